//! Files of the host: what may be reached below a root, and that nothing else is.

use nido_api::FrontEnd;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, CWD, RenameFlags};

use super::writing::fresh_name;
use super::*;

const BIG: u64 = 1 << 20;

/// `root/` with `a` and `sub/b`, `outside/secret` next to it.
fn place() -> (tempfile::TempDir, PathBuf, Roots) {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    std::fs::create_dir_all(root.join("sub")).unwrap();
    std::fs::create_dir(dir.path().join("outside")).unwrap();
    for (name, text) in [("root/a", "inside"), ("root/sub/b", "inside"), ("outside/secret", "secret")] {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let roots = Roots::open(std::slice::from_ref(&root)).unwrap();
    (dir, root, roots)
}

fn text(readable: Result<Readable>) -> Result<String> {
    let mut text = String::new();
    readable?.file.read_to_string(&mut text).unwrap();
    Ok(text)
}

fn code<T: std::fmt::Debug>(outcome: Result<T>) -> Code {
    let error = outcome.unwrap_err();
    assert!(error.hint_for(FrontEnd::Cli).is_some(), "{error}");
    error.code()
}

fn names(dir: &Path) -> Vec<OsString> {
    let mut names: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names
}

#[test]
fn files_below_a_root_are_read() {
    let (dir, root, roots) = place();
    let read = roots.read(&root.join("sub/./b"), BIG).unwrap();
    assert_eq!((read.bytes, read.name.to_str(), read.mode & 0o400), (6, Some("b"), 0o400));
    assert_eq!(text(roots.read(Path::new("sub/b"), BIG)).unwrap(), "inside");
    assert_eq!(code(roots.read(&root.join("a"), 5)), Code::LimitExceeded);
    assert_eq!(code(roots.read(&root.join("none"), BIG)), Code::PathNotFound);
    for directory in [&root, &root.join("sub"), Path::new(".")] {
        let error = roots.read(directory, BIG).unwrap_err();
        assert!(error.code() == Code::PathInvalid && error.hint_for(FrontEnd::Cli).unwrap().contains("tar"), "{error}");
    }
    for (directory, name) in [(root.as_path(), "a"), (Path::new("sub"), "b"), (Path::new("."), "a")] {
        let open = roots.directory(directory).unwrap();
        rustix::fs::statat(&open.fd, name, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
    assert_eq!(code(roots.directory(&root.join("a"))), Code::PathInvalid);
    assert_eq!(code(roots.directory(&root.join("none"))), Code::PathNotFound);
    // A root that was named through a symlink is known by both names.
    let link = dir.path().join("link");
    symlink(&root, &link).unwrap();
    let roots = Roots::open(std::slice::from_ref(&link)).unwrap();
    for name in [link.join("a"), root.join("a")] {
        assert_eq!(text(roots.read(&name, BIG)).unwrap(), "inside");
    }
}

// The path of what was written was answered with the '..' of its root, and could not be read again.
#[test]
fn a_root_that_was_named_with_detours_has_a_path_without() {
    let (_dir, root, _) = place();
    let roots = Roots::open(&[root.join("sub/..")]).unwrap();
    assert_eq!(roots.paths(), [root.as_path()]);
    let path = roots.write(Path::new("sub/new"), false).unwrap().commit(BIG).unwrap();
    assert_eq!(path, root.join("sub/new"));
    assert_eq!(text(roots.read(&path, BIG)).unwrap(), "");
}

#[test]
fn failures_of_the_host_are_no_failures_of_nido() {
    for (errno, expected) in [
        (Errno::ROFS, Code::ReadOnly),
        (Errno::ACCESS, Code::PermissionDenied),
        (Errno::ISDIR, Code::PathInvalid),
        (Errno::LOOP, Code::Denied),
    ] {
        assert_eq!(refused(Path::new("/x"), errno).code(), expected);
    }
    let (_dir, root, roots) = place();
    for path in ["a\0b", &"n".repeat(256), &"n/".repeat(3000)] {
        assert_eq!(code(roots.read(&root.join(path), BIG)), Code::PathInvalid);
        assert_eq!(code(roots.write(&root.join(path), true)), Code::PathInvalid);
    }
}

#[test]
fn nothing_else_is() {
    let (dir, root, roots) = place();
    std::fs::create_dir(dir.path().join("root-2")).unwrap();
    std::fs::write(dir.path().join("root-2/a"), "secret").unwrap();
    let outside = dir.path().join("outside");
    symlink(outside.join("secret"), root.join("link")).unwrap();
    symlink("../outside", root.join("way")).unwrap();
    symlink("a", root.join("harmless")).unwrap();
    symlink("/proc/self/root", root.join("magic")).unwrap();
    symlink("/proc/self/fd", root.join("fds")).unwrap();
    for path in [
        outside.join("secret"),
        dir.path().join("root-2/a"),
        root.join("../outside/secret"),
        root.join("sub/../a"),
        "../outside/secret".into(),
        "/etc/passwd".into(),
        "/".into(),
        root.join("way/secret"),
        root.join("magic/etc/passwd"),
        root.join("fds/0"),
    ] {
        assert_eq!(code(roots.read(&path, BIG)), Code::Denied, "{}", path.display());
        assert_eq!(code(roots.write(&path.with_file_name("new"), true)), Code::Denied, "{}", path.display());
    }
    let directories = ["../outside", "way", "magic", "fds"].map(|name| root.join(name));
    for path in directories.iter().chain([&dir.path().join("outside"), &dir.path().to_owned()]) {
        assert_eq!(code(roots.directory(path)), Code::Denied, "{}", path.display());
    }
    for link in ["link", "harmless", "magic"] {
        assert!(matches!(code(roots.read(&root.join(link), BIG)), Code::Denied | Code::PathInvalid), "{link}");
    }
    assert_eq!(names(&outside), ["secret"]);
    assert_eq!(code(Roots::default().read(Path::new("a"), BIG)), Code::Denied);
    assert_eq!(code(Roots::open(&[root.join("a")])), Code::PathInvalid);
    assert_eq!(code(Roots::open(&[root.join("none")])), Code::PathNotFound);
}

// Opening a pipe without a writer waits for ever.
#[test]
fn pipes_and_sockets_are_refused_at_once() {
    let (_dir, root, roots) = place();
    rustix::fs::mkfifoat(CWD, root.join("pipe"), Mode::RUSR | Mode::WUSR).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
    for name in ["pipe", "socket"] {
        assert_eq!(code(roots.read(&root.join(name), BIG)), Code::PathInvalid);
        assert_eq!(code(roots.write(&root.join(name), true)), Code::PathInvalid);
    }
    let devices = Roots::open(&["/dev".into()]).unwrap();
    assert_eq!(code(devices.read(Path::new("/dev/zero"), BIG)), Code::PathInvalid);
}

#[test]
fn a_file_appears_whole_or_not_at_all() {
    let (_dir, root, roots) = place();
    let new = roots.write(&root.join("sub/new"), false).unwrap();
    new.file().unwrap().write_all(b"text").unwrap();
    assert!(!root.join("sub/new").exists());
    assert_eq!(new.commit(BIG).unwrap(), root.join("sub/new"));
    assert_eq!(std::fs::read(root.join("sub/new")).unwrap(), b"text");
    assert_eq!(code(roots.write(&root.join("sub/new"), false)), Code::PathExists);
    let given_up = roots.write(&root.join("sub/other"), false).unwrap();
    given_up.file().unwrap().write_all(b"half").unwrap();
    drop(given_up);
    let long = roots.write(&root.join("sub/long"), false).unwrap();
    long.file().unwrap().write_all(b"too long").unwrap();
    assert_eq!(code(long.commit(7)), Code::LimitExceeded);
    let again = roots.write(&root.join("sub/new"), true).unwrap();
    again.file().unwrap().write_all(b"newer").unwrap();
    again.commit(BIG).unwrap();
    assert_eq!(std::fs::read(root.join("sub/new")).unwrap(), b"newer");
    // Another process was faster.
    let late = roots.write(&root.join("sub/late"), false).unwrap();
    std::fs::write(root.join("sub/late"), "theirs").unwrap();
    assert_eq!(code(late.commit(BIG)), Code::PathExists);
    assert_eq!(std::fs::read(root.join("sub/late")).unwrap(), b"theirs");
    assert_eq!(names(&root.join("sub")), ["b", "late", "new"]);
    assert_eq!(code(roots.write(&root.join("none/new"), false)), Code::PathNotFound);
    assert_eq!(code(roots.write(&root.join("a/new"), false)), Code::PathInvalid);
    assert_eq!(code(roots.write(&root.join("sub"), true)), Code::PathInvalid);
}

#[test]
fn a_file_system_without_nameless_files_will_do() {
    let (_dir, root, roots) = place();
    for overwrite in [false, true] {
        let mut new = roots.write(&root.join("sub/new"), overwrite).unwrap();
        let name = fresh_name().unwrap();
        new.file = File::create(root.join("sub").join(&name)).unwrap();
        new.fresh = Some(name);
        new.commit(BIG).unwrap();
        assert_eq!(names(&root.join("sub")), ["b", "new"]);
    }
    let mut given_up = roots.write(&root.join("sub/x"), false).unwrap();
    given_up.fresh = Some("new".into());
    drop(given_up);
    assert_eq!(names(&root.join("sub")), ["b"]);
}

#[test]
fn a_changing_symlink_is_never_followed() {
    let (dir, root, roots) = place();
    std::fs::write(dir.path().join("outside/b"), "secret").unwrap();
    symlink("../outside", root.join("way")).unwrap();
    symlink("../outside/secret", root.join("file")).unwrap();
    let done = AtomicBool::new(false);
    let mut seen = std::collections::BTreeSet::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let open = rustix::fs::open(&root, DIRECTORY, Mode::empty()).unwrap();
            while !done.load(Ordering::Relaxed) {
                for (one, other) in [("sub", "way"), ("a", "file")] {
                    rustix::fs::renameat_with(&open, one, &open, other, RenameFlags::EXCHANGE).unwrap();
                }
            }
        });
        // Judged only when the other thread has ended: a failed assertion would wait for it for ever.
        for n in 0..4000 {
            for path in ["sub/b", "a"] {
                if let Ok(text) = roots.read(Path::new(path), BIG).map(|read| std::io::read_to_string(read.file)) {
                    seen.insert(text.unwrap_or_else(|e| e.to_string()));
                }
            }
            if let Ok(new) = roots.write(Path::new("sub/new"), n % 2 == 0) {
                let _ = new.commit(BIG);
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(seen, std::collections::BTreeSet::from(["inside".to_owned()]));
    assert_eq!(names(&dir.path().join("outside")), ["b", "secret"]);
}
