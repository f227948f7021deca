//! Webhooks over REST: added, listed, tried, delivered, sent again, removed; and who may.

use serde_json::{Value, json};

use super::webhooks::expect_no_deliverer;
use crate::support::http::Server;
use crate::support::receiver::{Receiver, Reply};
use crate::support::{Home, until};

#[test]
fn the_lifecycle_of_an_endpoint_over_http() {
    let receiver = Receiver::start();
    let home = Home::new();
    let server = Server::start(&home);
    let body = json!({"url": receiver.url(), "allow_private": true, "events": ["vm.created", "vm.deleted"]});
    let added = server.post("/v1/webhooks", &body).ok(201);
    let id = added["id"].as_str().unwrap();
    let secret = added["secret"].as_str().unwrap();
    assert!(secret.starts_with("whsec_"));
    let listed = server.get("/v1/webhooks");
    let mut without = added.clone();
    without.as_object_mut().unwrap().remove("secret");
    assert_eq!(listed.json()["webhooks"], json!([without]));

    receiver.reply([Reply::status(500, "")]);
    let tried = |server: &Server| server.post(&format!("/v1/webhooks/{id}/test"), &json!({})).ok(200);
    assert_eq!((&tried(&server)["delivered"], &tried(&server)["delivered"]), (&json!(false), &json!(true)));

    server.post("/v1/vms", &json!({"name": "web", "start": false})).ok(201);
    let of_it = format!("/v1/webhooks/{id}/deliveries");
    let all = || server.get(&of_it).ok(200)["deliveries"].as_array().unwrap().clone();
    let delivered = until("the delivery", || all().pop().filter(|last| last["state"] == "delivered"));
    assert_eq!((&delivered["event"], &delivered["attempts"]), (&json!("vm.created"), &json!(1)));
    let path = format!("/v1/webhooks/deliveries/{}/redeliver", delivered["id"]);
    let queued = server.post(&path, &json!({})).ok(202);
    assert_eq!(queued["message_id"], delivered["message_id"]);
    let messages = until("it to come again", || Some(receiver.messages()).filter(|all| all.len() == 4));
    assert_eq!(messages[2].header("webhook-id"), messages[3].header("webhook-id"));

    // The secret was returned once: no answer and no line of the audit log has it, given or made.
    let given = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let body = json!({"url": receiver.url(), "allow_private": true, "secret": given, "format": "slack"});
    let other = server.post("/v1/webhooks", &body).ok(201);
    assert_eq!(other["secret"], given);
    let told = ["/v1/webhooks", &of_it, "/v1/audit"].map(|path| String::from_utf8(server.get(path).body).unwrap());
    assert!(told.iter().all(|text| !text.contains("whsec_")), "{told:?}");
    assert!(told[2].contains("webhook_redeliver"));

    let removed = server.send("DELETE", &format!("/v1/webhooks/{id}"), &[], b"").ok(200);
    assert_eq!(removed["id"], id);
    server.send("DELETE", &format!("/v1/webhooks/{id}"), &[], b"").problem(404, "webhook_not_found");
    server.get(&of_it).problem(404, "webhook_not_found");
    assert_eq!(server.get("/v1/webhooks").ok(200)["webhooks"].as_array().unwrap().len(), 1);
    expect_no_deliverer(&home);
}

#[test]
fn invalid_endpoints_are_reported() {
    let home = Home::new();
    let server = Server::start(&home);
    let add = |body: Value| server.post("/v1/webhooks", &body);
    add(json!({"url": "http://127.0.0.1/"})).problem(422, "webhook_invalid");
    add(json!({"url": "https://169.254.169.254/"})).problem(422, "webhook_invalid");
    add(json!({"url": "https://1.1.1.1/", "secret": "whsec_short"})).problem(422, "webhook_invalid");
    let problem = add(json!({"url": "https://1.1.1.1/", "events": ["vm.exploded"]})).problem(422, "spec_invalid");
    assert!(problem["detail"].as_str().unwrap().starts_with("events[0]: "), "{problem}");
    add(json!({})).problem(422, "spec_invalid");
    server.post("/v1/webhooks/deliveries/7/redeliver", &json!({})).problem(404, "webhook_not_found");
    server.post("/v1/webhooks/nobody/test", &json!({})).problem(404, "webhook_not_found");
    assert_eq!(server.get("/v1/webhooks").ok(200)["webhooks"], json!([]));
}

#[test]
fn only_admins_see_webhook_urls() {
    let home = Home::new();
    let server = Server::start(&home);
    for scope in ["read", "run"] {
        let made = home.nido(["token", "create", "--name", scope, "--scope", scope, "--json"]).run().ok().json();
        let token = format!("Bearer {}", made["token"].as_str().unwrap());
        let headers = [("authorization", &*token), ("content-type", "application/json")];
        for (method, path) in [
            ("GET", "/v1/webhooks"),
            ("POST", "/v1/webhooks"),
            ("DELETE", "/v1/webhooks/x"),
            ("GET", "/v1/webhooks/x/deliveries"),
            ("POST", "/v1/webhooks/x/test"),
            ("POST", "/v1/webhooks/deliveries/1/redeliver"),
        ] {
            let body = if method == "POST" { "{\"url\": \"https://1.1.1.1/\"}" } else { "" };
            server.plain(method, path, &headers, body.as_bytes()).problem(403, "denied");
        }
    }
}
