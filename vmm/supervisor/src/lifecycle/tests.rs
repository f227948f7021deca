use nido_api::state::FailureCause;
use nido_engine::qemu::QemuExit;
use proptest::prelude::*;

use super::ending::QUIT_TIMEOUT;
use super::*;

const S: Duration = Duration::from_secs(1);

fn pong() -> Pong {
    Pong { agent: "0".into(), uptime_ms: 1, sessions: 1, is_init: true, address: None, warnings: None }
}

fn vm(role: Role, now: Instant, ttl: Option<Duration>, idle: Option<Duration>) -> Lifecycle {
    Lifecycle::new(initial(role, now, ttl, idle))
}

fn initial(role: Role, now: Instant, ttl: Option<Duration>, idle: Option<Duration>) -> InitialState {
    let limits = Limits::new(now, ttl.map(|ttl| now + ttl), idle);
    InitialState {
        role,
        state: VmState::Starting,
        cause: None,
        ready: false,
        has_run: false,
        ready_within: 60 * S,
        limits,
        agent_counts: false,
    }
}

fn running(now: Instant) -> Lifecycle {
    let mut vm = vm(Role::Use, now, None, None);
    for event in [Event::QmpReady, Event::Booting, Event::Agent(AgentReply::Ready(pong()))] {
        vm.step(now, event);
    }
    vm
}

fn stop(force: bool, timeout: Duration) -> Event {
    Event::Stop(Stop { cause: Some(StateCause::User), force, timeout })
}

/// Steps at each deadline until QEMU is killed; for how long that took.
fn kill_at_deadlines(vm: &mut Lifecycle, mut now: Instant) -> (Vec<Action>, Instant) {
    let mut all = Vec::new();
    for _ in 0..8 {
        let actions = vm.step(now, Event::Tick);
        let killed = actions.contains(&Action::Kill);
        all.extend(actions);
        if killed {
            return (all, now);
        }
        now = vm.next_deadline().expect("a VM that ends has a deadline").max(now);
    }
    panic!("never killed: {all:?}");
}

#[test]
fn a_stop_requests_power_off_then_quits_qemu_then_kills() {
    let now = Instant::now();
    let mut vm = running(now);
    let actions = vm.step(now, stop(false, 30 * S));
    assert_eq!(actions, [Action::RecordState, Action::PowerOff(now + 30 * S)]);
    assert_eq!(vm.step(now + 29 * S, Event::Tick), []);
    assert_eq!(vm.step(now + 30 * S, Event::Tick), [Action::WarnPlugPulled, Action::Quit]);
    assert_eq!(vm.step(now + 35 * S, Event::Tick), [Action::Kill]);
    assert_eq!(vm.end(QemuExit::Signal(9)).0, VmState::Stopped);
}

// Each further `stop --force` gave QEMU five more seconds.
#[test]
fn a_repeated_stop_never_extends_the_deadline() {
    let now = Instant::now();
    let mut vm = running(now);
    vm.step(now, stop(true, S));
    for second in 1..5 {
        assert_eq!(vm.step(now + second * S, stop(second % 2 == 0, 60 * S)), []);
    }
    assert_eq!(vm.step(now + 5 * S, Event::Tick), [Action::Kill]);
}

#[test]
fn a_qemu_that_does_not_reply_is_killed_at_once() {
    let now = Instant::now();
    let mut vm = vm(Role::Use, now, Some(10 * S), None);
    vm.step(now, Event::Attached { mute: true });
    let actions = vm.step(now + 10 * S, Event::Tick);
    assert_eq!(actions, [Action::RecordLimit(Limit::Ttl), Action::RecordState, Action::Kill]);
}

// A stop waited until QEMU had started and loaded its guest.
#[test]
fn a_guest_that_has_not_run_is_not_asked_to_power_off() {
    let now = Instant::now();
    for event in [stop(false, 100 * S), Event::Terminated, Event::Tick] {
        let mut vm = vm(Role::Use, now, Some(5 * S), None);
        vm.step(now, Event::Launching);
        let actions = vm.step(now + 5 * S, event);
        assert_eq!(actions.last(), Some(&Action::Quit), "{actions:?}");
        assert_eq!(vm.end(QemuExit::Signal(9)), (VmState::Stopped, None));
    }
}

