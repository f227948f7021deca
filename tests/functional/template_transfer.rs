//! Export and import of templates: files, pipes, refusals. Their guests are started in the boot suite.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use rustix::process::Signal;

use crate::support::{Home, publish_whole};

fn archive(home: &Home) -> PathBuf {
    home.scratch("box.nido")
}

/// A home with the template `box` in it, exported.
fn exported() -> Home {
    let home = Home::new();
    publish_whole(&home, "box", b"none");
    home.nido(["template", "export", "box"]).arg(archive(&home)).run().ok();
    home
}

fn build_dir(home: &Home) -> usize {
    fs::read_dir(home.path().join("build")).map_or(0, Iterator::count)
}

#[test]
fn a_template_is_exported_and_imported() {
    let home = exported();
    let file = archive(&home);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    home.nido(["template", "delete", "box"]).run().ok();
    let came = home.nido(["template", "import", "--json"]).arg(&file).run().ok().json();
    assert_eq!((&came["template"]["name"], &came["already_present"]), (&"box".into(), &false.into()));
    // The agent in the archive was not ours.
    assert_eq!(came["template"]["agent_current"], true);
    assert!(came["warnings"][0].as_str().unwrap().contains("was replaced"), "{came}");
    let again = home.nido(["template", "import", "--json"]).arg(&file).run().ok().json();
    assert_eq!(again["already_present"], true);
    let other = home.nido(["template", "import", "--name", "other"]).arg(&file).run().ok();
    assert_eq!(other.text(), "other\n");
    assert!(other.stderr.starts_with("other: [1/6] vmlinux\nother: [2/6] initramfs\n"), "{}", other.stderr);
    assert!(other.stderr.contains("warning: the guest agent of another nido version"), "{}", other.stderr);
    assert_eq!(build_dir(&home), 0);
    // Parts that two templates have are there once.
    home.nido(["template", "delete", "box"]).run().ok();
    home.nido(["spawn", "web", "-T", "other", "--accel", "tcg"]).run().ok();
    home.nido(["delete", "web", "--force", "--yes"]).run().ok();
}

