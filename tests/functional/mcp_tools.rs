//! What the tools of the MCP server cost a model, what it reads, and the tools that do several steps in one.

use serde_json::{Value, json};

use crate::support::mcp::{Client, Era};
use crate::support::{Home, until};

/// The text of a result.
fn text(result: &Value) -> &str {
    let [block] = result["content"].as_array().unwrap().as_slice() else { panic!("{result}") };
    block["text"].as_str().unwrap()
}

/// Calls a tool; the text that a model reads.
fn read(client: &mut Client, tool: &str, arguments: Value) -> String {
    text(&client.call(tool, arguments)).to_owned()
}

#[test]
fn the_list_of_tools_costs_at_most_12_kilobytes_and_24_with_output_schemas() {
    let home = Home::new();
    for era in Era::ALL {
        let mut client = Client::start(&home, era);
        let mut answer = client.response_to("tools/list", json!({}));
        let whole = answer.to_string().len();
        for tool in answer["result"]["tools"].as_array_mut().unwrap() {
            assert!(tool.as_object_mut().unwrap().remove("outputSchema").is_some(), "{tool}");
        }
        let without = answer.to_string().len();
        assert!(without <= 12_000 && whole <= 24_000, "{without} bytes, {whole} with output schemas");
    }
}

#[test]
fn a_list_of_20_vms_takes_at_most_3_kilobytes() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Legacy);
    for number in 0..20 {
        client.good("vm_create", json!({"name": format!("agent-{number:02}"), "accel": "tcg"}));
    }
    let answer = client.response_to("tools/call", json!({"name": "vm_ls", "arguments": {}}));
    assert_eq!(answer["result"]["structuredContent"]["vms"].as_array().unwrap().len(), 20);
    let text = text(&answer["result"]);
    assert_eq!((text.lines().count(), text.lines().next()), (20, Some("agent-00 created sandbox")));
    assert!(answer.to_string().len() <= 3000, "{} bytes: {answer}", answer.to_string().len());
}

#[test]
fn the_text_of_a_command_is_its_output_and_a_status_line() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Modern);
    client.good("vm_spawn", json!({"name": "web", "accel": "tcg"}));
    let command = json!({"name": "web", "command": "echo out; echo err >&2; exit 3", "sessionId": "x"});
    let said = read(&mut client, "vm_exec", command);
    let (output, status) = said.split_once("[exit code 3, ").unwrap();
    assert_eq!(output, "out\n[stderr]\nerr\n");
    assert!(status.ends_with("[note: arguments that this tool does not have were ignored: sessionId]"), "{said}");
}

#[test]
fn a_run_has_a_vm_of_its_own_that_is_gone_afterwards() {
    for era in Era::ALL {
        let home = Home::new();
        let mut client = Client::start(&home, era);
        let ran = client.good("vm_run", json!({"argv": ["cat"], "stdin": "secret in", "accel": "tcg"}));
        assert_eq!((&ran["stdout"], &ran["exit_code"]), (&"secret in".into(), &0.into()));
        assert!(home.names().is_empty());
        let failed = client.bad("vm_run", json!({"argv": ["/no/such/program"], "accel": "tcg"}), "command_not_found");
        assert!(failed["next_step"].as_str().unwrap().starts_with("the VM is deleted"), "{failed}");
        client.bad("vm_run", json!({"accel": "tcg"}), "spec_invalid");
        client.bad("vm_run", json!({"argv": ["true"], "template": "none"}), "template_not_found");
        client.bad("vm_run", json!({"command": "rm -rf /"}), "denied");
        drop(client);
        home.expect_empty();
        let log = home.nido(["audit", "show", "--tool", "vm_run", "--json"]).run().ok().json();
        let ends = log["records"].as_array().unwrap().iter().filter(|line| line["stage"] == "outcome");
        let reasons: Vec<_> = ends.map(|line| line["reason"].as_str().unwrap().to_owned()).collect();
        let expected = ["exit_code:0", "command_not_found", "spec_invalid", "template_not_found", "dangerous_command"];
        assert_eq!(reasons, expected);
        assert!(!log.to_string().contains("secret in"));
    }
}

