use super::*;
use crate::{Purpose, parts::tests::parts_with_root};
use nido_api::egress::{Denial, DenialReason, DeniedProtocol};
use nido_api::state::FailureCause;
use nido_api::{EventsRequest, LimitKind, VmSpec};

fn open_with(state: VmState) -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("db")).unwrap();
    let spec = VmSpec::named("web".parse().unwrap());
    store.insert_vm(&VmRow::new("1".into(), spec, Purpose::Use, state, parts_with_root("c"), 1)).unwrap();
    (dir, store)
}

fn row(store: &Store) -> VmRow {
    store.vm_by_id("1").unwrap().unwrap()
}

fn events(store: &Store) -> usize {
    store.events(&EventsRequest::default()).unwrap().0.len()
}

pub(crate) fn machine() -> Machine {
    serde_json::from_value(serde_json::json!({
        "machine": "microvm", "accel": "tcg", "cpu_model": "max", "cpus": 1, "memory_mib": 512, "net": "nat",
        "transport": {"kind": "vsock", "cid": 5}, "reason": "", "warnings": []
    }))
    .unwrap()
}

fn all() -> Vec<Transition> {
    let failure = Failure { cause: FailureCause::GuestPanic, message: "x".into(), log_tail: Vec::new() };
    let launching = LaunchRecord {
        machine: machine(),
        cid: Some(5),
        started_at: Timestamp::from_second(1).unwrap(),
        expires_at: Timestamp::from_second(9).ok(),
        parts: parts_with_root("d"),
        origin: Origin::Boot,
    };
    let ready = AgentReady {
        state: VmState::Running,
        cause: None,
        agent: AgentInfo { ready: true, ..AgentInfo::default() },
        ip_address: Some("10.0.2.15".into()),
        timings: None,
        machine: None,
    };
    let adopted = AdoptedStart {
        machine: Some(machine()),
        origin: Origin::Boot,
        cid: Some(5),
        started_at: None,
        expires_at: None,
    };
    let at = Timestamp::UNIX_EPOCH;
    let denial = Denial {
        protocol: DeniedProtocol::Tcp,
        name: None,
        address: Some([1, 1, 1, 1].into()),
        port: Some(443),
        reason: DenialReason::AddressNotLearned,
        count: 1,
        first_at: at,
        last_at: at,
        rule: None,
    };
    vec![
        Transition::StartBegan,
        Transition::StartGivenUp { to: VmState::Created },
        Transition::Launching(Box::new(launching)),
        Transition::AddressChanged { cid: 6, machine: machine() },
        Transition::Entered { state: VmState::Paused, cause: Some(StateCause::User), timings: None },
        Transition::Ready(Box::new(ready)),
        Transition::MachineChanged(machine()),
        Transition::LimitReached(Limit::Ttl),
        Transition::LimitHit(Box::new(LimitHit::new(LimitKind::Disk, Some(1), "full"))),
        Transition::NetDenied(Box::new(denial)),
        Transition::SecretUsed(Box::new("key@example.com".parse().unwrap()), 3),
        Transition::ended(VmState::Failed, Some(failure)),
        Transition::DiskRestored { snapshot: "s".parse().unwrap(), to: VmState::Stopped },
        Transition::FoundRunning,
        Transition::Adopted(Box::new(adopted)),
    ]
}

#[test]
fn a_transition_is_made_from_the_states_that_it_names_and_changes_nothing_in_others() {
    for transition in all() {
        for state in VmState::ALL {
            let (_dir, store) = open_with(state);
            let (before, told) = (row(&store), events(&store));
            let done = store.transition("1", &transition).unwrap();
            let after = row(&store);
            if transition.from().contains(&state) {
                assert_eq!(done, TransitionOutcome::Yes, "{transition:?} from {state:?}");
                assert_eq!(after.state, transition.to().unwrap_or(state), "{transition:?}");
                let cause = if transition.to().is_some() { transition.cause() } else { before.cause };
                assert_eq!(after.cause, cause, "{transition:?}");
                assert_eq!(after.failure.as_ref(), transition.failure(), "{transition:?}");
            } else {
                assert_eq!(done, TransitionOutcome::No(state), "{transition:?} from {state:?}");
                assert_eq!((after, events(&store)), (before, told), "{transition:?} from {state:?}");
            }
        }
        let (_dir, store) = open_with(VmState::Created);
        assert_eq!(store.transition("2", &transition).unwrap(), TransitionOutcome::Gone);
    }
}

// A supervisor that was late overwrote how its VM had ended.
#[test]
fn how_a_vm_ended_is_recorded_once() {
    let (_dir, store) = open_with(VmState::Starting);
    for transition in all() {
        let is_of_supervisor = transition.from() == SUPERVISED;
        if is_of_supervisor && !matches!(transition, Transition::Ended(_)) {
            assert_eq!(store.transition("1", &transition).unwrap(), TransitionOutcome::Yes);
        }
    }
    let stopped = Transition::ended(VmState::Stopped, None);
    assert_eq!(store.transition("1", &stopped).unwrap(), TransitionOutcome::Yes);
    let (ended, told) = (row(&store), events(&store));
    assert_eq!((ended.ip_address.clone(), ended.cid, ended.agent.ready), (None, None, false));
    for late in all().iter().filter(|transition| transition.from() == SUPERVISED) {
        assert_eq!(store.transition("1", late).unwrap(), TransitionOutcome::No(VmState::Stopped));
    }
    assert_eq!((row(&store), events(&store)), (ended, told));
}

#[test]
fn a_start_that_was_given_up_after_a_supervisor_had_the_vm_is_not_undone() {
    let (_dir, store) = open_with(VmState::Running);
    let given_up = Transition::StartGivenUp { to: VmState::Stopped };
    assert_eq!(store.transition("1", &given_up).unwrap(), TransitionOutcome::No(VmState::Running));
    assert_eq!(row(&store).state, VmState::Running);
}

#[test]
fn limits_that_were_hit_are_kept_until_the_next_start() {
    let (_dir, store) = open_with(VmState::Running);
    let hit = |used| Transition::LimitHit(Box::new(LimitHit::new(LimitKind::Disk, Some(9), "full").with("used", used)));
    for used in [1, 2] {
        assert_eq!(store.transition("1", &hit(used)).unwrap(), TransitionOutcome::Yes);
    }
    assert_eq!(store.transition("1", &Transition::LimitReached(Limit::Session)).unwrap(), TransitionOutcome::Yes);
    let hits = row(&store).limits_hit;
    assert_eq!((hits.len(), hits[0].count, hits[0].evidence["used"]), (1, 2, 2));
    assert_eq!(store.transition("1", &Transition::ended(VmState::Stopped, None)).unwrap(), TransitionOutcome::Yes);
    assert_eq!(row(&store).limits_hit, hits);
    store.connection.execute("UPDATE vms SET limits_hit = '[{\"kind\": \"of_the_future\"}]'", []).unwrap();
    assert!(row(&store).limits_hit.is_empty() && row(&store).unreadable.is_none());
}
