//! Webhooks from end to end: the real nido, the real deliverer, and endpoints of every kind.

use std::collections::{HashMap, HashSet};
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use nido_vmm::api::VmSpec;
use nido_vmm::state::VmState;
use nido_vmm::store::{BootParts, Purpose, Store, VmRow, VmUpdate};
use nido_vmm::webhook::Secret;
use serde_json::Value;

use crate::support::receiver::{Message, Receiver, Reply};
use crate::support::{Home, processes, until};

/// Adds an endpoint on loopback.
fn add(home: &Home, url: &str) -> Value {
    home.nido(["webhook", "add", "--allow-private", "--json", "--url", url]).run().ok().json()
}

fn deliveries(home: &Home) -> Vec<Value> {
    home.nido(["webhook", "deliveries", "--json"]).run().ok().json()["deliveries"].as_array().unwrap().clone()
}

fn remove(home: &Home, webhook: &Value) {
    home.nido(["webhook", "remove", webhook["id"].as_str().unwrap()]).run().ok();
}

/// Makes a VM that never runs: one event.
fn create(home: &Home, name: &str) {
    home.nido(["create", name, "--accel", "tcg"]).run().ok();
}

/// The deliverers that live.
fn deliverers(home: &Home) -> Vec<rustix::process::Pid> {
    let all = processes::of(&home.path());
    all.into_iter().filter(|(_, line)| line.trim_end().ends_with(" deliver")).map(|(pid, _)| pid).collect()
}

fn expect_no_deliverer(home: &Home) {
    until("the end of the deliverer", || deliverers(home).is_empty().then_some(()));
}

/// Waits until the messages of so many events were taken.
fn await_taken(receiver: &Receiver, count: usize) -> Vec<Message> {
    until(&format!("{count} messages"), || (distinct(&receiver.messages()).len() >= count).then_some(()));
    receiver.messages().into_iter().filter(|message| message.taken).collect()
}

fn distinct(messages: &[Message]) -> HashSet<String> {
    messages.iter().filter(|message| message.taken).map(|message| message.header("webhook-id").to_owned()).collect()
}

