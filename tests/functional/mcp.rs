//! The MCP server over the real program: both eras of the protocol, tools and their answers, what is recorded.

use serde_json::{Value, json};

use crate::support::mcp::{Client, Era};
use crate::support::{Home, until};

#[test]
fn the_lifecycle_of_a_vm_in_both_protocol_versions() {
    for era in Era::ALL {
        let home = Home::new();
        let mut client = Client::start(&home, era);
        let request = json!({"name": "web", "accel": "tcg", "ttl_ms": 600_000, "labels": {"a": "b"}});
        let vm = client.good("vm_spawn", request.clone());
        assert_eq!((&vm["status"], &vm["labels"]["a"]), (&"running".into(), &"b".into()));
        assert!(vm["expires_at"].is_string() && vm.get("timings").is_none(), "{vm}");
        assert!(client.good("vm_info", json!({"name": "web"}))["timings"]["total_ms"].is_number());
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
        home.nido(["delete", "--force", "--yes", "web"]).run().ok();
        client.bad("vm_exec", json!({"name": "web", "argv": ["true"]}), "vm_not_found");
        let ran = client.ended().ok();
        assert!(ran.stderr.starts_with("host files can be read") && ran.stderr.lines().count() == 1, "{}", ran.stderr);
        home.expect_empty();
    }
}

#[test]
fn wrong_arguments_are_answers_that_name_the_field() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Modern);
    for (tool, arguments, words) in [
        ("vm_spawn", json!({"name": "Web"}), "name: 'Web' is not a VM name"),
        ("vm_spawn", json!({"name": "web", "cpus": "two"}), "cpus: must be a whole number"),
        ("vm_spawn", json!({"name": "web", "net": "bridge"}), "net: must be one of nat, restricted, none"),
        ("vm_spawn", json!({"name": "web", "start": false}), "start: there is no such argument"),
        ("vm_spawn", json!({"name": "web", "ttl_seconds": 0}), "ttl_seconds: must be a number greater than 0"),
        ("vm_spawn", json!({"name": "web", "ttl_ms": 0}), "ttl_ms: must be a number greater than 0"),
        ("vm_spawn", json!({"name": "web", "forwards": [{"guest_port": 0}]}), "forwards[0].guest_port: must be"),
        ("vm_create", json!({"name": "web", "idle_ms": 0}), "idle_ms: must be"),
        ("vm_create", json!({"name": "web", "labels": {"": "x"}}), "labels: at most"),
        ("vm_exec", json!({"argv": ["true"]}), "name: it is missing"),
        ("vm_exec", json!({"name": "web"}), "argv: there is no command"),
        ("vm_exec", json!({"name": "web", "argv": ["a"], "command": "a"}), "command: give either argv or command"),
        ("vm_ls", json!({"limit": 0}), "limit: must be a whole number from 1 to 500"),
        ("vm_ls", json!({"status": "asleep"}), "status: must be one of created, starting"),
    ] {
        let error = client.bad(tool, arguments, "spec_invalid");
        assert!(error["message"].as_str().unwrap().starts_with(words), "{error}");
    }
    // What is no tool is no call.
    let answer = client.response_to("tools/call", json!({"name": "vm_fly", "arguments": {}}));
    assert_eq!(answer["error"]["code"], -32602, "{answer}");
    assert!(home.names().is_empty());
}

#[test]
fn unknown_arguments_are_ignored_and_named_in_a_note() {
    // Clients such as n8n add fields of their own to every call, and none of their calls was carried out.
    let home = Home::new();
    let mut client = Client::start(&home, Era::Legacy);
    let extra =
        json!({"name": "web", "accel": "tcg", "toolCallId": "7", "lease": "0123456789abcdef", "sessionId": null});
    let made = client.good("vm_create", extra);
    assert_eq!(made["notes"], json!(["arguments that this tool does not have were ignored: lease, toolCallId"]));
    assert!(made["lease"].is_null(), "{made}");
    assert!(client.good("vm_info", json!({"name": "web"})).get("notes").is_none());
    let error = client.bad("vm_info", json!({"name": "nowhere", "verbose": true}), "vm_not_found");
    assert!(error["notes"][0].as_str().unwrap().ends_with("ignored: verbose"), "{error}");
}

