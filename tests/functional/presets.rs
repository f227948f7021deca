//! Presets of rules, and rules that bound those of VMs.

use serde_json::{Value, json};

use crate::support::http::Server;
use crate::support::mcp::{Client, Era};
use crate::support::{Home, Nido};

/// A command on a host whose pip uses an index on its loopback.
fn with_index<'a, const N: usize>(home: &'a Home, words: [&str; N]) -> Nido<'a> {
    home.nido(words).env("PIP_CONFIG_FILE", "/dev/null").env("PIP_INDEX_URL", "http://127.0.0.1:3141/simple")
}

fn preset(home: &Home) -> Value {
    home.info("web")["presets"].clone()
}

#[test]
fn a_preset_of_the_host_is_shown_added_and_removed() {
    let home = Home::new();
    let shown = with_index(&home, ["net", "presets", "pip", "--json"]).run().ok().json();
    let pip = &shown["presets"][0];
    assert_eq!((&pip["name"], &pip["source"], &pip["rules"]), (&json!("@pip"), &json!("host"), &json!(["host:3141"])));
    assert!(pip["read"].as_array().unwrap().contains(&json!("PIP_INDEX_URL")), "{pip}");
    let create = ["create", "web", "--net", "restricted", "--allow", "@pip", "--allow", "example.com"];
    with_index(&home, create).run().ok();
    let stored = json!([{"preset": "@pip", "rules": ["host:3141"]}]);
    assert_eq!((&preset(&home), &home.info("web")["allow"]), (&stored, &json!(["example.com"])));
    let text = home.nido(["net", "show", "web"]).run().ok().text().to_owned();
    assert!(text.contains("@pip: host:3141"), "{text}");
    let again = with_index(&home, ["net", "allow", "web", "@pip", "@github"]).run().ok();
    assert_eq!(again.text(), "@github\n@pip (unchanged)\n");
    assert!(again.stderr.contains("a channel out"), "{}", again.stderr);
    let problem = home.nido(["net", "deny", "web", "host:3141", "--json"]).run().fails(1, "rule_not_found");
    assert!(problem["hint"].as_str().unwrap().contains("@pip"), "{problem}");
    home.nido(["net", "deny", "web", "@pip"]).run().ok();
    assert_eq!(preset(&home).as_array().unwrap().len(), 1);
    let problem = home.nido(["net", "allow", "web", "@gihub", "--json"]).run().fails(2, "spec_invalid");
    assert!(problem["hint"].as_str().unwrap().contains("@github"), "{problem}");
    let nat = ["create", "open", "--net", "nat", "--allow", "@github", "--json"];
    home.nido(nat).run().fails(2, "spec_invalid");
}

#[test]
fn files_of_the_home_define_presets_and_a_broken_one_is_named() {
    let home = Home::new();
    home.nido(["ls"]).run().ok();
    let directory = home.path().join("presets.d");
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join("corp.toml"), "[presets.corp]\nrules = ['mirror.example.com:443']\n").unwrap();
    home.nido(["create", "web", "--net", "restricted", "--allow", "@corp"]).run().ok();
    assert_eq!(preset(&home)[0]["rules"], json!(["mirror.example.com:443"]));
    std::fs::write(directory.join("wrong.toml"), "[presets.x]\nrules = 7\n").unwrap();
    let problem = home.nido(["net", "allow", "web", "@github", "--json"]).run().fails(2, "spec_invalid");
    assert!(problem["detail"].as_str().unwrap().contains("presets.d/wrong.toml: line 2"), "{problem}");
    let list = Server::start(&home).get("/v1/network/presets").ok(200);
    assert!(list["damaged"][0].as_str().unwrap().contains("wrong.toml"), "{list}");
}

#[test]
fn rules_of_a_token_bound_those_of_vms() {
    let home = Home::new();
    let server = Server::start(&home);
    let create = ["token", "create", "--name", "ci", "--scope", "run", "--allow", "@pip", "--json"];
    let made = with_index(&home, create).arg("--allow").arg("*.example.com").run().ok().json();
    assert_eq!(made["limits"]["allow"], json!(["*.example.com", "host:3141"]));
    let bearer = format!("Bearer {}", made["token"].as_str().unwrap());
    let send = |path: &str, body: &Value| {
        let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
        server.plain("POST", path, &headers, body.to_string().as_bytes())
    };
    let vm = |net: &str, allow: Value| json!({"name": "web", "start": false, "net": net, "allow": allow});
    for (net, allow, words) in [
        ("nat", json!([]), "nat is not allowed"),
        ("restricted", json!(["example.com"]), "'example.com'"),
        ("restricted", json!(["a.example.com:22"]), "'a.example.com:22'"),
        ("restricted", json!(["@github"]), "'github.com:443'"),
    ] {
        let problem = send("/v1/vms", &vm(net, allow)).problem(403, "denied");
        assert!(problem["detail"].as_str().unwrap().contains(words), "{problem}");
    }
    send("/v1/vms", &vm("restricted", json!(["a.example.com", "host:3141"]))).ok(201);
    let rules = |allow: Value| json!({ "allow": allow });
    let problem = send("/v1/vms/web/network/rules", &rules(json!(["host:80"]))).problem(403, "denied");
    assert!(problem["hint"].as_str().unwrap().contains("*.example.com host:3141"), "{problem}");
    send("/v1/vms/web/network/rules", &rules(json!(["b.example.com:443"]))).ok(200);
    // A copy of a VM with wider rules.
    home.nido(["spawn", "wide", "--accel", "tcg", "--net", "restricted", "--allow", "x.org"]).run().ok();
    send("/v1/vms/wide/fork", &json!({"names": ["copy"]})).problem(403, "denied");
}

#[test]
fn rules_of_a_policy_bound_those_of_agents_vms() {
    let home = Home::new();
    let policy = home.scratch("policy.toml");
    std::fs::write(&policy, "[limits]\nallow = ['@github', 'host:8000-8010']\n").unwrap();
    let mut client = Client::with(&home, Era::Modern, &["--policy", policy.to_str().unwrap()], json!({}));
    client.good("vm_create", json!({"name": "web", "allow": ["@github", "host:8001"]}));
    // The same request again is the same VM.
    client.good("vm_create", json!({"name": "web", "allow": ["@github", "host:8001"]}));
    client.good("vm_create", json!({"name": "closed"}));
    client.bad("vm_create", json!({"name": "b", "allow": ["example.com"]}), "denied");
    client.bad("vm_create", json!({"name": "b", "net": "nat"}), "denied");
    client.bad("vm_create", json!({"name": "b", "allow": ["@pip"]}), "denied");
}
