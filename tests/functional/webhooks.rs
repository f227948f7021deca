//! Webhooks from end to end: events are delivered once and in order, whichever process is killed meanwhile.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use nido_api::WebhookSecret;
use serde_json::Value;

use crate::support::http::Server;
use crate::support::receiver::{Message, Receiver};
use crate::support::{Home, processes, until};

/// Adds an endpoint on loopback.
pub(super) fn add(home: &Home, url: &str) -> Value {
    home.nido(["webhook", "add", "--allow-private", "--json", "--url", url]).run().ok().json()
}

pub(super) fn deliveries(home: &Home) -> Vec<Value> {
    home.nido(["webhook", "deliveries", "--json"]).run().ok().json()["deliveries"].as_array().unwrap().clone()
}

pub(super) fn remove(home: &Home, webhook: &Value) {
    home.nido(["webhook", "remove", webhook["id"].as_str().unwrap()]).run().ok();
}

/// Makes a VM that never runs: one event.
pub(super) fn create(home: &Home, name: &str) {
    home.nido(["create", name, "--accel", "tcg"]).run().ok();
}

/// The running delivery workers.
pub(super) fn deliverers(home: &Home) -> Vec<rustix::process::Pid> {
    let all = processes::of(&home.path());
    all.into_iter().filter(|(_, line)| line.trim_end().ends_with(" deliver")).map(|(pid, _)| pid).collect()
}

pub(super) fn expect_no_deliverer(home: &Home) {
    until("the end of the deliverer", || deliverers(home).is_empty().then_some(()));
}

/// Waits until the messages of so many events were taken.
pub(super) fn await_taken(receiver: &Receiver, count: usize) -> Vec<Message> {
    until(&format!("{count} messages"), || (distinct(&receiver.messages()).len() >= count).then_some(()));
    receiver.messages().into_iter().filter(|message| message.taken).collect()
}

fn distinct(messages: &[Message]) -> HashSet<String> {
    messages.iter().filter(|message| message.taken).map(|message| message.header("webhook-id").to_owned()).collect()
}

/// Expects that what is about one VM came in order, whatever came twice.
pub(super) fn expect_order(messages: &[Message]) {
    let mut last: HashMap<String, u64> = HashMap::new();
    let mut seen = HashSet::new();
    for message in messages {
        let id = message.header("webhook-id");
        let cursor: u64 = id.rsplit('_').next().unwrap().parse().unwrap();
        // What is about no VM is in order, too.
        let vm = message.json()["details"]["vm_id"].as_str().unwrap_or_default().to_owned();
        if seen.insert(id.to_owned()) {
            let before = last.insert(vm, cursor).unwrap_or(0);
            assert!(before < cursor, "{cursor} came behind {before}");
        }
    }
}

#[test]
fn templates_are_announced() {
    let receiver = Receiver::start();
    let home = Home::new();
    home.nido(["template", "ls"]).run().ok();
    add(&home, &receiver.url());
    let manifest = home.path().join("templates/sandbox.json");
    let aside = home.scratch("sandbox.json");
    std::fs::rename(&manifest, &aside).unwrap();
    home.nido(["template", "ls"]).run().ok();
    std::fs::rename(&aside, &manifest).unwrap();
    home.nido(["template", "ls"]).run().ok();
    let mut told = Vec::new();
    for message in await_taken(&receiver, 2) {
        let body = message.json();
        assert_eq!((&body["vm_name"], &body["details"]["template"]), (&Value::Null, &"sandbox".into()));
        told.push(body["event"].as_str().unwrap().to_owned());
    }
    assert_eq!(told, ["template.deleted", "template.created"]);
    expect_no_deliverer(&home);
}

#[test]
fn every_event_of_a_life_arrives_once_in_order_and_signed() {
    let receiver = Receiver::start();
    let home = Home::new();
    let webhook = add(&home, &receiver.url());
    home.spawn("web");
    for verb in ["pause", "resume", "stop"] {
        home.nido([verb, "web"]).run().ok();
    }
    home.nido(["delete", "web", "--yes"]).run().ok();
    let messages = await_taken(&receiver, 6);
    let secret = WebhookSecret::parse(webhook["secret"].as_str().unwrap()).unwrap();
    for message in &messages {
        let (id, at) = (message.header("webhook-id"), message.header("webhook-timestamp").parse().unwrap());
        assert_eq!(message.header("webhook-signature"), secret.sign(id, at, &message.body).unwrap());
        assert_eq!(message.header("content-type"), "application/json");
        assert_eq!(message.header("user-agent"), concat!("nido/", env!("CARGO_PKG_VERSION")));
        let body = message.json();
        let keys: Vec<_> = body.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["event", "timestamp", "vm_name", "details"]);
        assert_eq!(body["vm_name"], "web");
        assert!(body["details"]["last_log_entries"].is_array());
    }
    let events: Vec<_> = messages.iter().map(|message| message.json()["event"].as_str().unwrap().to_owned()).collect();
    assert_eq!(events, ["vm.created", "vm.started", "vm.paused", "vm.resumed", "vm.stopped", "vm.deleted"]);
    expect_no_deliverer(&home);
    assert!(
        deliveries(&home)
            .iter()
            .all(|it| it["state"] == "delivered" && it["attempts"] == 1 && it["last_status"] == 200)
    );
    assert_eq!(home.nido(["webhook", "list", "--json"]).run().ok().json()["webhooks"][0]["pending"], 0);
}

