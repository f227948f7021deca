//! Copies between here and a guest. The "guest" shares our file system, so both sides can be looked at.

use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

use crate::support::Home;

fn vm() -> Home {
    let home = Home::new();
    home.spawn("web");
    for side in ["here", "there"] {
        fs::create_dir(home.scratch(side)).unwrap();
    }
    home
}

#[test]
fn a_file_is_uploaded_and_downloaded() {
    let home = vm();
    let (here, there, back) = (home.scratch("here/a, b\n=c"), home.scratch("there/x"), home.scratch("here/back"));
    let bytes: Vec<u8> = (0..1_500_000u32).map(|n| (n * 31 % 253) as u8).collect();
    fs::write(&here, &bytes).unwrap();
    fs::set_permissions(&here, fs::Permissions::from_mode(0o640)).unwrap();
    let up = home.nido(["upload", "web"]).arg(&here).arg(&there).run().ok();
    assert_eq!(up.text(), "");
    assert!(up.stderr.contains("copied 1 entry, 1.4 MiB in "), "{}", up.stderr);
    assert!(fs::read(&there).unwrap() == bytes);
    assert_eq!(fs::metadata(&there).unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(fs::metadata(&there).unwrap().mtime(), fs::metadata(&here).unwrap().mtime());
    let down = home.nido(["download", "web", "--json"]).arg(&there).arg(&back).run().ok();
    assert_eq!((down.json()["entries"].as_u64(), down.json()["bytes"].as_u64()), (Some(1), Some(1_500_000)));
    assert!(fs::read(&back).unwrap() == bytes);
}

#[test]
fn a_directory_goes_with_all_that_is_in_it() {
    let home = vm();
    let tree = home.scratch("here/tree");
    fs::create_dir_all(tree.join("empty")).unwrap();
    fs::create_dir_all(tree.join("deep/er")).unwrap();
    fs::write(tree.join("deep/er/file"), "x").unwrap();
    fs::write(tree.join(std::ffi::OsString::from_vec(b"odd\n\xff".to_vec())), "y").unwrap();
    symlink("../nowhere", tree.join("link")).unwrap();
    home.nido(["cp"]).arg(&tree).arg(format!("web:{}/", home.scratch("there").display())).run().ok();
    let copy = home.scratch("there/tree");
    assert!(copy.join("empty").is_dir());
    assert_eq!(fs::read(copy.join("deep/er/file")).unwrap(), b"x");
    assert_eq!(fs::read(copy.join(std::ffi::OsString::from_vec(b"odd\n\xff".to_vec()))).unwrap(), b"y");
    assert_eq!(fs::read_link(copy.join("link")).unwrap().to_str(), Some("../nowhere"));
    home.nido(["cp"]).arg(format!("web:{}", copy.display())).arg(home.scratch("here/back")).run().ok();
    assert_eq!(fs::read(home.scratch("here/back/deep/er/file")).unwrap(), b"x");
}

#[test]
fn standard_streams_are_files_too() {
    let home = vm();
    let there = home.scratch("there/x");
    home.nido(["upload", "web", "-"]).arg(&there).input("from a pipe").run().ok();
    assert_eq!(fs::read(&there).unwrap(), b"from a pipe");
    let down = home.nido(["download", "web"]).arg(&there).arg("-").run().ok();
    assert_eq!(down.text(), "from a pipe");
    let down = home.nido(["cp", "--json"]).arg(format!("web:{}", there.display())).arg("-").run().ok();
    assert_eq!(down.text(), "from a pipe", "the file and nothing else");
}

#[test]
fn an_existing_file_is_replaced_only_on_request() {
    let home = vm();
    let (here, there) = (home.scratch("here/x"), home.scratch("there/x"));
    fs::write(&there, "new").unwrap();
    fs::write(&here, "old").unwrap();
    home.nido(["download", "web", "--json"]).arg(&there).arg(&here).run().fails(1, "path_exists");
    assert_eq!(fs::read(&here).unwrap(), b"old");
    home.nido(["download", "web", "--force"]).arg(&there).arg(&here).run().ok();
    assert_eq!(fs::read(&here).unwrap(), b"new");
}

#[test]
fn a_missing_file_is_reported_and_leaves_no_orphans() {
    let home = vm();
    let (missing, there) = (home.scratch("here/missing"), home.scratch("there/x"));
    home.nido(["upload", "web", "--json"]).arg(&missing).arg(&there).run().fails(1, "path_not_found");
    home.nido(["download", "web", "--json"]).arg(&there).arg(&missing).run().fails(1, "guest_not_found");
    home.nido(["upload", "web", "--json", "/etc/hostname"])
        .arg(home.scratch("there/no/x"))
        .run()
        .fails(1, "guest_not_found");
    home.nido(["upload", "web", "--parents", "/etc/hostname"]).arg(home.scratch("there/no/x")).run().ok();
    home.nido(["upload", "web", "--json", "-u", "nobody-at-all", "/etc/hostname"])
        .arg(&there)
        .run()
        .fails(1, "user_not_found");
    assert_eq!(fs::read_dir(home.scratch("here")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(home.scratch("there")).unwrap().count(), 1);
}

#[test]
fn several_go_into_a_directory_or_nowhere() {
    let home = vm();
    for name in ["a", "b"] {
        fs::write(home.scratch("here").join(name), name).unwrap();
    }
    let there = format!("web:{}", home.scratch("there").display());
    home.nido(["cp", "a", "b"]).arg(&there).in_directory(home.scratch("here")).run().ok();
    assert_eq!(fs::read(home.scratch("there/b")).unwrap(), b"b");
    let file = format!("web:{}", home.scratch("there/a").display());
    let ran = home.nido(["cp", "a", "b"]).arg(&file).in_directory(home.scratch("here")).run();
    assert_ne!(ran.code(), 0);
    assert_eq!(fs::read(home.scratch("there/a")).unwrap(), b"a", "not overwritten by the last one");
}

#[test]
fn an_interrupted_copy_leaves_nothing_half_written() {
    let home = vm();
    let there = home.scratch("there/x");
    let mut up = home.nido(["upload", "web", "-"]).arg(&there).start();
    std::io::Write::write_all(up.stdin.as_mut().unwrap(), &[b'x'; 1 << 20]).unwrap();
    crate::support::until("the begun file", || fs::read_dir(home.scratch("there")).unwrap().next()).unwrap();
    up.signal(rustix::process::Signal::INT);
    up.wait().exits(130);
    crate::support::until("an empty directory", || {
        fs::read_dir(home.scratch("there")).unwrap().next().is_none().then_some(())
    });
}

#[test]
fn a_copy_to_standard_output_is_silent_when_its_reader_has_left() {
    let home = Home::new();
    home.spawn("web");
    let big = home.scratch("big");
    fs::write(&big, vec![b'x'; 4_000_000]).unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_nido"));
    command.args(["cp", &format!("web:{}", big.display()), "-"]).env("NIDO_HOME", home.path());
    command
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    std::io::Read::read_exact(&mut stdout, &mut [0; 1]).unwrap();
    drop(stdout);
    let ended = child.wait_with_output().unwrap();
    assert_eq!((ended.status.code(), String::from_utf8_lossy(&ended.stderr).as_ref()), (Some(141), ""));
}
