//! The control socket between different versions of nido, and of a VM whose QEMU does not reply.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use nido_files::lock::HeldLock;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::support::{Home, processes, until};

/// What a supervisor of protocol version 1 replied to a stop with a field that it did not know.
const REFUSAL_OF_VERSION_1: &str = r#"{"answer":"failed","problem":{"type":"urn:nido:problem:spec_invalid","title":"The request is not valid","status":422,"detail":"not a request to a supervisor: unknown field `version`, expected `force` or `timeout_ms`","code":"spec_invalid"}}"#;

/// The last line of the replies to `line`.
fn send_request(home: &Home, id: &str, line: &str) -> Value {
    let mut stream = UnixStream::connect(vm_dir(home, id).join("control.sock")).unwrap();
    stream.write_all(format!("{line}\n").as_bytes()).unwrap();
    let last = BufReader::new(stream).lines().map(Result::unwrap).last().unwrap();
    serde_json::from_str(&last).unwrap()
}

pub fn vm_dir(home: &Home, id: &str) -> PathBuf {
    home.path().join("vms").join(id)
}

pub fn pid_of(home: &Home, word: &str) -> Pid {
    let found = processes::of(&home.path()).into_iter().find(|(_, line)| line.contains(word));
    found.unwrap_or_else(|| panic!("no process {word}")).0
}

#[test]
fn a_client_is_replied_to_in_its_version() {
    let home = Home::new();
    let id = home.spawn("web")["id"].as_str().unwrap().to_owned();
    assert_eq!(send_request(&home, &id, r#"{"op":"ready"}"#), json!({"answer": "done"}));
    assert_eq!(send_request(&home, &id, r#"{"version":2,"op":"ready"}"#), json!({"version": 2, "answer": "done"}));
    let old = send_request(&home, &id, r#"{"op":"dance"}"#);
    assert_eq!((&old["answer"], &old["problem"]["code"]), (&json!("failed"), &json!("spec_invalid")), "{old}");
    for line in [r#"{"version":2,"op":"dance"}"#, r#"{"version":3,"op":"ready"}"#] {
        let new = send_request(&home, &id, line);
        assert_eq!((&new["answer"], &new["supported"]), (&json!("unsupported"), &json!(2)), "{new}");
    }
    assert_eq!(send_request(&home, &id, r#"{"op":"stop","force":true,"timeout_ms":1}"#), json!({"answer": "done"}));
    assert_eq!(home.info("web")["status"], "stopped");
}

/// Takes the place of the VM's supervisor, replies to each connection with the next line, and returns the requests.
pub fn play_supervisor(home: &Home, id: &str, replies: &'static [&'static str]) -> std::thread::JoinHandle<Vec<Value>> {
    let path = vm_dir(home, id).join("supervisor.lock");
    // The guardian may have started another one at once: that is killed as well.
    let lock = until("the lock of a killed supervisor", || {
        let supervisors = processes::of(&home.path()).into_iter().filter(|(_, line)| line.contains(" supervise "));
        for (pid, _) in supervisors {
            processes::kill_if_alive(pid);
        }
        HeldLock::try_take(&path).unwrap()
    });
    let socket = vm_dir(home, id).join("control.sock");
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        let _lock = lock;
        let mut requests = Vec::new();
        for reply in replies {
            let mut stream = listener.accept().unwrap().0;
            let mut line = String::new();
            BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
            requests.push(serde_json::from_str(&line).unwrap());
            stream.write_all(format!("{reply}\n").as_bytes()).unwrap();
        }
        requests
    })
}

#[test]
fn a_request_to_an_older_supervisor_is_repeated_without_a_version() {
    let home = Home::new();
    let id = home.spawn("web")["id"].as_str().unwrap().to_owned();
    let older = play_supervisor(&home, &id, &[REFUSAL_OF_VERSION_1, r#"{"answer":"done"}"#]);
    home.nido(["stop", "web"]).run().ok();
    let requests = older.join().unwrap();
    assert_eq!(
        requests,
        [
            json!({"version": 2, "op": "stop", "force": false, "timeout_ms": 30000}),
            json!({"op": "stop", "force": false, "timeout_ms": 30000})
        ]
    );
    processes::end_all(&home.path());
}

#[test]
fn a_supervisor_that_does_not_know_a_request_is_named_as_the_reason() {
    let home = Home::new();
    let id = home.spawn("web")["id"].as_str().unwrap().to_owned();
    let newer = play_supervisor(&home, &id, &[r#"{"version":9,"answer":"unsupported","supported":9,"why":"pause"}"#]);
    let problem = home.nido(["pause", "web", "--json"]).run().fails(1, "vm_busy");
    assert!(problem["detail"].as_str().unwrap().contains("belongs to another version of nido"), "{problem}");
    assert!(problem["hint"].as_str().unwrap().contains("nido restart web"), "{problem}");
    newer.join().unwrap();
    processes::end_all(&home.path());
}

// A supervisor that took over a stopping VM whose QEMU did not reply waited for another request to stop it.
#[test]
fn a_stop_ends_also_if_qemu_does_not_reply_to_the_next_supervisor() {
    let home = Home::new();
    home.qemu("ignore-powerdown");
    home.spawn("web");
    let stopping = home.nido(["stop", "web", "--timeout", "1h"]).start();
    home.await_info("web", |info| info["status"] == "stopping");
    kill_process(pid_of(&home, "fake-qemu"), Signal::STOP).unwrap();
    // Nor does its client request the stop again.
    stopping.signal(Signal::KILL);
    drop(stopping.wait());
    processes::kill(pid_of(&home, " supervise "));
    until("the end of the VM", || (home.info("web")["status"] == "stopped").then_some(()));
}
