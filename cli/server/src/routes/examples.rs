//! Examples of bodies and answers, for people who read the description and programs that follow its links.
//!
//! Invariant: each is what its type reads and writes, to the field; a test checks it.

use serde_json::{Value, json};

/// One example: of which operation, of its body (none) or the response of which status, and what.
pub type Example = (&'static str, Option<u16>, Value);

macro_rules! examples {
    (
        bodies: $($asks:literal => $body:ty: $asked:expr;)*
        answers: $($operation:literal $status:literal => $answer:ty: $answered:expr;)*
    ) => {
        /// All of them.
        pub fn all() -> Vec<Example> {
            let bodies = [$(($asks, None, $asked)),*];
            let answers = [$(($operation, Some($status), $answered)),*];
            bodies.into_iter().chain(answers).collect()
        }

        #[cfg(test)]
        mod tests {
            use nido_api::*;
            use serde::{Serialize, de::DeserializeOwned};

            use super::super::{exec::*, snapshots::*, templates::*, vms::*};
            use super::*;
            use crate::operation_view::ApiOperation;

            fn read<T: DeserializeOwned>(operation: &str, example: &Value) -> T {
                let read = serde_json::from_value(example.clone());
                read.unwrap_or_else(|error| panic!("{operation}: {error}"))
            }

            /// A body is read, and no field of it is overlooked.
            fn check_body<T: DeserializeOwned>(operation: &str, mut example: Value) {
                let _: T = read(operation, &example);
                example["no such field"] = true.into();
                assert!(serde_json::from_value::<T>(example).is_err(), "{operation}");
            }

            /// A response is read, and written again as it was.
            fn check_answer<T: Serialize + DeserializeOwned>(operation: &str, example: &Value) {
                assert_eq!(&serde_json::to_value(read::<T>(operation, example)).unwrap(), example, "{operation}");
            }

            #[test]
            fn examples_are_what_their_types_read_and_write() {
                $(check_body::<$body>($asks, $asked);)*
                $(check_answer::<$answer>($operation, &$answered);)*
            }
        }
    };
}

examples! {
    bodies:
    "vm_spawn" => SpawnRequest: json!({ "name": "web", "memory_mib": 512, "ttl_ms": 600_000, "labels": { "job": "42" } });
    "vm_start" => StartRequest: json!({ "wait": true });
    "vm_stop" => StopRequest: json!({ "force": true });
    "vm_restart" => StopRequest: json!({ "force": true });
    "vm_fork" => ForkRequest: json!({ "names": ["web-2"] });
    "vm_exec" => ExecBody: json!({ "argv": ["uname", "-a"], "timeout_ms": 10_000 });
    "run" => RunRequest: json!({ "exec": { "command": "make -C /src test" }, "vm": { "memory_mib": 1024 } });
    "snapshot_create" => SnapshotRequest: json!({ "name": "before" });
    "snapshot_restore" => RestoreRequest: json!({ "disk_only": false });
    "forward_add" => ForwardSpec: json!({ "guest_port": 80 });
    "net_allow" => RulesRequest: json!({ "allow": ["example.com", "host:8080"] });
    "template_create" => TemplateRequest: json!({ "name": "mine", "from": "web", "no_bake": true });
    "template_build" => RecipeRequest: json!({ "rebuild": false, "no_bake": true });
    "template_bake" => BakeRequest: json!({ "memory_mib": 256, "net": "none" });
    "pool_set" => PoolRequest: json!({ "wanted": 4 });
    "webhook_add" => WebhookRequest:
        json!({ "url": "https://example.com/hook", "events": ["vm.crashed", "vm.stopped"] });
    answers:
    "vm_spawn" 201 => VmInfo: vm("web");
    "vm_info" 200 => VmInfo: vm("web");
    "vm_list" 200 => VmPage: json!({ "vms": [vm("web")], "next_cursor": "00000001767538810000-6f1d2c3b4a596877" });
    "vm_fork" 201 => ForkResult: json!({ "vm": "web", "copies": [vm("web-2")], "paused_ms": 41 });
    "vm_exec" 200 => ExecResult: exec();
    "vm_upload" 200 => CopyResult:
        json!({ "entries": 1, "bytes": 5120, "skipped": 0, "unreadable": 0, "unreadable_entries": [], "path": "/srv/data.bin", "duration_ms": 9 });
    "run" 200 => RunResult: json!({ "vm": vm("run-1f0c2d3e"), "exec": exec() });
    "snapshot_create" 201 => SnapshotInfo: snapshot();
    "snapshot_list" 200 => SnapshotList: json!({ "snapshots": [snapshot()] });
    "forward_add" 201 => ForwardSpec: json!({ "host": "127.0.0.1", "host_port": 40_123, "guest_port": 80 });
    "net_show" 200 => VmNetwork: json!({ "net": "restricted", "allow": ["example.com"], "network": network() });
    "net_allow" 200 => RuleChangeResult: json!({
        "allow": ["example.com", "host:8080"], "changed": ["host:8080"], "unchanged": ["example.com"]
    });
    "net_deny" 200 => RuleChangeResult: json!({ "allow": ["example.com"], "changed": ["host:8080"], "unchanged": [] });
    "webhook_add" 201 => WebhookAdded: webhook();
    "webhook_deliveries" 200 => DeliveryList: json!({ "deliveries": [delivery()] });
    "events" 200 => EventList: json!({ "events": [event()], "cursor": 42, "oldest": 1 });
    "operation_get" 200 => ApiOperation: operation();
}

fn vm(name: &str) -> Value {
    json!({
        "name": name,
        "id": "6f1d2c3b4a596877",
        "status": "running",
        "status_cause": null,
        "status_detail": null,
        "template": "sandbox",
        "machine": "microvm",
        "machine_reason": "microvm: this QEMU has it",
        "accel": "kvm",
        "isolation": "hardware",
        "confinement": ["namespaces", "landlock", "seccomp", "no-capabilities"],
        "nested": false,
        "cpus": 1,
        "memory_mib": 512,
        "disk_bytes": 4_294_967_296_u64,
        "net": "nat",
        "ip_address": "127.0.0.1",
        "ssh_command": null,
        "forwards": [],
        "labels": { "job": "42" },
        "ephemeral": false,
        "lease": null,
        "agent": { "ready": true, "version": "0.1.0", "transport": "vsock" },
        "created_at": "2026-01-04T15:00:10Z",
        "started_at": "2026-01-04T15:00:10Z",
        "expires_at": "2026-01-04T15:10:10Z",
        "idle_at": null,
        "failure": null,
        "timings": { "path": "fork", "qemu_ms": 41.2, "load_ms": 12.4, "agent_ms": 30.1, "total_ms": 96.5 }
    })
}

fn network() -> Value {
    json!({
        "sent_bytes": 5_120,
        "received_bytes": 71_680,
        "connections": 3,
        "open": 1,
        "denied": 1,
        "denials": [{
            "protocol": "tcp",
            "name": "host",
            "address": "10.0.2.2",
            "port": 8080,
            "reason": "address_private",
            "count": 1,
            "first_at": "2026-01-04T15:00:12Z",
            "last_at": "2026-01-04T15:00:12Z",
            "rule": "host:8080"
        }]
    })
}

fn exec() -> Value {
    json!({
        "stdout": "Linux web 6.12.0 x86_64 GNU/Linux\n",
        "stderr": "",
        "exit_code": 0,
        "signal": null,
        "timed_out": false,
        "duration_ms": 4,
        "truncated": { "stdout": false, "stderr": false }
    })
}

fn snapshot() -> Value {
    json!({
        "vm": "web",
        "name": "before",
        "created_at": "2026-01-04T15:02:00Z",
        "running": true,
        "size_bytes": 141_557_760,
        "paused_ms": 41
    })
}

fn webhook() -> Value {
    json!({
        "id": "0f3a9c1b2d4e5f60",
        "url": "https://example.com/hook",
        "events": ["vm.crashed", "vm.stopped"],
        "format": "standard",
        "allow_private": false,
        "created_at": "2026-01-04T15:00:00Z",
        "disabled": null,
        "pending": 0,
        "secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    })
}

fn delivery() -> Value {
    json!({
        "id": 7,
        "webhook_id": "0f3a9c1b2d4e5f60",
        "message_id": "msg_0f3a9c1b2d4e5f60_42",
        "event": "vm.stopped",
        "cursor": 42,
        "state": "delivered",
        "attempts": 1,
        "next_at": null,
        "last_status": 200,
        "last_error": null,
        "created_at": "2026-01-04T15:05:00Z",
        "done_at": "2026-01-04T15:05:01Z"
    })
}

fn event() -> Value {
    json!({
        "cursor": 42,
        "event": "vm.stopped",
        "timestamp": "2026-01-04T15:05:00Z",
        "vm_name": "web",
        "details": { "ip_address": null, "last_log_entries": [], "vm_id": "6f1d2c3b4a596877", "ran_ms": 290_000 }
    })
}

fn operation() -> Value {
    json!({
        "id": "job_9d8c7b6a59687786",
        "kind": "vm_spawn",
        "status": "running",
        "stage": "booting",
        "created_at": "2026-01-04T15:00:10Z",
        "ended_at": null,
        "result": null,
        "error": null
    })
}
