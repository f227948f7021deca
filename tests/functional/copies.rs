//! What a copy does to what is there already, and to what cannot be read. The "guest" shares our file system.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::support::Home;

fn vm() -> Home {
    let home = Home::new();
    home.spawn("web");
    for side in ["here", "there"] {
        fs::create_dir(home.scratch(side)).unwrap();
    }
    home
}

fn pipe(path: &Path) {
    mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
}

fn is_pipe(path: &Path) -> bool {
    fs::symlink_metadata(path).unwrap().file_type().is_fifo()
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn guest(path: &Path) -> String {
    format!("web:{}", path.display())
}

// A copy onto a device, pipe or socket of the guest put a regular file in its place: /dev/null was gone.
#[test]
fn an_upload_never_replaces_a_pipe_of_the_guest() {
    let home = vm();
    let (file, tree) = (home.scratch("here/file"), home.scratch("here/tree"));
    fs::write(&file, "x").unwrap();
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("leaf"), "x").unwrap();
    let there = home.scratch("there/pipe");
    pipe(&there);
    home.nido(["cp", "--json"]).arg(&file).arg(guest(&there)).run().fails(2, "path_invalid");
    home.nido(["cp", "--json", "-"]).arg(guest(&there)).input("x").run().fails(2, "path_invalid");
    assert!(is_pipe(&there));
    // Below a tree, and by way of a symlink.
    fs::create_dir(home.scratch("there/tree")).unwrap();
    let leaf = home.scratch("there/tree/leaf");
    pipe(&leaf);
    home.nido(["cp", "--json"]).arg(&tree).arg(guest(&home.scratch("there"))).run().fails(2, "path_invalid");
    assert!(is_pipe(&leaf));
    symlink(&there, home.scratch("there/link")).unwrap();
    let link = guest(&home.scratch("there/link"));
    let problem = home.nido(["cp", "--json"]).arg(&file).arg(link).run().fails(2, "path_invalid");
    assert!(problem["detail"].as_str().unwrap().contains("not a regular file"), "{problem}");
    assert!(is_pipe(&there));
}

// With --force a download replaced a device or a pipe of the host by a file.
#[test]
fn a_download_writes_to_a_pipe_or_device_of_the_host_and_never_replaces_it() {
    let home = vm();
    let (there, here) = (home.scratch("there/file"), home.scratch("here/pipe"));
    fs::write(&there, "bytes").unwrap();
    pipe(&here);
    let reader = std::thread::spawn({
        let here = here.clone();
        move || fs::read(here).unwrap()
    });
    home.nido(["cp", "-f"]).arg(guest(&there)).arg(&here).run().ok();
    assert_eq!(reader.join().unwrap(), b"bytes");
    assert!(is_pipe(&here));
    let copied = home.nido(["cp"]).arg(guest(&there)).arg("/dev/null").run().ok();
    assert!(copied.stderr.contains(" to /dev/null"), "{}", copied.stderr);
    home.nido(["download", "web", "-f"]).arg(&there).arg("/dev/null").run().ok();
    assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    assert_eq!(home.nido(["cp"]).arg(guest(&there)).arg("/dev/stdout").run().ok().text(), "bytes");
    // In a directory the copy would get the pipe's name.
    let named = home.scratch("there/pipe");
    fs::write(&named, "bytes").unwrap();
    home.nido(["cp", "-f", "--json"]).arg(guest(&named)).arg(home.scratch("here")).run().fails(2, "path_invalid");
    assert!(is_pipe(&here));
}

// An upload gave the file that it replaced another mode and owner, and broke its hard links.
#[test]
fn a_file_that_is_replaced_keeps_its_mode_and_its_hard_links_on_both_sides() {
    let home = vm();
    let (from, to, other) = (home.scratch("here/file"), home.scratch("there/file"), home.scratch("there/other"));
    fs::write(&from, "new").unwrap();
    fs::write(&to, "old and longer").unwrap();
    set_mode(&to, 0o600);
    home.nido(["cp"]).arg(&from).arg(guest(&to)).run().ok();
    assert_eq!((fs::read(&to).unwrap(), mode(&to)), (b"new".to_vec(), 0o600));
    home.nido(["cp", "-"]).arg(guest(&to)).input("from stdin").run().ok();
    assert_eq!((fs::read(&to).unwrap(), mode(&to)), (b"from stdin".to_vec(), 0o600));
    fs::hard_link(&to, &other).unwrap();
    home.nido(["cp"]).arg(&from).arg(guest(&to)).run().ok();
    assert_eq!((fs::read(&other).unwrap(), mode(&other)), (b"new".to_vec(), 0o600));
    home.nido(["cp", "--preserve"]).arg(&from).arg(guest(&to)).run().ok();
    assert_eq!(mode(&to), mode(&from));
    // The other way round.
    set_mode(&from, 0o640);
    fs::hard_link(&from, home.scratch("here/other")).unwrap();
    fs::write(&to, "back").unwrap();
    home.nido(["cp", "-f"]).arg(guest(&to)).arg(&from).run().ok();
    assert_eq!(fs::read(home.scratch("here/other")).unwrap(), b"back");
    assert_eq!(mode(&from), 0o640);
    let left: Vec<_> = ["here", "there"].iter().flat_map(|side| fs::read_dir(home.scratch(side)).unwrap()).collect();
    assert_eq!(left.len(), 4, "{left:?}");
}

