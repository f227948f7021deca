//! Files and trees in both directions, and what goes wrong with them.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nido_guest_agent::wire::{Entry, EntryKind, Failed, Fault, Get, Put, Summary, ToGuest, ToHost, kind};

use crate::support::{Answer, Host, Session};

/// Whole seconds and a fraction, so that both are seen to arrive.
const TIME_NS: i64 = 1_234_567_890_123_456_789;

/// One entry of a tree, with the bytes of a file.
type Item = (Vec<Vec<u8>>, EntryKind, u16, Vec<u8>);

fn file(path: &[&[u8]], mode: u16, bytes: &[u8]) -> Item {
    (path.iter().map(|part| part.to_vec()).collect(), EntryKind::File(bytes.len() as u64), mode, bytes.to_vec())
}

fn directory(path: &[&[u8]], mode: u16) -> Item {
    (path.iter().map(|part| part.to_vec()).collect(), EntryKind::Directory, mode, Vec::new())
}

fn link(path: &[&[u8]], target: &[u8]) -> Item {
    let path = path.iter().map(|part| part.to_vec()).collect();
    (path, EntryKind::Symlink(target.to_vec().into()), 0o777, Vec::new())
}

fn put(path: &Path) -> Put {
    Put { path: path.as_os_str().as_bytes().to_vec().into(), name: None, user: None, parents: false, set_mode: None }
}

async fn send_item(session: &mut Session, (path, kind, mode, bytes): &Item) {
    let path = path.iter().map(|part| part.clone().into()).collect();
    session
        .send(&ToGuest::Entry(Entry {
            path,
            kind: kind.clone(),
            mode: *mode,
            mtime_ns: TIME_NS,
            owner: None,
            stored: None,
        }))
        .await;
    for piece in bytes.chunks(100_000) {
        session.send_raw(kind::FILE_DATA, piece).await;
    }
    session.send(&ToGuest::EntryEnd).await;
}

async fn send_tree(session: &mut Session, put: Put, items: &[Item]) -> Result<Summary, Fault> {
    session.send(&ToGuest::Put(put)).await;
    for item in items {
        send_item(session, item).await;
    }
    session.send(&ToGuest::TreeEnd).await;
    match session.message().await {
        ToHost::PutDone(summary) => Ok(summary),
        ToHost::Failed(failed) => Err(failed.fault),
        other => panic!("{other:?}"),
    }
}

async fn fetch(session: &mut Session, path: &Path) -> Result<(Vec<Item>, Summary), Failed> {
    session.send(&ToGuest::Get(Get { path: path.as_os_str().as_bytes().to_vec().into(), features: None })).await;
    let mut items: Vec<Item> = Vec::new();
    loop {
        match session.next().await {
            Some(Answer::Message(ToHost::Entry(entry))) => {
                let path = entry.path.iter().map(|part| part.to_vec()).collect();
                items.push((path, entry.kind, entry.mode, Vec::new()));
            }
            Some(Answer::Raw(kind::FILE_DATA, bytes)) => items.last_mut().unwrap().3.extend(bytes),
            Some(Answer::Message(ToHost::EntryEnd)) => {}
            Some(Answer::Message(ToHost::TreeEnd(summary))) => return Ok((items, summary)),
            Some(Answer::Message(ToHost::Failed(failed))) => return Err(failed),
            other => panic!("{other:?}"),
        }
    }
}

/// Names in a directory.
fn names(directory: &Path) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().as_bytes().to_vec()).collect();
    names.sort();
    names
}

fn odd_tree() -> Vec<Item> {
    vec![
        directory(&[], 0o750),
        file(&[b"plain"], 0o644, b"text"),
        file(&[b"empty"], 0o600, b""),
        file(&[b"new\nline, and comma"], 0o755, b"odd"),
        file(&[b"not \xff utf-8"], 0o400, b"odder"),
        link(&[b"link"], b"plain"),
        link(&[b"dangling"], b"/no/such/\xfething"),
        directory(&[b"hollow"], 0o700),
        directory(&[b"deep"], 0o555),
        directory(&[b"deep", b"er"], 0o755),
        file(&[b"deep", b"er", b"large"], 0o640, &[b'x'; 1_000_000]),
    ]
}

