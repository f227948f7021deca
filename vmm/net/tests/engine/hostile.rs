//! A guest that sends what it likes.

use std::time::Duration;

use nido_net::Mode;
use nido_net::subnet::GATEWAY_V4;

use crate::guest::{Guest, frame_of};
use crate::udp::{datagram, ipv4};

/// Numbers that look random, and are the same in each run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// The engine still answers.
fn is_alive(guest: &mut Guest) {
    let reply = |frame: &[u8]| frame.len() == 43 && frame[34] == 0 && frame[42] == 99;
    // One that came while many others waited may be lost.
    let answered = (0..10).any(|_| {
        guest.send_frame(&ipv4(1, GATEWAY_V4.into(), &[8, 0, 0, 0, 1, 2, 0, 1, 99]));
        guest.frame_within(Duration::from_secs(2), reply).is_some()
    });
    assert!(answered, "the engine does not answer");
}

fn seed_frames() -> Vec<Vec<u8>> {
    let mut syn = vec![0x4e, 0x20, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x60, 2, 0xff, 0xff, 0, 0, 0, 0, 2, 4, 5, 0xb4];
    syn[3] = 9;
    let mut v6 = vec![0x60, 0, 0, 0, 0, 16, 58, 255];
    v6.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x15]);
    v6.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    v6.extend([133, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    vec![
        ipv4(6, GATEWAY_V4.into(), &syn),
        datagram(1, "10.0.2.2:9".parse().unwrap(), b"data"),
        datagram(68, "255.255.255.255:67".parse().unwrap(), &[1; 300]),
        ipv4(1, GATEWAY_V4.into(), &[8, 0, 0, 0, 0, 0, 0, 0]),
        frame_of(0x0806, &[0, 1, 8, 0, 6, 4, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2]),
        frame_of(0x86dd, &v6),
    ]
}

#[test]
fn damaged_frames_do_not_stop_the_engine() {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let mut guest = Guest::new(Mode::Restricted, &["host:9", "host:9/udp"]);
    let seeds = seed_frames();
    for _ in 0..20_000 {
        let mut frame = seeds[numbers.next() as usize % seeds.len()].clone();
        for _ in 0..1 + numbers.next() % 4 {
            let at = numbers.next() as usize % frame.len();
            frame[at] = numbers.next() as u8;
        }
        if numbers.next().is_multiple_of(8) {
            frame.truncate(numbers.next() as usize % frame.len());
        }
        guest.send_frame(&frame);
        guest.poll();
    }
    is_alive(&mut guest);
}

#[test]
fn a_scan_is_counted_and_the_reports_are_few() {
    let mut guest = Guest::new(Mode::Restricted, &[]);
    let segment = [0x4e, 0x20, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0];
    for number in 0..10_000u32 {
        let [_, b, c, d] = number.to_be_bytes();
        guest.send_frame(&ipv4(6, [9, b, c, d].into(), &segment));
        guest.poll();
    }
    is_alive(&mut guest);
    let report = guest.report();
    assert_eq!((report.denied, report.denials.len(), report.other_denials), (10_000, 100, 9_900));
    let mut reported = 0;
    while guest.denials.try_recv().is_ok() {
        reported += 1;
    }
    assert!(reported <= 100, "{reported}");
    assert_eq!(report.open, 0);
}

#[test]
fn commands_are_executed_while_the_guest_reads_nothing() {
    let guest = Guest::new(Mode::Nat, &[]);
    let ends = (1..1000).map(|port| (([10, 0, 2, 15], port).into(), ([1, 1, 1, 1], 80).into())).collect();
    // More frames than the link holds.
    guest.reset_connections(ends);
    assert_eq!(guest.report().open, 0);
}
