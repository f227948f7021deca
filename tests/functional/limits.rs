//! What callers may make: the limits of a token and of a policy.

use serde_json::{Value, json};

use crate::support::Home;
use crate::support::http::{HttpResponse, Server};
use crate::support::mcp::{Client, Era};

/// A server, and what a token with these limits may do there.
fn with_token(home: &Home, limits: &[&str]) -> (Server, impl Fn(&Server, &str, &Value) -> HttpResponse + use<>) {
    let server = Server::start(home);
    let create = home.nido(["token", "create", "--name", "guests", "--scope", "run", "--json"]);
    let made = limits.iter().fold(create, |nido, flag| nido.arg(*flag)).run().ok().json();
    let bearer = format!("Bearer {}", made["token"].as_str().unwrap());
    let post = move |server: &Server, path: &str, body: &Value| {
        let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
        server.plain("POST", path, &headers, body.to_string().as_bytes())
    };
    (server, post)
}

// A caller with permission to create VMs could create any number of any size, with the host's network, and publish ports to all hosts.
#[test]
fn a_token_s_limits_hold_over_rest() {
    let home = Home::new();
    let flags = ["--max-vms", "2", "--max-cpus", "2", "--max-memory", "1G", "--ttl-max", "1h"];
    let (server, post) = with_token(&home, &[&flags[..], &["--net", "none", "--publish", "127.0.0.1"]].concat());
    let vm = |name: &str, more: Value| {
        let mut vm = json!({"name": name, "start": false, "net": "none", "ttl_ms": 60000});
        vm.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        vm
    };
    for (more, code) in [
        (json!({"cpus": 3}), "limit_exceeded"),
        (json!({"memory_mib": 1025}), "limit_exceeded"),
        (json!({"ttl_ms": 3_600_001}), "limit_exceeded"),
        (json!({"ttl_ms": null}), "limit_exceeded"),
        (json!({"net": "nat"}), "denied"),
        (json!({"forwards": [{"host": "0.0.0.0", "host_port": 8443, "guest_port": 80}]}), "denied"),
    ] {
        let problem = post(&server, "/v1/vms", &vm("web", more)).json();
        assert_eq!(problem["code"], code, "{problem}");
    }
    assert!(home.names().is_empty());
    post(&server, "/v1/vms", &vm("one", json!({}))).ok(201);
    let forward = json!({"host": "0.0.0.0", "host_port": 8443, "guest_port": 80});
    post(&server, "/v1/vms/one/forwards", &forward).problem(403, "denied");
    post(&server, "/v1/vms/one/forwards", &json!({"host_port": 8443, "guest_port": 80})).ok(201);
    post(&server, "/v1/vms", &vm("two", json!({}))).ok(201);
    assert_eq!(post(&server, "/v1/vms", &vm("three", json!({}))).json()["code"], "limit_exceeded");
    // A run makes a VM as well; those of others do not count.
    let run = json!({"vm": {"net": "none", "ttl_ms": 60000}, "exec": {"argv": ["true"]}});
    assert_eq!(post(&server, "/v1/runs", &run).json()["code"], "limit_exceeded");
    home.nido(["create", "mine", "--memory", "2G"]).run().ok();
    home.nido(["delete", "two"]).run().ok();
    post(&server, "/v1/vms", &vm("three", json!({}))).ok(201);
    assert_eq!(home.names().len(), 3);
    let list = home.nido(["token", "list", "--json"]).run().ok().json();
    assert_eq!(list["tokens"][0]["limits"]["publish"], json!(["127.0.0.1"]));
}

