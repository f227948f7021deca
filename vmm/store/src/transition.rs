//! How a VM's row changes: one named transition for each thing that happens to a VM.
//!
//! Invariants: a transition is made only from the states that it names, in the transaction that also writes its event; one that
//! comes too late changes nothing and is reported as [`TransitionOutcome::No`].

mod events;

use jiff::Timestamp;
use nido_api::egress::Denial;
use nido_api::error::{Code, Error, Result};
use nido_api::machine::Machine;
use nido_api::name::SnapshotName;
use nido_api::state::{StateCause, VmState};
use nido_api::{AgentInfo, Failure, Limit, LimitHit, SecretUse, Timings};

use self::events::events_of;
use super::{BootParts, Origin, Store, VmRow, encode, fault};

/// States without a QEMU.
const STOPPED_STATES: &[VmState] = &[VmState::Created, VmState::Stopped, VmState::Failed];
/// States of a VM that a supervisor takes care of. A row that another version of nido wrote keeps its own supervisor.
const SUPERVISED: &[VmState] =
    &[VmState::Starting, VmState::Running, VmState::Paused, VmState::Stopping, VmState::Unknown];
/// States in which a start may be prepared.
const LAUNCHABLE_STATES: &[VmState] = &[VmState::Created, VmState::Stopped, VmState::Failed, VmState::Starting];
/// The state of a start that has begun.
const STARTING_STATE: &[VmState] = &[VmState::Starting];

/// What happens to a VM.
#[derive(Debug, Clone, PartialEq)]
pub enum Transition {
    /// A command begins to start it.
    StartBegan,
    /// The start was given up before a supervisor had the VM, which is again as it was.
    StartGivenUp {
        /// Its state before: one without a QEMU.
        to: VmState,
    },
    /// The machine of a start was decided.
    Launching(Box<LaunchRecord>),
    /// The start takes another vsock address, because another program uses the first one.
    AddressChanged {
        /// The address.
        cid: u32,
        /// The machine with it.
        machine: Machine,
    },
    /// The supervisor observed a state.
    Entered {
        /// The state.
        state: VmState,
        /// Why it is paused.
        cause: Option<StateCause>,
        /// How long the start took, once that is known.
        timings: Option<Timings>,
    },
    /// The guest agent replies.
    Ready(Box<AgentReady>),
    /// A property of the machine that it runs on has changed.
    MachineChanged(Machine),
    /// A time limit was reached.
    LimitReached(Limit),
    /// Another limit was reached.
    LimitHit(Box<LimitHit>),
    /// The network refused what the guest tried to reach.
    NetDenied(Box<Denial>),
    /// A secret was put into a request.
    SecretUsed(Box<SecretUse>, u64),
    /// QEMU has ended, or never ran.
    Ended(Box<VmEnd>),
    /// The disk is again as it was in a snapshot.
    DiskRestored {
        /// The snapshot.
        snapshot: SnapshotName,
        /// The state: one without a QEMU.
        to: VmState,
    },
    /// A QEMU runs although its row states that the VM is stopped.
    FoundRunning,
    /// A directory without a row was adopted: the last start according to its record.
    Adopted(Box<AdoptedStart>),
}

/// A start, as it was decided.
#[derive(Debug, Clone, PartialEq)]
pub struct LaunchRecord {
    /// The machine.
    pub machine: Machine,
    /// Its vsock address, if it has one.
    pub cid: Option<u32>,
    /// When the start began.
    pub started_at: Timestamp,
    /// When its time to live ends.
    pub expires_at: Option<Timestamp>,
    /// The template parts that it uses.
    pub parts: BootParts,
    /// How the guest is started.
    pub origin: Origin,
}

/// What is known of a guest whose agent replies.
#[derive(Debug, Clone, PartialEq)]
pub struct AgentReady {
    /// The state.
    pub state: VmState,
    /// Why it is paused.
    pub cause: Option<StateCause>,
    /// The agent.
    pub agent: AgentInfo,
    /// The guest's address.
    pub ip_address: Option<String>,
    /// How long the start took.
    pub timings: Option<Timings>,
    /// The machine, if the guest warns of something new.
    pub machine: Option<Machine>,
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq)]
pub struct VmEnd {
    /// The state: one without a QEMU.
    pub state: VmState,
    /// Why it was stopped.
    pub cause: Option<StateCause>,
    /// Why it failed.
    pub failure: Option<Failure>,
    /// What its console showed last.
    pub last_log_entries: Vec<String>,
}

