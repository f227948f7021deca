use nido_api::error::Code;
use nido_api::state::VmState;
use nido_api::{
    AgentInfo, AllowEntry, AuditFilter, AuditLog, Caller, EgressRule, NetChoice, ReceiptLine, ReceiptVerdict, VmSpec,
    names_vm,
};
use nido_store::{AdoptedStart, AgentReady, Origin, Purpose, StoredBake, Transition, TransitionOutcome, VmRow};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::audit::receipt::{render, verify};
use crate::nido::OpenOptions;

struct Place {
    directory: TempDir,
    nido: Nido,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let home = Some(directory.path().join("home"));
        let nido = Nido::open_unreconciled(OpenOptions { home, ..OpenOptions::default() }).unwrap();
        Self { directory, nido }
    }

    fn create(&self, id: &str, name: &str) {
        self.create_in(id, name, VmState::Stopped);
    }

    fn create_in(&self, id: &str, name: &str, state: VmState) {
        let hash = |digit: &str| digit.repeat(64);
        let parts = serde_json::from_value(json!({
            "vmlinux": hash("a"), "initramfs": hash("b"), "root": hash("c"), "root_bytes": 1, "packages": hash("d"),
            "init": "agent", "append": ""
        }));
        let mut spec = VmSpec::named(name.parse().unwrap());
        (spec.net, spec.allow) = (NetChoice::Restricted, rules(&["example.com"]));
        let row = VmRow::new(id.into(), spec, Purpose::Use, state, parts.unwrap(), 1);
        self.nido.store().insert_vm(&row).unwrap();
    }

    fn delete(&self, id: &str) {
        self.nido.store().remove_vm(id, Vec::new()).unwrap();
    }

    /// A request that succeeds.
    fn request(&self, tool: &str, arguments: &Value) {
        self.nido.audit_begin(&Caller::command_line(), tool, arguments).unwrap().end(&Ok(())).unwrap();
    }

    fn receipt(&self, which: &str) -> AuditReceipt {
        self.nido.audit_receipt(which, |_| ()).unwrap()
    }

    /// A home with two VMs that had one name, and another VM.
    fn with_history() -> Self {
        let place = Self::new();
        place.create("id-0", "db");
        place.request("vm_exec", &json!({ "name": "db", "command": ["before"] }));
        place.request("vm_spawn", &json!({ "name": "web" }));
        place.create("id-1", "web");
        place.request("vm_exec", &json!({ "name": "web", "command": ["first"] }));
        place.request("vm_exec", &json!({ "name": "db", "command": ["between"] }));
        place.request("net_allow", &json!({ "name": "web", "allow": ["host:80", "example.com"] }));
        place.request("net_deny", &json!({ "name": "id-1", "rules": ["example.com"] }));
        place.delete("id-1");
        place.request("vm_exec", &json!({ "name": "web", "command": ["nobody"] }));
        place.create("id-2", "web");
        place.request("vm_exec", &json!({ "name": "web", "command": ["second"] }));
        place
    }
}

fn rules(texts: &[&str]) -> Vec<EgressRule> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn verified(receipt: &AuditReceipt) -> Result<ReceiptVerdict> {
    verify::verify(render(receipt).unwrap().as_bytes(), None, None)
}

/// The sentence with which a receipt is refused.
fn refused(receipt: &AuditReceipt) -> String {
    let error = verified(receipt).unwrap_err();
    assert_eq!(error.code(), Code::AuditBroken);
    error.message().to_owned()
}

/// Which operations and commands are shown of the log of writes.
fn shown(receipt: &AuditReceipt) -> Vec<String> {
    let lines = receipt.acts.lines.iter().filter_map(|line| match line {
        ReceiptLine::Line(text) => Line::parse(text.as_bytes()),
        _ => None,
    });
    let attempts = lines.filter(|line| line.record.stage == b"attempt");
    let told = attempts.map(|line| {
        let params: Value = serde_json::from_slice(&line.record.params).unwrap();
        format!("{} {}", String::from_utf8(line.record.tool).unwrap(), params["command"][0].as_str().unwrap_or("-"))
    });
    told.collect()
}

