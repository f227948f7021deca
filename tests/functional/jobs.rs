//! The supervisor replies to requests while one of its jobs hangs. A job hangs where a file was replaced by a named pipe.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, Mode, mkfifoat};
use serde_json::Value;

use crate::support::{Home, until};

/// How long a supervisor may take to reply while a job hangs.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);

fn vm_dir(home: &Home, info: &Value) -> PathBuf {
    home.path().join("vms").join(info["id"].as_str().unwrap())
}

/// Puts a named pipe in the place of a file.
fn replace_by_pipe(path: &Path) {
    let _ = fs::remove_file(path);
    mkfifoat(CWD, path, Mode::from_raw_mode(0o600)).unwrap();
}

/// Waits until a process reads from the named pipe. It hangs until the result is dropped.
fn hold_reader(path: &Path) -> File {
    // Without a reader this fails.
    let open = || OpenOptions::new().write(true).custom_flags(nonblocking()).open(path).ok();
    until("a process that reads from the named pipe", open)
}

fn nonblocking() -> i32 {
    i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap()
}

fn connect(dir: &Path) -> UnixStream {
    UnixStream::connect(dir.join("control.sock")).unwrap()
}

/// Sends a request, and returns the first reply.
fn request(mut stream: UnixStream, line: &str, timeout: Duration) -> Value {
    stream.set_read_timeout(Some(timeout)).unwrap();
    stream.write_all(format!("{line}\n").as_bytes()).unwrap();
    let mut reply = String::new();
    BufReader::new(stream).read_line(&mut reply).expect("a reply in time");
    serde_json::from_str(&reply).unwrap()
}

fn status(stream: UnixStream) -> Value {
    request(stream, r#"{"version":2,"op":"status"}"#, REPLY_TIMEOUT)
}

fn expect_status(dir: &Path) {
    let reply = status(connect(dir));
    assert_eq!(reply["answer"], "status", "{reply}");
}

// The rotation ran on the event loop.
#[test]
fn requests_are_answered_while_the_rotation_of_a_log_hangs() {
    let home = Home::new();
    let dir = vm_dir(&home, &home.spawn("web"));
    let old = dir.join("console.log.1");
    replace_by_pipe(&old);
    // Much more than a pipe holds: the copy hangs because nothing else is read.
    let mut pipe = OpenOptions::new().read(true).custom_flags(nonblocking()).open(&old).unwrap();
    OpenOptions::new().append(true).open(dir.join("console.log")).unwrap().set_len(5 << 20).unwrap();
    until("the rotation", || matches!(pipe.read(&mut [0]), Ok(1)).then_some(()));
    expect_status(&dir);
    home.nido(["stop", "web", "--force"]).run().ok();
    assert_eq!(home.info("web")["status"], "stopped");
    // The next supervisor gets the lock although the rotation has not ended.
    home.nido(["start", "web"]).run().ok();
    expect_status(&dir);
}

// The supervisor read the logs on the event loop's thread when QEMU had ended.
#[test]
fn a_vm_ends_although_its_log_cannot_be_read() {
    let home = Home::new();
    let dir = vm_dir(&home, &home.spawn("web"));
    replace_by_pipe(&dir.join("qemu.log"));
    home.nido(["stop", "web", "--force"]).run().ok();
    assert_eq!(home.info("web")["status"], "stopped");
}

// The supervisor removed an ephemeral VM's files on the event loop's thread.
#[test]
fn requests_are_refused_while_the_removal_of_a_vm_hangs() {
    let home = Home::new();
    let spawn = home.nido(["spawn", "web", "--ephemeral", "--json", "--accel", "tcg"]).run().ok();
    let dir = vm_dir(&home, &spawn.json());
    // Its last lines are read when QEMU has ended, which has a deadline, and again before the files are removed.
    replace_by_pipe(&dir.join("console.log"));
    let stop = home.nido(["stop", "web", "--force", "--yes"]).start();
    // The supervisor removes its socket before the files. A connection has to send its request within ten seconds.
    let mut last = None;
    until("the end of the control socket", || match UnixStream::connect(dir.join("control.sock")) {
        Ok(connection) => {
            last = Some(connection);
            std::thread::sleep(Duration::from_millis(20));
            None
        }
        Err(_) => Some(()),
    });
    let reply = status(last.unwrap());
    assert_eq!((&reply["answer"], &reply["problem"]["code"]), (&"failed".into(), &"vm_not_running".into()), "{reply}");
    drop(hold_reader(&dir.join("console.log")));
    stop.wait().ok();
    home.expect_empty();
}

// The supervisor tested QEMU on the event loop before it took a snapshot.
#[test]
fn requests_are_answered_while_qemu_is_tested_for_a_snapshot() {
    let home = Home::new();
    home.qemu("migrates");
    let dir = vm_dir(&home, &home.spawn("web"));
    let pipe = home.scratch("pipe");
    replace_by_pipe(&pipe);
    let hanging = home.scratch("hanging");
    fs::write(&hanging, format!("#!/bin/sh\nread -r line <'{}'\nexit 1\n", pipe.display())).unwrap();
    fs::set_permissions(&hanging, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(&hanging, home.qemu_path()).unwrap();
    let snapshot = connect(&dir);
    let snapshot = std::thread::spawn(move || {
        request(snapshot, r#"{"version":2,"op":"snapshot","name":"s","into":null}"#, Duration::from_secs(60))
    });
    let held = hold_reader(&pipe);
    expect_status(&dir);
    drop(held);
    let reply = snapshot.join().unwrap();
    assert_eq!(reply["answer"], "failed", "{reply}");
    // It can be tried again.
    home.qemu("migrates");
    home.nido(["snapshot", "create", "web", "s"]).run().ok();
}

// The event loop waited until a claimed clone's record was on the disk.
#[test]
fn requests_are_answered_while_the_record_of_a_claimed_clone_is_written() {
    let home = Home::new();
    home.qemu("migrates");
    home.nido(["template", "bake", "sandbox", "--accel", "tcg"]).run().ok();
    home.nido(["pool", "set", "sandbox", "1", "--accel", "tcg"]).run().ok();
    until("a clone that waits", || {
        let pools = home.nido(["pool", "ls", "--json"]).run().ok().json();
        (pools["pools"][0]["ready"] == 1).then_some(())
    });
    let dir = fs::read_dir(home.path().join("vms")).unwrap().next().unwrap().unwrap().path();
    let record = dir.join("vm.json");
    replace_by_pipe(&record);
    // Its owner does not wait for the disk: the row has everything.
    home.nido(["spawn", "web", "--accel", "tcg"]).run().ok();
    let pipe = hold_reader(&record);
    expect_status(&dir);
    drop(pipe);
    let is_regular = || fs::symlink_metadata(&record).is_ok_and(|metadata| metadata.is_file()).then_some(());
    until("the record", is_regular);
    let text = fs::read_to_string(&record).unwrap();
    assert!(text.contains(r#""name":"web""#), "{text}");
    home.nido(["pool", "set", "sandbox", "0", "--accel", "tcg"]).run().ok();
}