#[test]
fn every_optional_argument_may_be_null_or_empty() {
    // A model under OpenAI's strict mode has to send every field: most of its calls were refused, and vm_upload could never succeed.
    let home = Home::new();
    let mut client = Client::start(&home, Era::Modern);
    let tools = client.tools();
    let path = home.scratch("file");
    let read = || std::fs::read_to_string(&path).unwrap();
    for empty in [json!(null), json!(""), json!([])] {
        let all = |client: &mut Client, tool: &str, given: Value| {
            let mut arguments = given;
            for (field, _) in tools[tool]["inputSchema"]["properties"].as_object().unwrap() {
                if arguments.get(field).is_none() {
                    arguments[field] = empty.clone();
                }
            }
            client.good(tool, arguments)
        };
        all(&mut client, "vm_spawn", json!({"name": "web", "accel": "tcg"}));
        assert_eq!(all(&mut client, "vm_exec", json!({"name": "web", "command": "echo a"}))["stdout"], "a\n");
        assert_eq!(all(&mut client, "vm_exec", json!({"name": "web", "argv": ["echo", "b"]}))["stdout"], "b\n");
        all(&mut client, "vm_upload", json!({"name": "web", "path": path, "content": "hi"}));
        assert_eq!(read(), "hi");
        all(&mut client, "vm_upload", json!({"name": "web", "path": path, "content_base64": "aG8="}));
        assert_eq!(read(), "ho");
        assert_eq!(all(&mut client, "vm_download", json!({"name": "web", "path": path}))["content"], "ho");
        all(&mut client, "vm_ls", json!({}));
        all(&mut client, "vm_stop", json!({"name": "web", "force": true}));
        all(&mut client, "vm_start", json!({"name": "web"}));
        home.nido(["delete", "--force", "--yes", "web"]).run().ok();
    }
    client.good("vm_spawn", json!({"name": "web", "accel": "tcg"}));
    client.good("vm_upload", json!({"name": "web", "path": path, "content": ""}));
    assert_eq!(read(), "", "an empty file can be written");
}

#[test]
fn times_are_seconds_and_numbers_may_be_written_as_floats_or_text() {
    // The specification's own call failed: timeout_seconds was an unknown field, and 5.0 was no integer.
    let home = Home::new();
    let mut client = Client::start(&home, Era::Modern);
    client.good("vm_spawn", json!({"name": "t2-a", "accel": "tcg", "cpus": 1.0, "ttl_seconds": 600.0}));
    for timeout in [json!(5), json!(5.0), json!("5"), json!(4.5)] {
        client.good("vm_exec", json!({"name": "t2-a", "command": "ls -l /", "timeout_seconds": timeout}));
    }
    for late in [json!({"timeout_seconds": 0.2}), json!({"timeout_ms": 200})] {
        let mut call = late;
        call["name"] = "t2-a".into();
        call["argv"] = json!(["sleep", "1000"]);
        assert_eq!(client.good("vm_exec", call)["timed_out"], true);
    }
    assert_eq!(client.good("vm_ls", json!({"limit": 5.0}))["vms"][0]["name"], "t2-a");
}