#[tokio::test]
async fn a_tree_survives_both_ways() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let target = host.path("tree");
    let summary = send_tree(&mut session, put(&target), &odd_tree()).await.unwrap();
    assert_eq!((summary.entries, summary.bytes), (11, 1_000_012));
    assert_eq!(summary.path.unwrap().as_slice(), fs::canonicalize(&target).unwrap().as_os_str().as_bytes());
    for name in ["plain", "deep", "deep/er", "deep/er/large", "hollow", "link"] {
        let found = fs::symlink_metadata(target.join(name)).unwrap();
        assert_eq!(found.mtime() * 1_000_000_000 + found.mtime_nsec(), TIME_NS, "{name}");
    }
    assert_eq!(fs::metadata(target.join("deep")).unwrap().mode() & 0o7777, 0o555);
    let (mut items, summary) = fetch(&mut session, &target).await.unwrap();
    assert_eq!((summary.entries, summary.bytes, summary.skipped), (11, 1_000_012, 0));
    // Symlinks have no mode of their own, and the order within a directory is the disk's.
    let mut wanted = odd_tree();
    items.sort_by(|a, b| a.0.cmp(&b.0));
    wanted.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(items == wanted, "the tree has changed on its way");
    assert_eq!(names(host.directory.path()), [&b"channel.sock"[..], b"config", b"tree"]);
}

#[tokio::test]
async fn a_file_replaces_a_file_and_keeps_nothing_of_it() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let target = host.path("file");
    fs::write(&target, "an older and longer text").unwrap();
    fs::set_permissions(&target, fs::Permissions::from_mode(0o777)).unwrap();
    let inode = fs::metadata(&target).unwrap().ino();
    // Set-uid and the like are no part of the protocol.
    send_tree(&mut session, put(&target), &[file(&[], 0o7640, b"new")]).await.unwrap();
    let found = fs::metadata(&target).unwrap();
    assert_eq!((fs::read(&target).unwrap().as_slice(), found.mode() & 0o7777), (&b"new"[..], 0o640));
    assert_ne!(found.ino(), inode);
}

// A file that was replaced lost its mode and its other names.
#[tokio::test]
async fn a_file_that_is_replaced_keeps_its_mode_and_names_if_the_host_wants_that() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let (target, other) = (host.path("file"), host.path("other"));
    let keeping = |path: &Path| Put { set_mode: Some(false), ..put(path) };
    fs::write(&target, "an older and longer text").unwrap();
    fs::set_permissions(&target, fs::Permissions::from_mode(0o750)).unwrap();
    send_tree(&mut session, keeping(&target), &[file(&[], 0o644, b"new")]).await.unwrap();
    assert_eq!((fs::read(&target).unwrap(), fs::metadata(&target).unwrap().mode() & 0o7777), (b"new".into(), 0o750));
    fs::hard_link(&target, &other).unwrap();
    send_tree(&mut session, keeping(&target), &[file(&[], 0o644, b"newer")]).await.unwrap();
    assert_eq!((fs::read(&other).unwrap(), fs::metadata(&other).unwrap().mode() & 0o7777), (b"newer".into(), 0o750));
}

