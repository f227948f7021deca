//! The MCP server and invalid messages: other revisions, invalid params, invalid lines.

use serde_json::{Value, json};

use crate::support::Home;
use crate::support::mcp::{Client, Era};

#[test]
fn invalid_calls_are_explained_and_recorded() {
    for era in Era::ALL {
        let home = Home::new();
        let mut client = Client::start(&home, era);
        for (method, params, words) in [
            ("tools/call", json!({"name": "vm_fly", "arguments": {"stdin": "hidden"}}), "there is no such tool"),
            (
                "tools/call",
                json!({"name": "vm_exec", "arguments": "{\"stdin\": \"hidden\"}"}),
                "arguments: invalid type",
            ),
            ("tools/call", json!({"name": "vm_exec", "arguments": ["hidden"]}), "arguments: invalid type"),
            ("tools/call", json!({"name": 7}), "name: invalid type"),
            ("resources/read", json!({"uri": 7}), "uri: invalid type"),
            ("prompts/get", json!({}), "params: missing field `name`"),
        ] {
            let error = client.response_to(method, params)["error"].clone();
            assert_eq!(error["code"], -32602, "{error}");
            assert!(error["message"].as_str().unwrap().starts_with(words), "{error}");
        }
        drop(client);
        let log = home.nido(["audit", "show", "--json"]).run().ok().json();
        let lines = log["records"].as_array().unwrap().iter();
        let lines: Vec<_> = lines.map(|line| (&line["tool"], &line["result"], &line["reason"])).collect();
        let is = ["vm_fly", "vm_exec", "vm_exec", "tools/call"].map(Value::from);
        let reasons = ["no_such_tool", "params_invalid", "params_invalid", "params_invalid"].map(Value::from);
        let denied = Value::from("denied");
        let expected: Vec<_> = is.iter().zip(&reasons).map(|(tool, reason)| (tool, &denied, reason)).collect();
        assert_eq!(lines, expected);
        assert!(!log.to_string().contains("hidden"), "{log}");
    }
}

#[test]
fn a_revision_with_batches_is_answered_with_the_one_before_it() {
    let home = Home::new();
    for (asked, answered) in [
        ("2025-03-26", "2024-11-05"),
        ("2024-11-05", "2024-11-05"),
        ("2025-06-18", "2025-06-18"),
        ("2025-11-25", "2025-11-25"),
        ("1999-01-01", "2025-11-25"),
    ] {
        let hello = json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
            "protocolVersion": asked, "capabilities": {}, "clientInfo": {"name": "old", "version": "1"}}});
        let ready = json!({"jsonrpc": "2.0", "method": "notifications/initialized"});
        let call =
            json!({"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "vm_ls", "arguments": {}}});
        let ran = home.nido(["mcp-server", "start"]).input(format!("{hello}\n{ready}\n{call}\n")).run().ok();
        let answers: Vec<Value> = ran.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(answers[0]["result"]["protocolVersion"], answered, "{asked}");
        assert_eq!(answers[1]["result"]["structuredContent"], json!({"vms": []}), "{asked}");
    }
    let mut client = Client::start(&home, Era::Modern);
    let told = client.result("server/discover", json!({}));
    assert!(!told["supportedVersions"].to_string().contains("2025-03-26"), "{told}");
}

#[test]
fn invalid_lines_get_an_error_and_nothing_else() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Legacy);
    client.send_json(&json!("no message"));
    client.send_json(&json!({"jsonrpc": "2.0", "id": 77, "method": "no/such/method"}));
    assert_eq!(client.answer(77)["error"]["code"], -32601);
    client.good("vm_ls", json!({}));
    client.ended().ok();
    // A client that begins with another message.
    let ran = home.nido(["mcp-server", "start", "--json"]).input("GET / HTTP/1.1\r\n\r\n").run();
    assert!(ran.text().lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{}", ran.text());
}