#[test]
fn every_call_is_recorded_with_caller_and_outcome() {
    let home = Home::new();
    let mut client = Client::with(&home, Era::Legacy, &["--exclude-tools", "vm_delete"], json!({}));
    client.good("vm_spawn", json!({"name": "web", "accel": "tcg"}));
    client.good("vm_exec", json!({"name": "web", "argv": ["false"], "stdin": "secret"}));
    client.good("vm_ls", json!({}));
    let path = home.scratch("file");
    client.good("vm_upload", json!({"name": "web", "path": path, "content_base64": "c2VjcmV0"}));
    client.bad("vm_delete", json!({"name": "web"}), "denied");
    assert!(!client.tools().contains_key("vm_delete"));
    drop(client);
    let log = home.nido(["audit", "show", "--json"]).run().ok().json();
    // Of what is done and of what is read there are two logs; within a second the order is unknown.
    let (reads, acts): (Vec<_>, Vec<_>) =
        log["records"].as_array().unwrap().iter().cloned().partition(|line| line["log"] == "reads");
    assert_eq!(reads.iter().map(|line| &line["tool"]).collect::<Vec<_>>(), ["vm_ls"]);
    let line = |at: usize| {
        let line = &acts[at];
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
    assert_eq!(acts[2]["agent"], "tests");
    assert!(acts[2]["actor"].as_str().unwrap().starts_with("uid:"));
    assert!(!log.to_string().contains("secret") && !log.to_string().contains("c2VjcmV0"));
}

#[test]
fn vms_snapshots_and_files_over_mcp() {
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
    let mut whole = home.info("web");
    whole.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    whole["agent"].as_object_mut().unwrap().retain(|_, value| !value.is_null());
    whole["snapshots"] = json!([]);
    assert_eq!(client.good("vm_info", json!({"name": "web"})), whole);
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
    client.bad("vm_download", json!({"name": "web", "path": "/nowhere"}), "guest_not_found");
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
    let snapshots = client.good("vm_info", json!({"name": "web"}))["snapshots"].clone();
    assert_eq!((&snapshots[0]["name"], snapshots.as_array().unwrap().len()), (&"before".into(), 1));
    client.bad("vm_restore", json!({"name": "web", "snapshot": "before"}), "approval_required");
    assert_eq!(client.good("template_list", json!({}))["templates"][0]["name"], "sandbox");
    client.bad("template_create", json!({"name": "sandbox", "from": "web"}), "template_exists");
}

#[test]
fn every_next_step_leads_on() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Modern);
    let request = json!({"name": "web", "accel": "tcg"});
    let made = client.good("vm_spawn", request.clone());
    let started_at = client.good("vm_info", json!({"name": "web"}))["started_at"].clone();
    let resumes = |client: &mut Client, error: &Value| {
        assert_eq!(error["state"], "paused", "{error}");
        assert!(error["next_step"].as_str().unwrap().contains("vm_start"), "{error}");
        let now = client.good("vm_start", json!({"name": "web"}));
        assert_eq!((&now["status"], &now["id"]), (&"running".into(), &made["id"]));
        assert_eq!(client.good("vm_info", json!({"name": "web"}))["started_at"], started_at);
        assert_eq!(client.good("vm_exec", json!({"name": "web", "argv": ["echo", "on"]}))["stdout"], "on\n");
    };
    home.nido(["pause", "web"]).run().ok();
    let error = client.bad("vm_exec", json!({"name": "web", "argv": ["true"]}), "vm_not_running");
    resumes(&mut client, &error);
    home.nido(["pause", "web"]).run().ok();
    let error = client.bad("vm_spawn", request.clone(), "vm_exists");
    resumes(&mut client, &error);
    // The VM of this very request, stopped: it is not started again without a request.
    client.good("vm_stop", json!({"name": "web", "force": true}));
    let error = client.bad("vm_spawn", request.clone(), "vm_exists");
    assert!(error["next_step"].as_str().unwrap().contains("this very request: vm_start"), "{error}");
    assert_eq!(client.good("vm_start", json!({"name": "web"}))["id"], made["id"]);
    assert_eq!(client.good("vm_spawn", request)["id"], made["id"]);
    let error = client.bad("vm_spawn", json!({"name": "web", "cpus": 2}), "vm_exists");
    assert!(error["next_step"].as_str().unwrap().contains("another name"), "{error}");
    let error = client.bad("vm_upload", json!({"name": "web", "path": "/dev/null/x", "content": ""}), "path_invalid");
    assert!(error["next_step"].as_str().unwrap().contains("vm_exec with ls"), "{error}");
}