// A device, pipe or socket was replaced by a file; a dangling symlink, too.
#[tokio::test]
async fn special_files_are_not_replaced_and_a_dangling_symlink_is_followed() {
    let mut host = Host::start().await;
    let socket = host.path("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let small = file(&[], 0o644, b"x");
    let mut session = host.open().await;
    assert_eq!(send_tree(&mut session, put(&socket), std::slice::from_ref(&small)).await, Err(Fault::WrongType));
    let tree = [directory(&[], 0o755), file(&[b"socket"], 0o644, b"x")];
    let mut session = host.open().await;
    assert_eq!(send_tree(&mut session, put(host.directory.path()), &tree).await, Err(Fault::WrongType));
    assert!(std::os::unix::fs::FileTypeExt::is_socket(&fs::symlink_metadata(&socket).unwrap().file_type()));
    let link = host.path("link");
    symlink("missing", &link).unwrap();
    let mut session = host.open().await;
    send_tree(&mut session, put(&link), &[small]).await.unwrap();
    assert_eq!(fs::read(host.path("missing")).unwrap(), b"x");
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
}

#[tokio::test]
async fn the_destination_is_understood_as_cp_understands_it() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let name = Some(b"name".to_vec().into());
    let into = host.path("into");
    fs::create_dir(&into).unwrap();
    let named = |path: &Path| Put { name: name.clone(), ..put(path) };
    send_tree(&mut session, named(&into), &[file(&[], 0o644, b"1")]).await.unwrap();
    assert_eq!(fs::read(into.join("name")).unwrap(), b"1");
    send_tree(&mut session, named(&into.join("other")), &[file(&[], 0o644, b"2")]).await.unwrap();
    assert_eq!(fs::read(into.join("other")).unwrap(), b"2");
    let missing = host.path("a/b/");
    assert_eq!(
        send_tree(&mut host.open().await, named(&missing), &[file(&[], 0o644, b"3")]).await,
        Err(Fault::NotFound)
    );
    let parents = Put { parents: true, ..named(&missing) };
    send_tree(&mut session, parents, &[file(&[], 0o644, b"3")]).await.unwrap();
    assert_eq!(fs::read(missing.join("name")).unwrap(), b"3");
    // A symlink to a directory is that directory, one to a file is that file.
    symlink(&into, host.path("way")).unwrap();
    send_tree(&mut session, named(&host.path("way")), &[file(&[], 0o644, b"4")]).await.unwrap();
    assert_eq!(fs::read(into.join("name")).unwrap(), b"4");
    symlink(into.join("name"), host.path("alias")).unwrap();
    send_tree(&mut session, put(&host.path("alias")), &[file(&[], 0o644, b"5")]).await.unwrap();
    assert_eq!(fs::read(into.join("name")).unwrap(), b"5");
    assert!(host.path("alias").is_symlink());
}

#[tokio::test]
async fn wrong_types_users_and_trees_are_refused_and_change_nothing() {
    let mut host = Host::start().await;
    let (a_file, a_directory) = (host.path("file"), host.path("directory"));
    fs::write(&a_file, "old").unwrap();
    fs::create_dir(&a_directory).unwrap();
    fs::write(a_directory.join("kept"), "kept").unwrap();
    let before = names(host.directory.path());
    let stranger = Put { user: Some("no-such-user".into()), ..put(&a_file) };
    let small = file(&[], 0o644, b"new");
    let escape = |parts: &[&[u8]]| vec![directory(&[], 0o755), file(parts, 0o644, b"x")];
    for (put, items, fault) in [
        (put(&a_directory), vec![small.clone()], Fault::WrongType),
        (put(&a_file), vec![directory(&[], 0o755)], Fault::WrongType),
        (put(&a_file.join("below")), vec![small.clone()], Fault::WrongType),
        (put(&host.path("no/such")), vec![small.clone()], Fault::NotFound),
        (stranger, vec![small.clone()], Fault::NoUser),
        (put(Path::new("/")), vec![small.clone()], Fault::WrongType),
        (put(&a_file), vec![], Fault::Invalid),
        (put(&a_file), vec![file(&[b"name"], 0o644, b"")], Fault::Invalid),
        (put(&a_file), vec![small.clone(), small.clone()], Fault::Invalid),
        (put(&host.path("new")), escape(&[b".."]), Fault::Invalid),
        (put(&host.path("new")), escape(&[b"..", b"file"]), Fault::Invalid),
        (put(&host.path("new")), escape(&[b"a/b"]), Fault::Invalid),
        (put(&host.path("new")), escape(&[b""]), Fault::Invalid),
        (put(&host.path("new")), escape(&[b"no", b"parent"]), Fault::NotFound),
        (put(&host.path("new")), vec![directory(&[], 0o755), directory(&[], 0o755)], Fault::Invalid),
        (Put { name: Some(b"../x".to_vec().into()), ..put(&a_directory) }, vec![small.clone()], Fault::Invalid),
    ] {
        let mut session = host.open().await;
        assert_eq!(send_tree(&mut session, put.clone(), &items).await, Err(fault), "{put:?} {items:?}");
        assert_eq!(session.next().await, None);
    }
    assert_eq!(names(host.directory.path()), before);
    assert_eq!((fs::read(&a_file).unwrap(), names(&a_directory)), (b"old".to_vec(), vec![b"kept".to_vec()]));
}

