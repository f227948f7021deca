//! The operations that change something, and the effect that each of them acknowledges.

use std::fs;
use std::sync::OnceLock;

use crate::rig::Rig;
use crate::support::receiver::Receiver;

/// An operation, as a test carries it out again and again.
pub struct Operation {
    pub name: &'static str,
    /// Makes what it works on: VMs named `op…`, which are deleted afterwards.
    pub prepare: &'static [&'static str],
    /// What else it needs.
    pub arrange: fn(&Rig),
    pub command: &'static str,
    /// Whether its effect is there, in a home that has recovered.
    pub done: fn(&Rig) -> bool,
}

fn nothing(_: &Rig) {}

fn is(rig: &Rig, name: &str, status: &str) -> bool {
    rig.info(name).is_some_and(|info| info["status"] == status)
}

fn exists(rig: &Rig, name: &str) -> bool {
    rig.info(name).is_some()
}

fn has_snapshot(rig: &Rig) -> bool {
    let listed = rig.nido("snapshot ls op --json").run();
    listed.code() == 0 && listed.json()["snapshots"].as_array().is_some_and(|all| !all.is_empty())
}

fn has_forward(rig: &Rig) -> bool {
    rig.info("op").is_some_and(|info| info["forwards"].as_array().is_some_and(|all| !all.is_empty()))
}

fn has_rule(rig: &Rig) -> bool {
    rig.info("op").is_some_and(|info| info["allow"].as_array().is_some_and(|all| !all.is_empty()))
}

fn has_template(rig: &Rig, name: &str) -> bool {
    rig.nido(&format!("template info {name}")).run().code() == 0
}

/// Kills the supervisor of `op`; its QEMU keeps running.
fn lose_supervisor(rig: &Rig) {
    let id = rig.info("op").unwrap()["id"].as_str().unwrap().to_owned();
    let all = crate::support::processes::of(&rig.home.scratch(""));
    let (pid, _) = all.iter().find(|(_, line)| line.contains(&format!("supervise {id}"))).unwrap();
    crate::support::processes::kill(*pid);
}

/// What `doctor --gc` finds: a directory of no VM, a deletion and a build that were interrupted, a part of no template.
fn litter(rig: &Rig) {
    let home = rig.home.path();
    for directory in ["vms/0123456789abcdef", "vms/.gone-fedcba98", "build/import-1"] {
        fs::create_dir_all(home.join(directory)).unwrap();
    }
    fs::write(home.join("vms/0123456789abcdef/vm.lock"), "").unwrap();
    fs::write(home.join("blobs/sha256").join("a".repeat(64)), "").unwrap();
}

/// A warm image, and no clones.
fn bake(rig: &Rig) {
    rig.ok("template bake sandbox --accel tcg");
}

/// A clone that waits.
fn fill_pool(rig: &Rig) {
    bake(rig);
    rig.ok("pool set sandbox 1 --accel tcg");
    crate::check::await_clone(rig);
}

fn pool(rig: &Rig) -> u64 {
    let listed = rig.nido("pool ls --json").run().ok().json();
    listed["pools"].as_array().unwrap().iter().filter_map(|pool| pool["wanted"].as_u64()).sum()
}

/// A webhook whose messages are taken.
fn listen(rig: &Rig) {
    let url = RECEIVER.get_or_init(Receiver::start).url();
    rig.ok(&format!("webhook add --allow-private --url {url}"));
}

static RECEIVER: OnceLock<Receiver> = OnceLock::new();

const SPAWN: &str = "spawn op --accel tcg";

pub const BASIC: [Operation; 11] = [
    Operation {
        name: "spawn",
        prepare: &[],
        arrange: nothing,
        command: "spawn op --accel tcg --ttl 1h --label a=b",
        done: |rig| is(rig, "op", "running"),
    },
    Operation {
        name: "create",
        prepare: &[],
        arrange: nothing,
        command: "create op --accel tcg",
        done: |rig| is(rig, "op", "created"),
    },
    Operation {
        name: "start",
        prepare: &["create op --accel tcg"],
        arrange: nothing,
        command: "start op",
        done: |rig| is(rig, "op", "running"),
    },
    Operation {
        name: "stop",
        prepare: &[SPAWN],
        arrange: nothing,
        command: "stop op",
        done: |rig| is(rig, "op", "stopped"),
    },
    Operation {
        name: "restart",
        prepare: &[SPAWN],
        arrange: nothing,
        command: "restart op",
        done: |rig| is(rig, "op", "running"),
    },
    Operation {
        name: "pause",
        prepare: &[SPAWN],
        arrange: nothing,
        command: "pause op",
        done: |rig| is(rig, "op", "paused"),
    },
    Operation {
        name: "resume",
        prepare: &[SPAWN, "pause op"],
        arrange: nothing,
        command: "resume op",
        done: |rig| is(rig, "op", "running"),
    },
    Operation {
        name: "delete",
        prepare: &[SPAWN, "snapshot create op s"],
        arrange: nothing,
        command: "delete op --force --yes",
        done: |rig| !exists(rig, "op"),
    },
    Operation { name: "run", prepare: &[], arrange: nothing, command: "run --accel tcg -- true", done: |_| true },
    Operation {
        name: "takeover",
        prepare: &[SPAWN],
        arrange: lose_supervisor,
        command: "exec op -- true",
        done: |rig| is(rig, "op", "running"),
    },
    Operation {
        name: "doctor --gc",
        prepare: &[],
        arrange: litter,
        command: "doctor --gc",
        done: |rig| !rig.home.path().join("vms/0123456789abcdef").exists(),
    },
];