/// The last start of an adopted VM according to its record.
#[derive(Debug, Clone, PartialEq)]
pub struct AdoptedStart {
    /// The machine.
    pub machine: Option<Machine>,
    /// How it was started.
    pub origin: Origin,
    /// Its vsock address, if it runs.
    pub cid: Option<u32>,
    /// When it was started; if that is not recorded and it runs, when it was adopted.
    pub started_at: Option<Timestamp>,
    /// When its time to live ends, if it runs.
    pub expires_at: Option<Timestamp>,
}

/// Whether a transition was made.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransitionOutcome {
    /// It was.
    Yes,
    /// It was not: the VM is in this state, from which the transition does not lead.
    No(VmState),
    /// There is no such VM any more.
    Gone,
}

impl TransitionOutcome {
    /// Logs a transition that came too late.
    pub fn log(self, id: &str, what: &str) {
        match self {
            Self::Yes | Self::Gone => {}
            Self::No(state) => tracing::warn!("VM {id} is {}; not recorded any more: {what}", state.word()),
        }
    }
}

impl Transition {
    /// How a VM ended.
    #[must_use]
    pub fn ended(state: VmState, failure: Option<Failure>) -> Self {
        Self::Ended(Box::new(VmEnd { state, cause: None, failure, last_log_entries: Vec::new() }))
    }

    /// The states from which it leads.
    #[must_use]
    pub const fn from(&self) -> &'static [VmState] {
        match self {
            Self::StartBegan | Self::DiskRestored { .. } | Self::FoundRunning => STOPPED_STATES,
            Self::Launching(_) => LAUNCHABLE_STATES,
            Self::StartGivenUp { .. } | Self::AddressChanged { .. } => STARTING_STATE,
            Self::Entered { .. }
            | Self::Ready(_)
            | Self::MachineChanged(_)
            | Self::LimitReached(_)
            | Self::NetDenied(_)
            | Self::SecretUsed(..)
            | Self::Ended(_) => SUPERVISED,
            // A snapshot of a stopped VM can reach its quota.
            Self::Adopted(_) | Self::LimitHit(_) => &VmState::ALL,
        }
    }

    /// The state that it leads to; `None` if that is the one before.
    #[must_use]
    pub fn to(&self) -> Option<VmState> {
        match self {
            Self::StartBegan | Self::Launching(_) => Some(VmState::Starting),
            Self::StartGivenUp { to } | Self::DiskRestored { to, .. } => Some(*to),
            Self::Entered { state, .. } => Some(*state),
            Self::Ready(ready) => Some(ready.state),
            Self::Ended(end) => Some(end.state),
            Self::FoundRunning => Some(VmState::Running),
            Self::AddressChanged { .. } | Self::MachineChanged(_) | Self::Adopted(_) => None,
            Self::LimitReached(_) | Self::LimitHit(_) | Self::NetDenied(_) | Self::SecretUsed(..) => None,
        }
    }

    /// Why the VM is paused or stopped then.
    #[must_use]
    pub fn cause(&self) -> Option<StateCause> {
        match self {
            Self::Entered { cause, .. } => *cause,
            Self::Ready(ready) => ready.cause,
            Self::Ended(end) => end.cause,
            Self::DiskRestored { to: VmState::Stopped, .. } => Some(StateCause::Restored),
            _ => None,
        }
    }

    /// Why the VM has failed then.
    #[must_use]
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Ended(end) => end.failure.as_ref(),
            _ => None,
        }
    }

    /// The limit that was reached.
    #[must_use]
    pub fn limit_hit(&self, before: &VmRow) -> Option<LimitHit> {
        match self {
            Self::LimitReached(limit) => limit.hit(before.spec.ttl_ms, before.spec.idle_ms),
            Self::LimitHit(hit) => Some(LimitHit::clone(hit)),
            _ => None,
        }
    }

    /// The columns that it writes.
    fn columns(&self, before: &VmRow) -> Result<Columns> {
        let mut columns = Columns::default();
        if let Some(state) = self.to() {
            columns.set("state", state.word().to_owned());
            columns.set("state_cause", self.cause().map(StateCause::word));
        }
        match self {
            Self::StartBegan | Self::StartGivenUp { .. } | Self::NetDenied(_) | Self::SecretUsed(..) => {}
            Self::LimitReached(_) | Self::LimitHit(_) => {
                if let Some(hit) = self.limit_hit(before) {
                    let mut hits = before.limits_hit.clone();
                    nido_api::limit_hit::add(&mut hits, &hit);
                    columns.set("limits_hit", encode(&hits)?);
                }
            }
            Self::Launching(launch) => launch.columns(&mut columns)?,
            Self::AddressChanged { cid, machine } => {
                columns.set("cid", *cid);
                columns.set("machine", encode(machine)?);
            }
            Self::Entered { timings, .. } => columns.set("timings", timings.as_ref().map(encode).transpose()?),
            Self::Ready(ready) => ready.columns(&mut columns)?,
            Self::MachineChanged(machine) => columns.set("machine", encode(machine)?),
            Self::Ended(end) => {
                columns.clear_guest(&AgentInfo { ready: false, ..before.agent.clone() })?;
                columns.set("cid", None::<u32>);
                columns.set("expires_ms", None::<i64>);
                columns.set("failure", end.failure.as_ref().map(encode).transpose()?);
            }
            Self::DiskRestored { .. } | Self::FoundRunning => columns.set("failure", None::<String>),
            Self::Adopted(adopted) => {
                columns.set("machine", adopted.machine.as_ref().map(encode).transpose()?);
                columns.set("origin", encode(&adopted.origin)?);
                columns.set("cid", adopted.cid);
                columns.set("started_ms", adopted.started_at.map(Timestamp::as_millisecond));
                columns.set("expires_ms", adopted.expires_at.map(Timestamp::as_millisecond));
            }
        }
        Ok(columns)
    }
}

