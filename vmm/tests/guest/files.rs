//! Copies, against the real agent.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use nido_guest_agent::wire::Fault;
use nido_vmm::guest::{Download, GuestError, Limits, Progress, Source, Upload};

use crate::rig::{Rig, soon, until, within};

fn nowhere(_: Progress) {}

fn upload(source: &Path, destination: &Path) -> Upload {
    Upload {
        source: Source::Path(source.into()),
        destination: destination.as_os_str().as_bytes().to_vec(),
        user: None,
        parents: false,
    }
}

fn download(source: &Path, destination: &Path) -> Download {
    Download {
        source: source.as_os_str().as_bytes().to_vec(),
        destination: destination.into(),
        overwrite: false,
        limits: Limits::default(),
    }
}

/// A tree with everything the protocol knows in it.
fn make_tree(root: &Path) {
    std::fs::create_dir_all(root.join("empty")).unwrap();
    std::fs::create_dir_all(root.join("deep/er/still")).unwrap();
    std::fs::write(root.join("plain"), b"plain").unwrap();
    std::fs::write(root.join("nothing"), b"").unwrap();
    std::fs::write(root.join("deep/er/still/big"), vec![0x5a; 3_000_001]).unwrap();
    std::fs::write(root.join("comma, new\nline = \u{1b}[31m"), b"odd").unwrap();
    std::fs::write(root.join(std::ffi::OsStr::from_bytes(b"not \xff\xfe utf-8")), b"bytes").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", root.join("absolute")).unwrap();
    std::os::unix::fs::symlink("../nowhere", root.join("deep/dangling")).unwrap();
    std::fs::set_permissions(root.join("plain"), std::fs::Permissions::from_mode(0o640)).unwrap();
    std::fs::set_permissions(root.join("empty"), std::fs::Permissions::from_mode(0o500)).unwrap();
    let past = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_000_000);
    std::fs::File::open(root.join("plain")).unwrap().set_modified(past).unwrap();
    std::fs::File::open(root.join("deep")).unwrap().set_modified(past).unwrap();
}

/// Everything that must survive a copy, as text. Times only where the test set them.
fn describe(root: &Path) -> Vec<String> {
    let mut lines: Vec<_> = walkdir::WalkDir::new(root)
        .into_iter()
        .map(|entry| {
            let entry = entry.unwrap();
            let meta = entry.metadata().unwrap();
            let what = if meta.is_symlink() {
                format!("-> {:?}", std::fs::read_link(entry.path()).unwrap())
            } else if meta.is_dir() {
                format!("dir {:o}", meta.mode() & 0o7777)
            } else {
                let bytes = std::fs::read(entry.path()).unwrap();
                format!(
                    "file {:o} {} {:?}",
                    meta.mode() & 0o7777,
                    bytes.len(),
                    bytes.iter().map(|b| u64::from(*b)).sum::<u64>()
                )
            };
            let time = if meta.is_symlink() { 0 } else { meta.mtime() * 1_000_000_000 + meta.mtime_nsec() };
            format!("{:?} {what} {time}", entry.path().strip_prefix(root).unwrap())
        })
        .collect();
    lines.sort();
    lines
}

#[tokio::test(flavor = "current_thread")]
async fn a_tree_survives_the_way_there_and_back() {
    let rig = Rig::start().await;
    let (here, there, back) = (rig.path("here"), rig.path("there"), rig.path("back"));
    make_tree(&here);
    let sent = within(rig.guest.upload(upload(&here, &there), nowhere, soon())).await.unwrap();
    assert_eq!(describe(&here), describe(&there));
    let got = within(rig.guest.download(download(&there, &back), nowhere, soon())).await.unwrap();
    assert_eq!(describe(&here), describe(&back));
    assert_eq!((sent.entries, sent.bytes, sent.skipped), (got.entries, got.bytes, got.skipped));
    assert_eq!(sent.entries, describe(&here).len() as u64);
    assert_eq!(got.path, back.as_os_str().as_bytes());
    // Nothing else is left beside it.
    let left: Vec<_> = std::fs::read_dir(rig.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.as_bytes().starts_with(b".nido")), "{left:?}");
}

