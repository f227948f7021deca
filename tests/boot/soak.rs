//! A mix of everything that makes, copies, takes back and removes guests, over and over; at the end there are no orphans.
//! `scripts/soak` runs it for longer: `NIDO_SOAK_SECONDS`.

use std::time::{Duration, Instant};

use crate::rig::TestHome;

/// How long it runs by default, in seconds.
const SECONDS: u64 = 30;

/// Numbers that differ from run to run.
fn random(below: usize) -> usize {
    let mut bytes = [0; 8];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom").unwrap(), &mut bytes).unwrap();
    usize::try_from(u64::from_le_bytes(bytes) % below as u64).unwrap()
}

#[test]
fn nothing_is_left_of_a_long_day() {
    let home = TestHome::new();
    let seconds = std::env::var("NIDO_SOAK_SECONDS").map_or(SECONDS, |text| text.parse().unwrap());
    let until = Instant::now() + Duration::from_secs(seconds);
    let (mut number, mut done) = (0, 0);
    home.nido(["pool", "set", "sandbox", "1", "--net", "none"]).ok();
    while Instant::now() < until {
        let vms = home.names();
        let some = || vms[random(vms.len())].clone();
        number += 1;
        let fresh = format!("vm-{number}");
        match random(8) {
            _ if vms.is_empty() => drop(home.nido(["spawn", &fresh, "--net", "none"]).ok()),
            0 if vms.len() < 4 => drop(home.nido(["spawn", &fresh]).ok()),
            1 if vms.len() < 4 => drop(home.nido(["fork", &some(), &fresh]).ok()),
            2 => {
                let vm = some();
                home.nido(["exec", &vm, "--", "sh", "-c", "echo then > /root/soak; sync"]).ok();
                home.nido(["snapshot", "create", &vm, &fresh]).ok();
                home.nido(["exec", &vm, "--", "sh", "-c", "echo later > /root/soak"]).ok();
                home.nido(["snapshot", "restore", &vm, &fresh]).ok();
                assert_eq!(home.nido(["exec", &vm, "--", "cat", "/root/soak"]).text(), "then");
            }
            3 => drop(home.nido(["restart", &some()]).ok()),
            4 => drop(home.nido(["run", "-q", "--net", "none", "--", "true"]).ok()),
            5 => {
                let supervisors = home.processes().into_iter().filter(|p| p.arguments.iter().any(|a| a == "supervise"));
                let supervisors: Vec<_> = supervisors.collect();
                supervisors[random(supervisors.len())].kill();
            }
            6 => drop(home.nido(["delete", "--force", &some(), "--yes"]).ok()),
            _ => {
                let vm = some();
                assert_eq!(home.nido(["exec", &vm, "--", "hostname"]).text(), vm);
            }
        }
        done += 1;
    }
    println!("{done} things done in {seconds} s");
    home.nido(["pool", "set", "sandbox", "0", "--net", "none"]).ok();
    for vm in home.names() {
        home.nido(["delete", "--force", &vm, "--yes"]).ok();
    }
    home.assert_empty();
}
