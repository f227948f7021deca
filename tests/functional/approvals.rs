//! Approvals over the real `nido`: pending requests are listed, a decision counts once, and only for its request.

use nido_api::error::Code;
use nido_api::{ApprovalRequest, RestoreRequest, StopRequest, VmRef};
use nido_core::{Nido, OpenOptions};
use serde_json::{Value, json};

use crate::support::Home;

/// A server's side of it.
async fn server(home: &Home) -> Nido {
    let options = OpenOptions {
        home: Some(home.path()),
        qemu: Some(home.qemu_path()),
        supervisor: Some(env!("CARGO_BIN_EXE_nido").into()),
        ..OpenOptions::default()
    };
    Nido::open(options).await.unwrap()
}

fn with_server<T>(home: &Home, work: impl AsyncFnOnce(&Nido) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { work(&server(home).await).await })
}

fn request_for(vm: &Value) -> ApprovalRequest {
    ApprovalRequest {
        tool: "vm_delete".into(),
        vm_id: vm["id"].as_str().unwrap().into(),
        vm_name: vm["name"].as_str().unwrap().parse().unwrap(),
        actor: "token:ci".into(),
        agent: Some("nice\x1b[2J\u{202e}client".into()),
        arguments: json!({ "name": vm["name"], "force": true }),
    }
}

fn created(home: &Home, name: &str) -> Value {
    home.nido(["create", name, "--json"]).run().ok().json()
}

#[test]
fn a_person_approves_and_it_is_used_once() {
    let home = Home::new();
    let vm = created(&home, "web");
    with_server(&home, async |nido| {
        let id = nido.approval_request(&request_for(&vm)).unwrap().id;
        let list = home.nido(["approvals", "--json"]).run().ok().json();
        let shown = &list["approvals"][0];
        assert_eq!(
            (&shown["id"], &shown["state"], &shown["tool"]),
            (&json!(id), &json!("pending"), &json!("vm_delete"))
        );
        assert_eq!((&shown["vm_name"], &shown["arguments"]["force"]), (&json!("web"), &json!(true)));
        let table = home.nido(["approvals"]).run().ok();
        let row = table.text().lines().nth(1).unwrap().to_owned();
        for word in [&id, "vm_delete", "web", "token:ci", "nice^[[2J\\u{202e}client"] {
            assert!(row.contains(word), "{word} is not in {row}");
        }
        assert_eq!(home.nido(["approvals", "-q"]).run().ok().text().trim(), id);
        assert_eq!(nido.approval_use(&id, &request_for(&vm)).unwrap_err().code(), Code::ApprovalRequired);
        let done = home.nido(["approve", &id, "--yes"]).run().ok();
        assert_eq!(done.text().trim(), id);
        assert!(
            done.stderr.contains("approved: vm_delete of VM web") && !done.stderr.contains('\x1b'),
            "{}",
            done.stderr
        );
        assert_eq!(home.nido(["approvals", "-q"]).run().ok().text(), "", "nothing waits");
        nido.approval_use(&id, &request_for(&vm)).unwrap();
        assert_eq!(nido.approval_use(&id, &request_for(&vm)).unwrap_err().code(), Code::ApprovalRequired);
        home.nido(["approve", &id, "--yes", "--json"]).run().fails(1, "approval_ended");
        let all = home.nido(["approvals", "--all", "--json"]).run().ok().json();
        assert_eq!(all["approvals"][0]["state"], "used");
    });
    let lines = home.nido(["audit", "show", "--json", "--tool", "approval_approve", "--vm", "web"]).run().ok().json();
    let what: Vec<_> =
        lines["records"].as_array().unwrap().iter().map(|line| line["result"].as_str().unwrap()).collect();
    assert_eq!(what, ["pending", "success", "pending", "error"]);
}

#[test]
fn a_no_stays_a_no() {
    let home = Home::new();
    let vm = created(&home, "web");
    with_server(&home, async |nido| {
        let id = nido.approval_request(&request_for(&vm)).unwrap().id;
        home.nido(["approve", &id, "--yes"]).run().ok();
        assert_eq!(home.nido(["deny", &id, "--json"]).run().ok().json()["state"], "denied", "taken back");
        assert_eq!(nido.approval_use(&id, &request_for(&vm)).unwrap_err().code(), Code::Denied);
        assert_eq!(nido.approval_request(&request_for(&vm)).unwrap().id, id, "asking again does not help");
    });
    home.nido(["deny", "apr_\x1b", "--json"]).run().fails(1, "approval_not_found");
}

#[test]
fn an_approval_ends_with_its_vm() {
    let home = Home::new();
    let first = created(&home, "web");
    with_server(&home, async |nido| {
        let id = nido.approval_request(&request_for(&first)).unwrap().id;
        home.nido(["approve", &id, "--yes"]).run().ok();
        home.nido(["delete", "web"]).run().ok();
        let second = created(&home, "web");
        let error = nido.approval_use(&id, &request_for(&second)).unwrap_err();
        assert_eq!(error.code(), Code::Denied);
        assert!(error.message().contains("another VM"), "{error}");
    });
}

#[test]
fn an_approval_does_not_apply_to_the_next_vm_of_its_name() {
    let home = Home::new();
    let make = || {
        let vm = home.spawn("web");
        home.nido(["stop", "web", "--force"]).run().ok();
        home.nido(["snapshot", "create", "web", "before"]).run().ok();
        vm["id"].as_str().unwrap().to_owned()
    };
    let first = make();
    home.nido(["delete", "web"]).run().ok();
    let second = make();
    home.nido(["start", "web"]).run().ok();
    let there = home.info("web");
    let (name, snapshot) = ("web".parse().unwrap(), "before".parse().unwrap());
    let which = |id| VmRef { name: &name, id: Some(id) };
    with_server(&home, async |nido| {
        let mut quiet = |_| ();
        let how = RestoreRequest { disk_only: true, ..RestoreRequest::default() };
        let stop = StopRequest { force: true, ..StopRequest::default() };
        let refused = [
            nido.delete(which(&first), true).await,
            nido.stop(which(&first), stop).await,
            nido.snapshot_restore(which(&first), &snapshot, how, &mut quiet).await,
        ];
        for refused in refused {
            assert_eq!(refused.unwrap_err().code(), Code::VmReplaced);
        }
        assert_eq!(home.info("web"), there);
        nido.stop(which(&second), stop).await.unwrap();
        nido.snapshot_restore(which(&second), &snapshot, how, &mut quiet).await.unwrap();
        nido.delete(which(&second), false).await.unwrap();
        assert_eq!(nido.delete(which(&second), false).await.unwrap_err().code(), Code::VmNotFound);
    });
}
