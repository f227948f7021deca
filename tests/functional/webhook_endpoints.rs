//! Endpoints of webhooks: how they may fail, which are refused, and what is reported about them.

use std::collections::HashSet;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use nido_api::WebhookSecret;
use serde_json::Value;

use super::webhooks::{add, await_taken, create, deliveries, expect_no_deliverer, expect_order, remove};
use crate::support::receiver::{Message, Receiver, Reply};
use crate::support::run::Nido;
use crate::support::{Home, until};

#[test]
fn an_endpoint_that_fails_in_every_way_gets_everything_in_the_end() {
    let receiver = Receiver::start();
    let home = Home::new();
    let webhook = add(&home, &receiver.url());
    let elsewhere = format!("location: {}\r\n", receiver.url());
    let failures = [
        (Reply::status(500, ""), "responded 500"),
        (Reply::status(301, &elsewhere), "redirects are not followed"),
        (Reply::status(404, ""), "responded 404"),
        (Reply::Last(String::new()), "no response: connection closed"),
        (Reply::Last("HTTP/1.1 20".into()), "no response: "),
        (Reply::Last("SSH-2.0-OpenSSH_9.2\r\n\r\n".into()), "no response: "),
        (Reply::Last(format!("HTTP/1.1 200 OK\r\n{}\r\n", "x: y\r\n".repeat(1000))), "no response: "),
        (Reply::Last(format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "y".repeat(1 << 20))), "no response: "),
    ];
    // Always, for the delivery worker retries by itself, too.
    receiver.always(Some(failures[0].0.clone()));
    create(&home, "web");
    home.nido(["delete", "web", "--yes"]).run().ok();
    let mut before = 0;
    for (at, (_, why)) in failures.iter().enumerate() {
        until("another attempt", || (receiver.messages().len() > before).then_some(()));
        let failed = until(why, || {
            let first = deliveries(&home).swap_remove(0);
            first["last_error"].as_str().is_some_and(|error| error.contains(why)).then_some(first)
        });
        assert_eq!((&failed["state"], &failed["event"]), (&"pending".into(), &"vm.created".into()));
        receiver.always(failures.get(at + 1).map(|(reply, _)| reply.clone()));
        before = receiver.messages().len();
        home.nido(["webhook", "redeliver", &failed["id"].to_string()]).run().ok();
    }
    await_taken(&receiver, 2);
    expect_order(&receiver.messages());
    expect_no_deliverer(&home);
    // A response that never ends is a response, and its body is not kept.
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
fn retry_after_of_an_endpoint_is_respected() {
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
    // So it is about other VMs, and no other endpoint is delayed.
    let other = Receiver::start();
    let second = add(&home, &other.url());
    for vm in ["a", "b", "c"] {
        create(&home, vm);
    }
    await_taken(&other, 3);
    assert_eq!(receiver.messages().len(), 1);
    remove(&home, &second);
    // Retried automatically after about a second.
    receiver.reply([Reply::status(503, "retry-after: 1\r\n")]);
    home.nido(["webhook", "redeliver", &waits["id"].to_string()]).run().ok();
    await_taken(&receiver, 4);
    remove(&home, &webhook);
}

#[test]
fn slack_gets_its_message_format() {
    let home = Home::new();
    let format = |url: &str, more: &[&str]| {
        let add = ["webhook", "add", "--json", "--event", "vm.crashed", "--url", url];
        let added = more.iter().copied().fold(home.nido(add), Nido::arg).run().ok().json();
        home.nido(["webhook", "remove", added["id"].as_str().unwrap()]).run().ok();
        added["format"].as_str().unwrap().to_owned()
    };
    assert_eq!(format("https://hooks.slack.com/services/T/B/x", &[]), "slack");
    assert_eq!(format("https://hooks.slack.com/services/T/B/x", &["--format", "standard"]), "standard");
    assert_eq!(format("https://hooks.slack.com.example.com/", &[]), "standard");
    let pagerduty = "https://events.eu.pagerduty.com/v2/enqueue";
    assert_eq!(format(pagerduty, &["--secret", KEY]), "pagerduty");
}

