//! Malicious archives.

use std::io::Write as _;

use super::super::ImportOptions;
use super::rig::{Rig, compress, opening, part, qcow2};
use crate::archive::{BLOCK, Frame, Head, MAX_EXTENT_BYTES};
use crate::digest::unhex;
use crate::manifest::Manifest;

/// An archive of the small template's manifest as `change` leaves it, and these frames.
fn forged(change: impl FnOnce(&mut Manifest), frames: impl FnOnce(&Manifest) -> Vec<u8>) -> Vec<u8> {
    let mut manifest = Rig::small().manifest;
    change(&mut manifest);
    let frames = frames(&manifest);
    compress(&[opening(&manifest.to_json()), frames].concat())
}

fn begin(manifest: &Manifest) -> Vec<u8> {
    let vmlinux = &manifest.parts.vmlinux;
    Frame::Part { sha256: unhex(&vmlinux.sha256).unwrap(), bytes: vmlinux.bytes }.encode()
}

const KERNEL: &[u8] = b"\x7fELF the kernel";

#[test]
fn files_that_are_not_archives_are_refused() {
    let to = Rig::empty();
    assert!(to.refuses(b"").contains("truncated"));
    assert!(to.refuses(b"PK\x03\x04 a zip file, say").contains("damaged"));
    assert!(to.refuses(&compress(b"")).contains("truncated"));
    assert!(to.refuses(&compress(&[b'x'; 5000])).contains("not a template"));
    // A skippable frame is a frame without content.
    assert!(
        to.refuses(&[&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4][..], &Rig::small().archive()].concat())
            .contains("truncated")
    );
    let mut newer = Head::of(b"{}").encode();
    newer[11] = 9;
    assert!(to.refuses(&compress(&newer)).contains("version is 9, this program reads 1"));
}

