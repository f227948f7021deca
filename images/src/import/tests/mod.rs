//! Valid and invalid archives. Every test of an invalid one checks that it was refused, and nothing of it
//! is left.

mod hostile;
mod mutations;
mod rig;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rig::{AGENT, Rig, import_into};

use super::{ImportNote, ImportOptions, import_with};
use crate::error::ImageError;
use crate::export::ExportOptions;
use crate::store::Store;
use crate::transfer::TransferWatch;

fn named(name: &str) -> ImportOptions {
    ImportOptions { name: Some(name.to_owned()), ..ImportOptions::default() }
}

const FORCE: ImportOptions = ImportOptions { name: None, force: true, without_memory: false };

#[test]
fn a_template_arrives_as_it_was_and_its_holes_are_holes() {
    let (from, to) = (Rig::large(), Rig::empty());
    for level in [1, 3, 19] {
        let archive = from.export(ExportOptions { memory: true, level });
        let arrived = to.import(&archive, &FORCE).unwrap();
        assert_eq!((&arrived.manifest, arrived.already_present), (&from.manifest, false));
        assert_eq!(arrived.notes, []);
        assert_eq!(Store::new(to.home()).verify("sandbox").unwrap(), from.manifest);
    }
    for (name, part, _) in from.manifest.all_parts() {
        let path = |home: &Path| Store::new(home).blob_path(part);
        assert!(fs::read(path(from.home())).unwrap() == fs::read(path(to.home())).unwrap(), "{name}");
        let found = fs::metadata(path(to.home())).unwrap();
        assert_eq!(found.permissions().mode() & 0o777, if name == "memory" { 0o600 } else { 0o444 }, "{name}");
    }
    let memory = &from.manifest.bakes[0].memory;
    let allocated = |part| fs::metadata(Store::new(to.home()).blob_path(part)).unwrap().blocks() * 512;
    assert_eq!(memory.bytes, 64 << 20);
    // Two blocks of data, and what the file system needs to know about them.
    assert!(allocated(memory) <= 192 * 1024, "{}", allocated(memory));
    assert!(allocated(&from.manifest.parts.root.file) <= 192 * 1024);
    assert_eq!(to.leftovers(), [""; 0]);
    assert!(to.archive() == from.archive(), "the same template makes the same archive, wherever its holes lie");
}

#[test]
fn without_memory_no_bake_travels() {
    let (from, to) = (Rig::small(), Rig::empty());
    let archive = from.export(ExportOptions { memory: false, level: 3 });
    let arrived = to.import(&archive, &ImportOptions::default()).unwrap();
    assert_eq!(arrived.manifest.bakes, []);
    assert_eq!((arrived.manifest.parts, to.blobs()), (from.manifest.parts.clone(), 5));

    let to = Rig::empty();
    let without = ImportOptions { without_memory: true, ..ImportOptions::default() };
    assert_eq!(to.import(&from.archive(), &without).unwrap().manifest.bakes, []);
    assert_eq!(to.blobs(), 5);
}

#[test]
fn the_same_template_twice_is_no_error() {
    let (from, to) = (Rig::small(), Rig::empty());
    let archive = from.archive();
    assert!(!to.import(&archive, &ImportOptions::default()).unwrap().already_present);
    assert!(to.import(&archive, &ImportOptions::default()).unwrap().already_present);
    // One without the bakes holds nothing that is not here.
    let bare = from.export(ExportOptions { memory: false, level: 3 });
    let again = to.import(&bare, &ImportOptions::default()).unwrap();
    assert_eq!((again.already_present, again.manifest), (true, from.manifest.clone()));
    // Under another name it shares all parts.
    assert_eq!(to.import(&archive, &named("other")).unwrap().manifest.name, "other");
    assert_eq!(to.blobs(), 8);
}

#[test]
fn an_import_restores_a_missing_part() {
    let (from, to) = (Rig::small(), Rig::empty());
    to.import(&from.archive(), &ImportOptions::default()).unwrap();
    fs::remove_file(Store::new(to.home()).blob_path(&from.manifest.parts.packages)).unwrap();
    assert!(!to.import(&from.archive(), &ImportOptions::default()).unwrap().already_present);
    Store::new(to.home()).verify("sandbox").unwrap();
}

#[test]
fn another_template_of_that_name_is_replaced_only_on_request() {
    let (first, second, to) = (Rig::small(), Rig::large(), Rig::empty());
    to.import(&first.archive(), &ImportOptions::default()).unwrap();
    let refused = to.import(&second.archive(), &ImportOptions::default()).unwrap_err();
    assert!(matches!(&refused, ImageError::TemplateExists { name } if name == "sandbox"), "{refused}");
    assert!(refused.hint().unwrap().text(nido_api::FrontEnd::Cli).unwrap().contains("--name"));
    assert_eq!(Store::new(to.home()).verify("sandbox").unwrap(), first.manifest);
    // Bakes that only the archive has are a difference too.
    let bare = Rig::empty();
    bare.import(&first.export(ExportOptions { memory: false, level: 3 }), &ImportOptions::default()).unwrap();
    let refused = bare.import(&first.archive(), &ImportOptions::default()).unwrap_err();
    assert!(matches!(refused, ImageError::TemplateExists { .. }));

    to.import(&second.archive(), &FORCE).unwrap();
    assert_eq!(Store::new(to.home()).verify("sandbox").unwrap(), second.manifest);
    let invalid = to.import(&second.archive(), &named("../up")).unwrap_err();
    assert!(matches!(invalid, ImageError::NameInvalid { .. }));
}