/// Expects that what is about one VM came in order, whatever came twice.
fn expect_order(messages: &[Message]) {
    let mut last: HashMap<String, u64> = HashMap::new();
    let mut seen = HashSet::new();
    for message in messages {
        let id = message.header("webhook-id");
        let cursor: u64 = id.rsplit('_').next().unwrap().parse().unwrap();
        let vm = message.json()["details"]["vm_id"].as_str().unwrap().to_owned();
        if seen.insert(id.to_owned()) {
            let before = last.insert(vm, cursor).unwrap_or(0);
            assert!(before < cursor, "{cursor} came behind {before}");
        }
    }
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
    let secret = Secret::parse(webhook["secret"].as_str().unwrap()).unwrap();
    for message in &messages {
        let (id, at) = (message.header("webhook-id"), message.header("webhook-timestamp").parse().unwrap());
        assert_eq!(message.header("webhook-signature"), secret.sign(id, at, &message.body));
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
fn an_endpoint_that_fails_in_every_way_gets_everything_in_the_end() {
    let receiver = Receiver::start();
    let home = Home::new();
    let webhook = add(&home, &receiver.url());
    let elsewhere = format!("location: {}\r\n", receiver.url());
    let failures = [
        (Reply::status(500, ""), "answered 500"),
        (Reply::status(301, &elsewhere), "redirects are not followed"),
        (Reply::status(404, ""), "answered 404"),
        (Reply::Last(String::new()), "no answer: connection closed"),
        (Reply::Last("HTTP/1.1 20".into()), "no answer: "),
        (Reply::Last("SSH-2.0-OpenSSH_9.2\r\n\r\n".into()), "no answer: "),
        (Reply::Last(format!("HTTP/1.1 200 OK\r\n{}\r\n", "x: y\r\n".repeat(1000))), "no answer: "),
        (Reply::Last(format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "y".repeat(1 << 20))), "no answer: "),
    ];
    receiver.reply([failures[0].0.clone()]);
    create(&home, "web");
    home.nido(["delete", "web", "--yes"]).run().ok();
    for (at, (_, why)) in failures.iter().enumerate() {
        let failed = until(why, || {
            let first = deliveries(&home).swap_remove(0);
            first["last_error"].as_str().is_some_and(|error| error.contains(why)).then_some(first)
        });
        assert_eq!((&failed["state"], &failed["event"]), (&"pending".into(), &"vm.created".into()));
        receiver.reply(failures.get(at + 1).map(|(reply, _)| reply.clone()));
        home.nido(["webhook", "redeliver", &failed["id"].to_string()]).run().ok();
    }
    await_taken(&receiver, 2);
    expect_order(&receiver.messages());
    expect_no_deliverer(&home);
    // An answer that never ends is an answer, and what it says is not kept.
    let endless = format!("HTTP/1.1 200 OK\r\ncontent-length: 999999999\r\n\r\n{}", "y".repeat(1 << 20));
    receiver.reply([Reply::Say(endless)]);
    create(&home, "endless");
    until("its delivery", || (deliveries(&home).last().unwrap()["state"] == "delivered").then_some(()));
    let first = deliveries(&home).swap_remove(0);
    assert!(first["message_id"].as_str().unwrap().starts_with(&format!("msg_{}_", webhook["id"].as_str().unwrap())));
    let ids: HashSet<_> = receiver.messages()[..9].iter().map(|it| it.header("webhook-id").to_owned()).collect();
    assert_eq!(ids, HashSet::from([first["message_id"].as_str().unwrap().to_owned()]), "the id is that of the message");
}

#[test]
fn an_endpoint_is_left_alone_for_as_long_as_it_asks() {
    let receiver = Receiver::start();
    let home = Home::new();
    let webhook = add(&home, &receiver.url());
    receiver.reply([Reply::status(429, "retry-after: 3600\r\n")]);
    create(&home, "web");
    let waits = until("the delivery to fail", || {
        Some(deliveries(&home).swap_remove(0)).filter(|delivery| delivery["last_status"] == 429)
    });
    let next: jiff::Timestamp = waits["next_at"].as_str().unwrap().parse().unwrap();
    assert!((3500..3700).contains(&next.duration_since(jiff::Timestamp::now()).as_secs()));
    // Tried again by itself, without anybody's help, after a second or so.
    receiver.reply([Reply::status(503, "retry-after: 1\r\n")]);
    home.nido(["webhook", "redeliver", &waits["id"].to_string()]).run().ok();
    await_taken(&receiver, 1);
    assert_eq!(receiver.messages().len(), 3);
    remove(&home, &webhook);
}

#[test]
fn an_endpoint_that_is_gone_is_not_asked_again() {
    let receiver = Receiver::start();
    let home = Home::new();
    let webhook = add(&home, &receiver.url());
    receiver.reply([Reply::status(410, "")]);
    create(&home, "web");
    home.nido(["delete", "web", "--yes"]).run().ok();
    let disabled = until("the end of it", || {
        let list = home.nido(["webhook", "list", "--json"]).run().ok().json();
        list["webhooks"][0]["disabled"].as_str().map(str::to_owned)
    });
    assert!(disabled.contains("410"));
    expect_no_deliverer(&home);
    assert_eq!(receiver.messages().len(), 1);
    create(&home, "later");
    let after = deliveries(&home);
    assert!(!after.is_empty() && after.iter().all(|delivery| delivery["state"] == "failed"), "{after:?}");
    home.nido(["webhook", "redeliver", "1", "--json"]).run().fails(2, "webhook_invalid");
    assert!(home.nido(["webhook", "list"]).run().ok().text().contains("disabled: "));
    remove(&home, &webhook);
    home.nido(["webhook", "remove", webhook["id"].as_str().unwrap(), "--json"]).run().fails(1, "webhook_not_found");
}

#[test]
fn an_endpoint_that_hangs_delays_no_other_and_is_given_up_after_a_while() {
    let (slow, quick) = (Receiver::start(), Receiver::start());
    let home = Home::new();
    slow.hang();
    let stuck = add(&home, &slow.url());
    add(&home, &quick.url());
    let began = Instant::now();
    for number in 0..12 {
        create(&home, &format!("vm-{number}"));
    }
    await_taken(&quick, 12);
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
    assert_eq!(slow.messages().len(), 8, "so many at the same time and no more");
    let failed = until("an attempt to time out", || {
        deliveries(&home).into_iter().find(|delivery| delivery["last_error"].is_string())
    });
    assert_eq!(failed["last_error"], "no answer within 15 s");
    // With the endpoint go its deliveries, those under way included.
    let removed = Instant::now();
    remove(&home, &stuck);
    expect_no_deliverer(&home);
    assert!(removed.elapsed() < Duration::from_secs(10));
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
    // As after a restart of the host: nothing lives, and somebody runs nido.
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
fn an_endpoint_of_the_own_network_is_refused_unless_that_is_wanted() {
    let home = Home::bare();
    for url in [
        "http://example.com/",
        "https://127.0.0.1/",
        "https://localhost/",
        "https://[::1]:8443/",
        "https://[::ffff:169.254.169.254]/",
        "https://10.1.2.3/",
        "https://0x7f000001/",
        "https://user:geheim@example.com/",
        "file:///etc/passwd",
        "nonsense",
    ] {
        let problem = home.nido(["webhook", "add", "--json", "--url", url]).run().fails(2, "webhook_invalid");
        assert!(problem["hint"].is_string() && !problem.to_string().contains("geheim"), "{url}: {problem}");
    }
    home.nido(["webhook", "add", "--event", "vm.exploded", "--url", "https://1.1.1.1/"]).run().exits(2);
    home.nido(["webhook", "add", "--format", "smoke", "--url", "https://1.1.1.1/"]).run().exits(2);
    assert_eq!(home.nido(["webhook", "ls", "--json"]).run().ok().json(), serde_json::json!({ "webhooks": [] }));
    home.nido(["webhook", "deliveries", "nobody", "--json"]).run().fails(1, "webhook_not_found");
    home.nido(["webhook", "test", "nobody", "--json"]).run().fails(1, "webhook_not_found");
    home.nido(["webhook", "redeliver", "7", "--json"]).run().fails(1, "webhook_not_found");
    assert_eq!(
        home.nido(["webhook", "deliveries", "--json"]).run().ok().json(),
        serde_json::json!({ "deliveries": [] })
    );
}

#[test]
fn a_secret_is_told_once_and_then_kept() {
    let receiver = Receiver::start();
    let home = Home::new();
    let wrong = home.nido(["webhook", "add", "--json", "--url", "https://1.1.1.1/", "--secret", "whsec_geheim"]).run();
    assert!(!wrong.fails(2, "webhook_invalid").to_string().contains("geheim"));
    let given = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let url = receiver.url();
    let arguments = ["webhook", "add", "--allow-private", "--url", &url, "--secret", given];
    let id = home.nido(arguments).run().ok().text().trim().to_owned();
    let told = home
        .nido(["webhook", "add", "--allow-private", "-vv", "--event", "vm.created,vm.deleted", "--url", &url])
        .run()
        .ok();
    let made = told.text().lines().nth(1).unwrap().to_owned();
    assert!(made.starts_with("whsec_") && Secret::parse(&made).is_ok());
    create(&home, "web");
    await_taken(&receiver, 2);
    expect_no_deliverer(&home);
    let mut said = told.stderr;
    for verb in ["list", "deliveries"] {
        for flag in ["--json", "-vv", "-q"] {
            let ran = home.nido(["webhook", verb, flag]).run().ok();
            said.push_str(ran.text());
            said.push_str(&ran.stderr);
        }
    }
    said.push_str(home.nido(["webhook", "test", &id, "-vv"]).run().ok().text());
    for log in std::fs::read_dir(home.path().join("logs")).unwrap() {
        said.push_str(&std::fs::read_to_string(log.unwrap().path()).unwrap());
    }
    assert!(said.contains(&id) && !said.contains(given) && !said.contains(&made) && !said.contains("whsec_"));
    let mode = std::fs::metadata(home.path().join("nido.db")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_test_message_tells_how_it_fared() {
    let receiver = Receiver::start();
    let home = Home::bare();
    let webhook = add(&home, &receiver.url());
    let id = webhook["id"].as_str().unwrap();
    let test = home.nido(["webhook", "test", id, "--json"]).run().ok().json();
    assert_eq!((&test["delivered"], &test["status"], &test["error"]), (&true.into(), &200.into(), &Value::Null));
    let message = receiver.messages().pop().unwrap();
    assert_eq!(message.header("webhook-id"), test["message_id"].as_str().unwrap());
    let secret = Secret::parse(webhook["secret"].as_str().unwrap()).unwrap();
    let at = message.header("webhook-timestamp").parse().unwrap();
    assert_eq!(message.header("webhook-signature"), secret.sign(message.header("webhook-id"), at, &message.body));
    assert_eq!((&message.json()["event"], &message.json()["vm_name"]), (&"webhook.test".into(), &Value::Null));
    receiver.reply([Reply::status(500, "")]);
    let failed = home.nido(["webhook", "test", id]).run().exits(1);
    assert!(failed.text().starts_with("failed: the endpoint answered 500, "), "{}", failed.text());
    let slack = home
        .nido(["webhook", "add", "--allow-private", "--json", "--format", "slack", "--url", &receiver.url()])
        .run()
        .ok()
        .json();
    home.nido(["webhook", "test", slack["id"].as_str().unwrap()]).run().ok();
    assert_eq!(
        receiver.messages().pop().unwrap().json(),
        serde_json::json!({ "text": "*webhook.test* a test message of nido" })
    );
    assert!(deliveries(&home).is_empty());
}

/// How quickly a full outbox is emptied, and what memory that takes. Not part of every run: it is about time.
#[test]
#[ignore = "measures"]
fn ten_thousand_deliveries_drain_quickly_in_little_memory() {
    const COUNT: usize = 10_000;
    for vms in [1, 1000] {
        let receiver = Receiver::start();
        let home = Home::new();
        add(&home, &receiver.url());
        fill(&home, vms, COUNT);
        let began = Instant::now();
        let deliverer = home.nido(["--home"]).arg(home.path()).arg("deliver").start();
        until("the deliverer", || deliverers(&home).pop());
        let mut peak_kib = 0;
        let status = || {
            let pid = deliverers(&home).pop()?;
            std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).ok()
        };
        while let Some(status) = status() {
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0 kB");
            let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
            peak_kib = peak_kib.max(kib);
            std::thread::sleep(Duration::from_millis(100));
        }
        deliverer.wait().ok();
        let took = began.elapsed();
        let messages = receiver.messages();
        assert_eq!(messages.len(), COUNT);
        expect_order(&messages);
        let rate = COUNT as f64 / took.as_secs_f64();
        println!("{COUNT} deliveries about {vms} VMs: {rate:.0}/s, peak {peak_kib} KiB");
        assert!(rate > 500.0 && peak_kib < 64 << 10);
    }
}

/// Queues so many deliveries, about so many VMs in turn, as if nobody had delivered meanwhile.
fn fill(home: &Home, vms: usize, count: usize) {
    let store = Store::open(&home.path().join("nido.db")).unwrap();
    let parts = BootParts {
        vmlinux: String::new(),
        initramfs: String::new(),
        root: String::new(),
        root_bytes: 1,
        packages: String::new(),
        init: nido_images::Init::Agent,
        append: String::new(),
        frozen: Vec::new(),
    };
    let ids: Vec<_> = (0..vms).map(|number| format!("vm-{number}")).collect();
    let rounds = count / vms;
    for round in 0..rounds {
        for id in &ids {
            let spec = VmSpec::named(id.parse().unwrap());
            let state = if round % 2 == 0 { VmState::Running } else { VmState::Paused };
            match round {
                0 => store.insert_vm(&VmRow::new(id.clone(), spec, Purpose::Use, state, parts.clone(), 1)).unwrap(),
                _ if round == rounds - 1 => store.remove_vm(id).unwrap(),
                _ => store.update_vm(id, &VmUpdate { state: Some(state), ..VmUpdate::default() }).unwrap(),
            }
        }
    }
}
