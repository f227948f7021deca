//! Copies, against agents that lie.

use std::os::unix::fs::PermissionsExt;

use nido_engine::guest::{CopyTotals, Download, Form, GuestError, Limits, Source, Upload};
use nido_guest_agent::wire::{EntryKind, Failed, Fault, Summary, ToHost};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::fake_agent::{FakeAgent, FakeSession, nowhere};
use crate::rig::{soon, within};

/// Downloads to `into/copy` what `send` makes up; checks that nothing but a whole copy is ever there.
async fn download_of(
    limits: Limits,
    send: impl AsyncFnOnce(&mut FakeSession),
) -> (TempDir, Result<CopyTotals, GuestError>) {
    let liar = FakeAgent::new();
    let into = TempDir::new().unwrap();
    let lie = async {
        let mut end = liar.accept_welcome().await;
        send(&mut end).await;
        let _ = end.0.shutdown().await;
        end
    };
    let request = Download {
        source: b"/srv/copy".to_vec(),
        destination: into.path().into(),
        overwrite: false,
        preserve: false,
        limits,
    };
    let copy = liar.guest.download(request, nowhere, soon());
    let (outcome, _end) = within(async { tokio::join!(copy, lie) }).await;
    let left: Vec<_> = std::fs::read_dir(into.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    match &outcome {
        Ok(_) => assert_eq!(left, ["copy"]),
        Err(_) => assert!(left.is_empty(), "{left:?}"),
    }
    drop(liar.dir);
    (into, outcome)
}

async fn breach(send: impl AsyncFnOnce(&mut FakeSession)) {
    let (_into, outcome) = download_of(Limits::default(), send).await;
    assert!(matches!(outcome, Err(GuestError::Protocol(_))), "{outcome:?}");
}

#[tokio::test(flavor = "current_thread")]
async fn names_that_are_paths_are_refused() {
    let long = "x".repeat(256);
    for bad in ["..", ".", "", "a/b", "/etc/passwd", "a\0b", &long] {
        breach(async |end: &mut FakeSession| {
            end.whole(&[], EntryKind::Directory).await;
            end.whole(&[bad], EntryKind::Directory).await;
        })
        .await;
        breach(async |end: &mut FakeSession| {
            end.whole(&[], EntryKind::Directory).await;
            end.whole(&["a"], EntryKind::Directory).await;
            end.whole(&["a", bad, "file"], EntryKind::File(0)).await;
        })
        .await;
    }
}

#[tokio::test(flavor = "current_thread")]
async fn nothing_is_written_through_a_symlink_of_the_guests() {
    let outside = TempDir::new().unwrap();
    let target = || EntryKind::Symlink(outside.path().as_os_str().as_encoded_bytes().to_vec().into());
    breach(async |end: &mut FakeSession| {
        end.whole(&[], EntryKind::Directory).await;
        end.whole(&["way"], target()).await;
        end.whole(&["way", "file"], EntryKind::File(0)).await;
    })
    .await;
    breach(async |end: &mut FakeSession| {
        end.whole(&[], EntryKind::Directory).await;
        end.whole(&["dir"], EntryKind::Directory).await;
        end.whole(&["dir", "way"], target()).await;
        end.whole(&["dir", "way", "deeper"], EntryKind::Directory).await;
    })
    .await;
    // The same name first as a symlink, then as a file.
    breach(async |end: &mut FakeSession| {
        end.whole(&[], EntryKind::Directory).await;
        end.whole(&["way"], target()).await;
        end.whole(&["way"], EntryKind::File(0)).await;
    })
    .await;
    breach(async |end: &mut FakeSession| end.whole(&[], target()).await).await;
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
}

#[tokio::test(flavor = "current_thread")]
async fn trees_out_of_order_are_refused() {
    breach(async |end: &mut FakeSession| end.send_message(&ToHost::TreeEnd(Summary::default())).await).await;
    breach(async |end: &mut FakeSession| end.whole(&["no root"], EntryKind::Directory).await).await;
    breach(async |end: &mut FakeSession| {
        end.whole(&[], EntryKind::Directory).await;
        end.whole(&[], EntryKind::Directory).await;
    })
    .await;
    breach(async |end: &mut FakeSession| {
        end.whole(&[], EntryKind::Directory).await;
        end.whole(&["absent", "file"], EntryKind::File(0)).await;
    })
    .await;
    breach(async |end: &mut FakeSession| {
        end.whole(&[], EntryKind::File(0)).await;
        end.whole(&["below"], EntryKind::File(0)).await;
    })
    .await;
    breach(async |end: &mut FakeSession| {
        end.entry(&[], EntryKind::Directory, 0o755).await;
        end.data(b"bytes of a directory").await;
    })
    .await;
    breach(async |end: &mut FakeSession| {
        end.whole(&[], EntryKind::Directory).await;
        end.whole(&["twice"], EntryKind::Directory).await;
        end.whole(&["twice"], EntryKind::Directory).await;
    })
    .await;
}

#[tokio::test(flavor = "current_thread")]
async fn an_endless_tree_is_stopped_at_the_limit() {
    let limits = Limits { entries: 100, bytes: 1 << 20 };
    let (_into, outcome) = download_of(limits, async |end: &mut FakeSession| {
        end.whole(&[], EntryKind::Directory).await;
        for i in 0..200 {
            end.whole(&[&format!("d{i}")], EntryKind::Directory).await;
        }
    })
    .await;
    assert!(matches!(outcome, Err(GuestError::LimitExceeded { what: "files", limit: 100 })), "{outcome:?}");
    let (_into, outcome) = download_of(limits, async |end: &mut FakeSession| {
        end.entry(&[], EntryKind::File(1), 0o644).await;
        for _ in 0..200 {
            end.data(&[0; 10_000]).await;
        }
    })
    .await;
    assert!(matches!(outcome, Err(GuestError::LimitExceeded { what: "bytes", .. })), "{outcome:?}");
    let deep: [String; 20] = std::array::from_fn(|_| "x".repeat(250));
    let (_into, outcome) = download_of(limits, async |end: &mut FakeSession| {
        end.whole(&[], EntryKind::Directory).await;
        end.whole(&deep.each_ref().map(String::as_str), EntryKind::File(0)).await;
    })
    .await;
    assert!(matches!(outcome, Err(GuestError::LimitExceeded { .. })), "{outcome:?}");
}

#[tokio::test(flavor = "current_thread")]
async fn a_copy_that_breaks_off_is_no_copy() {
    for stop in 0..3 {
        let (_into, outcome) = download_of(Limits::default(), async |end: &mut FakeSession| {
            end.whole(&[], EntryKind::Directory).await;
            end.whole(&["dir"], EntryKind::Directory).await;
            if stop > 0 {
                end.entry(&["dir", "file"], EntryKind::File(9), 0o644).await;
            }
            if stop > 1 {
                end.data(b"some").await;
            }
        })
        .await;
        assert!(matches!(outcome, Err(GuestError::Gone)), "{outcome:?}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn modes_lose_only_dangerous_bits() {
    let (into, outcome) = download_of(Limits::default(), async |end: &mut FakeSession| {
        end.entry(&[], EntryKind::Directory, 0o7755).await;
        end.send_message(&ToHost::EntryEnd).await;
        end.entry(&["suid"], EntryKind::File(0), 0o6755).await;
        end.send_message(&ToHost::EntryEnd).await;
        end.entry(&["locked"], EntryKind::Directory, 0o000).await;
        end.send_message(&ToHost::EntryEnd).await;
        end.whole(&["locked", "inside"], EntryKind::File(0)).await;
        end.send_message(&ToHost::TreeEnd(Summary { skipped: 3, ..Summary::default() })).await;
    })
    .await;
    let copied = outcome.unwrap();
    assert_eq!((copied.entries, copied.skipped), (4, 3));
    let mode = |name: &str| into.path().join("copy").join(name).metadata().unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(""), mode("suid"), mode("locked")), (0o755, 0o755, 0o000));
    std::fs::set_permissions(into.path().join("copy/locked"), std::fs::Permissions::from_mode(0o700)).unwrap();
    assert!(into.path().join("copy/locked/inside").exists());
}

#[tokio::test(flavor = "current_thread")]
async fn a_failure_in_the_middle_of_an_upload_is_the_reason_given() {
    let liar = FakeAgent::new();
    let lie = async {
        let mut end = liar.accept_welcome().await;
        // The host is in the middle of it; nothing more is read.
        end.0.read_exact(&mut vec![0; 100_000]).await.unwrap();
        end.send_message(&ToHost::Failed(Failed { fault: Fault::DiskFull, message: "no space left".into() })).await;
    };
    let source = Source::Reader { reader: Box::new(std::io::repeat(7)), mode: 0o644, bytes: None };
    let request =
        Upload { source, destination: b"/x".to_vec(), user: None, parents: false, preserve: false, set_mode: false };
    let (outcome, ()) = within(async { tokio::join!(liar.guest.upload(request, nowhere, soon()), lie) }).await;
    assert_eq!(outcome.unwrap_err().fault(), Some(Fault::DiskFull));
}

/// Takes a file as an archive, from a guest that sends what it likes.
async fn archive_of(
    limits: Limits,
    send: impl AsyncFnOnce(&mut FakeSession),
) -> (Vec<u8>, Result<CopyTotals, GuestError>) {
    let liar = FakeAgent::new();
    let here = TempDir::new().unwrap();
    let packed = here.path().join("packed");
    let file = std::fs::File::create(&packed).unwrap();
    let work = liar.guest.download_to((b"/x".to_vec(), Form::Archive), file, limits, nowhere, soon());
    let lie = async {
        let mut end = liar.accept_welcome().await;
        send(&mut end).await;
        end
    };
    let (copied, _end) = within(async { tokio::join!(work, lie) }).await;
    (std::fs::read(packed).unwrap(), copied)
}

#[tokio::test(flavor = "current_thread")]
async fn an_archive_has_no_byte_that_the_guest_did_not_send() {
    // One that fits a frame is as long as it is, whatever was claimed.
    let (packed, copied) = archive_of(Limits::default(), async |end| {
        end.entry(&[], EntryKind::File(1 << 60), 0o644).await;
        end.data(b"three").await;
        end.send_message(&ToHost::EntryEnd).await;
        end.send_message(&ToHost::TreeEnd(Summary::default())).await;
    })
    .await;
    copied.unwrap();
    assert_eq!((packed.len(), &packed[512..517]), (4 * 512, &b"three"[..]));
    // A longer one that ends early breaks the archive off.
    let (packed, copied) = archive_of(Limits::default(), async |end| {
        end.entry(&[], EntryKind::File(1 << 30), 0o644).await;
        end.data(&[7; 200_000]).await;
        end.data(&[7; 200_000]).await;
        end.send_message(&ToHost::EntryEnd).await;
    })
    .await;
    assert!(copied.unwrap_err().to_string().contains("shorter"));
    assert!(packed.len() <= 512 + 400_000 && !packed.ends_with(&[0; 512]));
    // One that has grown is as long as it was.
    let (packed, copied) = archive_of(Limits::default(), async |end| {
        end.entry(&[], EntryKind::File(300_000), 0o644).await;
        end.data(&[7; 200_000]).await;
        end.data(&[7; 200_000]).await;
        end.send_message(&ToHost::EntryEnd).await;
        end.send_message(&ToHost::TreeEnd(Summary::default())).await;
    })
    .await;
    copied.unwrap();
    assert_eq!(packed[512..].iter().filter(|&&byte| byte == 7).count(), 300_000);
    assert_eq!(packed.len() % 512, 0);
}

// It was cut where its first frame ended, and the archive seemed whole.
#[tokio::test(flavor = "current_thread")]
async fn a_file_of_unknown_length_is_copied_completely() {
    let (packed, copied) = archive_of(Limits::default(), async |end| {
        end.entry(&[], EntryKind::File(0), 0o444).await;
        end.data(&[7; 200_000]).await;
        end.data(&[7; 200_000]).await;
        end.send_message(&ToHost::EntryEnd).await;
        end.send_message(&ToHost::TreeEnd(Summary::default())).await;
    })
    .await;
    assert!(copied.unwrap_err().to_string().contains("copy it alone"));
    assert!(!packed.ends_with(&[0; 512]));
}

#[tokio::test(flavor = "current_thread")]
async fn an_archive_never_writes_through_a_symlink() {
    let (packed, copied) = archive_of(Limits::default(), async |end| {
        end.entry(&[], EntryKind::Directory, 0o755).await;
        end.send_message(&ToHost::EntryEnd).await;
        end.entry(&["way"], EntryKind::Symlink(b"/etc".to_vec().into()), 0o777).await;
        end.send_message(&ToHost::EntryEnd).await;
        end.entry(&["way", "passwd"], EntryKind::File(1), 0o644).await;
        end.data(b"x").await;
        end.send_message(&ToHost::EntryEnd).await;
        end.send_message(&ToHost::TreeEnd(Summary::default())).await;
    })
    .await;
    assert!(matches!(copied.unwrap_err(), GuestError::Protocol(_)), "refused");
    assert!(!packed.windows(6).any(|bytes| bytes == b"passwd"));
}
