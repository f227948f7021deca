//! The MCP server over stdio: results that are too long for one page, and logs for the client.

use serde_json::{Value, json};

use crate::support::Home;
use crate::support::mcp::{Client, Era};

#[test]
fn invalid_requests_are_reported_only_to_their_client() {
    let asked = |home: &Home, era, flags: &[&str]| {
        let mut client = Client::with(home, era, flags, json!({}));
        assert_eq!(
            client.response_to("tools/call", json!({"name": "nonsense", "arguments": {}}))["error"]["code"],
            -32602
        );
        assert_eq!(client.response_to("nonsense/list", json!({}))["error"]["code"], -32601);
        let answer = client.response_to("resources/read", json!({"uri": "vmops://nonsense"}));
        assert!(answer["error"]["code"].is_i64(), "{answer}");
        client.bad("vm_info", json!({"name": "nobody"}), "vm_not_found");
        let secret =
            json!({"name": "nobody", "argv": ["cat"], "stdin": "word-of-mouth", "env": {"KEY": "word-of-mouth"}});
        client.bad("vm_exec", secret, "vm_not_found");
        client
            .send_json(&json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 4711}}));
        client.send_json(&json!({"jsonrpc": "2.0", "id": 4711, "result": {}}));
        let told = client.ended().stderr;
        // Which files of the host count is logged at the start.
        told.lines().filter(|line| !line.starts_with("host files can be read")).collect::<String>()
    };
    for era in Era::ALL {
        let home = Home::new();
        assert_eq!(asked(&home, era, &[]), "");
        // The user can find it.
        assert!(asked(&home, era, &["-v"]).contains("there is no such tool"));
        // Clients keep a server's standard error in a file.
        assert!(!asked(&home, era, &["-vv"]).contains("word-of-mouth"));
    }
}

#[test]
fn resources_are_listed_a_page_at_a_time() {
    let home = Home::new();
    for era in Era::ALL {
        let mut client = Client::start(&home, era);
        if era == Era::ALL[0] {
            // One more than a page holds.
            for number in 0..=200 {
                client.good("vm_create", json!({"name": format!("vm-{number}")}));
            }
        }
        let uris = |page: &Value| -> Vec<String> {
            let list = page["resources"].as_array().unwrap();
            list.iter().map(|one| one["uri"].as_str().unwrap().to_owned()).collect()
        };
        let first = client.result("resources/list", json!({}));
        let second = client.result("resources/list", json!({"cursor": first["nextCursor"]}));
        assert!(second.get("nextCursor").is_none(), "{second}");
        let (first, second) = (uris(&first), uris(&second));
        assert_eq!(first[..3], ["vmops://vms", "vmops://templates", "vmops://vm/vm-0/logs"]);
        assert_eq!((first.len(), second), (202, vec!["vmops://vm/vm-200/logs".to_owned()]));
        let answer = client.response_to("resources/list", json!({"cursor": "nonsense"}));
        assert_eq!(answer["error"]["code"], -32602, "{answer}");
        client.bad("vm_ls", json!({"cursor": "nonsense"}), "spec_invalid");
    }
}