#[test]
fn json_bombs_are_refused() {
    let to = Rig::empty();
    let mut head = Head::of(b"{}");
    head.manifest_bytes = u32::MAX;
    assert!(to.refuses(&compress(&head.encode())).contains("longer than"));
    assert!(to.refuses(&compress(&opening("[".repeat(1 << 20).as_bytes()))).contains("cannot be read"));
    assert!(to.refuses(&compress(&opening(&[b' '; 1 << 20]))).contains("cannot be read"));
    let deep = format!("{{\"format\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(to.refuses(&compress(&opening(deep.as_bytes()))).contains("cannot be read"));
    let many = |m: &mut Manifest| m.bakes = vec![m.bakes[0].clone(); 100];
    assert!(to.refuses(&forged(many, |_| Vec::new())).contains("100 warm images"));
}

#[test]
fn bombs_are_refused_before_they_go_off() {
    let to = Rig::empty();
    let huge = |m: &mut Manifest| m.parts.root.file.bytes = 1 << 60;
    assert!(to.refuses(&forged(huge, |_| Vec::new())).contains("too large"));
    // Far more content than was declared.
    let endless = |m: &Manifest| {
        let block = [b'x'; BLOCK as usize];
        let extents = (0..200_u64)
            .map(|at| [Frame::Extent { offset: at * 2 * BLOCK, length: 65536 }.encode(), block.to_vec()].concat());
        [begin(m), extents.flatten().collect()].concat()
    };
    assert!(to.refuses(&forged(|_| {}, endless)).contains("past the end"));
    // Endless zeros.
    let zeros = |m: &Manifest| {
        let extent = Frame::Extent { offset: 0, length: MAX_EXTENT_BYTES }.encode();
        [begin(m), [extent, vec![0; MAX_EXTENT_BYTES as usize]].concat().repeat(64)].concat()
    };
    let large = |m: &mut Manifest| m.parts.vmlinux.bytes = 256 << 20;
    assert!(to.refuses(&forged(large, zeros)).contains("instead of a hole"));
    // Extents without content.
    let hollow = |m: &Manifest| [begin(m), Frame::Extent { offset: 0, length: 0 }.encode().repeat(1000)].concat();
    assert!(to.refuses(&forged(|_| {}, hollow)).contains("0 bytes"));
    // A window that would have to be held in memory.
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(27).unwrap();
    encoder.write_all(&opening(&Rig::small().manifest.to_json())).unwrap();
    assert!(to.refuses(&encoder.finish().unwrap()).contains("damaged"));
}

#[test]
fn parts_appear_once_and_match_the_manifest() {
    let to = Rig::empty();
    let own = |m: &Manifest| part(&m.parts.vmlinux, KERNEL);
    let reason = |frames: &dyn Fn(&Manifest) -> Vec<u8>| to.refuses(&forged(|_| {}, frames));
    assert!(reason(&|m| [own(m), own(m)].concat()).contains("vmlinux is contained twice"));
    assert!(reason(&|m| part(&m.parts.packages, b"x")).contains("packages comes too early"));
    assert!(reason(&|m| [own(m), Frame::End.encode()].concat()).contains("initramfs is missing"));
    assert!(reason(&|_| Frame::PartEnd.encode()).contains("unexpected"));
    assert!(reason(&|m| [begin(m), Frame::End.encode()].concat()).contains("inside its vmlinux"));
    assert!(reason(&|m| [begin(m), begin(m)].concat()).contains("inside its vmlinux"));
    assert!(reason(&|m| part(&m.parts.vmlinux, b"\x7fELF THE KERNEL")).contains("does not match its hash"));
    assert!(reason(&|m| [begin(m), Frame::PartEnd.encode()].concat()).contains("does not match its hash"));
    assert!(reason(&|_| vec![99]).contains("unknown kind 99"));
    assert!(reason(&|m| own(m)).contains("truncated"));
    let stranger = |m: &Manifest| {
        let mut vmlinux = m.parts.vmlinux.clone();
        vmlinux.sha256 = "ab".repeat(32);
        part(&vmlinux, KERNEL)
    };
    assert!(reason(&stranger).contains("the part abababababab… is not named"));
    let longer = |m: &Manifest| {
        let mut vmlinux = m.parts.vmlinux.clone();
        vmlinux.bytes += 1;
        part(&vmlinux, KERNEL)
    };
    assert!(reason(&longer).contains("does not have the length"));
}

#[test]
fn nothing_may_follow_the_end() {
    let (from, to) = (Rig::small(), Rig::empty());
    let archive = from.archive();
    assert!(to.refuses(&[&archive[..], b"\n"].concat()).contains("data after its end"));
    assert!(to.refuses(&archive.repeat(2)).contains("data after its end"));
    let inside = [zstd::decode_all(&archive[..]).unwrap(), vec![0]].concat();
    assert!(to.refuses(&compress(&inside)).contains("data after its end"));
}

#[test]
fn truncation_is_found_wherever_it_is() {
    let (from, to) = (Rig::small(), Rig::empty());
    let archive = from.archive();
    let ends = (0..200).chain(archive.len() - 200..archive.len());
    for cut in ends.chain((0..archive.len()).step_by(23)) {
        assert!(to.refuses(&archive[..cut]).contains("truncated"), "{cut}");
    }
    let inside = zstd::decode_all(&archive[..]).unwrap();
    for cut in (inside.len() - 50..inside.len()).chain((0..inside.len()).step_by(997)) {
        assert!(to.refuses(&compress(&inside[..cut])).contains("truncated"), "{cut}");
    }
}

#[test]
fn disks_that_reach_outside_are_refused() {
    let to = Rig::empty();
    let root = |root: Vec<u8>| to.refuses(&Rig::with(|parts| parts.root = root).archive());
    assert!(root(qcow2("/etc/shadow", 0)).contains("root disk: it names a backing file"));
    assert!(root(b"raw".repeat(1000)).contains("root disk: it is not a qcow2 image"));
    let mut data_file = qcow2("", 0);
    data_file[79] = 4;
    assert!(root(data_file).contains("data in another file"));
    let mut larger = qcow2("", 0);
    larger[24] = 1;
    assert!(root(larger).contains("root disk has"));

    let overlay = |overlay: Vec<u8>| to.refuses(&Rig::with(|parts| parts.overlay = Some(overlay)).archive());
    assert!(overlay(qcow2("/etc/shadow", 0)).contains("is not based on the template's root disk"));
    assert!(overlay(qcow2(&"a".repeat(64), 0)).contains("is not based on"));
    assert!(overlay(qcow2("", 0)).contains("names no backing file"));
    assert!(overlay(b"raw".repeat(1000)).contains("disk of a warm image: it is not a qcow2"));
    let of = |change: fn(&mut Vec<u8>)| {
        let hash = Rig::small().manifest.parts.root.file.sha256;
        let mut image = qcow2(&hash, 0);
        change(&mut image);
        Rig::with(|parts| parts.overlay = Some(image)).archive()
    };
    assert!(
        to.refuses(&of(|image| image[112..117].copy_from_slice(b"raw\0\0"))).contains("format of its backing file")
    );
    assert!(to.refuses(&of(|image| image[24] = 1)).contains("does not have the size"));
    assert!(Rig::empty().import(&of(|_| {}), &ImportOptions::default()).is_ok());
}

#[test]
fn an_invalid_kernel_is_refused() {
    let to = Rig::empty();
    for vmlinux in [&b"MZ"[..], b"", b"#!/bin/sh\n"] {
        let from = Rig::with(|parts| parts.vmlinux = vmlinux.to_vec());
        assert!(to.refuses(&from.archive()).contains("not an ELF"), "{vmlinux:?}");
    }
}

#[test]
fn manifests_with_hashes_that_are_paths_are_refused() {
    let to = Rig::empty();
    let path = |m: &mut Manifest| m.parts.packages.sha256 = "../../../../etc/cron.d/x".to_owned();
    assert!(to.refuses(&forged(path, |_| Vec::new())).contains("hash of packages is malformed"));
    let name = |m: &mut Manifest| m.name = "../x".to_owned();
    assert!(to.refuses(&forged(name, |_| Vec::new())).contains("not a template name"));
    let format = |m: &mut Manifest| m.format += 1;
    assert!(to.refuses(&forged(format, |_| Vec::new())).contains("format"));
}

#[test]
fn fuzz_template_archive() {
    let (from, to) = (Rig::small(), Rig::empty());
    let manifest = &from.manifest;
    let frames = [begin(manifest), Frame::Extent { offset: 0, length: KERNEL.len() as u32 }.encode(), KERNEL.to_vec()];
    let plain = [opening(&manifest.to_json()), frames.concat(), Frame::PartEnd.encode(), Frame::End.encode()].concat();
    nido_fuzz::fuzz("template-archive", &[plain], |input| {
        // Compressed here: bytes that no decompressor takes reach nothing.
        let refused = to.import(&compress(input), &ImportOptions::default());
        assert!(refused.is_err() && to.leftovers().is_empty(), "{refused:?}");
    });
}