pub const COPIES: [Operation; 14] = [
    Operation {
        name: "snapshot create",
        prepare: &[SPAWN, "stop op"],
        arrange: nothing,
        command: "snapshot create op s",
        done: has_snapshot,
    },
    Operation {
        name: "snapshot create of a running VM",
        prepare: &[SPAWN],
        arrange: nothing,
        command: "snapshot create op s",
        done: |rig| has_snapshot(rig) && is(rig, "op", "running"),
    },
    Operation {
        name: "snapshot create of a paused VM",
        prepare: &[SPAWN, "pause op"],
        arrange: nothing,
        command: "snapshot create op s",
        done: |rig| has_snapshot(rig) && is(rig, "op", "paused"),
    },
    Operation {
        name: "snapshot restore",
        prepare: &[SPAWN, "stop op", "snapshot create op s"],
        arrange: nothing,
        command: "snapshot restore op s",
        done: |rig| has_snapshot(rig) && is(rig, "op", "stopped"),
    },
    Operation {
        name: "snapshot restore of a running VM",
        prepare: &[SPAWN, "snapshot create op s"],
        arrange: nothing,
        command: "snapshot restore op s",
        done: |rig| has_snapshot(rig) && is(rig, "op", "running"),
    },
    Operation {
        name: "snapshot delete",
        prepare: &[SPAWN, "snapshot create op s"],
        arrange: nothing,
        command: "snapshot delete op s",
        done: |rig| !has_snapshot(rig),
    },
    Operation {
        name: "fork",
        prepare: &[SPAWN],
        arrange: nothing,
        command: "fork op op-2",
        done: |rig| is(rig, "op-2", "running") && is(rig, "op", "running"),
    },
    Operation {
        name: "fork of a paused VM",
        prepare: &[SPAWN, "pause op"],
        arrange: nothing,
        command: "fork op op-2",
        done: |rig| is(rig, "op-2", "running") && is(rig, "op", "paused"),
    },
    Operation {
        name: "forward add",
        prepare: &[SPAWN],
        arrange: nothing,
        command: "forward add op 0:80",
        done: has_forward,
    },
    Operation {
        name: "forward add to a stopped VM",
        prepare: &[SPAWN, "stop op"],
        arrange: nothing,
        // Nothing listens there: the VM is not started.
        command: "forward add op 47311:80",
        done: has_forward,
    },
    Operation {
        name: "forward rm",
        prepare: &[SPAWN, "forward add op 0:80"],
        arrange: nothing,
        command: "forward rm op 80",
        done: |rig| !has_forward(rig),
    },
    Operation {
        name: "net allow",
        prepare: &[SPAWN],
        arrange: nothing,
        command: "net allow op host:80",
        done: has_rule,
    },
    Operation {
        name: "net allow of a stopped VM",
        prepare: &[SPAWN, "stop op"],
        arrange: nothing,
        command: "net allow op host:80",
        done: has_rule,
    },
    Operation {
        name: "net deny",
        prepare: &["spawn op --accel tcg --allow host:80"],
        arrange: nothing,
        command: "net deny op host:80",
        done: |rig| !has_rule(rig),
    },
];

pub const TEMPLATES: [Operation; 2] = [
    Operation {
        name: "template import",
        prepare: &[],
        arrange: crate::rig::delete_template,
        command: "template import @/real.nido",
        done: |rig| has_template(rig, "real"),
    },
    Operation {
        name: "template delete",
        prepare: &[],
        arrange: crate::rig::import_template,
        command: "template delete real",
        done: |rig| !has_template(rig, "real"),
    },
];

pub const POOLS: [Operation; 5] = [
    Operation {
        name: "template bake",
        prepare: &[],
        arrange: nothing,
        command: "template bake sandbox --accel tcg --again",
        done: |_| true,
    },
    Operation {
        name: "pool set",
        prepare: &[],
        arrange: bake,
        command: "pool set sandbox 1 --accel tcg",
        done: |rig| pool(rig) == 1,
    },
    Operation {
        name: "claim",
        prepare: &[],
        arrange: fill_pool,
        command: "spawn op --accel tcg",
        done: |rig| is(rig, "op", "running"),
    },
    Operation {
        name: "fork of a template",
        prepare: &[],
        arrange: bake,
        command: "spawn op --accel tcg",
        done: |rig| is(rig, "op", "running"),
    },
    Operation {
        name: "webhook",
        prepare: &[],
        arrange: listen,
        command: "create op --accel tcg",
        done: |rig| exists(rig, "op"),
    },
];

fn has_token(rig: &Rig) -> bool {
    let listed = rig.ok("token list");
    listed["tokens"].as_array().unwrap().iter().any(|token| token["name"] == "op")
}

fn has_checkpoint(rig: &Rig) -> bool {
    let file = fs::read_to_string(rig.home.scratch("checkpoint"));
    file.is_ok_and(|text| !text.is_empty()) && rig.nido("audit verify").run().code() == 0
}

/// Who may use the servers, where events are posted, and what is signed of the audit log.
pub const ACCESS: [Operation; 4] = [
    Operation {
        name: "token create",
        prepare: &[],
        arrange: nothing,
        command: "token create --name op --scope run",
        done: has_token,
    },
    Operation {
        name: "token revoke",
        prepare: &["token create --name op --scope run"],
        arrange: nothing,
        command: "token revoke op --yes",
        done: |rig| !has_token(rig),
    },
    Operation {
        name: "webhook add",
        prepare: &[],
        arrange: nothing,
        command: "webhook add --allow-private --url http://127.0.0.1:9/",
        done: |rig| !rig.ok("webhook ls")["webhooks"].as_array().unwrap().is_empty(),
    },
    Operation {
        name: "audit checkpoint",
        prepare: &[],
        arrange: |rig| drop(fs::remove_file(rig.home.scratch("checkpoint"))),
        command: "audit checkpoint -o @/checkpoint",
        done: has_checkpoint,
    },
];
