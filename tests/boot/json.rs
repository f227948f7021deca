//! `--json` of each verb: one value on stdout, with the contract's fields.

use serde_json::Value;

use crate::rig::TestHome;

const VM_FIELDS: [&str; 30] = [
    "name",
    "id",
    "status",
    "status_cause",
    "status_detail",
    "template",
    "machine",
    "machine_reason",
    "accel",
    "isolation",
    "confinement",
    "nested",
    "cpus",
    "memory_mib",
    "disk_bytes",
    "net",
    "ip_address",
    "ssh_command",
    "forwards",
    "labels",
    "ephemeral",
    "lease",
    "agent",
    "created_at",
    "started_at",
    "expires_at",
    "idle_at",
    "failure",
    "timings",
    "warnings",
];

/// Fields that are there only where they apply.
const OPTIONAL_FIELDS: [&str; 10] = [
    "allow",
    "disk_quota_bytes",
    "max_processes",
    "host_limits",
    "limits_hit",
    "net_limits",
    "network",
    "presets",
    "secret_env",
    "secrets",
];

#[track_caller]
fn has(value: &Value, fields: &[&str]) {
    let object = value.as_object().unwrap_or_else(|| panic!("no object: {value}"));
    for field in fields {
        assert!(object.contains_key(*field), "{field} is missing: {value:#}");
    }
}

/// Everything that is reported about a VM; `warnings` only if there are any.
#[track_caller]
fn is_vm(value: &Value, name: &str, status: &str) {
    let fields: Vec<_> = VM_FIELDS.into_iter().filter(|field| *field != "warnings").collect();
    has(value, &fields);
    assert_eq!((&value["name"], &value["status"]), (&name.into(), &status.into()), "{value:#}");
    has(&value["agent"], &["ready", "version", "transport"]);
    for key in value.as_object().unwrap().keys() {
        let key = key.as_str();
        assert!(VM_FIELDS.contains(&key) || OPTIONAL_FIELDS.contains(&key), "{key} is not in the contract");
    }
}

#[test]
fn every_verb_answers_in_json() {
    let home = TestHome::new();
    let call = |words: &[&str]| home.nido(words).json();

    is_vm(
        &call(&["create", "web", "--net", "none", "--ttl", "1h", "--idle", "1h", "--label", "a=b"]),
        "web",
        "created",
    );
    let started = call(&["start", "web"]);
    is_vm(&started, "web", "running");
    has(&started["timings"], &["path", "qemu_ms", "load_ms", "agent_ms", "total_ms"]);
    assert_eq!(started["timings"]["path"], "fork");
    if started["accel"] == "tcg" {
        assert!(started["warnings"][0].as_str().unwrap().contains("isolation"), "{started:#}");
    }
    let info = call(&["info", "web"]);
    is_vm(&info, "web", "running");
    assert!(info["expires_at"].is_string() && info["idle_at"].is_string());
    is_vm(&call(&["ls"])["vms"][0], "web", "running");

    let result = call(&["exec", "web", "--", "sh", "-c", "echo out; echo err >&2"]);
    has(&result, &["stdout", "stderr", "exit_code", "signal", "timed_out", "truncated", "duration_ms"]);
    assert_eq!(
        (&result["stdout"], &result["stderr"], &result["exit_code"]),
        (&"out\n".into(), &"err\n".into(), &0.into())
    );
    assert_eq!(result["truncated"], serde_json::json!({ "stdout": false, "stderr": false }));
    let done = home.nido(["--json", "exec", "web", "--", "sh", "-c", "exit 3"]).run().expect(3);
    assert_eq!(done.json()["exit_code"], 3);
    let long = call(&["exec", "web", "--", "head", "-c", "20000000", "/dev/zero"]);
    assert_eq!((&long["truncated"]["stdout"], &long["truncated"]["stderr"]), (&true.into(), &false.into()));
    assert_eq!(long["stdout"].as_str().unwrap().len(), 16 << 20);

    for copy in [
        call(&["upload", "web", "/etc/hostname", "/root/x"]),
        call(&["download", "web", "/root/x", "x"]),
        call(&["cp", "x", "web:/root/y"]),
    ] {
        has(&copy, &["entries", "bytes", "skipped", "path", "duration_ms"]);
        assert_eq!(copy["entries"], 1);
    }
    let forward = call(&["forward", "add", "web", "7000"]);
    has(&forward, &["host", "host_port", "guest_port"]);
    assert_eq!(call(&["forward", "ls", "web"])["forwards"][0], forward);
    call(&["forward", "rm", "web", "7000"]);

    is_vm(&call(&["pause", "web"]), "web", "paused");
    is_vm(&call(&["resume", "web"]), "web", "running");
    is_vm(&call(&["restart", "web"]), "web", "running");
    is_vm(&call(&["stop", "web"]), "web", "stopped");
    for line in home.nido(["--json", "logs", "web"]).text().lines() {
        has(&serde_json::from_str(line).unwrap(), &["line"]);
    }
    is_vm(&call(&["delete", "web"])["vms"][0], "web", "stopped");

    let spawned = home.nido(["--json", "spawn", "web", "--net", "none"]).ok();
    is_vm(&spawned.json(), "web", "running");
    for line in spawned.stderr.lines() {
        has(&serde_json::from_str(line).unwrap(), &[]);
    }
    let ran = home.nido(["--json", "run", "--net", "none", "--", "echo", "hi"]).ok();
    assert_eq!(ran.json()["stdout"], "hi\n");

    let templates = call(&["template", "ls"]);
    has(&templates, &["templates", "recipes"]);
    let template = call(&["template", "info", "sandbox"]);
    has(
        &template,
        &[
            "name",
            "recipe",
            "digest",
            "init",
            "kernel",
            "size_bytes",
            "disk_bytes",
            "created_at",
            "agent_current",
            "used_by",
        ],
    );
    assert_eq!(template["used_by"], serde_json::json!(["web"]));
    home.nido(["template", "delete", "sandbox"]).problem(1, "template_in_use");
    let built = call(&["template", "build", "sandbox"]);
    has(&built, &["template", "already_built", "duration_ms"]);
    assert_eq!(built["already_built"], true, "the suite's templates are those of this nido");
    let report = call(&["doctor"]);
    assert_eq!(report["ok"], true, "{report:#}");
    report["checks"].as_array().unwrap().iter().for_each(|check| has(check, &["name", "status", "detail"]));
    call(&["doctor", "--gc"]);
    home.nido(["exec", "web", "--", "true"]).ok();
    home.nido(["delete", "--force", "web", "--yes"]).ok();
    assert!(call(&["template", "delete", "debian-12"])["deleted"].is_string());
    home.nido(["spawn", "web", "--template", "debian-12"]).problem(1, "template_not_found");
}
