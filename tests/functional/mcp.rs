//! The MCP server over the real program: both eras of the protocol, tools and their answers, what is written down.

use serde_json::json;

use crate::support::mcp::{Client, Era};
use crate::support::{Home, until};

#[test]
fn a_vm_lives_in_both_eras() {
    for era in Era::ALL {
        let home = Home::new();
        let mut client = Client::start(&home, era);
        let request = json!({"name": "web", "accel": "tcg", "ttl_ms": 600_000, "labels": {"a": "b"}});
        let vm = client.good("vm_spawn", request.clone());
        assert_eq!((&vm["status"], &vm["labels"]["a"]), (&"running".into(), &"b".into()));
        assert!(vm["expires_at"].is_string() && vm["timings"]["total_ms"].is_number(), "{vm}");
        // The same as on the command line.
        assert_eq!(client.good("vm_ls", json!({}))["vms"][0]["id"], home.info("web")["id"]);
        // The same request again is the same VM; another one is a conflict.
        assert_eq!(client.good("vm_spawn", request)["id"], vm["id"]);
        let other = client.bad("vm_spawn", json!({"name": "web", "accel": "tcg"}), "vm_exists");
        assert_eq!(other["state"], "running");
        let done = client.good("vm_exec", json!({"name": "web", "command": "echo out; echo err >&2; exit 3"}));
        assert_eq!(
            (&done["stdout"], &done["stderr"], &done["exit_code"]),
            (&"out\n".into(), &"err\n".into(), &3.into())
        );
        let done = client.good("vm_exec", json!({"name": "web", "argv": ["cat"], "stdin": "in"}));
        assert_eq!(done["stdout"], "in");
        let busy = client.bad("vm_delete", json!({"name": "web"}), "vm_busy");
        assert!(busy["next_step"].as_str().unwrap().contains("vm_stop"), "{busy}");
        assert_eq!(client.good("vm_delete", json!({"name": "web", "force": true}))["name"], "web");
        client.bad("vm_exec", json!({"name": "web", "argv": ["true"]}), "vm_not_found");
        let ran = client.ended().ok();
        assert_eq!(ran.stderr, "");
        home.expect_empty();
    }
}

#[test]
fn wrong_arguments_are_answers_that_name_the_field() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Modern);
    for (tool, arguments, words) in [
        ("vm_spawn", json!({"name": "Web"}), "name: 'Web' is not a VM name"),
        ("vm_spawn", json!({"name": "web", "cpus": "two"}), "cpus: "),
        (
            "vm_spawn",
            json!({"name": "web", "net": "bridge"}),
            "net: unknown variant `bridge`, expected `nat` or `none`",
        ),
        ("vm_spawn", json!({"name": "web", "colour": "red"}), "colour: unknown field"),
        ("vm_exec", json!({"argv": ["true"]}), "name: it is missing"),
        ("vm_exec", json!({"name": "web"}), "argv: there is no command"),
        ("vm_exec", json!({"name": "web", "argv": ["a"], "command": "a"}), "command: argv is given as well"),
        ("vm_ls", json!({"limit": 0}), "limit: it is 1 to 500"),
        ("vm_ls", json!({"status": "asleep"}), "status: unknown variant `asleep`, expected one of `created`"),
    ] {
        let error = client.bad(tool, arguments, "spec_invalid");
        assert!(error["message"].as_str().unwrap().starts_with(words), "{error}");
    }
    // What is no tool is no call.
    let answer = client.ask("tools/call", json!({"name": "vm_fly", "arguments": {}}));
    assert_eq!(answer["error"]["code"], -32602, "{answer}");
    assert!(home.names().is_empty());
}

#[test]
fn every_call_is_written_down_with_who_and_how() {
    let home = Home::new();
    let mut client = Client::with(&home, Era::Legacy, &["--exclude-tools", "vm_delete"], json!({}));
    client.good("vm_spawn", json!({"name": "web", "accel": "tcg"}));
    client.good("vm_exec", json!({"name": "web", "argv": ["false"], "stdin": "secret"}));
    client.good("vm_ls", json!({}));
    client.bad("vm_delete", json!({"name": "web"}), "denied");
    assert!(!client.tools().contains_key("vm_delete"));
    drop(client);
    let log = home.nido(["audit", "show", "--json"]).run().ok().json();
    let line = |at: usize| {
        let line = &log["records"][at];
        let text = |key: &str| line[key].as_str().unwrap_or_default().to_owned();
        (text("face"), text("tool"), text("stage"), text("result"), text("reason"))
    };
    let is = |tool: &str, stage: &str, result: &str, reason: &str| {
        ("mcp".into(), tool.into(), stage.into(), result.into(), reason.into())
    };
    assert_eq!(line(0), is("vm_spawn", "attempt", "pending", ""));
    assert_eq!(line(1), is("vm_spawn", "outcome", "success", ""));
    assert_eq!(line(3), is("vm_exec", "outcome", "success", "exit_code:1"));
    assert_eq!(line(6), is("vm_delete", "outcome", "denied", "tool_not_offered"));
    assert_eq!(log["records"][2]["agent"], "tests");
    assert!(log["records"][2]["actor"].as_str().unwrap().starts_with("uid:"));
    assert!(!log.to_string().contains("secret"));
}

