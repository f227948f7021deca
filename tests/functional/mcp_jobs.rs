//! Calls of tools that take longer than a client waits: they continue as jobs, or are cancelled if they cannot be jobs.

use nido_api::{JOBS_MAX, JobOutcome, JobRequest};
use nido_core::{Nido, OpenOptions};
use serde_json::json;

use crate::support::http::Server;
use crate::support::mcp::{Client, Era};
use crate::support::{Home, until};

#[test]
fn long_calls_become_jobs_that_can_be_awaited_and_cancelled() {
    let home = Home::new();
    let mut client = Client::with(&home, Era::Modern, &["--confirm", "never", "--answer-within", "200ms"], json!({}));
    home.spawn("web");
    let go = home.scratch("go");
    let command = format!("until [ -e {} ]; do sleep 0.05; done; echo went", go.display());
    let begun = client.good("vm_exec", json!({"name": "web", "command": command}));
    assert_eq!(begun["status"], "running");
    let id = begun["job_id"].as_str().unwrap();
    assert_eq!(client.good("job_get", json!({"job_id": id}))["state"], "running");
    std::fs::write(&go, "").unwrap();
    let job = client.good("job_get", json!({"job_id": id, "wait_ms": 30_000}));
    assert_eq!(
        (&job["state"], &job["result"]["stdout"], &job["tool"]),
        (&"done".into(), &"went\n".into(), &"vm_exec".into())
    );
    // Cancelled, it is killed.
    let mark = home.scratch("mark");
    let command = format!("echo $$ > {}; exec sleep 1000", mark.display());
    let begun = client.good("vm_exec", json!({"name": "web", "command": command, "timeout_ms": 0}));
    let pid: u32 = std::fs::read_to_string(&mark).unwrap().trim().parse().unwrap();
    client.good("job_cancel", json!({"job_id": begun["job_id"]}));
    let job = client.good("job_get", json!({"job_id": begun["job_id"], "wait_ms": 30_000}));
    assert_eq!(job["state"], "cancelled");
    until("the command's end", || (!std::path::Path::new(&format!("/proc/{pid}")).exists()).then_some(()));
    client.bad("job_get", json!({"job_id": "job_0123456789abcdef"}), "job_not_found");
    // What a server carried out ends with it.
    let begun = client.good("vm_exec", json!({"name": "web", "argv": ["sleep", "1000"], "timeout_ms": 0}));
    drop(client);
    let mut client = Client::start(&home, Era::Modern);
    assert_eq!(client.good("job_get", json!({"job_id": begun["job_id"]}))["state"], "cancelled");
}

#[test]
fn a_job_of_a_tool_is_an_operation_of_the_rest_api_that_can_be_cancelled_there() {
    let home = Home::new();
    let mut client = Client::with(&home, Era::Modern, &["--confirm", "never", "--answer-within", "200ms"], json!({}));
    home.spawn("web");
    let begun = client.good("vm_exec", json!({"name": "web", "argv": ["sleep", "1000"], "timeout_ms": 0}));
    let server = Server::start(&home);
    let place = format!("/v1/operations/{}", begun["job_id"].as_str().unwrap());
    let shown = server.get(&place).ok(200);
    assert_eq!((&shown["kind"], &shown["status"]), (&"vm_exec".into(), &"running".into()), "{shown}");
    assert_eq!(server.send("DELETE", &place, &[], b"").ok(200)["status"], "cancelled");
    let job = client.good("job_get", json!({"job_id": begun["job_id"], "wait_ms": 30_000}));
    assert_eq!(job["state"], "cancelled");
}

/// A caller with the maximum number of jobs.
struct FullJobTable {
    nido: Nido,
    jobs: Vec<String>,
}

impl FullJobTable {
    fn of(home: &Home) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let options = OpenOptions { home: Some(home.path()), qemu: Some(home.qemu_path()), ..OpenOptions::default() };
        let nido = runtime.block_on(Nido::open(options)).unwrap();
        let request = JobRequest { tool: "vm_exec".into(), vm_name: None, actor: "token:other".into() };
        let jobs = (0..JOBS_MAX).map(|_| nido.job_begin(&request).unwrap().id).collect();
        Self { nido, jobs }
    }
}

#[test]
fn long_calls_that_cannot_be_jobs_are_cancelled_with_an_error() {
    let home = Home::new();
    let full = FullJobTable::of(&home);
    home.spawn("web");
    let mut client = Client::with(&home, Era::Modern, &["--confirm", "never", "--answer-within", "2s"], json!({}));
    let mark = home.scratch("mark");
    let command = format!("echo $$ > {}; exec sleep 1000", mark.display());
    let command = json!({"name": "web", "command": command, "timeout_ms": 0});
    let error = client.bad("vm_exec", command.clone(), "limit_exceeded");
    let pid = std::fs::read_to_string(&mark).unwrap().trim().to_owned();
    until("the command's end", || (!std::path::Path::new(&format!("/proc/{pid}")).exists()).then_some(()));
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("so it was cancelled: 1000 jobs are running, which is the limit"), "{message}");
    assert!(error["next_step"].as_str().unwrap().contains("job_cancel"), "{error}");
    // The guest never starts: nothing remains of it.
    home.qemu("no-agent");
    client.bad("vm_spawn", json!({"name": "late", "accel": "tcg"}), "limit_exceeded");
    assert_eq!(home.names(), ["web"]);
    // With room for one it continues.
    full.nido.job_end(&full.jobs[0], JobOutcome::Cancelled).unwrap();
    let begun = client.good("vm_exec", command);
    client.good("job_cancel", json!({"job_id": begun["job_id"]}));
    let log = home.nido(["audit", "show", "--json"]).run().ok().json();
    let ends =
        log["records"].as_array().unwrap().iter().filter(|line| line["stage"] == "outcome" && line["face"] == "mcp");
    let ends: Vec<_> = ends.take(2).map(|line| (&line["result"], &line["reason"])).collect();
    assert_eq!(ends, [(&"error".into(), &"interrupted".into()); 2]);
}

#[test]
fn uncancellable_calls_are_reported_as_running() {
    let home = Home::new();
    let _full = FullJobTable::of(&home);
    home.qemu("ignore-powerdown");
    home.spawn("web");
    let mut client = Client::with(&home, Era::Modern, &["--confirm", "never", "--answer-within", "300ms"], json!({}));
    let error = client.bad("vm_stop", json!({"name": "web", "timeout_ms": 16_000}), "limit_exceeded");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("it cannot be cancelled: it continues, and its result is lost"), "{message}");
    assert_eq!(client.good("vm_info", json!({"name": "web"}))["status"], "stopping");
    home.await_info("web", |vm| vm["status"] == "stopped");
}