impl LaunchRecord {
    fn columns(&self, columns: &mut Columns) -> Result<()> {
        columns.clear_guest(&AgentInfo::default())?;
        columns.set("cid", self.cid);
        columns.set("machine", encode(&self.machine)?);
        columns.set("started_ms", self.started_at.as_millisecond());
        columns.set("expires_ms", self.expires_at.map(Timestamp::as_millisecond));
        columns.set("failure", None::<String>);
        columns.set("limits_hit", None::<String>);
        columns.set("timings", None::<String>);
        columns.set("parts", encode(&self.parts)?);
        columns.set("origin", encode(&self.origin)?);
        Ok(())
    }
}

impl AgentReady {
    fn columns(&self, columns: &mut Columns) -> Result<()> {
        columns.set("agent", encode(&self.agent)?);
        columns.set("ip_address", self.ip_address.clone());
        if let Some(address) = &self.ip_address {
            columns.set("last_ip_address", address.clone());
        }
        columns.set("timings", self.timings.as_ref().map(encode).transpose()?);
        if let Some(machine) = &self.machine {
            columns.set("machine", encode(machine)?);
        }
        Ok(())
    }
}

/// Columns and their new values.
#[derive(Default)]
struct Columns {
    names: Vec<&'static str>,
    values: Vec<Box<dyn rusqlite::ToSql>>,
}

impl Columns {
    fn set(&mut self, column: &'static str, value: impl rusqlite::ToSql + 'static) {
        self.names.push(column);
        self.values.push(Box::new(value));
    }

    /// What is known only of a guest that runs.
    fn clear_guest(&mut self, agent: &AgentInfo) -> Result<()> {
        self.set("agent", encode(agent)?);
        self.set("ip_address", None::<String>);
        Ok(())
    }
}

impl Store {
    /// Makes a transition of a VM. The caller holds the VM's `supervisor.lock`.
    ///
    /// # Errors
    /// `vm_busy` if the vsock address is in use, else of the store.
    pub fn transition(&self, id: &str, transition: &Transition) -> Result<TransitionOutcome> {
        self.in_transaction(|| {
            let Some(before) = self.vm_by_id(id)? else { return Ok(TransitionOutcome::Gone) };
            if !transition.from().contains(&before.state) {
                return Ok(TransitionOutcome::No(before.state));
            }
            self.set_columns(id, transition.columns(&before)?)?;
            self.update_owned_parts(&before)?;
            for (kind, details) in events_of(&before, transition) {
                self.append(kind, Some(&before.spec.name), &details)?;
            }
            Ok(TransitionOutcome::Yes)
        })
    }

    fn set_columns(&self, id: &str, Columns { names, mut values }: Columns) -> Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        let assignments = names.iter().map(|column| format!("{column} = ?")).collect::<Vec<_>>().join(", ");
        values.push(Box::new(id.to_owned()));
        self.connection
            .execute(&format!("UPDATE vms SET {assignments} WHERE id = ?"), rusqlite::params_from_iter(values))
            .map_err(|e| match e.sqlite_error_code() {
                Some(rusqlite::ErrorCode::ConstraintViolation) => {
                    Error::new(Code::VmBusy, "the vsock address is in use")
                }
                _ => fault(e),
            })?;
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests;