#[test]
fn a_stop_that_was_requested_before_qemu_was_found_is_carried_out_then() {
    let now = Instant::now();
    for (mute, elapsed, expected) in
        [(false, S, Action::PowerOff(now + 10 * S)), (false, 10 * S, Action::Kill), (true, S, Action::Kill)]
    {
        let mut vm = Lifecycle::new(InitialState { has_run: true, ..initial(Role::Use, now, None, None) });
        vm.step(now, stop(false, 10 * S));
        vm.step(now + elapsed, Event::Tick);
        assert_eq!(vm.step(now + elapsed, Event::Attached { mute }), [expected]);
    }
}

// A guest that was stopped while it booted, and whose agent was late meanwhile, was `failed`.
#[test]
fn a_guest_that_is_late_after_a_stop_has_stopped() {
    let now = Instant::now();
    let mut vm = vm(Role::Use, now, None, None);
    vm.step(now, Event::QmpReady);
    vm.step(now, stop(false, 100 * S));
    assert_eq!(vm.step(now + 60 * S, Event::Agent(AgentReply::Late)), []);
    assert_eq!(vm.end(QemuExit::Code(0)), (VmState::Stopped, None));
}

#[test]
fn a_failure_before_a_stop_stays_one() {
    let now = Instant::now();
    let mut vm = running(now);
    assert_eq!(vm.step(now, Event::Observed(ObservedState::Panicked)), [Action::Quit]);
    vm.step(now, stop(true, S));
    assert_eq!(vm.end(QemuExit::Code(0)).1.unwrap().cause, FailureCause::GuestPanic);
}

#[test]
fn a_booting_and_a_paused_vm_are_not_idle_but_a_waiting_warm_image_is() {
    let now = Instant::now();
    let mut vm = vm(Role::Use, now, None, Some(10 * S));
    vm.step(now, Event::Booting);
    vm.step(now, Event::Sessions(0));
    assert_eq!(vm.step(now + 50 * S, Event::Agent(AgentReply::Ready(pong()))), [Action::RecordReady(pong())]);
    vm.step(now + 55 * S, Event::Observed(ObservedState::Paused(StateCause::User)));
    assert_eq!(vm.step(now + 500 * S, Event::Tick), []);
    vm.step(now + 500 * S, Event::CpusRun);
    assert_eq!(vm.step(now + 509 * S, Event::Tick), []);
    assert!(vm.step(now + 510 * S, Event::Tick).contains(&Action::RecordLimit(Limit::Idle)));

    let mut image = self::vm(Role::WarmImage { twin: false }, now, None, Some(10 * S));
    image.step(now, Event::Booting);
    image.step(now, Event::Sessions(0));
    let actions = image.step(now + 10 * S, Event::Tick);
    assert!(actions.contains(&Action::Quit), "{actions:?}");
}

// A fork failed if loading the copied guest took longer than its idle limit: its client was not counted yet.
#[test]
fn a_guest_that_is_still_being_loaded_is_not_idle() {
    let now = Instant::now();
    for role in [Role::Use, Role::WarmImage { twin: true }] {
        let mut vm = vm(role, now, None, Some(3 * S));
        assert_eq!(vm.step(now + 60 * S, Event::Booting), []);
        assert_eq!(vm.step(now + 61 * S, Event::Sessions(1)), []);
        assert_eq!(vm.step(now + 90 * S, Event::Tick), []);
    }
}

// While its agent was asked, the loop ran without a pause.
#[test]
fn an_idle_vm_is_stopped_only_when_its_agent_has_no_sessions() {
    let now = Instant::now();
    let limits = Limits::new(now, None, Some(S));
    let beginning = InitialState {
        role: Role::Use,
        state: VmState::Running,
        cause: None,
        ready: true,
        has_run: true,
        ready_within: S,
        limits,
        agent_counts: true,
    };
    let mut vm = Lifecycle::new(beginning);
    vm.step(now, Event::Sessions(0));
    assert_eq!(vm.step(now + S, Event::Tick), [Action::CountSessions]);
    assert_eq!((vm.step(now + 3 * S, Event::Tick), vm.next_deadline()), (vec![], None));
    assert_eq!(vm.step(now + 3 * S, Event::AgentSessions(1)), []);
    assert_eq!(vm.step(now + 4 * S, Event::Tick), [Action::CountSessions]);
    let actions = vm.step(now + 4 * S, Event::AgentSessions(0));
    assert!(actions.contains(&Action::RecordLimit(Limit::Idle)), "{actions:?}");
}

