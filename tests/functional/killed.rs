//! Any process is killed at any moment: no event is lost or out of order, and no orphan remains.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::net::TcpStream;
use std::time::Duration;

use serde_json::{Value, json};

use super::webhooks::{add, deliverers, expect_no_deliverer, expect_order, remove};
use crate::support::http::Server;
use crate::support::random::{Random, number};
use crate::support::receiver::Receiver;
use crate::support::{Home, RunningNido, processes, until};

/// Rounds, unless `NIDO_KILL_ROUNDS` is set.
const ROUNDS: u64 = 200;
/// How many names there are: few, so that operations meet.
const NAMES: u64 = 5;
/// Within which time after the beginning of a round something is killed, in microseconds: as long as a command takes.
const MOMENT_US: u64 = 60_000;

fn name(random: &mut Random) -> String {
    format!("vm-{}", random.below(NAMES))
}

/// A request over REST whose response is not awaited yet. The server may be killed meanwhile.
fn send_request(server: &Server, random: &mut Random) -> TcpStream {
    let name = name(random);
    let (method, path, body) = match random.below(12) {
        0..5 => ("POST", "/v1/vms".into(), json!({ "name": name, "start": false, "accel": "tcg" }).to_string()),
        5 => ("POST", "/v1/vms".into(), json!({ "name": name, "accel": "tcg" }).to_string()),
        6 => ("POST", format!("/v1/vms/{name}/stop"), json!({ "force": true }).to_string()),
        7 => ("GET", "/v1/vms".into(), String::new()),
        _ => ("DELETE", format!("/v1/vms/{name}?force=true"), String::new()),
    };
    let bearer = format!("Bearer {}", server.token());
    let mut headers = vec![("authorization", &*bearer), ("host", "localhost"), ("connection", "close")];
    headers.extend((!body.is_empty()).then_some(("content-type", "application/json")));
    server.begin(method, &path, &headers, body.len(), body.as_bytes())
}

/// Something on the command line.
fn command(home: &Home, random: &mut Random) -> RunningNido {
    let name = name(random);
    let nido = match random.below(12) {
        0..5 => home.nido(["create", &name, "--accel", "tcg"]),
        5 => home.nido(["spawn", &name, "--accel", "tcg"]),
        6 => home.nido(["stop", &name, "--force"]),
        7 => home.nido(["ls"]),
        _ => home.nido(["delete", &name, "--force", "--yes"]),
    };
    nido.start()
}

