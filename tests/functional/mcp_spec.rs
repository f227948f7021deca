//! The specification's own examples, through a client, against a server: what it records has to work as it is written.

use serde_json::{Value, json};

use crate::support::Home;
use crate::support::mcp::{Client, Era};

#[test]
fn the_tools_of_the_specification_are_there_with_its_annotations_and_schemas() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Legacy);
    let tools = client.tools();
    for (name, words) in [
        ("vm_ls", vec!["safe"]),
        ("vm_spawn", vec!["long_running"]),
        ("vm_create", vec!["safe"]),
        ("vm_start", vec!["safe"]),
        ("vm_stop", vec!["safe"]),
        ("vm_delete", vec!["destructive", "confirmation_required"]),
        ("vm_info", vec!["safe"]),
        ("vm_exec", vec!["potentially_dangerous"]),
        ("vm_upload", vec!["safe"]),
        ("vm_download", vec!["safe"]),
        ("template_list", vec!["safe"]),
        ("template_create", vec!["long_running"]),
        ("vm_snapshot", vec!["safe"]),
        ("vm_restore", vec!["destructive"]),
    ] {
        let said = tools[name]["_meta"]["vmops/annotations"].as_array().unwrap();
        assert!(words.iter().all(|word| said.contains(&json!(word))), "{name}: {said:?}");
    }
    let field = |tool: &str, side: &str, name: &str| tools[tool][side]["properties"][name].clone();
    for (tool, name, kind) in [
        ("vm_create", "name", "string"),
        ("vm_create", "template", "string"),
        ("vm_exec", "name", "string"),
        ("vm_exec", "command", "string"),
        ("vm_exec", "timeout_seconds", "number"),
    ] {
        assert_eq!(field(tool, "inputSchema", name)["type"], kind, "{tool}: {name}");
    }
    assert_eq!(field("vm_exec", "inputSchema", "timeout_seconds")["default"], 60);
    for (tool, name) in [
        ("vm_create", "name"),
        ("vm_create", "status"),
        ("vm_create", "ip_address"),
        ("vm_create", "ssh_command"),
        ("vm_exec", "stdout"),
        ("vm_exec", "stderr"),
        ("vm_exec", "exit_code"),
    ] {
        assert!(field(tool, "outputSchema", name).is_object(), "{tool}: {name}");
    }
}

#[test]
fn the_calls_of_the_specification_work_as_they_are_written() {
    let home = Home::new();
    for era in Era::ALL {
        let mut client = Client::start(&home, era);
        let made = client.good("vm_create", json!({"name": "test-vm-1", "template": "sandbox"}));
        assert_eq!((&made["name"], &made["status"]), (&json!("test-vm-1"), &json!("created")));
        assert_eq!((&made["ip_address"], &made["ssh_command"]), (&Value::Null, &Value::Null));
        client.good("vm_start", json!({"name": "test-vm-1"}));
        let done = client.good("vm_exec", json!({"name": "test-vm-1", "command": "ls -l /", "timeout_seconds": 60}));
        assert_eq!((&done["exit_code"], &done["stderr"]), (&json!(0), &json!("")));
        assert!(done["stdout"].as_str().unwrap().contains("etc"), "{done}");
        let log = client.result("resources/read", json!({"uri": "vmops://vm/test-vm-1/logs"}));
        assert!(log["contents"][0]["text"].as_str().unwrap().contains("started"), "{log}");
        for uri in ["vmops://vms", "vmops://templates"] {
            assert!(client.result("resources/read", json!({"uri": uri}))["contents"][0]["text"].is_string());
        }
        let prompts = client.result("prompts/list", json!({}));
        let names: Vec<_> = prompts["prompts"].as_array().unwrap().iter().map(|one| &one["name"]).collect();
        assert_eq!(names, ["deploy_and_test", "quick_sandbox"]);
        home.nido(["delete", "--force", "--yes", "test-vm-1"]).run().ok();
    }
}