#[test]
fn lists_are_paged() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Modern);
    for name in ["a", "b", "c"] {
        client.good("vm_create", json!({"name": name, "accel": "tcg", "labels": {"odd": (name != "b").to_string()}}));
    }
    let names = |page: &Value| {
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
fn a_read_only_server_offers_only_reads() {
    let home = Home::new();
    let mut client = Client::with(&home, Era::Modern, &["--read-only"], json!({}));
    assert!(client.tools().values().all(|tool| tool["annotations"]["readOnlyHint"] == true));
    let error = client.bad("vm_spawn", json!({"name": "web"}), "denied");
    assert!(error["message"].as_str().unwrap().contains("is read-only"), "{error}");
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
        let id = client.begin("vm_exec", json!({"name": "web", "command": command, "timeout_seconds": 0}), json!({}));
        let pid = until("the command", || {
            let pid = std::fs::read_to_string(&mark).ok()?;
            pid.trim().parse::<u32>().ok()
        });
        client.send_json(&json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": id}}));
        until("the command's end", || (!std::path::Path::new(&format!("/proc/{pid}")).exists()).then_some(()));
        // The guest never starts.
        home.qemu("no-agent");
        let id = client.begin("vm_spawn", json!({"name": "late", "accel": "tcg"}), json!({}));
        until("the VM that is begun", || home.names().contains(&"late".to_owned()).then_some(()));
        client.send_json(&json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": id}}));
        until("its end", || (!home.names().contains(&"late".to_owned())).then_some(()));
    }
}

#[test]
fn progress_reaches_its_caller_and_only_grows() {
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
    client.heard.clear();
    let id = client.begin("vm_create", json!({"name": "db", "accel": "tcg"}), json!({"progressToken": "c"}));
    client.done("vm_create", id);
    let first = &client.heard[0]["params"];
    assert_eq!((&first["progressToken"], &first["total"]), (&"c".into(), &2.0.into()), "{first}");
}

#[test]
fn a_policy_limits_commands_and_refusals_are_recorded() {
    let home = Home::new();
    let policy = home.scratch("policy.toml");
    std::fs::write(&policy, "[[allow]]\nprogram = \"echo\"\nargs = [\"**\"]\n").unwrap();
    let mut client = Client::with(&home, Era::Legacy, &["--policy", policy.to_str().unwrap()], json!({}));
    client.good("vm_spawn", json!({"name": "web", "accel": "tcg"}));
    assert_eq!(client.good("vm_exec", json!({"name": "web", "argv": ["echo", "hi"]}))["stdout"], "hi\n");
    client.bad("vm_exec", json!({"name": "web", "argv": ["cat", "/etc/shadow"]}), "denied");
    client.bad("vm_exec", json!({"name": "web", "command": "echo hi"}), "denied");
    // Nor is a program put into the place of one that may be run.
    let file = home.scratch("echo");
    let upload = json!({"name": "web", "path": file, "content": "#!/bin/sh\n", "mode": "755"});
    client.bad("vm_upload", upload.clone(), "denied");
    assert!(!file.exists());
    drop(client);
    let log = home.nido(["audit", "show", "--json"]).run().ok().json();
    let denied = log["records"].as_array().unwrap().iter().filter(|r| r["result"] == "denied");
    assert_eq!(
        denied.map(|r| r["reason"].as_str().unwrap()).collect::<Vec<_>>(),
        ["not_in_allowlist", "not_in_allowlist", "upload_not_allowed"]
    );
    std::fs::write(&policy, "upload = true\nconfirm = 'never'\n[[allow]]\nprogram = \"echo\"\nargs = [\"**\"]\n")
        .unwrap();
    let mut client = Client::with(&home, Era::Legacy, &["--policy", policy.to_str().unwrap()], json!({}));
    client.good("vm_upload", upload);
    assert!(file.exists());
}

#[test]
fn long_output_is_truncated_in_the_result_and_complete_as_a_resource() {
    let home = Home::new();
    let mut client = Client::with(&home, Era::Modern, &["--confirm", "never"], json!({}));
    home.spawn("web");
    let command = "printf '\\033[2Jfirst\\n'; i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done; echo last";
    let id = client.begin("vm_exec", json!({"name": "web", "command": command}), json!({}));
    let result = client.done("vm_exec", id);
    let answer = &result["structuredContent"];
    let text = answer["stdout"].as_str().unwrap();
    assert!(text.len() <= 32 << 10 && text.starts_with("first\n0\n") && text.ends_with("\nlast\n"), "{text}");
    assert!(text.contains("bytes left out") && answer["truncated"] == json!({"stdout": true, "stderr": false}));
    assert_eq!(answer["altered"], json!({"stdout": true, "stderr": false}), "{answer}");
    let uri = answer["full_output"][0].as_str().unwrap();
    assert!(
        result["content"].as_array().unwrap().iter().any(|part| part["type"] == "resource_link" && part["uri"] == uri)
    );
    let whole = client.result("resources/read", json!({"uri": uri}));
    let whole = whole["contents"][0]["text"].as_str().unwrap();
    assert!(whole.lines().count() == 20_002 && !whole.contains('\u{1b}'));
    let listed = client.result("resources/list", json!({}));
    assert!(listed["resources"].as_array().unwrap().iter().any(|one| one["uri"] == uri));
}

#[test]
fn resources_are_read_and_completed_and_prompts_are_filled_in() {
    for era in Era::ALL {
        let home = Home::new();
        let mut client = Client::start(&home, era);
        home.spawn("web");
        let read = |client: &mut Client, uri: &str| {
            let result = client.result("resources/read", json!({"uri": uri}));
            result["contents"][0]["text"].as_str().unwrap().to_owned()
        };
        let vms: Value = serde_json::from_str(&read(&mut client, "vmops://vms")).unwrap();
        assert_eq!(vms["vms"][0]["name"], "web");
        let templates: Value = serde_json::from_str(&read(&mut client, "vmops://templates")).unwrap();
        assert_eq!(templates["templates"][0]["name"], "sandbox");
        read(&mut client, "vmops://vm/web/logs");
        for wrong in ["vmops://vm/nobody/logs", "vmops://vm/../logs", "file:///etc/passwd", "vmops://output/0"] {
            let answer = client.response_to("resources/read", json!({"uri": wrong}));
            let code = if era == Era::Legacy { -32002 } else { -32602 };
            assert_eq!(answer["error"]["code"], code, "{answer}");
            assert_eq!(answer["error"]["data"]["uri"], wrong, "{answer}");
        }
        let kinds = client.result("resources/templates/list", json!({}));
        assert_eq!(kinds["resourceTemplates"][0]["uriTemplate"], "vmops://vm/{name}/logs");
        let mut complete = |of: Value, name: &str, value: &str| {
            let asked = json!({"ref": of, "argument": {"name": name, "value": value}});
            client.result("completion/complete", asked)["completion"]["values"].clone()
        };
        let of_logs = json!({"type": "ref/resource", "uri": "vmops://vm/{name}/logs"});
        assert_eq!(complete(of_logs.clone(), "name", "w"), json!(["web"]));
        assert_eq!(complete(of_logs, "name", "x"), json!([]));
        assert_eq!(
            complete(json!({"type": "ref/prompt", "name": "quick_sandbox"}), "template", ""),
            json!(["sandbox"])
        );
        let prompts = client.result("prompts/list", json!({}));
        assert_eq!(prompts["prompts"].as_array().unwrap().len(), 2);
        let asked = json!({"name": "quick_sandbox", "arguments": {"task": "count to ten"}});
        let filled = client.result("prompts/get", asked);
        assert!(filled["messages"][0]["content"]["text"].as_str().unwrap().contains("count to ten"), "{filled}");
        let answer = client.response_to("prompts/get", json!({"name": "quick_sandbox"}));
        assert_eq!(answer["error"]["code"], -32602, "{answer}");
    }
}

#[test]
fn subscribers_are_notified_in_both_protocol_versions() {
    for era in Era::ALL {
        let home = Home::new();
        let mut client = Client::start(&home, era);
        match era {
            Era::Legacy => drop(client.result("resources/subscribe", json!({"uri": "vmops://vms"}))),
            Era::Modern => {
                let wanted = json!({"resourcesListChanged": true, "resourceSubscriptions": ["vmops://vms"]});
                client.request("subscriptions/listen", json!({"notifications": wanted}));
                client.hear("notifications/subscriptions/acknowledged");
            }
        }
        home.nido(["create", "web"]).run().ok();
        assert_eq!(client.hear("notifications/resources/updated")["params"]["uri"], "vmops://vms");
        client.hear("notifications/resources/list_changed");
        // It does not keep the server from ending.
        client.ended().ok();
    }
}

#[test]
fn template_subscribers_are_notified_of_deletions() {
    for era in Era::ALL {
        let home = Home::new();
        let mut client = Client::start(&home, era);
        assert_eq!(client.good("template_list", json!({}))["templates"][0]["name"], "sandbox");
        match era {
            Era::Legacy => drop(client.result("resources/subscribe", json!({"uri": "vmops://templates"}))),
            Era::Modern => {
                let wanted = json!({"resourceSubscriptions": ["vmops://templates"]});
                client.request("subscriptions/listen", json!({"notifications": wanted}));
                client.hear("notifications/subscriptions/acknowledged");
            }
        }
        home.nido(["template", "delete", "sandbox"]).run().ok();
        assert_eq!(client.hear("notifications/resources/updated")["params"]["uri"], "vmops://templates");
        client.ended().ok();
        let events = home.nido(["events", "--json"]).run().ok();
        let last = events.json()["events"].as_array().unwrap().last().unwrap().clone();
        assert_eq!((&last["event"], &last["details"]["template"]), (&"template.deleted".into(), &"sandbox".into()));
    }
}

#[test]
fn clients_are_configured_and_keep_other_settings() {
    let home = Home::new();
    let file = home.scratch("client.json");
    let path = file.to_str().unwrap();
    let install = |arguments: &[&str]| {
        let nido = home.nido(["mcp-server", "install", "--file", path]);
        arguments.iter().fold(nido, |nido, argument| nido.arg(*argument)).run()
    };
    for (client, key) in [
        ("claude-desktop", "mcpServers"),
        ("claude-code", "mcpServers"),
        ("cursor", "mcpServers"),
        ("vscode", "servers"),
    ] {
        let entry = install(&["--client", client, "--", "--read-only"]).ok().json()[key]["nido"].clone();
        assert!(std::path::Path::new(entry["command"].as_str().unwrap()).is_absolute());
        assert_eq!(entry["args"], json!(["mcp-server", "start", "--read-only"]));
        assert_eq!(entry["env"]["NIDO_HOME"], home.path().to_str().unwrap());
    }
    assert!(!file.exists());
    std::fs::write(&file, r#"{"other": 1, "mcpServers": {"x": {}}}"#).unwrap();
    for _ in 0..2 {
        install(&["--client", "cursor", "--write"]).ok();
        let now: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
        assert_eq!((&now["other"], &now["mcpServers"]["x"]), (&1.into(), &json!({})));
        assert_eq!(now["mcpServers"]["nido"]["args"], json!(["mcp-server", "start"]));
    }
    // What only this environment finds is recorded: the client starts it with another one.
    let moved = home.scratch("data");
    let install_moved = home.nido(["mcp-server", "install", "--client", "cursor", "--file", path]);
    let entry =
        install_moved.env("XDG_DATA_HOME", &moved).env("XDG_STATE_HOME", &moved).env("NIDO_HOME", "").run().ok().json();
    let env = &entry["mcpServers"]["nido"]["env"];
    assert_eq!(env["XDG_STATE_HOME"], moved.to_str().unwrap());
    if !rustix::process::geteuid().is_root() {
        assert_eq!(env["NIDO_HOME"], moved.join("nido").to_str().unwrap());
    }
    std::fs::write(&file, "// comment").unwrap();
    install(&["--client", "vscode", "--write", "--json"]).fails(2, "spec_invalid");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "// comment");
}

#[test]
fn log_subscribers_are_notified_of_growth() {
    for era in Era::ALL {
        let home = Home::new();
        let mut client = Client::start(&home, era);
        let vm = client.good("vm_spawn", json!({"name": "web", "accel": "tcg"}));
        let uri = "vmops://vm/web/logs";
        match era {
            Era::Legacy => drop(client.result("resources/subscribe", json!({"uri": uri}))),
            Era::Modern => {
                client.request("subscriptions/listen", json!({"notifications": {"resourceSubscriptions": [uri]}}));
                client.hear("notifications/subscriptions/acknowledged");
            }
        }
        let console = home.path().join("vms").join(vm["id"].as_str().unwrap()).join("console.log");
        let told = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            // The first check reads the length of the log; what is written behind it is growth.
            scope.spawn(|| {
                let mut log = std::fs::File::options().append(true).create(true).open(&console).unwrap();
                // For a minute at most: a test that fails meanwhile waits for this thread.
                for _ in 0..1200 {
                    if told.load(std::sync::atomic::Ordering::Relaxed) {
                        break;
                    }
                    std::io::Write::write_all(&mut log, b"a line\n").unwrap();
                    std::thread::sleep(std::time::Duration::from_millis(50));
                }
            });
            while client.hear("notifications/resources/updated")["params"]["uri"] != uri {}
            told.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        client.ended().ok();
    }
}

#[test]
fn a_session_begins_once() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Legacy);
    let hello =
        json!({"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "again", "version": "1"}});
    let answer = client.response_to("initialize", hello);
    assert_eq!(answer["error"]["code"], -32600, "{answer}");
    assert_eq!(client.good("vm_ls", json!({}))["vms"], json!([]));
    client.ended().ok();
}
