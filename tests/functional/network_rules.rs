//! Changes of rules of a VM that exists, and what is shown of its network. Frames are sent to the network in place of QEMU.

use std::os::unix::net::UnixDatagram;

use serde_json::{Value, json};

use super::control::{pid_of, play_supervisor, vm_dir};
use crate::support::http::Server;
use crate::support::mcp::{Client, Era};
use crate::support::{Home, Nido, processes, until};

fn spawn(home: &Home, flags: &[&str]) -> String {
    let nido = home.nido(["spawn", "web", "--accel", "tcg", "--json"]);
    let made = flags.iter().fold(nido, |nido, flag| nido.arg(*flag)).run().ok().json();
    made["id"].as_str().unwrap().to_owned()
}

fn rules_of(home: &Home) -> Value {
    home.nido(["net", "show", "web", "--json"]).run().ok().json()["allow"].clone()
}

fn network(home: &Home) -> Value {
    home.nido(["net", "show", "web", "--json"]).run().ok().json()["network"].clone()
}

/// The sum of RFC 1071 over words of these bytes.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap()).to_be_bytes()
}

/// The guest's first segment of a connection to that port of the host's loopback, in an Ethernet frame.
fn syn(from: u16, to: u16) -> Vec<u8> {
    let (guest, gateway) = ([10, 0, 2, 15], [10, 0, 2, 2]);
    let mut tcp = [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff]].concat();
    tcp.extend([0; 4]);
    let sum = checksum(&[&guest[..], &gateway, &[0, 6, 0, 20], &tcp].concat());
    tcp[16..18].copy_from_slice(&sum);
    let mut ip = [&[0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0][..], &guest, &gateway].concat();
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum);
    let ethernet = [0x52, 0x54, 0, 0x12, 0x34, 0x02, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 8, 0];
    [&ethernet[..], &ip, &tcp].concat()
}

fn send(home: &Home, id: &str, frame: &[u8]) {
    let socket = UnixDatagram::unbound().unwrap();
    socket.send_to(frame, vm_dir(home, id).join("qemu/net.sock")).unwrap();
}

#[test]
fn a_running_network_follows_changes_and_shows_what_it_refused() {
    let home = Home::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let rule = format!("host:{port}");
    let id = spawn(&home, &["--net", "restricted"]);
    let shown = home.nido(["net", "show", "web", "--json"]).run().ok().json();
    assert_eq!(
        (&shown["net"], &shown["allow"], &shown["network"]["open"]),
        (&json!("restricted"), &json!([]), &json!(0))
    );
    send(&home, &id, &syn(1001, port));
    let refused = until("a refusal", || Some(network(&home)).filter(|network| network["denied"] == 1));
    assert_eq!(refused["denials"][0]["rule"], *rule);
    let text = home.nido(["net", "show", "web"]).run().ok().text().to_owned();
    assert!(text.contains(&format!("nido net allow web '{rule}' allows it")), "{text}");
    // The rule of the refusal is one that can be added.
    let changed = home.nido(["net", "allow", "web", &rule, "--json"]).run().ok().json();
    assert_eq!(changed, json!({"allow": [rule], "changed": [rule], "unchanged": []}));
    send(&home, &id, &syn(1002, port));
    let (client, _) = listener.accept().unwrap();
    until("the connection", || (network(&home)["open"] == 1).then_some(()));
    // A change that concerns others leaves it.
    home.nido(["net", "allow", "web", "example.com", "*.github.io"]).run().ok();
    home.nido(["net", "deny", "web", "example.com"]).run().ok();
    assert_eq!(network(&home)["open"], 1);
    home.nido(["net", "deny", "web", &rule]).run().ok();
    until("the end of the connection", || (network(&home)["open"] == 0).then_some(()));
    drop(client);
    send(&home, &id, &syn(1003, port));
    until("another refusal", || (network(&home)["denied"] == 2).then_some(()));
}