#[tokio::test]
async fn links_inside_a_tree_lead_nowhere() {
    let mut host = Host::start().await;
    let outside = host.path("outside");
    fs::create_dir(&outside).unwrap();
    let items = [directory(&[], 0o755), link(&[b"way"], b"../outside"), file(&[b"way", b"planted"], 0o644, b"x")];
    assert!(send_tree(&mut host.open().await, put(&host.path("new")), &items).await.is_err());
    let merged = host.path("merged");
    fs::create_dir(&merged).unwrap();
    symlink("../outside", merged.join("way")).unwrap();
    let items = [directory(&[], 0o755), directory(&[b"way"], 0o755), file(&[b"way", b"planted"], 0o644, b"x")];
    assert_eq!(send_tree(&mut host.open().await, put(&merged), &items).await, Err(Fault::WrongType));
    assert!(names(&outside).is_empty());
    assert!(!host.path("new").exists());
}

#[tokio::test]
async fn a_tree_is_merged_into_a_directory_that_exists() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let target = host.path("target");
    fs::create_dir_all(target.join("sub")).unwrap();
    fs::write(target.join("kept"), "kept").unwrap();
    fs::write(target.join("sub/replaced"), "old").unwrap();
    fs::set_permissions(target.join("sub"), fs::Permissions::from_mode(0o711)).unwrap();
    let items = [
        directory(&[], 0o700),
        directory(&[b"sub"], 0o700),
        file(&[b"sub", b"replaced"], 0o644, b"new"),
        // Not depth first, which costs nothing but time.
        file(&[b"added"], 0o644, b"added"),
        file(&[b"sub", b"late"], 0o644, b"late"),
        link(&[b"kept-link"], b"kept"),
    ];
    send_tree(&mut session, put(&target), &items).await.unwrap();
    assert_eq!(names(&target), [&b"added"[..], b"kept", b"kept-link", b"sub"]);
    assert_eq!(names(&target.join("sub")), [&b"late"[..], b"replaced"]);
    assert_eq!(fs::read(target.join("sub/replaced")).unwrap(), b"new");
    assert_eq!(fs::metadata(target.join("sub")).unwrap().mode() & 0o7777, 0o711);
}

#[tokio::test]
async fn a_session_that_breaks_off_leaves_nothing_behind() {
    let mut host = Host::start().await;
    let target = host.path("file");
    fs::write(&target, "old").unwrap();
    let before = names(host.directory.path());
    let begun: [&[Item]; 2] = [&[], &[directory(&[], 0o755), file(&[b"one"], 0o644, b"1")]];
    for (destination, begun) in [target.clone(), host.path("new")].iter().zip(begun) {
        let mut session = host.open().await;
        session.send(&ToGuest::Put(put(destination))).await;
        for item in begun {
            send_item(&mut session, item).await;
        }
        let path = if begun.is_empty() { vec![] } else { vec![b"two".to_vec().into()] };
        let entry = Entry { path, kind: EntryKind::File(9), mode: 0o644, mtime_ns: 0, owner: None, stored: None };
        session.send(&ToGuest::Entry(entry)).await;
        session.send_raw(kind::FILE_DATA, b"half").await;
        until(|| names(host.directory.path()).len() > before.len()).await;
        drop(session);
        until(|| names(host.directory.path()) == before).await;
    }
    assert_eq!(fs::read(&target).unwrap(), b"old");
}