#[tokio::test(flavor = "current_thread")]
async fn an_existing_directory_gets_the_copy_under_its_own_name() {
    let rig = Rig::start().await;
    let (there, back) = (rig.path("there"), rig.path("back"));
    for dir in [&there, &back] {
        std::fs::create_dir(dir).unwrap();
    }
    let file = rig.path("one,two");
    std::fs::write(&file, b"text").unwrap();
    let copied = within(rig.guest.upload(upload(&file, &there), nowhere, soon())).await.unwrap();
    assert_eq!(copied.path, there.join("one,two").as_os_str().as_bytes());
    assert_eq!(std::fs::read(there.join("one,two")).unwrap(), b"text");
    within(rig.guest.download(download(&there, &back), nowhere, soon())).await.unwrap();
    assert_eq!(std::fs::read(back.join("there/one,two")).unwrap(), b"text");
}

#[tokio::test(flavor = "current_thread")]
async fn what_exists_is_replaced_only_if_asked() {
    let rig = Rig::start().await;
    let (new, old) = (rig.path("new"), rig.path("old"));
    std::fs::write(&new, b"new").unwrap();
    std::fs::write(&old, b"old").unwrap();
    let refused = within(rig.guest.download(download(&new, &old), nowhere, soon())).await;
    assert!(matches!(refused, Err(GuestError::PathExists(_))), "{refused:?}");
    assert_eq!(std::fs::read(&old).unwrap(), b"old");
    let request = Download { overwrite: true, ..download(&new, &old) };
    within(rig.guest.download(request, nowhere, soon())).await.unwrap();
    assert_eq!(std::fs::read(&old).unwrap(), b"new");
}

#[tokio::test(flavor = "current_thread")]
async fn directories_are_merged_if_asked() {
    let rig = Rig::start().await;
    let (tree, into) = (rig.path("tree"), rig.path("into"));
    make_tree(&tree);
    std::fs::create_dir_all(into.join("tree/deep")).unwrap();
    std::fs::write(into.join("tree/deep/kept"), b"kept").unwrap();
    std::fs::write(into.join("tree/plain"), b"older").unwrap();
    let refused = within(rig.guest.download(download(&tree, &into), nowhere, soon())).await;
    assert!(matches!(refused, Err(GuestError::PathExists(_))), "{refused:?}");
    let request = Download { overwrite: true, ..download(&tree, &into) };
    within(rig.guest.download(request, nowhere, soon())).await.unwrap();
    assert_eq!(std::fs::read(into.join("tree/deep/kept")).unwrap(), b"kept");
    assert_eq!(std::fs::read(into.join("tree/plain")).unwrap(), b"plain");
    assert_eq!(std::fs::read(into.join("tree/deep/er/still/big")).unwrap().len(), 3_000_001);
}

#[tokio::test(flavor = "current_thread")]
async fn a_merge_never_follows_a_symlink_of_the_destination() {
    let rig = Rig::start().await;
    let (tree, into, outside) = (rig.path("tree"), rig.path("into"), rig.path("outside"));
    std::fs::create_dir_all(tree.join("sub")).unwrap();
    std::fs::write(tree.join("sub/file"), b"text").unwrap();
    std::fs::create_dir_all(into.join("tree")).unwrap();
    std::fs::create_dir(&outside).unwrap();
    std::os::unix::fs::symlink(&outside, into.join("tree/sub")).unwrap();
    let request = Download { overwrite: true, ..download(&tree, &into) };
    let refused = within(rig.guest.download(request, nowhere, soon())).await;
    assert!(matches!(refused, Err(GuestError::PathExists(_))), "{refused:?}");
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
}