#[test]
fn a_receipt_has_the_lines_of_its_vm_and_hashes_of_the_others() {
    let place = Place::with_history();
    let first = place.receipt("id-1");
    assert_eq!(shown(&first), ["vm_spawn -", "vm_exec first", "net_allow -", "net_deny -"]);
    assert!(!render(&first).unwrap().contains("between"), "lines of another VM are not revealed");
    let vm = &first.vm;
    assert_eq!((vm.name.as_str(), vm.parts["root"].as_str()), ("web", &*"c".repeat(64)));
    assert!(vm.created_at.is_some() && vm.deleted_at.is_some());
    let networks: Vec<_> = first.network.iter().map(|one| (one.net, one.allow.clone())).collect();
    let expected = [&["example.com"][..], &["example.com", "host:80"], &["host:80"]];
    assert_eq!(
        networks,
        expected.map(|allow| (NetChoice::Restricted, rules(allow).into_iter().map(AllowEntry::Rule).collect()))
    );
    let verdict = verified(&first).unwrap();
    // Of the first VM: eight lines of writes, and its creation and deletion.
    assert_eq!((verdict.lines, verdict.unlinked, verdict.trusted_key), (10, 0, false));
    // Two lines each: 'between', 'nobody', 'second'; the creation of the second VM.
    assert_eq!(verdict.hidden, 7);

    let mut notes = Vec::new();
    let second = place.nido.audit_receipt("web", |note| notes.push(note.to_owned())).unwrap();
    assert_eq!((second.vm.id.as_str(), shown(&second)), ("id-2", vec!["vm_exec second".to_owned()]));
    assert!(notes[0].contains("2 VMs have had the name web"), "{notes:?}");
    assert_eq!(second.vm.deleted_at, None);
    verified(&second).unwrap();
    let error = place.nido.audit_receipt("nothing", |_| ()).unwrap_err();
    assert_eq!(error.code(), Code::VmNotFound);
}

#[test]
fn every_changed_byte_of_a_receipt_is_detected() {
    let text = render(&Place::with_history().receipt("id-1")).unwrap().into_bytes();
    verify::verify(&text, None, None).unwrap();
    for at in 0..text.len() {
        let mut changed = text.clone();
        changed[at] ^= 1;
        assert!(verify::verify(&changed, None, None).is_err(), "byte {at}");
    }
    assert!(verify::verify(&text[..text.len() - 1], None, None).is_err());
}

#[test]
fn another_key_is_refused() {
    let place = Place::with_history();
    let (receipt, key) = (place.receipt("id-1"), place.nido.audit_key().unwrap());
    assert_eq!(receipt.public_key, key);
    let text = render(&receipt).unwrap();
    assert!(verify::verify(text.as_bytes(), Some(&key), None).unwrap().trusted_key);
    let other = Place::new().nido.audit_key().unwrap();
    let error = verify::verify(text.as_bytes(), Some(&other), None).unwrap_err();
    assert!(error.message().contains("another key"), "{error}");
    let forged = AuditReceipt { public_key: other, ..receipt };
    assert!(refused(&forged).contains("signature"));
}

// Any program can make a key and sign: what the lines state is compared nevertheless.
#[test]
fn a_receipt_with_another_key_is_refused_if_it_contradicts_its_lines() {
    let place = Place::with_history();
    let key = Key::open(&Log::at(Place::new().directory.path().join("key"))).unwrap();
    let forged = |change: &dyn Fn(&mut AuditReceipt)| {
        let mut receipt = place.receipt("id-1");
        change(&mut receipt);
        sign(receipt, &key).unwrap()
    };
    verified(&forged(&|_| ())).unwrap();
    let swapped = forged(&|receipt| drop(receipt.vm.parts.insert("root".into(), "e".repeat(64))));
    assert!(refused(&swapped).contains("digest"));
    assert!(refused(&forged(&|receipt| drop(receipt.network.pop()))).contains("network rules"));
    assert!(refused(&forged(&|receipt| receipt.vm.deleted_at = None)).contains("the VM"));
    for at in 0..place.receipt("id-1").acts.lines.len() {
        let removed = refused(&forged(&|receipt| drop(receipt.acts.lines.remove(at))));
        assert!(removed.contains("of acts"), "{removed}");
    }
    let last = refused(&forged(&|receipt| drop(receipt.events.lines.pop())));
    assert!(last.contains("of events do not end with the chain"), "{last}");
    let altered = forged(&|receipt| {
        for line in &mut receipt.acts.lines {
            if let ReceiptLine::Line(text) = line {
                *text = text.replace("first", "worst");
            }
        }
    });
    assert!(refused(&altered).contains("altered or removed"));
}