/// Waits for the agent to do something that shows on the disk.
async fn until(mut done: impl FnMut() -> bool) {
    let waiting = async {
        while !done() {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    };
    crate::support::soon("a change on the disk", waiting).await;
}

#[tokio::test]
async fn a_full_disk_is_reported_and_the_old_file_stays() {
    // A disk of its own, 1 MiB large, in name spaces of the agent's own.
    let mut host = Host::start_on_small_disk().await;
    let mut session = host.open().await;
    let disk = host.path("disk");
    let target = disk.join("file");
    send_tree(&mut session, put(&target), &[file(&[], 0o644, b"old")]).await.unwrap();
    let full = send_tree(&mut session, put(&target), &[file(&[], 0o644, &vec![1; 3_000_000])]).await;
    assert_eq!(full, Err(Fault::DiskFull));
    let mut session = host.open().await;
    let tree = [directory(&[], 0o755), file(&[b"big"], 0o644, &vec![1; 3_000_000])];
    assert_eq!(send_tree(&mut session, put(&disk.join("tree")), &tree).await, Err(Fault::DiskFull));
    let mut session = host.open().await;
    let (items, _) = fetch(&mut session, &disk).await.unwrap();
    let seen: Vec<_> = items.iter().map(|(path, ..)| path.concat()).collect();
    assert_eq!(seen, [b"".to_vec(), b"file".to_vec()]);
    assert_eq!(items[1].3, b"old");
}

#[tokio::test]
async fn special_files_are_skipped_without_waiting() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let tree = host.path("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), "x").unwrap();
    let fifo = tree.join("fifo");
    make_fifo(&fifo);
    let _socket = std::os::unix::net::UnixListener::bind(tree.join("socket")).unwrap();
    let (items, summary) = fetch(&mut session, &tree).await.unwrap();
    assert_eq!((items.len(), summary.entries, summary.skipped), (2, 2, 2));
    assert_eq!(fetch(&mut session, &fifo).await.unwrap_err().fault, Fault::WrongType);
    assert_eq!(fetch(&mut session, Path::new("/dev/zero")).await.unwrap_err().fault, Fault::WrongType);
    assert_eq!(fetch(&mut session, &host.path("none")).await.unwrap_err().fault, Fault::NotFound);
    assert_eq!(
        fetch(&mut session, &PathBuf::from(OsStr::from_bytes(b"a\0b"))).await.unwrap_err().fault,
        Fault::Invalid
    );
    // Files of unknown size and the session itself are still fine.
    let (items, _) = fetch(&mut session, Path::new("/proc/version")).await.unwrap();
    assert!(!items[0].3.is_empty());
    symlink(tree.join("file"), host.path("alias")).unwrap();
    let (items, _) = fetch(&mut session, &host.path("alias")).await.unwrap();
    assert_eq!((items[0].1.clone(), items[0].3.as_slice()), (EntryKind::File(1), &b"x"[..]));
}

fn make_fifo(path: &Path) {
    assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[tokio::test]
async fn a_host_that_does_not_read_blocks_no_other_session() {
    let mut host = Host::start().await;
    let large = host.path("large");
    fs::File::create(&large).unwrap().set_len(64 * 1024 * 1024).unwrap();
    let mut lazy = host.open().await;
    lazy.send(&ToGuest::Get(Get { path: large.as_os_str().as_bytes().to_vec().into(), features: None })).await;
    let mut session = host.open().await;
    assert_eq!(session.run("echo here").await.stdout, b"here\n");
    let (items, summary) = {
        let mut items = 0;
        loop {
            match lazy.next().await {
                Some(Answer::Raw(..)) => items += 1,
                Some(Answer::Message(ToHost::TreeEnd(summary))) => break (items, summary),
                Some(_) => {}
                None => panic!("closed"),
            }
        }
    };
    assert!(items > 1 && summary.bytes == 64 * 1024 * 1024);
}

#[tokio::test]
async fn thousands_of_small_files_arrive() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let mut items = vec![directory(&[], 0o755)];
    for outer in 0..20 {
        let outer = format!("d{outer}");
        items.push(directory(&[outer.as_bytes()], 0o755));
        for inner in 0..100 {
            let inner = format!("f{inner}");
            items.push(file(&[outer.as_bytes(), inner.as_bytes()], 0o644, inner.as_bytes()));
        }
    }
    let target = host.path("many");
    send_tree(&mut session, put(&target), &items).await.unwrap();
    let (mut fetched, _) = fetch(&mut session, &target).await.unwrap();
    fetched.sort_by(|a, b| a.0.cmp(&b.0));
    items.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(fetched == items);
}
