//! Many processes work on one home at once, on the same few names. A model predicts each result; see [`Model`].
//! `scripts/soak --operations` runs it for longer: `NIDO_SOAK_OPERATIONS` and `NIDO_SOAK_PROCESSES`.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::Value;

use crate::rig::{FinishedCall, TestHome};

/// Operations of a run if nothing else is requested; `scripts/soak --operations` runs 10,000.
const OPERATIONS: usize = 300;
/// How many processes run at once.
const PROCESSES: usize = 16;
/// How many names they share: few enough that several processes often mean the same VM.
const NAMES: usize = 20;
/// How many VMs may run at once. Guests are emulated: more of them would only measure the host's speed.
const RUNNING_MAX: usize = 5;

/// What a VM's name stands for, as far as the model knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Absent,
    /// It has never been started.
    Created,
    Stopped,
    Running,
    /// Several operations overlapped on it; the next one that is alone finds out.
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Create,
    Spawn,
    Start,
    Stop,
    Exec,
    Snapshot,
    Fork,
    Delete,
    Info,
    List,
}

/// Each operation as often as it stands here.
const MIX: [(Operation, usize); 10] = [
    (Operation::Create, 22),
    (Operation::Delete, 20),
    (Operation::Exec, 16),
    (Operation::Snapshot, 9),
    (Operation::List, 9),
    (Operation::Info, 6),
    (Operation::Spawn, 6),
    (Operation::Start, 4),
    (Operation::Stop, 4),
    (Operation::Fork, 4),
];

/// What a command reported: success, or the code of its problem.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Ok,
    /// The guest's command was ended by a signal.
    Ended(i32),
    Problem(String),
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    state: State,
    in_flight: usize,
    /// Operations overlapped since the last moment at which none was in flight.
    contended: bool,
}

/// The state of every name, and which results are possible.
///
/// An operation that was alone on its name for its whole duration has exactly one possible result. One that overlapped
/// others may find any state, so that any refusal of its own is possible, but never a defect (`internal`, exit code 70),
/// nor an error that is about anything else.
struct Model {
    slots: Mutex<Vec<Slot>>,
}

/// A turn that has begun: which operation, on which name.
#[derive(Clone, Copy)]
struct Turn {
    operation: Operation,
    name: usize,
}

impl Model {
    fn new() -> Self {
        let slot = Slot { state: State::Absent, in_flight: 0, contended: false };
        Self { slots: Mutex::new(vec![slot; NAMES]) }
    }

    /// Chooses what to do, and notes that it is in flight.
    fn begin(&self) -> Turn {
        let mut slots = self.slots.lock().unwrap();
        let may_run = |slot: &Slot| slot.state == State::Running || slot.in_flight > 0 || slot.state == State::Unknown;
        let running = slots.iter().filter(|slot| may_run(slot)).count();
        let (operation, name) = loop {
            let (operation, name) = (choose(), random(NAMES));
            let starts = matches!(operation, Operation::Spawn | Operation::Start | Operation::Fork);
            if !starts || running < RUNNING_MAX || may_run(&slots[name]) {
                break (operation, name);
            }
        };
        let slot = &mut slots[name];
        slot.in_flight += 1;
        slot.contended |= slot.in_flight > 1;
        Turn { operation, name }
    }

    /// Checks the result of an operation and records what it implies about the state.
    fn end(&self, Turn { operation, name }: Turn, outcome: &Outcome, context: &str) {
        let mut slots = self.slots.lock().unwrap();
        let slot = &mut slots[name];
        slot.in_flight -= 1;
        if slot.contended {
            let possible = possible(operation);
            let is_possible = match outcome {
                Outcome::Ok => true,
                // `poweroff` hangs up on what runs.
                Outcome::Ended(_) => operation == Operation::Exec,
                Outcome::Problem(code) => possible.contains(&code.as_str()),
            };
            assert!(is_possible, "{operation:?} of vm-{name}, overlapping others: {outcome:?}\n{context}");
            slot.state = State::Unknown;
            slot.contended = slot.in_flight > 0;
            return;
        }
        let results: Vec<_> = match slot.state {
            State::Unknown => {
                let all = [State::Absent, State::Created, State::Stopped, State::Running];
                all.map(|state| predict(operation, state)).to_vec()
            }
            known => vec![predict(operation, known)],
        };
        let fits: Vec<_> = results.iter().filter(|(wanted, _)| wanted == outcome).map(|(_, then)| *then).collect();
        let state = slot.state;
        assert!(!fits.is_empty(), "{operation:?} of vm-{name}, {state:?} and alone: {outcome:?}\n{context}");
        let is_certain = fits.iter().all(|then| *then == fits[0]);
        slot.state = if is_certain { fits[0] } else { State::Unknown };
    }
}

/// The result of an operation in a state that nothing else changes, and the state after it.
fn predict(operation: Operation, state: State) -> (Outcome, State) {
    use {Operation as Op, State as St};
    let refused = |code: &str| (Outcome::Problem(code.to_owned()), state);
    match (operation, state) {
        (Op::List, _) => (Outcome::Ok, state),
        (Op::Create, St::Absent) => (Outcome::Ok, St::Created),
        (Op::Spawn, St::Absent) => (Outcome::Ok, St::Running),
        (Op::Create | Op::Spawn, _) => refused("vm_exists"),
        (_, St::Absent) => refused("vm_not_found"),
        (Op::Delete, _) => (Outcome::Ok, St::Absent),
        (Op::Start, _) => (Outcome::Ok, St::Running),
        (Op::Stop, St::Created) => (Outcome::Ok, St::Created),
        (Op::Stop, _) => (Outcome::Ok, St::Stopped),
        (Op::Snapshot, St::Created) => refused("vm_not_running"),
        (Op::Snapshot | Op::Info, _) | (Op::Exec | Op::Fork, St::Running) => (Outcome::Ok, state),
        (Op::Exec | Op::Fork, _) => refused("vm_not_running"),
    }
}