#[test]
fn rules_are_added_and_removed_on_the_command_line() {
    let home = Home::new();
    spawn(&home, &["--net", "restricted", "--allow", "example.com"]);
    let allow = home.nido(["net", "allow", "web", "Example.com:443,80", "host:5432", "*.github.io"]).run().ok();
    assert_eq!(allow.text(), "host:5432\n*.github.io\nexample.com (unchanged)\n");
    assert!(allow.stderr.contains("warning: rule '*.github.io'"), "{}", allow.stderr);
    assert_eq!(rules_of(&home), json!(["example.com", "host:5432", "*.github.io"]));
    assert_eq!(home.info("web")["allow"], rules_of(&home));
    // All or none.
    let problem =
        home.nido(["net", "deny", "web", "host:5432", "host:5433", "--json"]).run().fails(1, "rule_not_found");
    assert!(problem["hint"].as_str().unwrap().contains("example.com host:5432 *.github.io"), "{problem}");
    assert_eq!(home.nido(["net", "deny", "web", "example.com:80,443", "-q"]).run().ok().text(), "example.com\n");
    assert_eq!(rules_of(&home), json!(["host:5432", "*.github.io"]));
    home.nido(["net", "allow", "web", "--json"]).run().exits(2);
    home.nido(["net", "allow", "web", "@Pip", "--json"]).run().exits(2);
    home.nido(["net", "show", "nobody", "--json"]).run().fails(1, "vm_not_found");
    let many: Vec<_> = (1..=255).map(|port| format!("host:{port}")).collect();
    let nido = many.iter().fold(home.nido(["net", "allow", "web", "--json"]), Nido::arg);
    nido.run().fails(2, "spec_invalid");
    assert_eq!(rules_of(&home), json!(["host:5432", "*.github.io"]));
    // Each change has its lines in the audit log, also one that failed.
    let records = home.nido(["audit", "show", "--json"]).run().ok().json()["records"].as_array().unwrap().clone();
    let ends: Vec<_> = records.iter().filter(|line| line["stage"] == "outcome").map(|line| &line["tool"]).collect();
    assert_eq!(ends, ["net_allow", "net_deny", "net_deny", "net_allow"]);
    let arguments = json!({"name": "web", "rules": ["host:5432", "host:5433"]});
    assert!(
        records.iter().any(|line| line["params"] == arguments && line["reason"] == "rule_not_found"),
        "{records:?}"
    );
}

#[test]
fn rules_that_the_network_cannot_have_are_not_added() {
    let home = Home::new();
    spawn(&home, &["--net", "nat"]);
    let problem = home.nido(["net", "allow", "web", "host:80", "example.com", "--json"]).run().fails(2, "spec_invalid");
    assert!(problem["detail"].as_str().unwrap().contains("allow[1]"), "{problem}");
    home.nido(["net", "allow", "web", "host:80", "169.254.0.0/16"]).run().ok();
    assert_eq!(rules_of(&home), json!(["host:80", "169.254.0.0/16"]));
    home.nido(["create", "alone", "--net", "none"]).run().ok();
    for verb in ["allow", "deny"] {
        let problem = home.nido(["net", verb, "alone", "host:80", "--json"]).run().fails(2, "spec_invalid");
        assert!(problem["detail"].as_str().unwrap().contains("has no network"), "{problem}");
    }
    let shown = home.nido(["net", "show", "alone", "--json"]).run().ok().json();
    assert_eq!(shown, json!({"net": "none", "allow": []}));
}

#[test]
fn changed_rules_survive_restarts_copies_and_snapshots() {
    let home = Home::new();
    home.qemu("migrates");
    let id = spawn(&home, &["--net", "restricted", "--allow", "example.com"]);
    home.nido(["snapshot", "create", "web", "before"]).run().ok();
    home.nido(["net", "allow", "web", "host:80"]).run().ok();
    home.nido(["net", "deny", "web", "example.com"]).run().ok();
    let rules = json!(["host:80"]);
    home.nido(["fork", "web", "copy"]).run().ok();
    assert_eq!(home.info("copy")["allow"], rules);
    home.nido(["restart", "web", "--force"]).run().ok();
    assert_eq!(rules_of(&home), rules);
    home.nido(["snapshot", "restore", "web", "before"]).run().ok();
    assert_eq!(rules_of(&home), rules);
    home.nido(["stop", "web", "--force"]).run().ok();
    // A stopped VM has them from its next start; also its record, from which a lost row is made.
    home.nido(["net", "allow", "web", "host:81"]).run().ok();
    assert!(network(&home).is_null());
    let record: Value = serde_json::from_slice(&std::fs::read(vm_dir(&home, &id).join("vm.json")).unwrap()).unwrap();
    assert_eq!(record["spec"]["allow"], json!(["host:80", "host:81"]));
    home.nido(["start", "web"]).run().ok();
    send(&home, &id, &syn(1001, 82));
    until("a refusal", || (network(&home)["denials"][0]["rule"] == "host:82").then_some(()));
    assert_eq!(rules_of(&home), json!(["host:80", "host:81"]));
}

