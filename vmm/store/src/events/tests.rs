use super::super::{AgentReady, BootParts, Purpose, Transition, TransitionOutcome, VmEnd};
use super::*;
use nido_api::state::{FailureCause, VmState};
use nido_api::{AgentInfo, Failure, Limit, LimitKind, VmSpec};

fn row(id: &str, purpose: Purpose) -> VmRow {
    let parts = BootParts {
        vmlinux: "a".into(),
        initramfs: "b".into(),
        initramfs_base: None,
        agent: None,
        root: "c".into(),
        root_bytes: 1,
        packages: "d".into(),
        init: nido_images::Init::Agent,
        append: String::new(),
        frozen: Vec::new(),
        allow: None,
    };
    let spec = VmSpec::named(format!("vm-{id}").parse().unwrap());
    VmRow::new(id.into(), spec, purpose, VmState::Starting, parts, 1 << 30)
}

fn open() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("db")).unwrap();
    (dir, store)
}

fn all(store: &Store) -> Vec<Event> {
    store.events(&EventsRequest::default()).unwrap().0
}

fn words(store: &Store) -> Vec<&'static str> {
    all(store).iter().map(|event| event.event.word()).collect()
}

fn to(state: VmState) -> Transition {
    Transition::Entered { state, cause: None, timings: None }
}

fn answered() -> Transition {
    answered_from(None)
}

fn answered_from(ip_address: Option<String>) -> Transition {
    let agent = AgentInfo { ready: true, ..AgentInfo::default() };
    let state = VmState::Running;
    Transition::Ready(Box::new(AgentReady { state, cause: None, agent, ip_address, timings: None, machine: None }))
}

fn ended(state: VmState, failure: Option<Failure>, last_log_entries: Vec<String>) -> Transition {
    Transition::Ended(Box::new(VmEnd { state, cause: None, failure, last_log_entries }))
}

fn make(store: &Store, id: &str, transition: &Transition) {
    assert_eq!(store.transition(id, transition).unwrap(), TransitionOutcome::Yes);
}

#[test]
fn the_events_of_a_vm_are_in_order() {
    let (_dir, store) = open();
    store.insert_vm(&row("1", Purpose::Use)).unwrap();
    let address = answered_from(Some("10.0.2.15".into()));
    let time_is_up = Transition::LimitReached(Limit::Ttl);
    let steps =
        [to(VmState::Running), address, to(VmState::Paused), to(VmState::Running), time_is_up, to(VmState::Stopping)];
    for transition in steps {
        make(&store, "1", &transition);
    }
    make(&store, "1", &ended(VmState::Stopped, None, vec!["Power down".to_owned()]));
    store.remove_vm("1", vec!["the end".into()]).unwrap();
    store.remove_vm("1", Vec::new()).unwrap();
    let first = ["vm.created", "vm.started", "vm.paused", "vm.resumed", "vm.expired", "vm.limit_hit"];
    assert_eq!(words(&store), [&first[..], &["vm.stopped", "vm.deleted"]].concat());
    let events = all(&store);
    assert!(events.windows(2).all(|pair| pair[0].cursor < pair[1].cursor));
    assert!(events.iter().all(|event| event.vm_name.as_ref().unwrap().as_str() == "vm-1"));
    assert_eq!(events[5].details.limit_hit.as_ref().unwrap().kind, LimitKind::Time);
    assert_eq!(events[6].details.ip_address.as_deref(), Some("10.0.2.15"), "the address it had");
    assert_eq!(events[6].details.last_log_entries, ["Power down"]);
    assert_eq!(store.last_cursor().unwrap(), events[7].cursor);
}