#[test]
fn a_checkpoint_binds_a_receipt_to_the_log() {
    let place = Place::with_history();
    let checkpoint = place.nido.audit_checkpoint().unwrap();
    place.request("vm_exec", &json!({ "name": "web", "command": ["later"] }));
    let text = render(&place.receipt("id-1")).unwrap();
    let verdict = verify::verify(text.as_bytes(), None, Some(&checkpoint)).unwrap();
    assert_eq!(verdict.checkpoint, Some(checkpoint.seq));
    let other = Place::with_history().nido.audit_checkpoint().unwrap();
    let error = verify::verify(text.as_bytes(), None, Some(&other)).unwrap_err();
    assert!(error.message().contains("the log was replaced"), "{error}");
    place.request("vm_exec", &json!({ "name": "web", "command": ["latest"] }));
    let later = place.nido.audit_checkpoint().unwrap();
    let error = verify::verify(text.as_bytes(), None, Some(&later)).unwrap_err();
    assert!(error.message().contains("the receipt about lines"), "{error}");
}

#[test]
fn events_precede_what_was_requested_after_them_and_are_copied_once() {
    let place = Place::with_history();
    let events = || {
        let filter = AuditFilter { log: Some(AuditLog::Events), ..AuditFilter::default() };
        place.nido.audit_show(&filter).unwrap().records
    };
    let of_web: Vec<_> = events().into_iter().filter(|line| names_vm(&line.params, "web")).collect();
    let told: Vec<_> = of_web.iter().map(|line| (&*line.tool, line.params["acts"].as_u64().unwrap())).collect();
    // The log of writes has two lines for each request; the attempt counts.
    assert_eq!(told, [("vm.created", 3), ("vm.deleted", 11), ("vm.created", 13)]);
    assert_eq!((events().len(), of_web[0].actor.as_str()), (4, "nido"));
    let both = place.nido.audit_show(&AuditFilter::default()).unwrap().records;
    assert!(both.iter().all(|line| line.log == AuditLog::Acts), "events are shown where they are asked for");
    let verdict = place.nido.audit_verify(None).unwrap();
    assert_eq!(verdict.events.map(|events| events.lines), Some(4));
}

#[test]
fn the_uses_of_secrets_are_lines_and_facts_of_a_receipt() {
    let place = Place::new();
    place.create_in("id-1", "web", VmState::Running);
    for (used, requests) in [("key@example.com", 1), ("key@example.com", 41), ("key@example.com:x-key", 1)] {
        let used = Transition::SecretUsed(Box::new(used.parse().unwrap()), requests);
        assert_eq!(place.nido.store().transition("id-1", &used).unwrap(), TransitionOutcome::Yes);
    }
    let receipt = place.receipt("web");
    let used: Vec<_> = receipt.secrets.iter().map(|one| (one.secret.to_string(), one.requests)).collect();
    assert_eq!(used, [("key@example.com:authorization".to_owned(), 42), ("key@example.com:x-key".to_owned(), 1)]);
    assert_eq!(verified(&receipt).unwrap().secrets, receipt.secrets);
    let filter =
        AuditFilter { log: Some(AuditLog::Events), tool: Some("secret.used".into()), ..AuditFilter::default() };
    let lines = place.nido.audit_show(&filter).unwrap().records;
    let told: Vec<_> = lines.iter().map(|line| line.params["details"]["secret_requests"].as_u64()).collect();
    assert_eq!((told, names_vm(&lines[0].params, "web")), (vec![Some(1), Some(41), Some(1)], true));

    let key = Key::open(&Log::at(Place::new().directory.path().join("key"))).unwrap();
    let fewer = |receipt: &mut AuditReceipt| receipt.secrets[0].requests = 1;
    let mut forged = receipt;
    fewer(&mut forged);
    assert!(refused(&sign(forged, &key).unwrap()).contains("the uses of secrets"));
}