#[test]
fn a_policys_limits_hold_for_agents_which_publish_on_loopback_only() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Modern);
    let open = json!([{"host": "0.0.0.0", "host_port": 8443, "guest_port": 80}]);
    client.bad("vm_create", json!({"name": "open", "forwards": open}), "denied");
    client.good("vm_create", json!({"name": "near", "forwards": [{"host_port": 8443, "guest_port": 80}]}));
    drop(client);
    let policy = home.scratch("policy.toml");
    std::fs::write(&policy, "[limits]\nmax_vms = 2\nmax_memory_mib = 256\nnet = ['none']\npublish = []\n").unwrap();
    let mut client = Client::with(&home, Era::Modern, &["--policy", policy.to_str().unwrap()], json!({}));
    let vm = |name: &str| json!({"name": name, "net": "none", "memory_mib": 256});
    client.bad("vm_create", json!({"name": "big", "net": "none"}), "limit_exceeded");
    client.bad("vm_create", json!({"name": "wide", "memory_mib": 256}), "denied");
    client.good("vm_create", vm("two"));
    let error = client.bad("vm_spawn", vm("three"), "limit_exceeded");
    assert!(error["message"].as_str().unwrap().contains("2 VMs"), "{error}");
    // What the user has made by themselves is not the agent's.
    home.nido(["create", "mine"]).run().ok();
    let approved = approved(&home, &mut client);
    client.good("vm_delete", json!({"name": "two", "approval_id": approved}));
    client.good("vm_create", vm("three"));
}

/// The id of an approval to delete the VM 'two'.
fn approved(home: &Home, client: &mut Client) -> Value {
    let error = client.bad("vm_delete", json!({"name": "two"}), "approval_required");
    let id = error["approval_id"].as_str().unwrap();
    home.nido(["approve", id, "--yes"]).run().ok();
    id.into()
}

/// A VM whose requests get this secret; it is not started.
fn with_secret(name: &str, secret: &str) -> Value {
    json!({
        "name": name, "net": "restricted", "allow": ["api.example.com:443", "www.example.com:443"],
        "secrets": [secret], "secret_env": ["API_KEY=key"]
    })
}

#[test]
fn a_token_gives_exactly_the_secrets_that_it_lists_to_vms_that_request_them() {
    let home = Home::new();
    let vm = |name: &str, secret: &str| {
        let mut vm = with_secret(name, secret);
        vm["start"] = false.into();
        vm
    };
    let (server, post) = with_token(&home, &["--secret", "key@api.example.com"]);
    let listed = home.nido(["token", "list", "--json"]).run().ok().json();
    assert_eq!(listed["tokens"][0]["limits"]["secrets"], json!(["key@api.example.com:authorization"]));
    // Listed, and not stored yet.
    post(&server, "/v1/vms", &vm("web", "key@api.example.com")).problem(404, "secret_not_found");
    for name in ["key", "other"] {
        home.nido(["secret", "set", name]).input("value-of-a-secret\n").run().ok();
    }
    for other in ["key@www.example.com", "key@api.example.com:x-api-key", "other@api.example.com"] {
        let mut vm = vm("web", other);
        vm["secret_env"] = json!([]);
        post(&server, "/v1/vms", &vm).problem(403, "denied");
    }
    // The token of the server itself lists none.
    server.post("/v1/vms", &vm("web", "key@api.example.com")).problem(403, "denied");
    assert!(home.names().is_empty());
    let made = post(&server, "/v1/vms", &vm("web", "key@api.example.com")).ok(201);
    assert_eq!(made["secrets"], json!(["key@api.example.com:authorization"]));
    assert_eq!(made["secret_env"], json!(["API_KEY=key"]));
    // A VM that requests none has none.
    assert_eq!(post(&server, "/v1/vms", &json!({"name": "plain", "start": false})).ok(201).get("secrets"), None);
}

#[test]
fn a_policy_gives_exactly_the_secrets_that_it_lists_to_vms_of_agents() {
    let home = Home::new();
    home.nido(["secret", "set", "key"]).input("value-of-a-secret\n").run().ok();
    let policy = home.scratch("policy.toml");
    std::fs::write(&policy, "[limits]\nsecrets = ['key@api.example.com']\n").unwrap();
    let mut client = Client::with(&home, Era::Legacy, &["--policy", policy.to_str().unwrap()], json!({}));
    client.bad("vm_create", with_secret("web", "key@www.example.com"), "denied");
    client.bad("vm_create", with_secret("web", "key@api.example.com:x-api-key"), "denied");
    client.good("vm_create", with_secret("web", "key@api.example.com"));
    let info = home.nido(["info", "web", "--json"]).run().ok().json();
    assert_eq!(info["secrets"], json!(["key@api.example.com:authorization"]));
    client.ended();
    // Without a policy an agent gets none.
    let mut client = Client::start(&home, Era::Legacy);
    client.bad("vm_create", with_secret("other", "key@api.example.com"), "denied");
}