#[test]
fn only_time_in_which_the_cpus_ran_counts_against_a_guest_that_is_late() {
    let now = Instant::now();
    let mut vm = vm(Role::Use, now, None, None);
    vm.step(now, Event::QmpReady);
    vm.step(now, Event::Booting);
    vm.step(now + 10 * S, Event::Observed(ObservedState::Paused(StateCause::DiskFull)));
    vm.step(now + 30 * S, Event::CpusRun);
    assert_eq!(vm.step(now + 60 * S, Event::Agent(AgentReply::Late)), [Action::AwaitAgent(20 * S)]);
    assert_eq!(vm.step(now + 80 * S, Event::Agent(AgentReply::Late)), [Action::Quit]);
    assert_eq!(vm.end(QemuExit::Code(0)).1.unwrap().cause, FailureCause::GuestTimeout);
}

#[test]
fn a_clone_is_claimed_once_and_is_a_users_vm_then() {
    let now = Instant::now();
    let mut vm = vm(Role::Clone, now, None, None);
    vm.step(now, Event::QmpReady);
    vm.admit_claim().unwrap_err();
    assert_eq!(vm.step(now, Event::Agent(AgentReply::Ready(pong()))), [Action::Park(pong())]);
    assert_eq!(vm.step(now, Event::Parked(Some(pong()))), [Action::RecordState, Action::RecordReady(pong())]);
    vm.admit_pause_or_resume().unwrap_err();
    vm.admit_claim().unwrap();
    vm.step(now, Event::Claimed(Limits::new(now, Some(now + S), None), S));
    assert_eq!(vm.step(now, Event::Woken), []);
    assert_eq!((vm.state(), vm.role()), (VmState::Running, Role::Use));
    vm.admit_retirement().unwrap_err();
    assert!(vm.step(now + S, Event::Tick).contains(&Action::RecordLimit(Limit::Ttl)));
}

/// Everything that can happen but a stop and the exit.
fn event() -> impl Strategy<Value = Event> {
    let observed = prop_oneof![
        Just(ObservedState::Runs),
        Just(ObservedState::Paused(StateCause::User)),
        Just(ObservedState::Paused(StateCause::DiskFull)),
        Just(ObservedState::KvmFailed),
        Just(ObservedState::Panicked),
        Just(ObservedState::Passing),
    ];
    let reply = prop_oneof![
        Just(AgentReply::Ready(pong())),
        Just(AgentReply::Late),
        Just(AgentReply::Refused(FailureCause::AgentRefused, "x".into())),
        Just(AgentReply::NotRenewed("x".into())),
    ];
    prop_oneof![
        Just(Event::Tick),
        (0usize..3).prop_map(Event::Sessions),
        Just(Event::Launching),
        any::<bool>().prop_map(|mute| Event::Attached { mute }),
        Just(Event::QmpReady),
        Just(Event::Booting),
        reply.prop_map(Event::Agent),
        (0u32..2).prop_map(Event::AgentSessions),
        observed.prop_map(Event::Observed),
        Just(Event::CpusRun),
        Just(Event::Paused),
        Just(Event::ResumeBegins),
        any::<bool>().prop_map(Event::ResumeEnds),
        Just(Event::Panicked),
        Just(Event::Woken),
    ]
}

fn stops() -> impl Strategy<Value = Event> {
    prop_oneof![
        (any::<bool>(), 0u64..100).prop_map(|(force, seconds)| stop(force, Duration::from_secs(seconds))),
        Just(Event::SessionEnded),
        Just(Event::Terminated),
    ]
}

fn role() -> impl Strategy<Value = Role> {
    prop_oneof![
        Just(Role::Use),
        Just(Role::Clone),
        Just(Role::WarmImage { twin: false }),
        Just(Role::WarmImage { twin: true })
    ]
}