#[test]
fn a_vm_is_made_started_kept_and_taken_back_and_files_go_in_and_out() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Modern);
    let request = json!({"name": "web", "accel": "tcg", "net": "none"});
    let made = client.good("vm_create", request.clone());
    assert_eq!(made["status"], "created");
    assert_eq!(client.good("vm_create", request)["id"], made["id"]);
    client.bad("vm_create", json!({"name": "web", "accel": "tcg"}), "vm_exists");
    let stopped = client.bad("vm_exec", json!({"name": "web", "argv": ["true"]}), "vm_not_running");
    assert_eq!((&stopped["state"], stopped["next_step"].is_string()), (&"created".into(), true));
    assert_eq!(client.good("vm_start", json!({"name": "web"}))["status"], "running");
    assert_eq!(client.good("vm_start", json!({"name": "web"}))["id"], made["id"]);
    assert_eq!(client.good("vm_info", json!({"name": "web"})), home.info("web"));
    // The fake guest's files are the host's.
    let path = home.scratch("in/file");
    let path = path.to_str().unwrap();
    let copied = client.good("vm_upload", json!({"name": "web", "path": path, "content": "grün\n", "mode": "600"}));
    assert_eq!(copied["bytes"], 6);
    let got = client.good("vm_download", json!({"name": "web", "path": path}));
    assert_eq!((&got["content"], &got["bytes"], got.get("content_base64")), (&"grün\n".into(), &6.into(), None));
    client.good("vm_upload", json!({"name": "web", "path": path, "content_base64": "G1sySgA="}));
    let got = client.good("vm_download", json!({"name": "web", "path": path}));
    assert_eq!((got.get("content"), &got["content_base64"]), (None, &"G1sySgA=".into()), "controls are not shown");
    client.bad("vm_download", json!({"name": "web", "path": path, "max_bytes": 4}), "limit_exceeded");
    client.bad("vm_download", json!({"name": "web", "path": "/nowhere"}), "path_not_found");
    for wrong in
        [json!({"path": "a", "content": ""}), json!({"path": "/a"}), json!({"path": "/a", "content_base64": "?"})]
    {
        let mut wrong = wrong;
        wrong["name"] = "web".into();
        client.bad("vm_upload", wrong, "spec_invalid");
    }
    assert_eq!(client.good("vm_stop", json!({"name": "web", "force": true}))["status"], "stopped");
    let kept = client.good("vm_snapshot", json!({"name": "web", "snapshot": "before"}));
    assert_eq!((&kept["name"], &kept["running"]), (&"before".into(), &false.into()));
    client.bad("vm_restore", json!({"name": "web", "snapshot": "never"}), "snapshot_not_found");
    client.good("vm_restore", json!({"name": "web", "snapshot": "before", "disk_only": true}));
    assert_eq!(client.good("template_list", json!({}))["templates"][0]["name"], "sandbox");
    client.bad("template_create", json!({"name": "sandbox", "from": "web"}), "template_exists");
}

#[test]
fn lists_come_in_pages() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Modern);
    for name in ["a", "b", "c"] {
        client.good("vm_create", json!({"name": name, "accel": "tcg", "labels": {"odd": (name != "b").to_string()}}));
    }
    let names = |page: &serde_json::Value| {
        let vms = page["vms"].as_array().unwrap().iter();
        vms.map(|vm| vm["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let first = client.good("vm_ls", json!({"limit": 2}));
    let rest = client.good("vm_ls", json!({"limit": 2, "cursor": first["next_cursor"]}));
    assert_eq!(
        (names(&first), names(&rest), rest.get("next_cursor")),
        (vec!["a".into(), "b".into()], vec!["c".into()], None)
    );
    assert_eq!(names(&client.good("vm_ls", json!({"labels": {"odd": "true"}, "status": "created"}))), ["a", "c"]);
}

#[test]
fn a_server_that_only_looks_offers_nothing_else() {
    let home = Home::new();
    let mut client = Client::with(&home, Era::Modern, &["--read-only"], json!({}));
    assert!(client.tools().values().all(|tool| tool["annotations"]["readOnlyHint"] == true));
    let error = client.bad("vm_spawn", json!({"name": "web"}), "denied");
    assert!(error["message"].as_str().unwrap().contains("only looks"), "{error}");
    assert!(home.names().is_empty());
}

#[test]
fn cancelling_kills_the_command_and_removes_the_vm_that_was_begun() {
    for era in Era::ALL {
        let home = Home::new();
        let mut client = Client::start(&home, era);
        client.good("vm_spawn", json!({"name": "web", "accel": "tcg"}));
        let mark = home.scratch("mark");
        let command = format!("echo $$ > {}; exec sleep 1000", mark.display());
        let id = client.begin("vm_exec", json!({"name": "web", "command": command, "timeout_ms": 0}), json!({}));
        let pid = until("the command", || {
            let pid = std::fs::read_to_string(&mark).ok()?;
            pid.trim().parse::<u32>().ok()
        });
        client.say(&json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": id}}));
        until("the command's end", || (!std::path::Path::new(&format!("/proc/{pid}")).exists()).then_some(()));
        // The guest never comes to life.
        home.qemu("no-agent");
        let id = client.begin("vm_spawn", json!({"name": "late", "accel": "tcg"}), json!({}));
        until("the VM that is begun", || home.names().contains(&"late".to_owned()).then_some(()));
        client.say(&json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": id}}));
        until("its end", || (!home.names().contains(&"late".to_owned())).then_some(()));
    }
}

#[test]
fn progress_comes_to_who_asked_for_it_and_only_grows() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Modern);
    let id = client.begin("vm_spawn", json!({"name": "web", "accel": "tcg"}), json!({"progressToken": "p"}));
    client.done("vm_spawn", id);
    client.good("vm_exec", json!({"name": "web", "argv": ["true"]}));
    let steps: Vec<_> = client.heard.iter().map(|message| &message["params"]).collect();
    assert!(!steps.is_empty());
    assert!(steps.iter().all(|step| step["progressToken"] == "p" && step["message"].is_string()), "{steps:?}");
    let done: Vec<_> = steps.iter().map(|step| step["progress"].as_f64().unwrap()).collect();
    assert!(done.is_sorted_by(|a, b| a < b), "{done:?}");
}