// An upload replaced a dangling symlink by the file; a download with --force replaced any symlink.
#[test]
fn a_symlink_that_is_named_is_followed_on_both_sides() {
    let home = vm();
    let (from, target, link) = (home.scratch("here/file"), home.scratch("there/target"), home.scratch("there/link"));
    fs::write(&from, "new").unwrap();
    symlink("target", &link).unwrap();
    home.nido(["cp"]).arg(&from).arg(guest(&link)).run().ok();
    assert_eq!(fs::read(&target).unwrap(), b"new");
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    for (name, before) in [("target", true), ("missing", false)] {
        let (target, link) = (home.scratch("here").join(name), home.scratch("here/link"));
        if before {
            fs::write(&target, "old").unwrap();
        }
        symlink(name, &link).unwrap();
        home.nido(["cp", "-f"]).arg(guest(&home.scratch("there/target"))).arg(&link).run().ok();
        assert_eq!(fs::read(&target).unwrap(), b"new");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        fs::remove_file(&link).unwrap();
    }
}

// The final mode was set before the last move: an ordinary user could not copy a directory without write permission.
#[test]
fn a_directory_that_may_not_be_written_is_copied_with_its_mode() {
    let home = vm();
    let tree = home.scratch("there/tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(tree.join("sub/file"), "x").unwrap();
    for directory in [tree.join("sub"), tree.clone()] {
        set_mode(&directory, 0o555);
    }
    let here = home.scratch("here/copy");
    home.nido(["cp"]).arg(guest(&tree)).arg(&here).plainly().run().ok();
    assert_eq!((mode(&here), mode(&here.join("sub"))), (0o555, 0o555));
    // Merged into what is there, which keeps its own mode.
    let into = home.scratch("here/into");
    fs::create_dir_all(into.join("tree")).unwrap();
    home.nido(["cp", "-f"]).arg(guest(&tree)).arg(&into).plainly().run().ok();
    assert_eq!((mode(&into.join("tree")) & 0o200, mode(&into.join("tree/sub"))), (0o200, 0o555));
    assert_eq!(fs::read(into.join("tree/sub/file")).unwrap(), b"x");
    for directory in [tree.join("sub"), tree, here.join("sub"), here, into.join("tree/sub")] {
        set_mode(&directory, 0o755);
    }
}

// A guest chose modes on the host that the user's umask forbids.
#[test]
fn modes_of_a_download_are_masked_unless_preserved() {
    let home = vm();
    let tree = home.scratch("there/tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), "x").unwrap();
    set_mode(&tree, 0o777);
    set_mode(&tree.join("file"), 0o666);
    for (name, keep, expected) in [("masked", "--quiet", (0o700, 0o600)), ("kept", "--preserve", (0o777, 0o666))] {
        let here = home.scratch("here").join(name);
        home.nido(["cp", keep]).arg(guest(&tree)).arg(&here).through("umask 077").run().ok();
        assert_eq!((mode(&here), mode(&here.join("file"))), expected, "{name}");
    }
}

// A hole of a gigabyte became a gigabyte of zeros, and a file with two names two files.
#[test]
fn holes_and_hard_links_are_kept_both_ways() {
    let home = vm();
    let tree = home.scratch("here/tree");
    fs::create_dir(&tree).unwrap();
    let sparse = fs::File::create(tree.join("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"middle", 32 << 20).unwrap();
    let holes = sparse.metadata().unwrap().blocks() < 1 << 14;
    assert!(holes, "this file system has no holes: set TMPDIR to another");
    fs::write(tree.join("one"), "same").unwrap();
    fs::hard_link(tree.join("one"), tree.join("two")).unwrap();
    home.nido(["cp"]).arg(&tree).arg(guest(&home.scratch("there"))).run().ok();
    home.nido(["cp"]).arg(guest(&home.scratch("there/tree"))).arg(home.scratch("here/back")).run().ok();
    for copy in [home.scratch("there/tree"), home.scratch("here/back")] {
        let copied = fs::metadata(copy.join("sparse")).unwrap();
        assert_eq!(copied.len(), 64 << 20);
        assert!(copied.blocks() < 1 << 14, "{} blocks", copied.blocks());
        assert!(fs::read(copy.join("sparse")).unwrap() == fs::read(tree.join("sparse")).unwrap());
        let (one, two) = (fs::metadata(copy.join("one")).unwrap(), fs::metadata(copy.join("two")).unwrap());
        assert_eq!((one.ino(), one.nlink()), (two.ino(), 2));
    }
    // Once more, into what is there.
    home.nido(["cp"]).arg(&tree).arg(guest(&home.scratch("there"))).run().ok();
    assert_eq!(fs::read_dir(home.scratch("there/tree")).unwrap().count(), 3);
    // To a stream holes are zeros.
    let ran = home.nido(["cp"]).arg(guest(&home.scratch("there/tree/sparse"))).arg("-").run().ok();
    assert_eq!(ran.text().len(), 64 << 20);
}

// A tree ended at the first entry without permission, as a defect of nido (exit code 70).
#[test]
fn a_tree_copy_skips_and_names_unreadable_entries() {
    let home = Home::new();
    // Permission bits count for the side that is read: for this guest, which sends, and for the command, which sends to another.
    home.nido(["spawn", "web", "--accel", "tcg"]).plainly().run().ok();
    home.spawn("to");
    let to = |path: &Path| format!("to:{}", path.display());
    for side in ["here", "there"] {
        let tree = home.scratch(side).join("tree");
        fs::create_dir_all(tree.join("closed")).unwrap();
        for file in ["a", "b", "c", "closed/d"] {
            fs::write(tree.join(file), file).unwrap();
        }
        set_mode(&tree.join("b"), 0);
        set_mode(&tree.join("closed"), 0);
    }
    let (up, down) = (home.scratch("there/up"), home.scratch("here/down"));
    let ran = home.nido(["cp", "--json"]).arg(home.scratch("here/tree")).arg(to(&up)).plainly().run().exits(1);
    let down_ran =
        home.nido(["cp", "--json"]).arg(guest(&home.scratch("there/tree"))).arg(&down).plainly().run().exits(1);
    for (ran, copy) in [(ran, up), (down_ran, down)] {
        let json = ran.json();
        assert_eq!(json["unreadable"], 2, "{json}");
        let named: Vec<_> = json["unreadable_entries"].as_array().unwrap().iter().map(|e| e["path"].as_str()).collect();
        assert!(named.iter().any(|path| path.unwrap().ends_with("/tree/b")), "{named:?}");
        assert_eq!(fs::read(copy.join("a")).unwrap(), b"a");
        assert_eq!(fs::read(copy.join("c")).unwrap(), b"c");
        assert!(!copy.join("b").exists() && !copy.join("closed").exists());
    }
    // In the text output, too. A file alone is an error of its own.
    let ran = home.nido(["cp"]).arg(home.scratch("here/tree")).arg(to(&home.scratch("there/x"))).plainly().run();
    let ran = ran.exits(1);
    assert!(ran.stderr.contains("2 entries could not be read") && ran.stderr.contains("tree/b"), "{}", ran.stderr);
    let alone = home.nido(["cp", "--json"]).arg(home.scratch("here/tree/b")).arg(to(&home.scratch("there/y")));
    let problem = alone.plainly().run().fails(1, "permission_denied");
    assert!(problem["hint"].is_string(), "{problem}");
    for side in ["here", "there"] {
        set_mode(&home.scratch(side).join("tree/closed"), 0o755);
    }
}

// A directory could not be written to standard output, nor an archive read from standard input.
#[test]
fn a_directory_is_a_tar_archive_on_the_standard_streams() {
    let home = vm();
    let tree = home.scratch("there/tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), "x").unwrap();
    let archive = home.nido(["cp"]).arg(guest(&tree)).arg("-").run().ok();
    assert!(archive.text().contains("./file"));
    let bytes = archive.text().as_bytes().to_vec();
    let into = format!("{}/", guest(&home.scratch("there/unpacked")));
    home.nido(["cp", "-"]).arg(into).input(bytes).run().ok();
    assert_eq!(fs::read(home.scratch("there/unpacked/file")).unwrap(), b"x");
    // A directory without the slash is refused, and not after all bytes have been read.
    home.nido(["cp", "--json", "-"]).arg(guest(&tree)).input("x").run().fails(2, "path_invalid");
}

#[test]
fn a_copy_goes_from_one_vm_to_another() {
    let home = vm();
    home.spawn("db");
    let (tree, file) = (home.scratch("there/tree"), home.scratch("there/file"));
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(tree.join("sub/f"), "deep").unwrap();
    fs::write(&file, "x").unwrap();
    let into = home.scratch("here").display().to_string();
    home.nido(["cp"]).arg(guest(&tree)).arg(guest(&file)).arg(format!("db:{into}/")).run().ok();
    assert_eq!(fs::read(home.scratch("here/tree/sub/f")).unwrap(), b"deep");
    assert_eq!(fs::read(home.scratch("here/file")).unwrap(), b"x");
    home.nido(["cp"]).arg(guest(&file)).arg(format!("db:{into}/renamed")).run().ok();
    assert_eq!(fs::read(home.scratch("here/renamed")).unwrap(), b"x");
    home.nido(["cp"]).arg(format!("{}/.", guest(&tree))).arg(format!("db:{into}/contents")).run().ok();
    assert_eq!(fs::read(home.scratch("here/contents/sub/f")).unwrap(), b"deep");
}
