//! The REST API over the real program: events, streamed as they happen and to clients that reconnect.

use serde_json::json;

use crate::support::Home;
use crate::support::http::Server;

#[test]
fn events_reach_listeners_and_reconnecting_clients() {
    let home = Home::new();
    let server = Server::start(&home);
    let bearer = format!("Bearer {}", server.token());
    let listen = |last: Option<&str>| {
        let mut headers = vec![("authorization", &*bearer), ("accept", "text/event-stream")];
        headers.extend(last.map(|cursor| ("last-event-id", cursor)));
        server.open("GET", "/v1/events?vm=web", &headers, b"")
    };
    let mut live = listen(None);
    assert_eq!(live.status, 200);
    home.spawn("web");
    let kind = |stream: &mut crate::support::http::Stream| loop {
        if let Some(kind) = stream.line().strip_prefix("event: ") {
            return kind.to_owned();
        }
    };
    assert_eq!([kind(&mut live), kind(&mut live)], ["vm.created", "vm.started"]);
    home.nido(["stop", "web"]).run().ok();
    assert_eq!(kind(&mut live), "vm.stopped");
    // A client that was disconnected continues where it was.
    let all = server.get("/v1/events?vm=web").ok(200);
    let cursor = all["events"][0]["cursor"].to_string();
    let mut back = listen(Some(&cursor));
    assert_eq!([kind(&mut back), kind(&mut back)], ["vm.started", "vm.stopped"]);
    let crashes = server.get("/v1/events?event=vm.crashed").ok(200);
    assert_eq!(crashes["events"], json!([]));
    server.get("/v1/events?event=vm.sneezed").problem(422, "spec_invalid");
}