const KEY: &str = "0123456789abcdef0123456789abcdef";

#[test]
fn pagerduty_gets_an_alert_for_a_crash_and_its_end() {
    let receiver = Receiver::start();
    let home = Home::new();
    let url = receiver.url();
    let add = ["webhook", "add", "--allow-private", "--json", "--format", "pagerduty", "--url", &url];
    let problem = home.nido(add).run().fails(2, "webhook_invalid");
    assert!(problem["hint"].as_str().unwrap().contains("secret"), "{problem}");
    home.nido(add).arg("--secret").arg("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").run().fails(2, "webhook_invalid");
    let added = home.nido(add).arg("--secret").arg(KEY).run().ok().json();
    let events = serde_json::json!(["vm.started", "vm.deleted", "vm.crashed"]);
    assert_eq!((&added["format"], &added["events"]), (&"pagerduty".into(), &events));
    home.nido(["create", "web", "--accel", "tcg"]).run().ok();
    home.qemu("panic-after-ms:0;no-agent");
    home.nido(["start", "web", "--timeout", "5s"]).run();
    home.nido(["delete", "web", "--force", "--yes"]).run().ok();
    let messages = await_taken(&receiver, 2);
    let [trigger, resolve] = [&messages[0], &messages[1]].map(Message::json);
    assert_eq!((&trigger["routing_key"], &trigger["event_action"]), (&KEY.into(), &"trigger".into()), "{trigger}");
    assert_eq!((&trigger["payload"]["source"], &trigger["payload"]["severity"]), (&"web".into(), &"critical".into()));
    assert_eq!((&resolve["event_action"], &resolve["dedup_key"]), (&"resolve".into(), &trigger["dedup_key"]));
    assert!(messages[0].headers.iter().all(|(name, _)| name != "webhook-signature"));
    remove(&home, &added);
}

#[test]
fn an_endpoint_that_returns_410_is_disabled() {
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
    let doctor = home.nido(["doctor", "--json"]).run().json();
    let check = doctor["checks"].as_array().unwrap().iter().find(|check| check["name"] == "webhooks").unwrap();
    assert_eq!(check["status"], "warning", "{check}");
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
    assert_eq!(failed["last_error"], "no response within 15 s");
    // With the endpoint go its deliveries, those under way included.
    let removed = Instant::now();
    remove(&home, &stuck);
    expect_no_deliverer(&home);
    assert!(removed.elapsed() < Duration::from_secs(10));
}

#[test]
fn private_endpoints_are_refused_unless_allowed() {
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
fn a_secret_is_returned_only_once() {
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
    assert!(made.starts_with("whsec_") && WebhookSecret::parse(&made).is_ok());
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
fn a_test_message_reports_its_result() {
    let receiver = Receiver::start();
    let home = Home::bare();
    let webhook = add(&home, &receiver.url());
    let id = webhook["id"].as_str().unwrap();
    let mut listed = home.nido(["webhook", "list", "--json"]).run().ok().json()["webhooks"][0].clone();
    listed["secret"] = webhook["secret"].clone();
    assert_eq!(listed, webhook, "what is told of it at first is told of it later, but for the secret");
    let test = home.nido(["webhook", "test", id, "--json"]).run().ok().json();
    assert_eq!((&test["delivered"], &test["status"], &test["error"]), (&true.into(), &200.into(), &Value::Null));
    let message = receiver.messages().pop().unwrap();
    assert_eq!(message.header("webhook-id"), test["message_id"].as_str().unwrap());
    let secret = WebhookSecret::parse(webhook["secret"].as_str().unwrap()).unwrap();
    let at = message.header("webhook-timestamp").parse().unwrap();
    assert_eq!(
        message.header("webhook-signature"),
        secret.sign(message.header("webhook-id"), at, &message.body).unwrap()
    );
    assert_eq!((&message.json()["event"], &message.json()["vm_name"]), (&"webhook.test".into(), &Value::Null));
    receiver.reply([Reply::status(500, "")]);
    let failed = home.nido(["webhook", "test", id]).run().exits(1);
    assert!(failed.text().starts_with("failed: the endpoint responded 500, "), "{}", failed.text());
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