#[tokio::test(flavor = "current_thread")]
async fn one_file_through_a_reader_and_a_writer() {
    let rig = Rig::start().await;
    let there = rig.path("there");
    let reader = Box::new(std::io::Cursor::new(vec![1u8; 1_000_000]));
    let request = Upload { source: Source::Reader { reader, mode: 0o600 }, ..upload(Path::new("-"), &there) };
    assert_eq!(within(rig.guest.upload(request, nowhere, soon())).await.unwrap().bytes, 1_000_000);
    assert_eq!(there.metadata().unwrap().mode() & 0o7777, 0o600);
    let (mut out, writer) = std::io::pipe().unwrap();
    let read = std::thread::spawn(move || std::io::read_to_string(&mut out).unwrap());
    let source = there.as_os_str().as_bytes().to_vec();
    let got = rig.guest.download_to(source, writer, Limits::default(), nowhere, soon());
    assert_eq!(within(got).await.unwrap().bytes, 1_000_000);
    assert_eq!(read.join().unwrap(), "\u{1}".repeat(1_000_000));
    let source = rig.dir.path().as_os_str().as_bytes().to_vec();
    let refused = within(rig.guest.download_to(source, std::io::sink(), Limits::default(), nowhere, soon())).await;
    assert_eq!(refused.unwrap_err().fault(), Some(Fault::WrongType));
}

#[tokio::test(flavor = "current_thread")]
async fn what_is_missing_is_said_to_be_missing() {
    let rig = Rig::start().await;
    let missing = rig.path("missing");
    let error = within(rig.guest.upload(upload(&missing, &rig.path("x")), nowhere, soon())).await.unwrap_err();
    assert!(matches!(&error, GuestError::PathNotFound(path) if *path == missing), "{error}");
    let error = within(rig.guest.download(download(&missing, &rig.path("x")), nowhere, soon())).await.unwrap_err();
    assert_eq!(error.fault(), Some(Fault::NotFound), "{error}");
    let into = rig.path("no/such/dir");
    let error =
        within(rig.guest.download(download(Path::new("/etc/hosts"), &into), nowhere, soon())).await.unwrap_err();
    assert!(matches!(error, GuestError::PathNotFound(_)), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn a_full_guest_disk_is_reported_as_such_and_keeps_the_old_file() {
    let rig = Rig::start_with_small_disk().await;
    let big = rig.path("big");
    std::fs::write(&big, vec![1; 8 << 20]).unwrap();
    let there = rig.path("full/file");
    let small = Box::new(std::io::Cursor::new(b"old".to_vec()));
    let request = Upload { source: Source::Reader { reader: small, mode: 0o644 }, ..upload(&big, &there) };
    within(rig.guest.upload(request, nowhere, soon())).await.unwrap();
    for _ in 0..5 {
        let error = within(rig.guest.upload(upload(&big, &there), nowhere, soon())).await.unwrap_err();
        assert_eq!(error.fault(), Some(Fault::DiskFull), "{error}");
    }
    let mut got = rig.path("got");
    within(rig.guest.download(download(&there, &got), nowhere, soon())).await.unwrap();
    assert_eq!(std::fs::read(&got).unwrap(), b"old");
    got.pop();
}

#[tokio::test(flavor = "current_thread")]
async fn a_full_host_disk_is_reported_as_such() {
    let rig = Rig::start().await;
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let error = within(rig.guest.download_to(b"/etc/passwd".to_vec(), full, Limits::default(), nowhere, soon())).await;
    assert!(matches!(error, Err(GuestError::DiskFull(_))), "{error:?}");
}

#[tokio::test(flavor = "current_thread")]
async fn dropping_a_download_leaves_nothing() {
    let rig = Rig::start().await;
    let (endless, into) = (rig.path("endless"), rig.path("into"));
    std::fs::create_dir(&into).unwrap();
    std::fs::File::create(&endless).unwrap().set_len(1 << 40).unwrap();
    let (moved, mut started) = tokio::sync::watch::channel(0);
    let progress = move |progress: Progress| {
        moved.send_replace(progress.bytes);
    };
    let copy = rig.guest.download(download(&endless, &into), progress, soon());
    tokio::select! {
        outcome = copy => panic!("ended by itself: {outcome:?}"),
        moving = started.wait_for(|bytes| *bytes > 0) => drop(moving.unwrap()),
    }
    until("the copy is removed", async || std::fs::read_dir(&into).unwrap().count() == 0).await;
}
