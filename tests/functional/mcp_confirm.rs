//! Confirmation by a person before something is destroyed: which client gets the form, for which calls, and what counts as a response.

use serde_json::{Value, json};

use crate::support::mcp::{Client, Era};
use crate::support::{Home, until};

/// A VM that a person has to be asked about.
fn kept(client: &mut Client) {
    client.good("vm_create", json!({"name": "web", "accel": "tcg"}));
}

const FORMS: fn() -> Value = || json!({"elicitation": {}});

#[test]
fn a_client_without_forms_gets_the_approve_command() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Legacy);
    kept(&mut client);
    let error = client.bad("vm_delete", json!({"name": "web"}), "approval_required");
    let id = error["approval_id"].as_str().unwrap();
    assert!(error["hint"].as_str().unwrap().contains(&format!("nido approve {id}")), "{error}");
    // Not given yet; and an id that a model invents is not one.
    client.bad("vm_delete", json!({"name": "web", "approval_id": id}), "approval_required");
    client.bad("vm_delete", json!({"name": "web", "approval_id": "apr_0123456789abcdef"}), "approval_required");
    home.nido(["approve", id, "--yes"]).run().ok();
    // For exactly what was asked.
    let other = client.bad("vm_delete", json!({"name": "web", "approval_id": id, "force": true}), "denied");
    assert!(other["next_step"].as_str().unwrap().contains("without approval_id"), "{other}");
    client.good("vm_delete", json!({"name": "web", "approval_id": id}));
    assert!(home.names().is_empty());
    // For that VM, not for the next of its name.
    kept(&mut client);
    client.bad("vm_delete", json!({"name": "web", "approval_id": id}), "denied");
}

#[test]
fn a_client_with_forms_shows_one_in_both_protocol_versions() {
    for era in Era::ALL {
        for (answer, goes) in
            [(json!({"action": "decline"}), false), (json!({"action": "accept", "content": {"confirm": true}}), true)]
        {
            let home = Home::new();
            let mut client = Client::with(&home, era, &[], FORMS());
            kept(&mut client);
            let call = json!({"name": "vm_delete", "arguments": {"name": "web"}});
            let result = match era {
                Era::Legacy => {
                    let id = client.request("tools/call", call);
                    let asked = client.hear("elicitation/create");
                    assert!(asked["params"]["message"].as_str().unwrap().contains("VM 'web'"), "{asked}");
                    client.send_json(&json!({"jsonrpc": "2.0", "id": asked["id"], "result": answer.clone()}));
                    client.done("vm_delete", id)
                }
                Era::Modern => {
                    let asked = client.result("tools/call", call.clone());
                    assert_eq!(asked["resultType"], "input_required", "{asked}");
                    assert_eq!(asked["inputRequests"]["confirm"]["method"], "elicitation/create");
                    let mut again = call;
                    again["inputResponses"] = json!({"confirm": answer});
                    again["requestState"] = asked["requestState"].clone();
                    let id = client.request("tools/call", again.clone());
                    let first = client.done("vm_delete", id);
                    if goes {
                        // Used up: for another VM of that name it is invalid.
                        kept(&mut client);
                        let id = client.request("tools/call", again);
                        assert_eq!(client.done("vm_delete", id)["isError"], true);
                        home.nido(["delete", "--yes", "web"]).run().ok();
                    }
                    first
                }
            };
            assert_eq!(result["isError"], !goes, "{result}");
            assert_eq!(home.names().is_empty(), goes, "{era:?} {result}");
            if !goes {
                let refused = result["structuredContent"]["error"].clone();
                assert!(
                    refused["next_step"].as_str().unwrap().starts_with("the user has refused: do not"),
                    "{refused}"
                );
                // The user may have changed their mind, and is asked again; not for ever.
                for _ in 0..2 {
                    let (open, _) = form(&mut client, era, "vm_delete", &json!({"name": "web"}));
                    assert_eq!(answer_with(&mut client, "vm_delete", open, &answer)["isError"], true);
                }
                assert_eq!(client.bad("vm_delete", json!({"name": "web"}), "denied"), refused);
            }
        }
    }
}

#[test]
fn own_ephemeral_vms_and_policies_without_confirmation_need_none() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Modern);
    client.good("vm_spawn", json!({"name": "own", "accel": "tcg", "ephemeral": true}));
    client.good("vm_delete", json!({"name": "own", "force": true}));
    home.nido(["create", "other", "--ephemeral"]).run().ok();
    client.bad("vm_delete", json!({"name": "other"}), "approval_required");
    drop(client);
    let mut client = Client::with(&home, Era::Modern, &["--confirm", "never"], json!({}));
    client.good("vm_delete", json!({"name": "other"}));
    drop(client);
    let log = home.nido(["audit", "show", "--json"]).run().ok().json();
    let reasons: Vec<_> = log["records"].as_array().unwrap().iter().filter(|r| r["tool"] == "vm_delete").collect();
    let reasons: Vec<_> = reasons.iter().filter_map(|record| record["reason"].as_str()).collect();
    assert_eq!(reasons, ["own_ephemeral", "approval_required", "confirm_never"]);
}