#[test]
fn of_concurrent_changes_none_is_lost() {
    let home = Home::new();
    spawn(&home, &["--net", "restricted"]);
    let rules: Vec<_> = (1..=8).map(|port| format!("host:{port}")).collect();
    let running: Vec<_> = rules.iter().map(|rule| home.nido(["net", "allow", "web", rule]).start()).collect();
    running.into_iter().for_each(|nido| drop(nido.wait().ok()));
    let mut found: Vec<_> =
        rules_of(&home).as_array().unwrap().iter().map(|rule| rule.as_str().unwrap().to_owned()).collect();
    found.sort();
    assert_eq!(found, rules);
}

#[test]
fn the_next_supervisor_has_the_rules() {
    let home = Home::new();
    let id = spawn(&home, &["--net", "restricted", "--allow", "host:80"]);
    home.nido(["net", "allow", "web", "host:81"]).run().ok();
    processes::kill(pid_of(&home, " supervise "));
    // The command starts the next one.
    home.nido(["net", "deny", "web", "host:80"]).run().ok();
    assert_eq!(rules_of(&home), json!(["host:81"]));
    send(&home, &id, &syn(1001, 80));
    until("a refusal", || (network(&home)["denials"][0]["rule"] == "host:80").then_some(()));
}

#[test]
fn an_older_supervisor_keeps_its_rules_until_the_next_start() {
    let home = Home::new();
    let id = spawn(&home, &["--net", "restricted"]);
    let older =
        play_supervisor(&home, &id, &[r#"{"version":2,"answer":"unsupported","supported":2,"why":"apply_rules"}"#]);
    let problem = home.nido(["net", "allow", "web", "host:80", "--json"]).run().fails(1, "vm_busy");
    assert!(problem["detail"].as_str().unwrap().contains("apply only from its next start"), "{problem}");
    assert!(problem["hint"].as_str().unwrap().contains("nido restart web"), "{problem}");
    assert_eq!(older.join().unwrap(), [json!({"version": 2, "op": "apply_rules"})]);
    assert_eq!(home.info("web")["allow"], json!(["host:80"]));
    processes::end_all(&home.path());
}

#[test]
fn rules_are_changed_over_rest() {
    let home = Home::new();
    spawn(&home, &["--net", "restricted"]);
    let server = Server::start(&home);
    let rules = |allow: Value| json!({ "allow": allow });
    let added =
        server.post("/v1/vms/web/network/rules", &rules(json!(["[2001:DB8::/32]:53/udp", "*.example.com:*"]))).ok(200);
    let all = json!(["[2001:db8::/32]:53/udp", "*.example.com:*"]);
    assert_eq!((&added["allow"], &added["changed"], &added["unchanged"]), (&all, &all, &json!([])));
    let shown = server.get("/v1/vms/web/network").ok(200);
    assert_eq!((&shown["net"], &shown["allow"], &shown["network"]["denied"]), (&json!("restricted"), &all, &json!(0)));
    let again = server.post("/v1/vms/web/network/rules", &rules(json!(["*.example.com:*"]))).ok(200);
    assert_eq!((&again["changed"], &again["unchanged"]), (&json!([]), &json!(["*.example.com:*"])));
    let delete = |rule: &str| server.send("DELETE", &format!("/v1/vms/web/network/rules/{rule}"), &[], b"");
    let removed = delete("%5B2001:db8::%2F32%5D:53%2Fudp").ok(200);
    assert_eq!(
        (&removed["allow"], &removed["changed"]),
        (&json!(["*.example.com:*"]), &json!(["[2001:db8::/32]:53/udp"]))
    );
    let problem = delete("host:80").problem(404, "rule_not_found");
    assert!(problem["hint"].as_str().unwrap().contains("*.example.com:*"), "{problem}");
    delete("@Pip").problem(422, "spec_invalid");
    for (body, code) in
        [(json!({}), "spec_invalid"), (rules(json!([])), "spec_invalid"), (rules(json!(["*.com"])), "spec_invalid")]
    {
        server.post("/v1/vms/web/network/rules", &body).problem(422, code);
    }
    server.get("/v1/vms/nobody/network").problem(404, "vm_not_found");
}

#[test]
fn callers_change_rules_only_within_their_scope_and_limits() {
    let home = Home::new();
    spawn(&home, &["--net", "nat"]);
    let server = Server::start(&home);
    let token = |name: &str, flags: &[&str]| {
        let create = home.nido(["token", "create", "--json", "--name", name]);
        let made = flags.iter().fold(create, |nido, flag| nido.arg(*flag)).run().ok().json();
        format!("Bearer {}", made["token"].as_str().unwrap())
    };
    let send = |token: &str, method: &str, path: &str, body: &str| {
        let headers = [("authorization", token), ("content-type", "application/json")];
        server.plain(method, &format!("/v1/vms/web/network{path}"), &headers, body.as_bytes())
    };
    let (read, limited) =
        (token("read", &["--scope", "read"]), token("run", &["--scope", "run", "--net", "restricted"]));
    let body = r#"{"allow": ["host:80"]}"#;
    send(&read, "GET", "", "").ok(200);
    send(&read, "POST", "/rules", body).problem(403, "denied");
    send(&read, "DELETE", "/rules/host:80", "").problem(403, "denied");
    // As at the creation: this caller may not have a VM with this network.
    send(&limited, "POST", "/rules", body).problem(403, "denied");
    send(&token("all", &["--scope", "run"]), "POST", "/rules", body).ok(200);
    send(&limited, "DELETE", "/rules/host:80", "").ok(200);
    assert_eq!(rules_of(&home), json!([]));
}

#[test]
fn an_agent_adds_rules_only_with_a_person_s_confirmation_or_within_a_limit() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Modern);
    client.good("vm_create", json!({"name": "web", "allow": ["*.example.com", "host:8000"]}));
    let shown = client.good("vm_network", json!({"name": "web"}));
    assert_eq!((&shown["net"], &shown["allow"]), (&json!("restricted"), &json!(["*.example.com", "host:8000"])));
    // The guest reaches no more with it.
    client.good("vm_network", json!({"name": "web", "allow": ["a.example.com:443"]}));
    let wider = json!({"name": "web", "allow": ["example.com"]});
    let error = client.bad("vm_network", wider.clone(), "approval_required");
    assert_eq!(rules_of(&home), json!(["*.example.com", "host:8000", "a.example.com:443"]));
    home.nido(["approve", error["approval_id"].as_str().unwrap(), "--yes"]).run().ok();
    assert_eq!(client.good("vm_network", wider)["allow"][3], "example.com");
    // What is removed is not: it would have to be confirmed again.
    let left = client.good("vm_network", json!({"name": "web", "deny": ["example.com", "host:8000"]}));
    assert_eq!(left["allow"], json!(["*.example.com", "a.example.com:443"]));
    client.bad("vm_network", json!({"name": "web", "allow": ["host:8000"]}), "approval_required");
    // What would fail is not asked about.
    client.bad("vm_network", json!({"name": "web", "deny": ["host:8000"]}), "rule_not_found");
    client.bad("vm_network", json!({"name": "web", "allow": ["@nothing"]}), "spec_invalid");
    client.bad("vm_network", json!({"name": "web", "allow": ["x.org"], "deny": ["*.example.com"]}), "spec_invalid");
    client.bad("vm_network", json!({"name": "nobody", "allow": ["x.org"]}), "vm_not_found");
    client.good("vm_create", json!({"name": "alone", "net": "none"}));
    client.bad("vm_network", json!({"name": "alone", "allow": ["host:80"]}), "spec_invalid");
    // A VM of another caller.
    home.nido(["create", "theirs", "--net", "restricted", "--allow", "x.org"]).run().ok();
    client.good("vm_network", json!({"name": "theirs"}));
    client.bad("vm_network", json!({"name": "theirs", "deny": ["x.org"]}), "approval_required");
    // A limit covers it, or refuses it.
    let policy = home.scratch("policy.toml");
    std::fs::write(&policy, "[limits]\nallow = ['host:8000-8010']\n").unwrap();
    let mut client = Client::with(&home, Era::Modern, &["--policy", policy.to_str().unwrap()], json!({}));
    client.good("vm_network", json!({"name": "web", "allow": ["host:8001"]}));
    client.bad("vm_network", json!({"name": "web", "allow": ["example.com"]}), "denied");
    let mut client = Client::with(&home, Era::Modern, &["--read-only"], json!({}));
    assert!(!client.tools().contains_key("vm_network"));
}