#[test]
fn an_address_and_an_ssh_command_are_shown_only_if_they_work() {
    // ip_address was 10.0.2.15 for every VM, which nothing on the host reaches; ssh_command was always null.
    let home = Home::new();
    let mut client = Client::start(&home, Era::Modern);
    let plain = client.good("vm_spawn", json!({"name": "plain", "accel": "tcg"}));
    assert_eq!((&plain["ip_address"], &plain["ssh_command"]), (&Value::Null, &Value::Null));
    let forwards = json!([{"guest_port": 22, "host_port": 0}]);
    let vm = client.good("vm_spawn", json!({"name": "ssh", "accel": "tcg", "forwards": forwards}));
    let port = vm["forwards"][0]["host_port"].as_u64().unwrap();
    assert_eq!(vm["ip_address"], "127.0.0.1");
    assert_eq!(vm["ssh_command"], format!("ssh -p {port} root@127.0.0.1"));
    std::net::TcpStream::connect(("127.0.0.1", u16::try_from(port).unwrap())).unwrap();
    client.good("vm_stop", json!({"name": "ssh", "force": true}));
    let stopped = client.good("vm_info", json!({"name": "ssh"}));
    assert_eq!((&stopped["ip_address"], &stopped["ssh_command"]), (&Value::Null, &Value::Null));
}

#[test]
fn prompts_and_resources_show_only_what_the_server_allows() {
    // Both prompts were offered where every call of theirs was refused, and vmops://vms went round --exclude-tools.
    let home = Home::new();
    let mut client = Client::with(&home, Era::Modern, &["--read-only"], json!({}));
    assert_eq!(client.result("prompts/list", json!({}))["prompts"], json!([]));
    let refused = client.response_to("prompts/get", json!({"name": "quick_sandbox", "arguments": {"task": "x"}}));
    assert!(refused["error"]["message"].as_str().unwrap().contains("does not offer"), "{refused}");
    let mut client = Client::with(&home, Era::Modern, &["--exclude-tools", "vm_ls,vm_info"], json!({}));
    for uri in ["vmops://vms", "vmops://vm/web/logs"] {
        let refused = client.response_to("resources/read", json!({"uri": uri}));
        assert!(refused["error"]["message"].as_str().unwrap().contains("does not offer"), "{refused}");
    }
    assert!(!client.result("resources/list", json!({})).to_string().contains("vmops://vms"));
    let policy = home.scratch("policy.toml");
    std::fs::write(&policy, "[[allow]]\nprogram = \"echo\"\nargs = [\"**\"]\n").unwrap();
    let mut client = Client::with(&home, Era::Modern, &["--policy", policy.to_str().unwrap()], json!({}));
    let prompts = client.result("prompts/list", json!({}));
    assert!(!prompts.to_string().contains("deploy_and_test"), "{prompts}");
    let words = client.result("prompts/get", json!({"name": "quick_sandbox", "arguments": {"task": "x"}}));
    assert!(!words.to_string().contains("a line of shell") && !words.to_string().contains("vm_upload"), "{words}");
    // Files of the host, the size of the VM and its template are those that the server allows.
    let limits =
        "roots = []\n[limits]\nmax_memory_mib = 600\nttl_max_ms = 600000\nnet = ['none']\ntemplates = ['small']\n";
    std::fs::write(&policy, limits).unwrap();
    let flags = ["--policy", policy.to_str().unwrap(), "--exclude-tools", "vm_download"];
    let mut client = Client::with(&home, Era::Modern, &flags, json!({}));
    let mut get =
        |name: &str, arguments: Value| client.response_to("prompts/get", json!({"name": name, "arguments": arguments}));
    let words = get("quick_sandbox", json!({"task": "x", "ttl": "1h"}))["result"].to_string();
    assert!(words.contains(r#"\"template\":\"small\""#) && words.contains(r#"\"net\":\"none\""#), "{words}");
    assert!(words.contains(r#"\"ttl_seconds\":600"#) && !words.contains("vm_download"), "{words}");
    let refused = get("quick_sandbox", json!({"task": "x", "template": "sandbox"}));
    assert!(refused["error"]["message"].as_str().unwrap().contains("template: sandbox is not allowed"), "{refused}");
    let tests = |repository: &str| json!({"repository": repository, "test_command": "make test"});
    let words = get("deploy_and_test", tests("https://git.example/app.git"))["result"].to_string();
    assert!(words.contains(r#"\"memory_mib\":600"#), "{words}");
    let refused = get("deploy_and_test", tests("/srv/app"));
    assert!(
        refused["error"]["message"].as_str().unwrap().starts_with("repository: no files of this host"),
        "{refused}"
    );
}