/// What a client with forms gets when it asks, and how its user's answer comes back.
enum Form {
    /// A request of the server, with its number.
    Asked { call: u64, question: Value },
    /// A result, to be brought back with the answer.
    Returned { again: Value },
}

/// Calls a tool, as far as the user being asked.
fn form(client: &mut Client, era: Era, tool: &str, arguments: &Value) -> (Form, String) {
    let call = json!({"name": tool, "arguments": arguments});
    match era {
        Era::Legacy => {
            let call = client.request("tools/call", call);
            let question = client.hear("elicitation/create");
            let words = question["params"]["message"].as_str().unwrap().to_owned();
            (Form::Asked { call, question }, words)
        }
        Era::Modern => {
            let asked = client.result("tools/call", call.clone());
            assert_eq!(asked["resultType"], "input_required", "{asked}");
            let words = asked["inputRequests"]["confirm"]["params"]["message"].as_str().unwrap().to_owned();
            let mut again = call;
            again["requestState"] = asked["requestState"].clone();
            (Form::Returned { again }, words)
        }
    }
}

/// The user approves; returns the result of the call.
fn yes(client: &mut Client, tool: &str, form: Form) -> Value {
    answer_with(client, tool, form, &json!({"action": "accept", "content": {"confirm": true}}))
}

/// The user answers this; what becomes of the call.
fn answer_with(client: &mut Client, tool: &str, form: Form, yes: &Value) -> Value {
    match form {
        Form::Asked { call, question } => {
            client.send_json(&json!({"jsonrpc": "2.0", "id": question["id"], "result": yes}));
            client.done(tool, call)
        }
        Form::Returned { mut again } => {
            again["inputResponses"] = json!({"confirm": yes});
            let id = client.request("tools/call", again);
            client.done(tool, id)
        }
    }
}

#[test]
fn a_confirmation_does_not_apply_to_the_next_vm_of_its_name() {
    for era in Era::ALL {
        for (tool, arguments) in [
            ("vm_delete", json!({"name": "web", "force": true})),
            ("vm_restore", json!({"name": "web", "snapshot": "before"})),
            ("vm_stop", json!({"name": "web"})),
        ] {
            let home = Home::new();
            let mut client = Client::with(&home, era, &[], FORMS());
            let make = || {
                if tool == "vm_stop" {
                    home.nido(["spawn", "web", "--accel", "tcg", "--ephemeral"]).run().ok();
                } else {
                    home.spawn("web");
                    home.nido(["stop", "web", "--force"]).run().ok();
                    home.nido(["snapshot", "create", "web", "before"]).run().ok();
                }
            };
            make();
            let first = home.info("web");
            let (open, words) = form(&mut client, era, tool, &arguments);
            assert!(words.contains(first["id"].as_str().unwrap()), "{words}");
            home.nido(["delete", "web", "--force", "--yes"]).run().ok();
            make();
            let second = home.info("web");
            let result = yes(&mut client, tool, open);
            let error = &result["structuredContent"]["error"];
            let code = if era == Era::Legacy { "vm_replaced" } else { "denied" };
            assert_eq!((&result["isError"], &error["code"]), (&true.into(), &code.into()), "{result}");
            assert!(error["next_step"].is_string(), "{error}");
            assert_eq!(home.info("web"), second, "{tool}");
        }
    }
}

#[test]
fn stopping_another_callers_ephemeral_vm_needs_confirmation() {
    for era in Era::ALL {
        let home = Home::new();
        home.nido(["spawn", "theirs", "--accel", "tcg", "--ephemeral"]).run().ok();
        home.spawn("kept");
        let mut client = Client::with(&home, era, &[], FORMS());
        let (open, words) = form(&mut client, era, "vm_stop", &json!({"name": "theirs"}));
        assert!(words.contains("which deletes it") && words.contains("its disk, what runs in it (up for"), "{words}");
        assert_eq!(home.info("theirs")["status"], "running");
        assert_eq!(yes(&mut client, "vm_stop", open)["isError"], false);
        assert!(!home.names().contains(&"theirs".to_owned()));
        // No confirmation is needed if nothing is lost, or for the caller's own VM.
        assert_eq!(client.good("vm_stop", json!({"name": "kept", "force": true}))["status"], "stopped");
        client.good("vm_spawn", json!({"name": "own", "accel": "tcg", "ephemeral": true}));
        client.good("vm_stop", json!({"name": "own", "force": true}));
        drop(client);
        home.nido(["spawn", "theirs", "--accel", "tcg", "--ephemeral"]).run().ok();
        let mut client = Client::start(&home, era);
        let error = client.bad("vm_stop", json!({"name": "theirs"}), "approval_required");
        let id = error["approval_id"].as_str().unwrap();
        home.nido(["approve", id, "--yes"]).run().ok();
        client.good("vm_stop", json!({"name": "theirs", "approval_id": id}));
        assert_eq!(home.names(), ["kept"]);
    }
}

