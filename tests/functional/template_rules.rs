//! Rules of a template, which bound those of its VMs, and the network of VMs for which none is requested.

use serde_json::{Value, json};

use crate::support::http::Server;
use crate::support::mcp::{Client, Era};
use crate::support::{Home, bound_template, publish_whole};

/// A home with the template `bound`, whose VMs may have these rules.
fn home(rules: &[&str]) -> Home {
    let home = Home::new();
    publish_whole(&home, "bound", b"none");
    bound_template(&home.path(), "bound", rules);
    home
}

#[test]
fn rules_of_a_template_bound_those_of_its_vms() {
    let home = home(&["*.example.com", "host:8000-8010"]);
    let create = |name: &str, flags: &[&str]| {
        let nido = home.nido(["create", name, "-T", "bound", "--json"]);
        flags.iter().fold(nido, |nido, flag| nido.arg(*flag)).run()
    };
    assert_eq!(create("plain", &[]).ok().json()["net"], "restricted");
    let within = create("web", &["--allow", "a.example.com:443", "--allow", "host:8001"]).ok().json();
    assert_eq!((&within["net"], &within["allow"]), (&json!("restricted"), &json!(["a.example.com:443", "host:8001"])));
    create("alone", &["--net", "none"]).ok();
    for (flags, words) in [
        (&["--net", "nat"][..], "nat is not allowed here, because it reaches more than the rules of template 'bound'"),
        (&["--allow", "example.com"], "'example.com' is not within the rules of template 'bound'"),
        (&["--allow", "@github"], "'github.com:443'"),
    ] {
        let problem = create("b", flags).fails(1, "denied");
        assert!(problem["detail"].as_str().unwrap().contains(words), "{problem}");
    }
    // Also after the template has gone.
    let allow = |name: &str, rule: &str| home.nido(["net", "allow", name, rule, "--json"]).run();
    let problem = allow("web", "host:80").fails(1, "denied");
    assert!(problem["hint"].as_str().unwrap().contains("*.example.com host:8000-8010"), "{problem}");
    bound_template(&home.path(), "bound", &["host:80"]);
    allow("web", "host:80").fails(1, "denied");
    allow("web", "b.example.com").ok();
    // A template of it would be bound as it is, and cannot be wider.
    let wider = home.nido(["template", "create", "wider", "--from", "web", "--allow", "example.com", "--json"]);
    let problem = wider.run().fails(1, "denied");
    assert!(problem["detail"].as_str().unwrap().contains("'example.com' is not within"), "{problem}");
}

#[test]
fn rules_of_a_template_hold_over_rest_and_mcp_and_for_copies() {
    let home = home(&["host:8000"]);
    home.qemu("migrates");
    let server = Server::start(&home);
    let vm = |name: &str, more: Value| {
        let mut vm = json!({"name": name, "template": "bound", "start": false});
        vm.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/vms", &vm)
    };
    assert_eq!(vm("web", json!({"allow": ["host:8000"]})).ok(201)["net"], "restricted");
    vm("b", json!({"net": "nat"})).problem(403, "denied");
    vm("b", json!({"net": "restricted", "allow": ["host:8001"]})).problem(403, "denied");
    server.post("/v1/vms/web/network/rules", &json!({"allow": ["host:8001"]})).problem(403, "denied");
    let mut client = Client::start(&home, Era::Modern);
    client.good("vm_create", json!({"name": "mine", "template": "bound", "allow": ["host:8000"]}));
    client.bad("vm_create", json!({"name": "b", "template": "bound", "allow": ["host:8001"]}), "denied");
    home.nido(["spawn", "runs", "-T", "bound", "--accel", "tcg", "--allow", "host:8000"]).run().ok();
    home.nido(["fork", "runs", "copy"]).run().ok();
    home.nido(["net", "allow", "copy", "host:8001", "--json"]).run().fails(1, "denied");
    home.nido(["net", "deny", "copy", "host:8000"]).run().ok();
    home.nido(["net", "allow", "copy", "host:8000"]).run().ok();
}

#[test]
fn rules_of_a_template_are_shown_and_exported() {
    let home = home(&["host:8000"]);
    let info = home.nido(["template", "info", "bound"]).run().ok();
    assert!(
        info.text().lines().any(|line| line.starts_with("allow") && line.ends_with(" host:8000")),
        "{}",
        info.text()
    );
    let file = home.scratch("bound.nido");
    home.nido(["template", "export", "bound"]).arg(&file).run().ok();
    home.nido(["template", "delete", "bound"]).run().ok();
    let came = home.nido(["template", "import", "--json"]).arg(&file).run().ok().json();
    assert_eq!(came["template"]["allow"], json!(["host:8000"]));
    let listed = home.nido(["template", "ls", "--json"]).run().ok().json();
    let of =
        |name: &str| listed["templates"].as_array().unwrap().iter().find(|one| one["name"] == name).unwrap().clone();
    assert_eq!(of("bound")["allow"], json!(["host:8000"]));
    assert!(of("sandbox").get("allow").is_none());
    home.nido(["create", "web", "-T", "bound", "--net", "nat", "--json"]).run().fails(1, "denied");
}

// A request without a network failed under a token that does not allow nat.
#[test]
fn a_request_without_a_network_gets_one_that_the_token_allows() {
    let home = Home::new();
    let server = Server::start(&home);
    let net = |name: &str, flags: &[&str], path: &str| {
        let create = home.nido(["token", "create", "--name", name, "--scope", "run", "--json"]);
        let made = flags.iter().fold(create, |nido, flag| nido.arg(*flag)).run().ok().json();
        let bearer = format!("Bearer {}", made["token"].as_str().unwrap());
        let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
        let vm = json!({"name": name, "start": false});
        server.plain("POST", path, &headers, vm.to_string().as_bytes()).ok(201)["net"].clone()
    };
    for (name, flags, expected) in [
        ("free", &[][..], "nat"),
        ("bound", &["--allow", "example.com"], "restricted"),
        ("closed", &["--allow", "none"], "restricted"),
        ("alone", &["--net", "none"], "none"),
        ("both", &["--net", "nat,none", "--allow", "example.com"], "none"),
    ] {
        assert_eq!(net(name, flags, "/v1/vms"), expected, "{name}");
    }
}
