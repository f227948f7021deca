//! The network of a VM and its rules, from every front end to the store and back.

use serde_json::{Value, json};

use crate::support::Home;
use crate::support::http::Server;
use crate::support::mcp::{Client, Era};

const RESTRICTED: [&str; 6] =
    ["--net", "restricted", "--allow", "Example.com:443", "--allow", "[2001:db8::/32]:53/udp"];

fn rules() -> Value {
    json!(["example.com:443", "[2001:db8::/32]:53/udp"])
}

#[test]
fn rules_are_stored_and_shown_until_the_vm_is_deleted() {
    let home = Home::new();
    let spawn =
        RESTRICTED.iter().fold(home.nido(["spawn", "web", "--json", "--accel", "tcg"]), |nido, word| nido.arg(*word));
    let made = spawn.run().ok().json();
    assert_eq!((&made["net"], &made["allow"]), (&json!("restricted"), &rules()));
    let shown = home.nido(["info", "web"]).run().ok().text().to_owned();
    for line in ["restricted", "example.com:443", "[2001:db8::/32]:53/udp"] {
        assert!(shown.lines().any(|shown| shown.ends_with(&format!(" {line}"))), "{shown}");
    }
    home.nido(["restart", "web"]).run().ok();
    home.nido(["stop", "web", "--force"]).run().ok();
    home.nido(["start", "web"]).run().ok();
    assert_eq!(home.info("web")["allow"], rules());
    assert_eq!(home.info("web")["net"], "restricted");
    home.spawn("plain");
    assert!(home.info("plain").get("allow").is_none());
}

#[test]
fn a_copy_of_a_vm_has_its_rules() {
    let home = Home::new();
    home.qemu("migrates");
    let spawn =
        RESTRICTED.iter().fold(home.nido(["spawn", "web", "--json", "--accel", "tcg"]), |nido, word| nido.arg(*word));
    spawn.run().ok();
    home.nido(["fork", "web", "copy"]).run().ok();
    let copy = home.info("copy");
    assert_eq!((&copy["net"], &copy["allow"]), (&json!("restricted"), &rules()));
}

#[test]
fn rules_that_the_network_cannot_have_are_refused() {
    let home = Home::new();
    for (flags, words) in [
        (&["--net", "none", "--allow", "host:80"][..], "without a network"),
        (&["--allow", "10.0.0.0/8", "--allow", "example.com"], "allow[1]"),
        (&["--net", "nat", "--allow", "*.example.com"], "all other names"),
    ] {
        let nido = flags.iter().fold(home.nido(["create", "web", "--json"]), |nido, flag| nido.arg(*flag));
        let problem = nido.run().fails(2, "spec_invalid");
        assert!(problem["detail"].as_str().unwrap().contains(words), "{problem}");
        assert!(problem["hint"].as_str().unwrap().contains("restricted"), "{problem}");
    }
    let many: Vec<_> = (1..=257).map(|port| format!("host:{port}")).collect();
    let nido = many.iter().fold(home.nido(["create", "web", "--json"]), |nido, rule| nido.arg("--allow").arg(rule));
    nido.run().fails(2, "spec_invalid");
    home.nido(["create", "web", "--allow", "host:8080", "--allow", "10.0.0.0/8:*"]).run().ok();
    assert_eq!(home.info("web")["allow"], json!(["host:8080", "10.0.0.0/8:*"]));
}

#[test]
fn a_rule_that_allows_more_than_it_seems_to_has_a_warning() {
    let home = Home::new();
    let made = home.nido(["create", "web", "--net", "restricted", "--allow", "*.github.io"]).run().ok();
    assert!(made.stderr.contains("warning: rule '*.github.io'"), "{}", made.stderr);
    assert!(home.info("web")["warnings"][0].as_str().unwrap().contains("*.github.io"));
}

#[test]
fn rules_are_accepted_over_rest() {
    let home = Home::new();
    let server = Server::start(&home);
    let vm = |net: &str, allow: Value| json!({"name": "web", "start": false, "net": net, "allow": allow});
    for (net, rule, words) in [
        ("restricted", "@nothing", "there is no preset '@nothing'"),
        ("restricted", "example.com:http", "for example example.com:443"),
        ("nat", "example.com", "allow[0]: with net nat"),
        ("none", "host:80", "without a network"),
    ] {
        let problem = server.post("/v1/vms", &vm(net, json!([rule]))).problem(422, "spec_invalid");
        assert!(problem["detail"].as_str().unwrap().contains(words), "{problem}");
    }
    let made = server.post("/v1/vms", &vm("restricted", rules())).ok(201);
    assert_eq!((&made["net"], &made["allow"]), (&json!("restricted"), &rules()));
    assert_eq!(server.get("/v1/vms/web").ok(200)["allow"], rules());
}

#[test]
fn rules_are_accepted_over_mcp() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Modern);
    let wrong = json!({"name": "web", "accel": "tcg", "net": "restricted", "allow": ["*.com"]});
    client.bad("vm_spawn", wrong, "spec_invalid");
    client.bad("vm_create", json!({"name": "web", "net": "none", "allow": ["host:80"]}), "spec_invalid");
    client.good("vm_spawn", json!({"name": "web", "accel": "tcg", "net": "restricted", "allow": rules()}));
    assert_eq!(home.info("web")["allow"], rules());
    // A call that names no network has this one.
    client.good("vm_create", json!({"name": "plain", "allow": ["example.com"]}));
    assert_eq!(
        (&home.info("plain")["net"], &home.info("plain")["allow"]),
        (&json!("restricted"), &json!(["example.com"]))
    );
    // The same request again is the same VM.
    client.good("vm_spawn", json!({"name": "web", "accel": "tcg", "net": "restricted", "allow": rules()}));
    client.bad("vm_spawn", json!({"name": "web", "accel": "tcg", "net": "restricted"}), "vm_exists");
    let run = json!({"argv": ["true"], "accel": "tcg", "net": "restricted", "allow": ["example.com"]});
    assert_eq!(client.good("vm_run", run)["exit_code"], 0);
}