/// The refusals that are possible if others change the VM meanwhile.
fn possible(operation: Operation) -> &'static [&'static str] {
    match operation {
        Operation::List => &[],
        Operation::Info => &["vm_not_found"],
        Operation::Create | Operation::Spawn => {
            &["vm_exists", "vm_busy", "vm_not_found", "vm_not_running", "vm_replaced"]
        }
        Operation::Delete => &["vm_not_found", "vm_busy", "vm_replaced"],
        // The guest may go away beneath a session.
        Operation::Exec => &["vm_not_found", "vm_busy", "vm_not_running", "vm_replaced", "agent_unreachable"],
        Operation::Snapshot | Operation::Fork => {
            &["vm_not_found", "vm_busy", "vm_not_running", "vm_replaced", "agent_unreachable", "qemu_failed"]
        }
        Operation::Start | Operation::Stop => &["vm_not_found", "vm_busy", "vm_not_running", "vm_replaced"],
    }
}

fn random(below: usize) -> usize {
    let mut bytes = [0; 8];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom").unwrap(), &mut bytes).unwrap();
    usize::try_from(u64::from_le_bytes(bytes) % below as u64).unwrap()
}

fn choose() -> Operation {
    let mut left = random(MIX.iter().map(|(_, weight)| weight).sum());
    for (operation, weight) in MIX {
        match left.checked_sub(weight) {
            Some(rest) => left = rest,
            None => return operation,
        }
    }
    unreachable!("the weights were added up")
}

/// What a command reported. A defect of nido fails the test whatever the model predicts.
fn outcome(done: &FinishedCall, guest: bool) -> Outcome {
    if done.code == 0 {
        return Outcome::Ok;
    }
    let last = done.stderr.lines().last().unwrap_or_default();
    let problem: Option<Value> = serde_json::from_str(last).ok();
    match problem.as_ref().and_then(|problem| problem["code"].as_str()) {
        Some(code) => Outcome::Problem(code.to_owned()),
        None if guest && done.code > 128 => Outcome::Ended(done.code),
        None => panic!("exit code {} without a problem: {done:?}", done.code),
    }
}

/// Carries one operation out.
fn carry_out(home: &TestHome, turn: Turn, number: usize) -> (Outcome, PrintedCommand) {
    let name = format!("vm-{}", turn.name);
    let (label, copy) = (format!("s{number}"), format!("copy-{number}"));
    let (words, guest): (Vec<&str>, bool) = match turn.operation {
        Operation::Create => (vec!["create", &name, "--net", "none"], false),
        Operation::Spawn => (vec!["spawn", &name, "--net", "none"], false),
        Operation::Start => (vec!["start", &name], false),
        Operation::Stop => (vec!["stop", "--force", &name], false),
        Operation::Exec => (vec!["exec", &name, "--", "hostname"], true),
        Operation::Snapshot => (vec!["snapshot", "create", &name, &label], false),
        Operation::Fork => (vec!["fork", &name, &copy], false),
        Operation::Delete => (vec!["delete", "--force", "--yes", &name], false),
        Operation::Info => (vec!["info", &name], false),
        Operation::List => (vec!["ls"], false),
    };
    let done = home.nido(["--json"]).args(&words).run();
    let result = outcome(&done, guest);
    if result == Outcome::Ok && turn.operation == Operation::Fork {
        // The copy is this process's own: nothing else knows its name.
        let ran = home.nido(["exec", &copy, "--", "hostname"]).text();
        assert_eq!(ran, copy, "the copy has a name of its own");
        home.nido(["delete", "--force", "--yes", &copy]).ok();
    }
    let words = words.join(" ");
    (result, PrintedCommand { words, done })
}

/// A command and what it printed, for a failure's report.
struct PrintedCommand {
    words: String,
    done: FinishedCall,
}

impl fmt::Display for PrintedCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nido {}: {:?}", self.words, self.done)
    }
}

/// Stops the other threads when this one has failed.
struct StopOnPanic<'a>(&'a AtomicBool);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

fn number_of(variable: &str, otherwise: usize) -> usize {
    std::env::var(variable).map_or(otherwise, |text| text.parse().unwrap())
}

/// Commands that work on one home at once must never see each other's half-done work as an error of their own.
#[test]
fn processes_that_share_a_home_get_only_the_results_that_a_model_predicts() {
    let home = TestHome::new();
    let operations = number_of("NIDO_SOAK_OPERATIONS", OPERATIONS);
    let (model, done, failed) = (Model::new(), AtomicUsize::new(0), AtomicBool::new(false));
    let work = || {
        let _stop_others = StopOnPanic(&failed);
        while !failed.load(Ordering::Relaxed) {
            let number = done.fetch_add(1, Ordering::Relaxed);
            if number >= operations {
                return;
            }
            let turn = model.begin();
            let (result, shown) = carry_out(&home, turn, number);
            model.end(turn, &result, &shown.to_string());
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..number_of("NIDO_SOAK_PROCESSES", PROCESSES) {
            scope.spawn(work);
        }
    });
    // Everything has ended: the model matches the home.
    let names = home.names();
    for (number, slot) in model.slots.lock().unwrap().iter().enumerate() {
        if slot.state != State::Unknown {
            let there = names.contains(&format!("vm-{number}"));
            assert_eq!(there, slot.state != State::Absent, "vm-{number}, {slot:?}, in {names:?}");
        }
    }
    home.nido(["audit", "verify"]).ok();
    if !names.is_empty() {
        home.nido(["delete", "--force", "--yes"]).args(&names).ok();
    }
    home.assert_empty();
}