#[test]
fn a_run_that_is_cancelled_or_becomes_a_job_leaves_no_vm() {
    let home = Home::new();
    let mut client = Client::with(&home, Era::Modern, &["--answer-within", "1500ms"], json!({}));
    let running = || home.names().first().is_some_and(|name| home.info(name)["status"] == "running");
    let begin = |client: &mut Client| {
        let arguments = json!({"argv": ["sleep", "1000"], "timeout_seconds": 0, "accel": "tcg"});
        client.begin("vm_run", arguments, json!({}))
    };
    let id = begin(&mut client);
    until("the VM of the run", || running().then_some(()));
    client.send_json(&json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": id}}));
    until("the end of the VM", || home.names().is_empty().then_some(()));
    let id = begin(&mut client);
    let begun = client.done("vm_run", id)["structuredContent"].clone();
    assert_eq!(begun["status"], "running", "{begun}");
    client.good("job_cancel", json!({"job_id": begun["job_id"]}));
    let job = client.good("job_get", json!({"job_id": begun["job_id"], "wait_seconds": 30}));
    assert_eq!(job["state"], "cancelled", "{job}");
    assert!(home.names().is_empty());
}

#[test]
fn a_policy_about_commands_limits_and_confirmation_holds_for_runs_and_copies() {
    let home = Home::new();
    let policy = home.scratch("policy.toml");
    let words = "confirm = ['vm_run']\n[[allow]]\nprogram = 'echo'\nargs = ['**']\n[limits]\nmax_memory_mib = 600\n";
    std::fs::write(&policy, words).unwrap();
    let mut client = Client::with(&home, Era::Legacy, &["--policy", policy.to_str().unwrap()], json!({}));
    let tools = client.tools();
    assert!(tools["vm_run"]["description"].as_str().unwrap().contains("only these commands"), "{}", tools["vm_run"]);
    assert!(tools["vm_run"]["inputSchema"]["properties"].get("command").is_none());
    // Parsed, then admitted; no confirmation is requested for an impossible call.
    client.bad("vm_run", json!({"argv": "echo"}), "spec_invalid");
    client.bad("vm_run", json!({"argv": ["env"]}), "denied");
    client.bad("vm_run", json!({"command": "echo hi"}), "denied");
    client.bad("vm_run", json!({"argv": ["echo", "hi"], "memory_mib": 1024}), "limit_exceeded");
    client.bad("vm_run", json!({"argv": ["echo", "hi"], "template": "none"}), "template_not_found");
    assert_eq!(home.nido(["approvals", "--all", "-q"]).run().ok().text(), "");
    let run = json!({"argv": ["echo", "hi"], "accel": "tcg"});
    let error = client.bad("vm_run", run.clone(), "approval_required");
    home.nido(["approve", error["approval_id"].as_str().unwrap(), "--yes"]).run().ok();
    // The same call again is enough: no schema has to list the approval.
    assert_eq!(client.good("vm_run", run.clone())["stdout"], "hi\n");
    client.bad("vm_run", run, "approval_required");
}

#[test]
fn logs_are_read_by_their_last_lines_and_without_control_characters() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Modern);
    let vm = client.good("vm_spawn", json!({"name": "web", "accel": "tcg"}));
    let console = home.path().join("vms").join(vm["id"].as_str().unwrap()).join("console.log");
    let mut written: String = (0..20_000).map(|number| format!("line {number}\n")).collect();
    written += "\u{1b}[2Jcleared\u{202e}\n";
    std::fs::write(&console, written).unwrap();
    let whole = read(&mut client, "vm_logs", json!({"name": "web"}));
    assert!(whole.starts_with("== VM web ==\n") && whole.contains("state: running"), "{whole}");
    assert!(whole.contains("== supervisor ==") && whole.ends_with("line 19999\ncleared\n"), "{whole}");
    let last = client.good("vm_logs", json!({"name": "web", "source": "console", "lines": 2}));
    assert_eq!(last["log"], "line 19999\ncleared\n");
    std::fs::write(&console, "x".repeat(200_000)).unwrap();
    for arguments in [json!({"name": "web"}), json!({"name": "web", "source": "console", "lines": 1000})] {
        let log = read(&mut client, "vm_logs", arguments);
        assert!(log.len() <= 32 << 10 && log.contains("xxx"), "{}", log.len());
    }
    client.bad("vm_logs", json!({"name": "web", "lines": 1001}), "spec_invalid");
    client.bad("vm_logs", json!({"name": "nobody"}), "vm_not_found");
    // It only reads.
    let mut client = Client::with(&home, Era::Modern, &["--read-only"], json!({}));
    assert!(client.tools().contains_key("vm_logs") && !client.tools().contains_key("vm_run"));
}

