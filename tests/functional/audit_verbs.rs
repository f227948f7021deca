//! The audit log of the command line: which verbs of the real `nido` are in it, beside those that act upon a VM itself.

use std::fs;
use std::net::TcpListener;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Home, Nido};

/// Tool, result and reason of every outcome, with its arguments; each has its attempt.
fn outcomes(home: &Home) -> Vec<([String; 3], Value)> {
    let records = home.nido(["audit", "show", "--json"]).run().ok().json()["records"].as_array().unwrap().clone();
    let is = |line: &Value, stage: &str| line["stage"] == stage;
    for end in records.iter().filter(|line| is(line, "outcome")) {
        let begin = records.iter().find(|line| is(line, "attempt") && line["id"] == end["id"]).expect("an attempt");
        assert_eq!(begin["params"], end["params"]);
    }
    let ends = records.iter().filter(|line| is(line, "outcome"));
    let word = |line: &Value, key: &str| line[key].as_str().unwrap_or_default().to_owned();
    ends.map(|line| (["tool", "result", "reason"].map(|key| word(line, key)), line["params"].clone())).collect()
}

#[test]
fn changes_of_tokens_and_webhooks_are_recorded() {
    let home = Home::new();
    let made = home.nido(["token", "create", "--name", "ci", "--scope", "run", "--expires", "1h", "--json"]).run();
    let made = made.ok().json();
    let (id, token) = (made["id"].as_str().unwrap(), made["token"].as_str().unwrap());
    // A token that is given as its name is not written to the log.
    home.nido(["token", "revoke", token, "--json"]).run().fails(1, "token_not_found");
    home.nido(["token", "revoke", id]).run().ok();
    home.nido(["token", "revoke", "ci", "--json"]).run().fails(1, "token_not_found");
    let url = "http://127.0.0.1:9/s3cr3t";
    let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let add =
        ["webhook", "add", "--allow-private", "--event", "vm.crashed", "--url", url, "--secret", secret, "--json"];
    let webhook = home.nido(add).run().ok().json()["id"].as_str().unwrap().to_owned();
    home.nido(["webhook", "remove", &webhook]).run().ok();
    home.nido(["webhook", "remove", &webhook, "--json"]).run().fails(1, "webhook_not_found");
    let expected = [
        (
            "token_create",
            "",
            json!({"name": "ci", "scope": "run", "only": null, "expires_in_ms": 3_600_000, "limits": {}}),
        ),
        ("token_revoke", "token_not_found", json!({"name": {"bytes": token.len()}})),
        ("token_revoke", "", json!({"name": "ci", "id": id})),
        ("token_revoke", "token_not_found", json!({"name": "ci"})),
        (
            "webhook_add",
            "",
            json!({"url": "http://127.0.0.1:9/[redacted: 7 bytes]", "events": ["vm.crashed"], "format": null, "allow_private": true}),
        ),
        ("webhook_remove", "", json!({"id": webhook})),
        ("webhook_remove", "webhook_not_found", json!({"id": webhook})),
    ];
    let expected = expected.map(|(tool, reason, params)| {
        let result = if reason.is_empty() { "success" } else { "error" };
        ([tool, result, reason].map(str::to_owned), params)
    });
    assert_eq!(outcomes(&home), expected);
    let text = fs::read_to_string(home.path().join("audit/mcp-audit.log")).unwrap();
    assert!(!text.contains("s3cr3t") && !text.contains("whsec_") && !text.contains("nido_"), "{text}");
}

#[test]
fn cleanup_replacement_and_access_are_recorded() {
    let home = Home::new();
    home.spawn("web");
    let stray = home.path().join("vms/0123456789abcdef");
    fs::create_dir_all(&stray).unwrap();
    home.nido(["doctor"]).run();
    assert!(stray.exists() && outcomes(&home).is_empty(), "a look removes nothing");
    home.nido(["doctor", "--gc"]).run();
    assert!(!stray.exists());
    home.nido(["pool", "set", "sandbox", "0"]).run().ok();
    home.nido(["template", "bake", "nothing", "--json"]).run().fails(1, "template_not_found");
    home.nido(["template", "export", "nothing", "--json"])
        .arg(home.scratch("file"))
        .run()
        .fails(1, "template_not_found");
    let added = home.nido(["forward", "add", "web", "7", "--json"]).run().ok().json();
    let forward = format!("{}:7", added["host_port"]);
    home.nido(["forward", "rm", "web", &forward]).run().ok();
    home.nido(["proxy", "nobody", "7", "--json"]).run().fails(1, "vm_not_found");
    let ends = outcomes(&home);
    let ended: Vec<_> = ends.iter().map(|([tool, _, reason], _)| [&**tool, &**reason]).collect();
    assert_eq!(
        ended,
        [
            ["doctor_gc", ""],
            ["pool_set", ""],
            ["template_bake", "template_not_found"],
            ["template_export", "template_not_found"],
            ["forward_add", ""],
            ["forward_remove", ""],
            ["vm_proxy", "vm_not_found"],
        ]
    );
    assert_eq!((&ends[1].1["name"], &ends[1].1["wanted"]), (&json!("sandbox"), &json!(0)));
    let there = json!({"name": "web", "host": "127.0.0.1", "host_port": added["host_port"], "guest_port": 7});
    assert_eq!(ends[5].1, there);
}

#[test]
fn an_interrupted_proxy_is_recorded() {
    let home = Home::new();
    home.spawn("web");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let proxy = home.nido(["proxy", "web"]).arg(port.to_string()).start();
    let _carried = listener.accept().unwrap();
    proxy.signal(Signal::TERM);
    proxy.wait().exits(143);
    let expected = ["vm_proxy", "unknown", "interrupted"].map(str::to_owned);
    assert_eq!(outcomes(&home), [(expected, json!({"name": "web", "guest_port": port}))]);
}

#[test]
fn without_an_audit_line_no_token_is_created_and_nothing_is_removed() {
    let home = Home::new();
    home.nido(["token", "create", "--name", "ci", "--scope", "read"]).run().ok();
    let webhook = home.nido(["webhook", "add", "--allow-private", "--url", "http://127.0.0.1:9/", "--json"]).run();
    let webhook = webhook.ok().json()["id"].as_str().unwrap().to_owned();
    let stray = home.path().join("vms/0123456789abcdef");
    fs::create_dir_all(&stray).unwrap();
    let audit = home.path().join("audit");
    fs::remove_dir_all(&audit).unwrap();
    fs::write(&audit, "no directory").unwrap();
    let verbs: [&[&str]; 6] = [
        &["token", "create", "--name", "other", "--scope", "admin"],
        &["token", "revoke", "ci"],
        &["webhook", "add", "--allow-private", "--url", "http://127.0.0.1:9/"],
        &["webhook", "remove", &webhook],
        &["doctor", "--gc"],
        &["pool", "set", "sandbox", "1"],
    ];
    for verb in verbs {
        verb.iter().copied().fold(home.nido(["--json"]), Nido::arg).run().fails(1, "audit_failed");
    }
    assert_eq!(home.nido(["token", "list", "-q"]).run().ok().text(), "ci\n");
    assert_eq!(home.nido(["webhook", "list", "-q"]).run().ok().text(), format!("{webhook}\n"));
    assert_eq!(home.nido(["pool", "ls", "-q"]).run().ok().text(), "");
    assert!(stray.exists());
    fs::remove_file(&audit).unwrap();
}