#[test]
fn an_endpoint_that_was_away_and_a_host_that_was_off_lose_nothing() {
    let port = Receiver::start().port();
    let home = Home::new();
    let url = format!("http://localhost:{port}/hook");
    add(&home, &url);
    create(&home, "web");
    home.nido(["delete", "web", "--yes"]).run().ok();
    let refused = until("the delivery to fail", || {
        Some(deliveries(&home).swap_remove(0)).filter(|delivery| delivery["last_error"].is_string())
    });
    assert!(refused["last_error"].as_str().unwrap().contains("refused"), "{refused}");
    // As after a restart of the host: no process runs, and a user runs nido.
    until("a deliverer", || deliverers(&home).pop().map(processes::kill));
    let receiver = Receiver::at(port);
    home.nido(["ls"]).run().ok();
    let messages = await_taken(&receiver, 2);
    let events: Vec<_> = messages.iter().map(|message| message.json()["event"].clone()).collect();
    assert_eq!(events, ["vm.created", "vm.deleted"]);
    expect_no_deliverer(&home);
}

#[test]
fn a_deliverer_that_is_killed_again_and_again_loses_nothing() {
    let receiver = Receiver::start();
    let home = Home::new();
    add(&home, &receiver.url());
    // So that it is killed while it waits for an answer, too.
    receiver.dawdle(Duration::from_millis(10));
    const ROUNDS: usize = 25;
    for round in 0..ROUNDS {
        let name = format!("vm-{}", round % 3);
        if round >= 3 {
            home.nido(["delete", &name, "--yes"]).run().ok();
        }
        create(&home, &name);
        // At whatever it is doing now.
        std::thread::sleep(Duration::from_millis(u64::try_from(round % 7).unwrap() * 3));
        deliverers(&home).into_iter().for_each(processes::kill);
    }
    home.nido(["ls"]).run().ok();
    await_taken(&receiver, ROUNDS + ROUNDS - 3);
    expect_no_deliverer(&home);
    expect_order(&receiver.messages());
    assert!(deliveries(&home).iter().all(|delivery| delivery["state"] == "delivered"));
}

#[test]
fn a_server_counts_deliveries_and_restarts_the_delivery_worker() {
    let port = Receiver::start().port();
    let home = Home::new();
    let server = Server::start(&home);
    let count = |webhook: &Value, state: &str| {
        let text = String::from_utf8(server.get("/metrics").body).unwrap();
        let name =
            format!("nido_webhook_deliveries{{webhook=\"{}\",state=\"{state}\"}} ", webhook["id"].as_str().unwrap());
        text.lines().find_map(|line| line.strip_prefix(&*name)?.parse::<u64>().ok())
    };
    let webhook = add(&home, &format!("http://localhost:{port}/hook"));
    let states = ["pending", "delivered", "failed"];
    assert_eq!(states.map(|state| count(&webhook, state)), [Some(0); 3]);
    create(&home, "web");
    assert_eq!(states.map(|state| count(&webhook, state)), [Some(1), Some(0), Some(0)]);
    // From here on only the server runs.
    let first = until("a deliverer", || Some(deliverers(&home)).filter(|live| !live.is_empty()));
    for one in &first {
        processes::kill_if_alive(*one);
    }
    until("another", || deliverers(&home).into_iter().find(|live| !first.contains(live)));
    let receiver = Receiver::at(port);
    // It tries again by itself, but not so soon.
    home.nido(["webhook", "redeliver", &deliveries(&home)[0]["id"].to_string()]).run().ok();
    await_taken(&receiver, 1);
    until("the count", || (count(&webhook, "delivered") == Some(1)).then_some(()));
    expect_no_deliverer(&home);
    remove(&home, &webhook);
}

#[test]
fn a_crash_is_delivered_without_a_running_command() {
    let receiver = Receiver::start();
    let home = Home::new();
    let url = receiver.url();
    home.nido(["webhook", "add", "--allow-private", "--event", "vm.crashed", "--url", &url]).run().ok();
    home.spawn("web");
    assert!(deliverers(&home).is_empty(), "nothing to deliver yet");
    let qemu = processes::of(&home.path()).into_iter().find(|(_, line)| line.contains("fake-qemu")).unwrap();
    processes::kill(qemu.0);
    let crash = await_taken(&receiver, 1).remove(0).json();
    assert_eq!((&crash["event"], &crash["vm_name"]), (&"vm.crashed".into(), &"web".into()));
    assert_eq!(crash["details"]["cause"], "qemu_signal");
    expect_no_deliverer(&home);
}

#[test]
fn commands_at_the_same_time_need_one_deliverer_and_keep_the_order() {
    let receiver = Receiver::start();
    let home = Home::new();
    add(&home, &receiver.url());
    let names: Vec<_> = (0..8).map(|number| format!("vm-{number}")).collect();
    for verb in ["create", "delete", "create", "delete"] {
        let all: Vec<_> = names.iter().map(|name| home.nido([verb, name]).arg("--quiet")).collect();
        let all: Vec<_> =
            all.into_iter().map(|one| if verb == "delete" { one.arg("--yes") } else { one }.start()).collect();
        all.into_iter().for_each(|one| drop(one.wait().ok()));
    }
    await_taken(&receiver, 4 * names.len());
    expect_no_deliverer(&home);
    expect_order(&receiver.messages());
    assert_eq!(receiver.messages().len(), 4 * names.len(), "nobody was killed, so nothing came twice");
}