#[test]
fn ports_are_published_and_unpublished_and_written_as_on_the_command_line() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Modern);
    let made = client.good("vm_spawn", json!({"name": "web", "accel": "tcg", "forwards": ["0:22"]}));
    assert_eq!(made["forwards"][0]["guest_port"], 22, "{made}");
    let published = client.good("vm_ports", json!({"name": "web", "publish": "80"}))["forwards"].clone();
    let port = published.as_array().unwrap().iter().find(|one| one["guest_port"] == 80).unwrap();
    assert!(port["host"] == "127.0.0.1" && port["host_port"].as_u64().unwrap() > 0, "{port}");
    let left = client.good("vm_ports", json!({"name": "web", "unpublish": "80"}))["forwards"].clone();
    assert_eq!(left.as_array().unwrap().len(), 1, "{left}");
    client.bad("vm_ports", json!({"name": "web", "publish": "ssh"}), "spec_invalid");
    client.bad("vm_ports", json!({"name": "web", "unpublish": "80"}), "forward_not_found");
    // Other machines do not reach it, unless a policy allows it.
    client.bad("vm_ports", json!({"name": "web", "publish": "0.0.0.0:0:80"}), "denied");
    // Of a VM of another caller they are listed, and no more without a person's confirmation.
    home.spawn("theirs");
    assert_eq!(client.good("vm_ports", json!({"name": "theirs"}))["forwards"], json!([]));
    client.bad("vm_ports", json!({"name": "theirs", "publish": "80"}), "approval_required");
    client.bad("vm_fork", json!({"name": "theirs", "copies": ["mine"]}), "approval_required");
}

#[test]
fn impossible_copies_are_refused_before_confirmation() {
    let home = Home::new();
    home.spawn("theirs");
    let mut client = Client::start(&home, Era::Legacy);
    client.bad("vm_fork", json!({"name": "theirs", "copies": []}), "spec_invalid");
    client.bad("vm_fork", json!({"name": "theirs", "copies": ["A b"]}), "spec_invalid");
    client.bad("vm_fork", json!({"name": "theirs", "copies": ["theirs"]}), "vm_exists");
    client.bad("vm_fork", json!({"name": "nobody", "copies": ["web"]}), "vm_not_found");
    home.nido(["stop", "theirs", "--force"]).run().ok();
    client.bad("vm_fork", json!({"name": "theirs", "copies": ["web"]}), "vm_not_running");
    client.bad("vm_restore", json!({"name": "theirs", "snapshot": "No Name"}), "spec_invalid");
    assert_eq!(home.nido(["approvals", "--all", "-q"]).run().ok().text(), "");
}

#[test]
fn the_question_names_what_is_lost() {
    let home = Home::new();
    home.spawn("web");
    home.nido(["stop", "web", "--force"]).run().ok();
    for snapshot in ["one", "two"] {
        home.nido(["snapshot", "create", "web", snapshot]).run().ok();
    }
    home.nido(["start", "web"]).run().ok();
    let mut client = Client::with(&home, Era::Modern, &[], json!({"elicitation": {}}));
    let mut question = |tool: &str, arguments: Value| {
        let asked = client.result("tools/call", json!({"name": tool, "arguments": arguments}));
        asked["inputRequests"]["confirm"]["params"]["message"].as_str().unwrap().to_owned()
    };
    let words = question("vm_delete", json!({"name": "web", "force": true}));
    let parts = "Lost permanently: its disk, what runs in it (up for 0 min), its 2 snapshots one, two.";
    assert!(words.contains(parts), "{words}");
    let words = question("vm_restore", json!({"name": "web", "snapshot": "one"}));
    let parts = "Lost permanently: everything written to its disk since then, what runs in it (up for 0 min).";
    assert!(words.contains(parts), "{words}");
}