#[test]
fn a_change_of_many_rules_is_whole_in_a_receipt() {
    let place = Place::new();
    place.create("id-1", "web");
    let many: Vec<_> = (0..200).map(|n| format!("service-{n}.example.org:443")).collect();
    place.request("net_allow", &json!({ "name": "web", "allow": many }));
    let receipt = place.receipt("web");
    assert_eq!(receipt.network.last().unwrap().allow.len(), 201);
    assert_eq!(receipt.arguments.len(), 1);
    verified(&receipt).unwrap();

    let key = Key::open(&Log::at(Place::new().directory.path().join("key"))).unwrap();
    let forged = |change: &dyn Fn(&mut AuditReceipt)| {
        let mut receipt = receipt.clone();
        change(&mut receipt);
        refused(&sign(receipt, &key).unwrap())
    };
    let fewer = forged(&|receipt| {
        receipt.arguments.values_mut().for_each(|whole| *whole = whole.replace("service-7.", "service-8."));
    });
    assert!(fewer.contains("arguments of a change"), "{fewer}");
    assert!(forged(&|receipt| drop(receipt.arguments.insert("0".repeat(64), "{}".into()))).contains("arguments"));
    assert!(forged(&|receipt| receipt.arguments.clear()).contains("network rules"));

    // They are not kept: the receipt does not state rules that it does not know.
    std::fs::remove_dir_all(place.nido.audit_log().unwrap().directory().join("params")).unwrap();
    let receipt = place.receipt("web");
    assert_eq!((receipt.network.len(), receipt.arguments.len()), (1, 0));
    let verdict = verified(&receipt).unwrap();
    assert!(verdict.not_proven.iter().any(|sentence| sentence.contains("the network rules from line")), "{verdict:?}");
}

#[test]
fn starts_from_saved_memory_are_facts_of_a_receipt() {
    let place = Place::new();
    place.create_in("id-2", "booted", VmState::Running);
    place.create_in("id-3", "copy", VmState::Running);
    let saved = StoredBake { memory: "e".repeat(64), state: "f".repeat(64), token: "secret-token".into(), live: false };
    let (origin, machine) = (Origin::Fork(saved), None);
    let launched = AdoptedStart { machine, origin, cid: None, started_at: None, expires_at: None };
    let launched = place.nido.store().transition("id-3", &Transition::Adopted(Box::new(launched))).unwrap();
    assert_eq!(launched, TransitionOutcome::Yes);
    for id in ["id-2", "id-3"] {
        let ready = AgentReady {
            agent: AgentInfo { ready: true, ..AgentInfo::default() },
            state: VmState::Running,
            cause: None,
            ip_address: None,
            timings: None,
            machine: None,
        };
        let ready = place.nido.store().transition(id, &Transition::Ready(Box::new(ready))).unwrap();
        assert_eq!(ready, TransitionOutcome::Yes);
    }
    assert_eq!(place.receipt("booted").starts, []);
    let receipt = place.receipt("copy");
    assert_eq!(receipt.starts.len(), 1);
    assert_eq!(receipt.starts[0].image["memory"], "e".repeat(64));
    assert_eq!(receipt.starts[0].image["state"], "f".repeat(64));
    verified(&receipt).unwrap();
    assert!(!render(&receipt).unwrap().contains("secret-token"));
    let key = Key::open(&Log::at(Place::new().directory.path().join("key"))).unwrap();
    let mut forged = receipt;
    forged.starts[0].image.insert("memory".into(), "d".repeat(64));
    assert!(refused(&sign(forged, &key).unwrap()).contains("digests of their images"));
}

#[test]
fn the_files_of_snapshots_are_hashed() {
    let place = Place::with_history();
    let dir = place.nido.vm_dir("id-2").file("snapshots").join("one");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join(DISK), "disk").unwrap();
    std::fs::write(dir.join("snapshot.json"), serde_json::to_vec(&snapshot::Record::now(None)).unwrap()).unwrap();
    let receipt = place.receipt("id-2");
    let expected = BTreeMap::from([("disk".to_owned(), hex::encode(&Sha256::digest(b"disk")))]);
    assert_eq!(receipt.snapshots.iter().map(|one| &one.files).collect::<Vec<_>>(), [&expected]);
    verified(&receipt).unwrap();
}