#[test]
fn a_response_to_an_unknown_form_is_ignored() {
    let yes = json!({"confirm": {"action": "accept", "content": {"confirm": true}}});
    // A client that showed no form, and one that shows forms and answers with what is printed for people.
    for capabilities in [json!({}), FORMS()] {
        let home = Home::new();
        let mut client = Client::with(&home, Era::Modern, &[], capabilities.clone());
        kept(&mut client);
        let call = json!({"name": "vm_delete", "arguments": {"name": "web"}});
        let asked = client.result("tools/call", call.clone());
        let id = home.nido(["approvals", "-q"]).run().ok().text().trim().to_owned();
        assert!(id.starts_with("apr_"), "{id}");
        for state in [id.as_str(), "", "0123456789abcdef0123456789abcdef"] {
            let mut forged = call.clone();
            forged["inputResponses"] = yes.clone();
            forged["requestState"] = state.into();
            let answer = client.result("tools/call", forged);
            match asked["resultType"] == "input_required" {
                true => assert_eq!(answer, asked, "asked again"),
                false => assert_eq!(answer["structuredContent"]["error"]["code"], "approval_required", "{answer}"),
            }
        }
        assert_eq!(asked["resultType"] == "input_required", capabilities != json!({}), "{asked}");
        assert!(!asked["requestState"].to_string().contains(&id), "{asked}");
        assert_eq!(home.names(), ["web"]);
    }
}

#[test]
fn an_unknown_name_fails_without_confirmation() {
    let home = Home::new();
    let mut client = Client::with(&home, Era::Modern, &[], FORMS());
    client.bad("vm_delete", json!({"name": "web"}), "vm_not_found");
    client.bad("vm_delete", json!({"name": "Web"}), "spec_invalid");
    client.bad("vm_delete", json!({}), "spec_invalid");
    assert_eq!(home.nido(["approvals", "--all", "-q"]).run().ok().text(), "");
}

// A dialog that was closed, or sent without the tick, was a no: the user was not asked again for two minutes.
#[test]
fn a_form_that_was_only_closed_was_not_answered() {
    for era in Era::ALL {
        for closed in [json!({"action": "cancel"}), json!({"action": "accept", "content": {"confirm": false}})] {
            let home = Home::new();
            let mut client = Client::with(&home, era, &[], FORMS());
            kept(&mut client);
            let (open, _) = form(&mut client, era, "vm_delete", &json!({"name": "web"}));
            let result = answer_with(&mut client, "vm_delete", open, &closed);
            let error = &result["structuredContent"]["error"];
            assert_eq!(error["code"], "approval_required", "{result}");
            let (open, _) = form(&mut client, era, "vm_delete", &json!({"name": "web"}));
            assert_eq!(yes(&mut client, "vm_delete", open)["isError"], false);
        }
    }
}

// A client gave up after a minute, and the yes that its user gave a little later was lost.
#[test]
fn a_late_approval_is_valid_for_the_next_call() {
    let home = Home::new();
    let mut client = Client::with(&home, Era::Legacy, &["--answer-within", "300ms"], FORMS());
    kept(&mut client);
    let (open, words) = form(&mut client, Era::Legacy, "vm_delete", &json!({"name": "web"}));
    assert!(words.contains("of template sandbox") && words.contains("Lost permanently: its disk."), "{words}");
    let Form::Asked { call, question } = open else { panic!("asked by a result") };
    let error = client.done("vm_delete", call)["structuredContent"]["error"].clone();
    assert_eq!(error["code"], "approval_required", "{error}");
    let yes = json!({"action": "accept", "content": {"confirm": true}});
    client.send_json(&json!({"jsonrpc": "2.0", "id": question["id"], "result": yes}));
    until("the yes", || {
        let list = home.nido(["approvals", "--all", "--json"]).run().ok().json();
        (list["approvals"][0]["state"] == "approved").then_some(())
    });
    let again = json!({"name": "web", "force": false, "approval_id": error["approval_id"]});
    client.good("vm_delete", again);
    assert!(home.names().is_empty());
}

