//! What happens to a VM, and what is to be done about it.

use std::time::{Duration, Instant};

use nido_api::Limit;
use nido_api::state::{FailureCause, StateCause};
use nido_guest_agent::wire::Pong;

use crate::limits::Limits;
use crate::pause::ObservedState;

/// What happens to a VM.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    /// Time has passed.
    Tick,
    /// So many sessions are open.
    Sessions(usize),
    /// Its time to live ends then.
    ExpiresAt(Option<Instant>),
    /// A stop was requested, by a user or by what the cause names.
    Stop(Stop),
    /// The session that it was created for has ended: its data is no longer needed.
    SessionEnded,
    /// The host shuts down, its user logs out, or an administrator ends the supervisor.
    Terminated,
    /// QEMU has to be started: the guest has not run.
    Launching,
    /// The QEMU that the supervisor before has left was found; whether its monitor does not reply.
    Attached {
        /// It can only be killed.
        mute: bool,
    },
    /// The guest runs: QEMU replies on its monitor, and has loaded what it had to load.
    QmpReady,
    /// The agent is awaited.
    Booting,
    /// The agent's first reply, or why there is none.
    Agent(AgentReply),
    /// So many sessions has the agent, which was asked because the VM seemed to be idle.
    AgentSessions(u32),
    /// QEMU's word for what the CPUs do.
    Observed(ObservedState),
    /// QEMU reported that the CPUs run.
    CpusRun,
    /// A pause that was requested is done.
    Paused,
    /// A resume begins; RESUME and STOP are its own until it is over.
    ResumeBegins,
    /// It is over; whether the CPUs run.
    ResumeEnds(bool),
    /// The guest's kernel panicked.
    Panicked,
    /// A warm image was saved, or could not be.
    Saved,
    /// A clone was paused, and this is its agent's reply; or it could not be.
    Parked(Option<Pong>),
    /// The clone became a user's VM.
    Claimed(Limits, Duration),
    /// Its CPUs run again; the row has it when the guest is ready.
    Woken,
    /// QEMU has ended.
    Exited,
}

/// A stop.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stop {
    /// Who requested it, if that is recorded.
    pub cause: Option<StateCause>,
    /// Terminate QEMU at once.
    pub force: bool,
    /// How long the guest may take to power off.
    pub timeout: Duration,
}

impl Stop {
    /// QEMU is terminated at once.
    pub(crate) const fn force(cause: Option<StateCause>) -> Self {
        Self { cause, force: true, timeout: Duration::ZERO }
    }
}

/// The agent's first reply, or why there is none.
#[derive(Debug, Clone)]
pub(crate) enum AgentReply {
    /// It is there.
    Ready(Pong),
    /// It did not reply in time.
    Late,
    /// There can be no session with it.
    Refused(FailureCause, String),
    /// The guest could not be made a machine of its own.
    NotRenewed(String),
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Action {
    /// Write the state and its cause.
    RecordState,
    /// Write which limit ended it.
    RecordLimit(Limit),
    /// Warn that the guest did not power off.
    WarnPlugPulled,
    /// Ask the guest to power off until then, and resume its CPUs for that.
    PowerOff(Instant),
    /// Ask QEMU to quit.
    Quit,
    /// Kill QEMU.
    Kill,
    /// Ask the agent for its sessions.
    CountSessions,
    /// Await the agent for so much longer.
    AwaitAgent(Duration),
    /// Notify clients that the VM can be used, or reports itself why it cannot.
    ReportReady,
    /// Write what the agent reported, and notify clients.
    RecordReady(Pong),
    /// Save the guest as a warm image.
    SaveGuest,
    /// Pause the clone, then record that it is ready.
    Park(Pong),
    /// Set the guest's clock.
    SetClock,
}