/// Events, each after so many milliseconds.
fn history(of: impl Strategy<Value = Event>) -> impl Strategy<Value = Vec<(u64, Event)>> {
    proptest::collection::vec((0u64..20_000, of), 0..40)
}

fn play(vm: &mut Lifecycle, now: &mut Instant, history: Vec<(u64, Event)>) -> Vec<Action> {
    let mut actions = Vec::new();
    for (after_ms, event) in history {
        *now += Duration::from_millis(after_ms);
        actions.extend(vm.step(*now, event));
    }
    actions
}

proptest! {
    #[test]
    fn a_stop_ends_within_its_deadlines_whatever_happens(
        role in role(), mute in any::<bool>(), before in history(event()),
        force in any::<bool>(), seconds in 0u64..100, after in history(prop_oneof![event(), stops()])
    ) {
        let (mut vm, mut now) = (vm(role, Instant::now(), None, None), Instant::now());
        if mute { vm.step(now, Event::Attached { mute }); }
        play(&mut vm, &mut now, before);
        let asked_at = now;
        vm.step(now, stop(force, Duration::from_secs(seconds)));
        let mut killed = false;
        let latest = asked_at + Duration::from_secs(seconds) + QUIT_TIMEOUT;
        // The loop steps at each deadline, between the other events.
        for (after_ms, event) in after {
            let next = now + Duration::from_millis(after_ms);
            while let Some(deadline) = vm.next_deadline().filter(|at| *at <= next && !killed) {
                now = deadline.max(now);
                killed |= vm.step(now, Event::Tick).contains(&Action::Kill);
            }
            now = next;
            killed |= vm.step(now, event).contains(&Action::Kill);
            prop_assert!(killed || now <= latest);
        }
        if !killed {
            prop_assert!(kill_at_deadlines(&mut vm, now).1 <= latest.max(now));
        }
    }

    #[test]
    fn a_stop_before_any_failure_ends_as_stopped(
        force in any::<bool>(), seconds in 0u64..100, after in history(prop_oneof![event(), stops()]), code in 0i32..3
    ) {
        let mut now = Instant::now();
        let mut vm = running(now);
        vm.step(now, stop(force, Duration::from_secs(seconds)));
        play(&mut vm, &mut now, after);
        for exit in [QemuExit::Code(code), QemuExit::Signal(9), QemuExit::Unknown] {
            prop_assert_eq!(vm.end(exit), (VmState::Stopped, None));
        }
        prop_assert_eq!(vm.end_cause(VmState::Stopped), Some(StateCause::User));
    }

    #[test]
    fn an_expired_time_to_live_starts_a_stop(
        role in role(), ttl in 0u64..200, events in history(event())
    ) {
        let (began, ttl) = (Instant::now(), Duration::from_secs(ttl));
        let mut vm = vm(role, began, Some(ttl), None);
        let mut now = began;
        play(&mut vm, &mut now, events);
        vm.step(now.max(began + ttl), Event::Tick);
        prop_assert!(vm.is_ending());
    }

    #[test]
    fn nothing_is_done_after_the_exit(
        role in role(), before in history(event()), after in history(prop_oneof![event(), stops()])
    ) {
        let (mut vm, mut now) = (vm(role, Instant::now(), Some(50 * S), Some(5 * S)), Instant::now());
        play(&mut vm, &mut now, before);
        vm.step(now, Event::Exited);
        prop_assert_eq!(play(&mut vm, &mut now, after), []);
    }

    #[test]
    fn a_guest_that_is_there_to_be_saved_or_claimed_is_never_resumed(
        twin in any::<bool>(), events in history(prop_oneof![event(), stops()])
    ) {
        for role in [Role::WarmImage { twin }, Role::Clone] {
            let (mut vm, mut now) = (vm(role, Instant::now(), Some(500 * S), Some(50 * S)), Instant::now());
            // To be asked to power off, a guest is resumed.
            let actions = play(&mut vm, &mut now, events.clone());
            prop_assert!(!actions.iter().any(|action| matches!(action, Action::PowerOff(_))), "{:?}", actions);
            prop_assert!(vm.admit_pause_or_resume().is_err());
        }
    }
}