#[test]
fn it_goes_through_a_pipe() {
    let home = exported();
    let out = home.nido(["template", "export", "box", "-", "--json"]).run().ok();
    assert!(out.stdout == fs::read(archive(&home)).unwrap(), "the same template makes the same archive");
    assert_eq!(out.stderr, "");
    home.nido(["template", "import", "-", "--name", "piped"]).input(out.stdout).run().ok();
    home.nido(["template", "info", "piped"]).run().ok();
    // A pipe that has a name.
    let fifo = home.scratch("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    let live = home.nido(["template", "import", "--name", "named"]).arg(&fifo).start();
    fs::write(&fifo, fs::read(archive(&home)).unwrap()).unwrap();
    assert_eq!(live.wait().ok().text(), "named\n");
}

#[test]
fn a_closed_reader_ends_an_export_silently() {
    let home = exported();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_nido"));
    command.args(["template", "export", "box", "-", "--quiet"]).env("NIDO_HOME", home.path());
    let mut child = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let ended = child.wait_with_output().unwrap();
    assert_eq!((ended.status.code(), &*String::from_utf8_lossy(&ended.stderr)), (Some(141), ""));
}

#[test]
fn existing_files_are_kept_without_force() {
    let home = exported();
    let export = |words: [&str; 2]| home.nido(["template", "export", "box"]).arg(words[0]).arg(words[1]);
    let file = archive(&home);
    fs::write(&file, "precious").unwrap();
    let shown = file.to_str().unwrap();
    let problem = export([shown, "--json"]).run().fails(1, "path_exists");
    assert!(problem["hint"].as_str().unwrap().contains("--force"));
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    let done = home.nido(["template", "export", "box", "--force", "--json", "--level", "19"]).arg(&file).run().ok();
    let done = done.json();
    assert_eq!(done["path"], shown);
    assert_eq!(done["archive_bytes"], fs::metadata(&file).unwrap().len());
    assert_eq!(done["bakes"], 0);
    export(["/dev/null", "--json"]).arg("--force").run().fails(2, "path_invalid");
    export([shown, "--json"]).arg("--level=20").run().fails(2, "spec_invalid");
    let unused = home.scratch("unused");
    home.nido(["template", "export", "nothing", "--json"]).arg(&unused).run().fails(1, "template_not_found");
    assert!(!unused.exists());
    let nowhere = home.scratch("no/such/directory");
    export([nowhere.to_str().unwrap(), "--json"]).run().fails(2, "path_invalid");
}

#[test]
fn a_refused_import_leaves_no_orphans() {
    let home = exported();
    let import =
        |words: &[&str]| words.iter().fold(home.nido(["template", "import", "--json"]), |nido, word| nido.arg(*word));
    let file = archive(&home);
    let good = fs::read(&file).unwrap();
    let blobs = || fs::read_dir(home.path().join("blobs/sha256")).unwrap().count();
    let (shown, before) = (file.to_str().unwrap(), blobs());
    for (bad, why) in [
        (&good[..good.len() / 2], "truncated"),
        (&[&good[..], b"more"].concat(), "data after its end"),
        (b"\x1f\x8b", "damaged"),
        (b"PK\x03\x04 something else altogether", "damaged"),
    ] {
        fs::write(&file, bad).unwrap();
        let problem = import(&[shown, "--name", "evil"]).run().fails(2, "archive_invalid");
        assert!(problem["detail"].as_str().unwrap().contains(why), "{problem}");
        assert_eq!((blobs(), build_dir(&home)), (before, 0), "{why}");
    }
    home.nido(["template", "info", "evil", "--json"]).run().fails(1, "template_not_found");
    // Another template has the name.
    fs::write(&file, good).unwrap();
    publish_whole(&home, "box", b"other packages");
    let problem = import(&[shown]).run().fails(1, "template_exists");
    assert!(problem["hint"].as_str().unwrap().contains("--name"), "{problem}");
    import(&[shown, "--force"]).run().ok();
    // What the replaced one had for itself is gone.
    let parts = fs::read_dir(home.path().join("blobs/sha256")).unwrap();
    let contents: Vec<_> = parts.map(|part| fs::read(part.unwrap().path()).unwrap()).collect();
    assert!(contents.iter().any(|content| content == b"none"));
    assert!(!contents.iter().any(|content| content == b"other packages"));
    import(&["/no/such/file"]).run().fails(1, "path_not_found");
    import(&["/"]).run().fails(2, "path_invalid");
    import(&[shown, "--name", "../up"]).run().fails(2, "name_invalid");
}

#[test]
fn an_import_that_waits_for_its_pipe_can_be_interrupted_and_killed() {
    let home = exported();
    let half = fs::read(archive(&home)).unwrap();
    let half = &half[..half.len() / 2];
    for (signal, code) in [(Signal::INT, Some(130)), (Signal::KILL, None)] {
        let mut live = home.nido(["template", "import", "-", "--name", "half"]).start();
        let mut stdin = live.stdin.take().unwrap();
        stdin.write_all(half).unwrap();
        live.until("its scratch", || (build_dir(&home) > 0).then_some(()));
        live.signal(signal);
        match code {
            Some(code) => {
                live.wait().exits(code);
                assert_eq!(build_dir(&home), 0);
            }
            None => drop(live.wait()),
        }
        drop(stdin);
    }
    // The killed one left its scratch, and the next one clears up.
    assert_eq!(build_dir(&home), 1);
    home.nido(["template", "import", "--name", "whole"]).arg(archive(&home)).run().ok();
    assert_eq!(build_dir(&home), 0);
    home.nido(["template", "info", "half", "--json"]).run().fails(1, "template_not_found");
}
