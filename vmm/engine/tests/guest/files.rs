//! Copies, against the real agent.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use nido_engine::guest::{Download, Form, GuestError, Limits, Progress, Source, Upload};
use nido_guest_agent::wire::Fault;

use crate::rig::{Rig, soon, until, within};

fn nowhere(_: Progress) {}

fn upload(source: &Path, destination: &Path) -> Upload {
    Upload {
        source: Source::Path(source.into()),
        destination: destination.as_os_str().as_bytes().to_vec(),
        user: None,
        parents: false,
        preserve: false,
        set_mode: false,
    }
}

fn download(source: &Path, destination: &Path) -> Download {
    Download {
        source: source.as_os_str().as_bytes().to_vec(),
        destination: destination.into(),
        overwrite: false,
        preserve: false,
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
    // No other file remains next to it.
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
async fn existing_files_are_replaced_only_on_request() {
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
async fn directories_are_merged_on_request() {
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
    let request =
        Upload { source: Source::Reader { reader, mode: 0o600, bytes: None }, ..upload(Path::new("-"), &there) };
    assert_eq!(within(rig.guest.upload(request, nowhere, soon())).await.unwrap().bytes, 1_000_000);
    assert_eq!(there.metadata().unwrap().mode() & 0o7777, 0o600);
    let (mut out, writer) = std::io::pipe().unwrap();
    let read = std::thread::spawn(move || std::io::read_to_string(&mut out).unwrap());
    let source = there.as_os_str().as_bytes().to_vec();
    let got = rig.guest.download_to((source, Form::File), writer, Limits::default(), nowhere, soon());
    assert_eq!(within(got).await.unwrap().bytes, 1_000_000);
    assert_eq!(read.join().unwrap(), "\u{1}".repeat(1_000_000));
    let source = rig.dir.path().as_os_str().as_bytes().to_vec();
    let refused =
        within(rig.guest.download_to((source, Form::File), std::io::sink(), Limits::default(), nowhere, soon())).await;
    assert!(matches!(refused, Err(GuestError::IsDirectory)), "{refused:?}");
}

#[tokio::test(flavor = "current_thread")]
async fn missing_files_are_reported() {
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
    let request = Upload { source: Source::Reader { reader: small, mode: 0o644, bytes: None }, ..upload(&big, &there) };
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
    let error =
        within(rig.guest.download_to((b"/etc/passwd".to_vec(), Form::File), full, Limits::default(), nowhere, soon()))
            .await;
    assert!(matches!(error, Err(GuestError::DiskFull(_))), "{error:?}");
}

#[tokio::test(flavor = "current_thread")]
async fn dropping_a_download_leaves_nothing() {
    let rig = Rig::start().await;
    let (endless, into) = (rig.path("endless"), rig.path("into"));
    std::fs::create_dir(&into).unwrap();
    // Data, as holes are not sent.
    std::fs::write(&endless, vec![7; 256 << 20]).unwrap();
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

fn archive(bytes: Vec<u8>, destination: &Path) -> Upload {
    let source = Source::Archive(Box::new(std::io::Cursor::new(bytes)));
    Upload {
        source,
        destination: destination.as_os_str().as_bytes().to_vec(),
        user: None,
        parents: false,
        preserve: false,
        set_mode: false,
    }
}

/// GNU tar's archive of a directory.
fn tar(directory: &Path, arguments: &[&str]) -> Vec<u8> {
    let mut command = std::process::Command::new("tar");
    let made = command.arg("-C").arg(directory).arg("-c").args(arguments).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    made.stdout
}

/// As [`describe`], with times to the second: an archive has no finer ones.
fn describe_roughly(root: &Path) -> Vec<String> {
    let cut = |line: String| {
        let (rest, time) = line.rsplit_once(' ').unwrap();
        format!("{rest} {}", time.parse::<i64>().unwrap() / 1_000_000_000)
    };
    describe(root).into_iter().map(cut).collect()
}

#[tokio::test(flavor = "current_thread")]
async fn a_tree_survives_as_an_archive_both_ways() {
    let rig = Rig::start().await;
    let (tree, there, back) = (rig.path("tree"), rig.path("there"), rig.path("back"));
    make_tree(&tree);
    let sent = within(rig.guest.upload(archive(tar(&tree, &["."]), &there), nowhere, soon())).await.unwrap();
    assert_eq!(sent.path, there.as_os_str().as_bytes());
    assert_eq!(describe_roughly(&there), describe_roughly(&tree));
    let packed = rig.path("packed.tar");
    let file = std::fs::File::create(&packed).unwrap();
    let source = there.as_os_str().as_bytes().to_vec();
    let got = rig.guest.download_to((source, Form::Archive), file, Limits::default(), nowhere, soon());
    let got = within(got).await.unwrap();
    assert_eq!((got.entries, got.bytes), (sent.entries, sent.bytes));
    std::fs::create_dir(&back).unwrap();
    let mut unpack = std::process::Command::new("tar");
    let unpacked = unpack.arg("-xpf").arg(&packed).arg("-C").arg(&back).output().unwrap();
    assert!(unpacked.status.success(), "{}", String::from_utf8_lossy(&unpacked.stderr));
    assert_eq!(describe_roughly(&back), describe_roughly(&tree));
}

#[tokio::test(flavor = "current_thread")]
async fn directories_that_an_archive_does_not_name_are_made() {
    let rig = Rig::start().await;
    let (tree, there) = (rig.path("tree"), rig.path("there"));
    make_tree(&tree);
    let scattered = ["--no-recursion", "deep/er/still/big", "plain", "deep/dangling", "empty", "deep/er/still"];
    within(rig.guest.upload(archive(tar(&tree, &scattered), &there), nowhere, soon())).await.unwrap();
    assert_eq!(std::fs::read(there.join("deep/er/still/big")).unwrap().len(), 3_000_001);
    assert_eq!(std::fs::metadata(there.join("deep/er")).unwrap().mode() & 0o7777, 0o755);
    assert_eq!(std::fs::metadata(there.join("empty")).unwrap().mode() & 0o7777, 0o500);
    // Into what is there each file is put by itself.
    std::fs::write(there.join("own"), "own").unwrap();
    within(rig.guest.upload(archive(tar(&tree, &["nothing", "plain"]), &there), nowhere, soon())).await.unwrap();
    assert_eq!(std::fs::read(there.join("own")).unwrap(), b"own");
    assert_eq!(std::fs::read(there.join("nothing")).unwrap(), b"");
}

#[tokio::test(flavor = "current_thread")]
async fn an_archive_that_is_refused_leaves_nothing() {
    let rig = Rig::start().await;
    let (tree, there) = (rig.path("tree"), rig.path("there"));
    make_tree(&tree);
    let whole = tar(&tree, &["."]);
    let outside = tar(&tree, &["-P", "--transform", "s,plain,../escaped,", "plain"]);
    std::fs::hard_link(tree.join("plain"), tree.join("twin")).unwrap();
    let linked = tar(&tree, &["."]);
    for bad in [whole[..whole.len() / 2].to_vec(), outside, linked, b"no archive".to_vec(), Vec::new()] {
        let refused = within(rig.guest.upload(archive(bad, &there), nowhere, soon())).await;
        assert!(matches!(refused, Err(GuestError::BadArchive(_))), "{refused:?}");
    }
    let is_left = || {
        let mut names = std::fs::read_dir(rig.path("")).unwrap().map(|entry| entry.unwrap().file_name());
        names.any(|name| name == "there" || name == "escaped" || name.as_bytes().starts_with(b".nido-"))
    };
    until("nothing is left", async || !is_left()).await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_symlink_in_an_archive_leads_nowhere() {
    let rig = Rig::start().await;
    let (outside, tree, there) = (rig.path("outside"), rig.path("tree"), rig.path("there"));
    std::fs::create_dir(&outside).unwrap();
    std::fs::create_dir(&tree).unwrap();
    std::os::unix::fs::symlink(&outside, tree.join("x")).unwrap();
    let mut link = tar(&tree, &["x"]);
    std::fs::remove_file(tree.join("x")).unwrap();
    std::fs::create_dir(tree.join("x")).unwrap();
    std::fs::write(tree.join("x/file"), "escaped").unwrap();
    // The link first, then an entry that claims to be in it.
    link.truncate(1024);
    while link.ends_with(&[0; 512]) {
        link.truncate(link.len() - 512);
    }
    let both = [link, tar(&tree, &["x/file"])].concat();
    within(rig.guest.upload(archive(both, &there), nowhere, soon())).await.unwrap_err();
    assert!(std::fs::read_dir(&outside).unwrap().next().is_none());
}