#[test]
fn kills_of_any_process_lose_no_event_and_leave_no_orphans() {
    let seed = number("NIDO_KILL_SEED").unwrap_or_else(|| u64::from(std::process::id()) * 7919);
    let rounds = number("NIDO_KILL_ROUNDS").unwrap_or(ROUNDS);
    println!("NIDO_KILL_SEED={seed} NIDO_KILL_ROUNDS={rounds}");
    let mut random = Random(seed);
    let receiver = Receiver::start();
    // So that delivery workers are killed while they wait for a response, too.
    receiver.dawdle(Duration::from_millis(2));
    let home = Home::new();
    let webhook = add(&home, &receiver.url());
    let mut server = Server::start(&home);
    let mut killed = [0_u64; 3];
    for _ in 0..rounds {
        let mut asked = send_request(&server, &mut random);
        let command = command(&home, &mut random);
        // The moment, whatever it is.
        std::thread::sleep(Duration::from_micros(random.below(MOMENT_US)));
        let victim = usize::try_from(random.below(3)).unwrap();
        match victim {
            0 => command.kill(),
            1 => server = server.killed(&home),
            _ => {
                for deliverer in deliverers(&home) {
                    processes::kill_if_alive(deliverer);
                }
            }
        }
        killed[victim] += 1;
        // Refused, done or broken off: all of it is fine, as long as it ends.
        let _ = asked.read_to_end(&mut Vec::new());
        let _ = command.end();
    }
    assert!(rounds < 50 || killed.iter().all(|count| *count > 0), "{killed:?}");

    let audit = home.nido(["audit", "verify", "--json"]).run().ok().json();
    assert_eq!(audit["ok"], true, "{audit}");
    // A directory of a killed create is removed before the next VM is created.
    home.nido(["create", "last"]).run().ok();
    let doctor = home.nido(["doctor", "--json"]).run().json();
    let orphans = doctor["checks"].as_array().unwrap().iter().find(|check| check["name"] == "orphans").unwrap();
    assert_eq!(orphans["status"], "ok", "{orphans}");
    // Running VMs work, and are deleted on request.
    for name in home.names() {
        home.nido(["delete", &name, "--force", "--yes"]).run().ok();
    }
    let events = all_events(&home);
    let cursors: BTreeSet<u64> = events.iter().map(|event| event["cursor"].as_u64().unwrap()).collect();
    assert_eq!(cursors.len(), events.len());
    expect_whole_lives(&events);

    // Everything arrived, and nothing else.
    let arrived = || -> BTreeSet<u64> {
        let taken = receiver.messages().into_iter().filter(|message| message.taken);
        taken.map(|message| message.header("webhook-id").rsplit('_').next().unwrap().parse().unwrap()).collect()
    };
    until("every event", || arrived().is_superset(&cursors).then_some(()));
    assert_eq!(arrived(), cursors);
    expect_order(&receiver.messages());
    for message in receiver.messages() {
        let cursor: u64 = message.header("webhook-id").rsplit('_').next().unwrap().parse().unwrap();
        let event = events.iter().find(|event| event["cursor"] == cursor).unwrap();
        assert_eq!((&message.json()["event"], &message.json()["vm_name"]), (&event["event"], &event["vm_name"]));
    }
    expect_no_deliverer(&home);
    remove(&home, &webhook);
    drop(server);
    home.expect_empty();
    assert_eq!(home.nido(["audit", "verify", "--json"]).run().ok().json()["ok"], true);
}

/// The whole log, the oldest first.
fn all_events(home: &Home) -> Vec<Value> {
    let mut all = Vec::new();
    let mut since = 0;
    loop {
        let page = home.nido(["events", "--json", "--since", &since.to_string()]).run().ok().json();
        all.extend(page["events"].as_array().unwrap().iter().cloned());
        let cursor = page["cursor"].as_u64().unwrap();
        if cursor == since {
            return all;
        }
        since = cursor;
    }
}

/// The events of a VM begin with its creation and end with its deletion, both once: nothing in between is missing at an end.
fn expect_whole_lives(events: &[Value]) {
    let mut lives: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for event in events.iter().filter(|event| event["vm_name"].is_string()) {
        let vm = event["details"]["vm_id"].as_str().unwrap();
        lives.entry(vm).or_default().push(event["event"].as_str().unwrap());
    }
    for (vm, life) in &lives {
        let count = |word: &str| life.iter().filter(|event| **event == word).count();
        assert_eq!((life.first(), life.last()), (Some(&"vm.created"), Some(&"vm.deleted")), "{vm}: {life:?}");
        assert_eq!((count("vm.created"), count("vm.deleted")), (1, 1), "{vm}: {life:?}");
    }
    assert!(!lives.is_empty());
}

#[test]
fn an_unreported_template_deletion_is_reported_by_the_next_reader() {
    let home = Home::new();
    home.nido(["template", "ls"]).run().ok();
    // As by a process that was killed after it.
    std::fs::remove_file(home.path().join("templates/sandbox.json")).unwrap();
    for _ in 0..2 {
        home.nido(["template", "ls"]).run().ok();
        let events = home.nido(["events", "--json"]).run().ok().json();
        let kinds: Vec<_> = events["events"].as_array().unwrap().iter().map(|event| event["event"].clone()).collect();
        assert_eq!(kinds, ["template.created", "template.deleted"]);
    }
}