#[test]
fn a_crash_has_a_cause_and_log_lines() {
    let (_dir, store) = open();
    store.insert_vm(&row("1", Purpose::Use)).unwrap();
    let started_at = Timestamp::now().checked_sub(std::time::Duration::from_secs(7)).unwrap();
    store.connection.execute("UPDATE vms SET started_ms = ?1", [started_at.as_millisecond()]).unwrap();
    make(&store, "1", &answered());
    let (cause, log_tail) = (FailureCause::GuestPanic, vec!["Kernel panic".to_owned()]);
    let failure = Failure { cause, message: "the guest's kernel panicked".into(), log_tail: log_tail.clone() };
    make(&store, "1", &ended(VmState::Failed, Some(failure), Vec::new()));
    let crash = all(&store).pop().unwrap();
    assert_eq!((crash.event, crash.details.cause), (EventKind::VmCrashed, Some(cause)));
    assert_eq!(crash.details.last_log_entries, log_tail);
    assert!((7000..60_000).contains(&crash.details.ran_ms.unwrap()));
    // Recorded once.
    let again = ended(VmState::Failed, None, Vec::new());
    assert_eq!(store.transition("1", &again).unwrap(), TransitionOutcome::No(VmState::Failed));
    assert_eq!(words(&store).len(), 3);
}

#[test]
fn clones_have_no_events_until_they_are_claimed() {
    let (_dir, store) = open();
    for (id, purpose) in [("1", Purpose::Pool), ("2", Purpose::Bake)] {
        store.insert_vm(&row(id, purpose)).unwrap();
        make(&store, id, &answered());
        store.remove_vm(id, Vec::new()).unwrap();
    }
    assert_eq!(words(&store), [""; 0]);
}

#[test]
fn a_start_that_was_called_off_is_no_stop() {
    let (_dir, store) = open();
    store.insert_vm(&row("1", Purpose::Use)).unwrap();
    make(&store, "1", &ended(VmState::Stopped, None, Vec::new()));
    assert_eq!(words(&store), ["vm.created"]);
}

#[test]
fn templates_and_snapshots_are_announced_once_per_creation() {
    let (_dir, store) = open();
    let vm = row("1", Purpose::Use);
    let (template, snapshot) = ("sandbox".parse().unwrap(), "first".parse().unwrap());
    for second in [1, 1, 2] {
        let at = Timestamp::from_second(second).unwrap();
        store.announce_template(&template, &at.to_string()).unwrap();
        store.announce_snapshot(&vm, &snapshot, at).unwrap();
    }
    assert_eq!(words(&store), ["template.created", "snapshot.created", "template.created", "snapshot.created"]);
    assert_eq!(store.announced_templates().unwrap(), std::slice::from_ref(&template));
    for _ in 0..2 {
        store.record_template_deleted(&template).unwrap();
    }
    assert!(store.announced_templates().unwrap().is_empty());
    store.announce_template(&template, &Timestamp::from_second(2).unwrap().to_string()).unwrap();
    assert_eq!(words(&store)[4..], ["template.deleted", "template.created"]);
}

#[test]
fn readers_continue_at_their_cursor_and_filter() {
    let (_dir, store) = open();
    for id in ["1", "2", "3"] {
        store.insert_vm(&row(id, Purpose::Use)).unwrap();
        make(&store, id, &answered());
    }
    let second = EventsRequest { vm: Some("vm-2".parse().unwrap()), ..EventsRequest::default() };
    let (events, cursor) = store.events(&second).unwrap();
    assert_eq!((events.len(), cursor), (2, 6), "the cursor passes what was not asked for");
    let later = EventsRequest { since: 4, kinds: vec![EventKind::VmStarted], vm: None };
    assert_eq!(store.events(&later).unwrap().0.len(), 1);
    assert_eq!(store.events(&EventsRequest { since: 6, ..later }).unwrap(), (Vec::new(), 6));
}

#[test]
fn old_events_are_deleted_and_their_cursors_never_reused() {
    let (_dir, store) = open();
    store.insert_vm(&row("1", Purpose::Use)).unwrap();
    store.connection.execute("UPDATE events SET at_ms = 0", []).unwrap();
    for number in 0..PRUNE_INTERVAL {
        make(&store, "1", &to(if number % 2 == 0 { VmState::Running } else { VmState::Paused }));
    }
    assert!(all(&store)[0].event != EventKind::VmCreated);
    store.connection.execute("DELETE FROM events", []).unwrap();
    let last = store.last_cursor().unwrap();
    store.remove_vm("1", Vec::new()).unwrap();
    assert_eq!(all(&store)[0].cursor, last + 1);
}