#[test]
fn another_agent_is_replaced_and_bakes_with_it_are_dropped() {
    let from = Rig::small();
    let to = Rig::empty();
    let other = super::OwnAgent { binary: b"a newer agent", sha256: &crate::digest::sha256(b"newer"), ..AGENT };
    let arrived = import_into(other, to.home(), &from.archive(), &ImportOptions::default()).unwrap();
    assert_eq!(arrived.notes, [ImportNote::AgentReplaced, ImportNote::BakesDropped(1)]);
    assert!(arrived.notes[1].to_string().starts_with("1 warm image was left out"));
    let manifest = Store::new(to.home()).verify("sandbox").unwrap();
    assert_eq!((&manifest, to.blobs()), (&arrived.manifest, 5));
    assert_eq!(manifest.agent.sha256, other.sha256);
    let base = fs::read(Store::new(from.home()).blob_path(&from.manifest.parts.initramfs_base)).unwrap();
    let initramfs = fs::read(Store::new(to.home()).blob_path(&manifest.parts.initramfs)).unwrap();
    assert_eq!(initramfs, crate::initramfs::with_agent(&base, other.binary).unwrap());
    let again = import_into(other, to.home(), &from.archive(), &ImportOptions::default()).unwrap();
    assert!(again.already_present);
}

#[test]
fn an_initramfs_with_an_unexpected_agent_is_rebuilt() {
    let from = Rig::with(|parts| parts.initramfs = b"something else".to_vec());
    let to = Rig::empty();
    let arrived = to.import(&from.archive(), &ImportOptions::default()).unwrap();
    assert_eq!(arrived.notes, [ImportNote::AgentReplaced, ImportNote::BakesDropped(1)]);
    assert_ne!(arrived.manifest.parts.initramfs, from.manifest.parts.initramfs);
}

#[test]
fn another_protocol_is_refused_by_both_numbers() {
    let (from, to) = (Rig::small(), Rig::empty());
    let newer = super::OwnAgent { protocol: 7, ..AGENT };
    let refused = import_into(newer, to.home(), &from.archive(), &ImportOptions::default()).unwrap_err();
    assert!(matches!(refused, ImageError::AgentProtocol { theirs: 1, ours: 7 }));
    assert_eq!(to.leftovers(), [""; 0]);
}

#[test]
fn an_interrupted_import_leaves_nothing() {
    let (from, to) = (Rig::large(), Rig::empty());
    let archive = from.archive();
    // Stopped in the middle of each part, and right before it is published.
    for stop in 1..=9 {
        let cancel = AtomicBool::new(false);
        let mut progress = |at: crate::transfer::TransferProgress| cancel.store(at.index >= stop, Ordering::Relaxed);
        let mut watch = TransferWatch { progress: &mut progress, cancel: &cancel };
        let result = import_with(AGENT, to.home(), &mut &archive[..], &ImportOptions::default(), &mut watch);
        match stop {
            // By then it is done.
            9 => assert!(!result.unwrap().already_present),
            _ => assert!(matches!(result, Err(ImageError::Interrupted)), "{stop}"),
        }
        if stop < 9 {
            assert_eq!(to.leftovers(), [""; 0], "{stop}");
        }
    }
}

#[test]
fn progress_runs_from_nothing_to_everything() {
    let (from, to) = (Rig::large(), Rig::empty());
    let cancel = AtomicBool::new(false);
    let total: u64 = from.manifest.all_parts().map(|(_, part, _)| part.bytes).sum();
    let mut reports = Vec::new();
    let mut progress = |at: crate::transfer::TransferProgress| reports.push(at);
    let mut watch = TransferWatch { progress: &mut progress, cancel: &cancel };
    import_with(AGENT, to.home(), &mut &from.archive()[..], &ImportOptions::default(), &mut watch).unwrap();
    assert!(reports.windows(2).all(|pair| pair[0].bytes <= pair[1].bytes && pair[0].index <= pair[1].index));
    assert!(reports.iter().all(|at| at.total_bytes == total && at.total == 9));
    let (first, last) = (&reports[0], &reports[reports.len() - 1]);
    assert_eq!((first.stage, first.index, first.bytes), ("vmlinux", 1, 0));
    assert_eq!((last.stage, last.index, last.bytes), ("publish", 9, total));
}

#[test]
fn a_part_that_rotted_is_not_exported() {
    let from = Rig::small();
    let path = Store::new(from.home()).blob_path(&from.manifest.parts.packages);
    let length = fs::metadata(&path).unwrap().len();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&path, vec![b'?'; usize::try_from(length).unwrap()]).unwrap();
    let refused = from.try_export(ExportOptions::default(), &mut Vec::new()).unwrap_err();
    assert!(matches!(refused, ImageError::Damaged { part: "packages", .. }), "{refused}");
}

#[test]
fn a_full_disk_ends_an_export() {
    let mut full = fs::File::options().write(true).open("/dev/full").unwrap();
    let refused = Rig::small().try_export(ExportOptions::default(), &mut full).unwrap_err();
    assert!(matches!(refused, ImageError::DiskFull { .. }), "{refused}");
}

#[test]
fn a_missing_template_is_not_exported() {
    let refused = Rig::empty().try_export(ExportOptions::default(), &mut Vec::new()).unwrap_err();
    assert!(matches!(refused, ImageError::TemplateNotFound { .. }));
}