// `rm -rf` in a VM that another caller had created ran without a confirmation.
#[test]
fn commands_and_files_for_vms_of_others_need_confirmation() {
    let home = Home::new();
    home.spawn("theirs");
    let mut client = Client::start(&home, Era::Legacy);
    let command = json!({"name": "theirs", "argv": ["echo", "hi"]});
    let error = client.bad("vm_exec", command.clone(), "approval_required");
    let id = error["approval_id"].as_str().unwrap().to_owned();
    let refused = home.nido(["approve", &id, "--json"]).run().fails(1, "approval_required");
    assert!(refused["hint"].as_str().unwrap().contains("--yes"), "{refused}");
    home.nido(["approve", &id, "--yes"]).run().ok();
    let mut approved = command.clone();
    approved["approval_id"] = id.into();
    assert_eq!(client.good("vm_exec", approved)["stdout"], "hi\n");
    let path = home.scratch("file");
    client.bad("vm_upload", json!({"name": "theirs", "path": path, "content": "x"}), "approval_required");
    client.good("vm_spawn", json!({"name": "own", "accel": "tcg"}));
    client.good("vm_exec", json!({"name": "own", "argv": ["true"]}));
    // Its own, but destroyed at once: refused without a confirmation.
    for wrong in [json!({"name": "own", "command": "rm -rf /"}), json!({"name": "theirs", "argv": ["rm", "-rf", "/"]})]
    {
        client.bad("vm_exec", wrong, "denied");
    }
    drop(client);
    let log = home.nido(["audit", "show", "--tool", "vm_exec", "--result", "denied", "--json"]).run().ok().json();
    let reasons: Vec<_> = log["records"].as_array().unwrap().iter().map(|line| line["reason"].clone()).collect();
    assert_eq!(reasons, ["approval_required", "dangerous_command", "dangerous_command"]);
    // Any tool can be put behind a question, and that is all that is asked then.
    let mut client = Client::with(&home, Era::Modern, &["--confirm", "vm_spawn,vm_exec@foreign"], json!({}));
    client.bad("vm_spawn", json!({"name": "new", "accel": "tcg"}), "approval_required");
    client.good("vm_delete", json!({"name": "own", "force": true}));
    drop(client);
    let policy = home.scratch("policy.toml");
    std::fs::write(&policy, "confirm = ['vm_fly']").unwrap();
    home.nido(["mcp-server", "start", "--json", "--policy", policy.to_str().unwrap()]).run().fails(2, "spec_invalid");
}

// A person approved an impossible call, and was asked again for the possible one.
#[test]
fn an_impossible_call_needs_no_confirmation() {
    let home = Home::new();
    home.spawn("web");
    let mut client = Client::with(&home, Era::Modern, &[], FORMS());
    let busy = client.bad("vm_delete", json!({"name": "web"}), "vm_busy");
    assert!(busy["hint"].is_null(), "the way around the question: {busy}");
    client.bad("vm_restore", json!({"name": "web", "snapshot": "none"}), "snapshot_not_found");
    assert_eq!(home.nido(["approvals", "--all", "-q"]).run().ok().text(), "");
    home.nido(["stop", "web"]).run().ok();
    home.nido(["snapshot", "create", "web", "clean"]).run().ok();
    home.nido(["start", "web"]).run().ok();
    let (_, words) = form(&mut client, Era::Modern, "vm_restore", &json!({"name": "web", "snapshot": "clean"}));
    assert!(words.contains("to the snapshot 'clean' of 20"), "{words}");
    let (_, words) = form(&mut client, Era::Modern, "vm_delete", &json!({"name": "web", "force": true}));
    assert!(words.contains("ended at once"), "{words}");
}

// A file of the host could be replaced by what a guest had written, unasked.
#[test]
fn a_file_of_the_host_is_not_replaced_unasked() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Modern);
    client.good("vm_spawn", json!({"name": "web", "accel": "tcg"}));
    let guest = home.scratch("guest-file");
    std::fs::write(&guest, "new").unwrap();
    let fetch = json!({"name": "web", "path": guest, "destination": "out", "overwrite": true});
    client.good("vm_download", fetch.clone());
    let out = home.path().join("exchange/out");
    std::fs::write(&out, "precious").unwrap();
    client.bad("vm_download", fetch, "approval_required");
    assert_eq!(std::fs::read_to_string(&out).unwrap(), "precious");
}

#[test]
fn approvals_watch_prints_a_new_request() {
    let home = Home::new();
    let watching = home.nido(["approvals", "--watch"]).start();
    let mut client = Client::start(&home, Era::Legacy);
    kept(&mut client);
    let error = client.bad("vm_delete", json!({"name": "web"}), "approval_required");
    let line = watching.line();
    assert!(line.starts_with(error["approval_id"].as_str().unwrap()) && line.contains("vm_delete web"), "{line}");
    watching.signal(rustix::process::Signal::TERM);
    assert_eq!(watching.wait().code(), 0);
}
