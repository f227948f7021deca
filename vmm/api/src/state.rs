//! The states of a VM, and the whole policy of what may be done in which.
//!
//! ```text
//!  created --start--> starting --QmpReady--> running <--pause/resume--> paused
//!     ^                  |                      |                         |
//!     |                  v                      +------ stop -------------+
//!     |               failed <---- QemuExited, unasked ----+--> stopping --QemuExited--> stopped
//!     +-------------------- start works from created, stopped and failed --------------------+
//! ```
//!
//! Two pure functions: [`admit`] answers whether a request may be carried out, [`advance`] what a fact about QEMU or
//! the guest turns the state into. "The agent is ready" is a fact about a running VM, not a state.
//!
//! Invariant: after [`Fact::QemuExited`] the VM is not running, whatever its state was; and `stop` is never denied.

use serde::{Deserialize, Serialize};

/// The state of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// Created, never started.
    Created,
    /// The supervisor starts it; QEMU does not reply yet.
    Starting,
    /// Running.
    Running,
    /// Paused: its CPUs do not run.
    Paused,
    /// A stop was requested.
    Stopping,
    /// Stopped by request, or powered off by the guest.
    Stopped,
    /// Ended for any other reason.
    Failed,
    /// Its row in the store cannot be read: it is damaged, or of another version of nido. Never stored.
    Unknown,
}

impl VmState {
    /// Every state that is stored.
    pub const ALL: [Self; 7] =
        [Self::Created, Self::Starting, Self::Running, Self::Paused, Self::Stopping, Self::Stopped, Self::Failed];

    /// Every state that users see.
    pub const SHOWN: [Self; 8] = [
        Self::Created,
        Self::Starting,
        Self::Running,
        Self::Paused,
        Self::Stopping,
        Self::Stopped,
        Self::Failed,
        Self::Unknown,
    ];

    /// No QEMU belongs to it.
    #[must_use]
    pub const fn is_inactive(self) -> bool {
        matches!(self, Self::Created | Self::Stopped | Self::Failed)
    }

    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
        }
    }

    /// The state that a word stands for.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.word() == word)
    }
}

/// What can be asked of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Request {
    /// Start it.
    Start,
    /// Stop it.
    Stop,
    /// Pause its CPUs.
    Pause,
    /// Resume them.
    Resume,
    /// Use the agent: exec, copy, forward.
    UseAgent,
    /// Delete it.
    Delete,
}

impl Request {
    /// Every request.
    pub const ALL: [Self; 6] = [Self::Start, Self::Stop, Self::Pause, Self::Resume, Self::UseAgent, Self::Delete];
}

/// Whether a request may be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Carry it out.
    Do,
    /// There is nothing to do.
    AlreadySo,
    /// Not in this state; a few words why.
    Denied(&'static str),
}

/// Decides whether `request` may be carried out in `state`.
#[must_use]
pub const fn admit(state: VmState, request: Request) -> Admission {
    use Admission::{AlreadySo, Denied, Do};
    use VmState as S;
    match (request, state) {
        (Request::Start, S::Created | S::Stopped | S::Failed) => Do,
        (Request::Start, S::Starting | S::Running) => AlreadySo,
        (Request::Start, S::Paused) => Denied("it is paused; resume it"),
        (Request::Start, S::Stopping) => Denied("it is being stopped"),

        (Request::Stop, S::Unknown) => Do,
        (_, S::Unknown) => Denied("its row in the store cannot be read"),

        (Request::Stop, S::Created | S::Stopped | S::Failed) => AlreadySo,
        (Request::Stop, S::Starting | S::Running | S::Paused | S::Stopping) => Do,

        (Request::Pause, S::Running) => Do,
        (Request::Pause, S::Paused) => AlreadySo,
        // Whether the CPUs run only QEMU knows: the row may lag behind.
        (Request::Resume, S::Paused | S::Running) => Do,
        (Request::Pause | Request::Resume, S::Starting) => Denied("it is still starting"),
        (Request::Pause | Request::Resume, S::Stopping) => Denied("it is being stopped"),
        (Request::Pause | Request::Resume, S::Created | S::Stopped | S::Failed) => Denied("it is not running"),

        (Request::UseAgent, S::Starting | S::Running) => Do,
        (Request::UseAgent, S::Paused) => Denied("it is paused; resume it"),
        (Request::UseAgent, S::Stopping) => Denied("it is being stopped"),
        (Request::UseAgent, S::Created | S::Stopped | S::Failed) => Denied("it is not running; start it"),

        (Request::Delete, S::Created | S::Stopped | S::Failed) => Do,
        (Request::Delete, S::Starting | S::Running | S::Paused | S::Stopping) => {
            Denied("it is running; stop it or force")
        }
    }
}

/// What is learned about QEMU or the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fact {
    /// QEMU answers on its monitor and the CPUs run.
    QmpReady,
    /// The CPUs are paused.
    GuestPaused,
    /// The CPUs were resumed.
    GuestResumed,
    /// The guest restarts. With `-no-reboot` QEMU ends next.
    GuestReset,
    /// The guest powers itself off.
    GuestShutdown,
    /// The guest's kernel panicked.
    GuestPanicked,
    /// A stop was requested.
    StopAsked,
    /// QEMU is gone; whether it ended in order (exit code 0 after a shutdown).
    QemuExited {
        /// Exit code 0, or the end of a shutdown seen on the monitor.
        clean: bool,
    },
    /// The time for starting ran out.
    DeadlinePassed,
}

/// What `fact` turns `state` into.
#[must_use]
pub const fn advance(state: VmState, fact: Fact) -> VmState {
    use VmState as S;
    match (fact, state) {
        // Without a QEMU, facts about it do not apply.
        (_, S::Created | S::Stopped | S::Failed | S::Unknown) => state,
        (Fact::QmpReady | Fact::GuestResumed, S::Starting | S::Running | S::Paused) => S::Running,
        (Fact::GuestPaused, S::Starting | S::Running | S::Paused) => S::Paused,
        (Fact::StopAsked | Fact::GuestShutdown | Fact::GuestReset, _) => S::Stopping,
        // A guest that panicked, or did not come up, is on its way down; how it ends is QemuExited's word.
        (Fact::GuestPanicked | Fact::DeadlinePassed, _) => state,
        (Fact::QemuExited { .. }, S::Stopping) => S::Stopped,
        (Fact::QemuExited { clean: true }, S::Running | S::Paused) => S::Stopped,
        (Fact::QemuExited { .. }, S::Starting | S::Running | S::Paused) => S::Failed,
        (Fact::QmpReady | Fact::GuestResumed | Fact::GuestPaused, S::Stopping) => S::Stopping,
    }
}

/// Why a VM is paused or stopped, for programs. For a failed one see [`FailureCause`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StateCause {
    /// Paused or stopped by a user.
    User,
    /// Paused: the guest wrote to its disk, and the host's disk is full.
    DiskFull,
    /// Paused: the host could not read or write the guest's disk.
    IoError,
    /// Paused: the guest suspended itself.
    GuestSuspended,
    /// Paused by QEMU for another reason.
    Qemu,
    /// Stopped: the guest powered itself off.
    Guest,
    /// Stopped: its time to live is over.
    Ttl,
    /// Stopped: it was idle for too long.
    Idle,
    /// Stopped: the session that it was created for has ended.
    Session,
    /// Stopped: the host shut down, its user logged out, or the supervisor received a signal.
    Host,
    /// Stopped: its disk was restored from a snapshot.
    Restored,
}

impl StateCause {
    /// Every cause.
    pub const ALL: [Self; 11] = [
        Self::User,
        Self::DiskFull,
        Self::IoError,
        Self::GuestSuspended,
        Self::Qemu,
        Self::Guest,
        Self::Ttl,
        Self::Idle,
        Self::Session,
        Self::Host,
        Self::Restored,
    ];

    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::DiskFull => "disk_full",
            Self::IoError => "io_error",
            Self::GuestSuspended => "guest_suspended",
            Self::Qemu => "qemu",
            Self::Guest => "guest",
            Self::Ttl => "ttl",
            Self::Idle => "idle",
            Self::Session => "session",
            Self::Host => "host",
            Self::Restored => "restored",
        }
    }

    /// The cause that a word stands for.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|cause| cause.word() == word)
    }

    /// The cause in a sentence, with what to do about it.
    #[must_use]
    pub const fn detail(self) -> &'static str {
        match self {
            Self::User => "as requested",
            Self::DiskFull => {
                "the host's disk is full: free some space on the disk that holds nido's home; it then resumes automatically"
            }
            Self::IoError => {
                "the host could not read or write the VM's disk: check the host's disk, then resume the VM"
            }
            Self::GuestSuspended => "the guest suspended itself; resume it to continue",
            Self::Qemu => "QEMU paused it; see its supervisor's log",
            Self::Guest => "the guest powered itself off",
            Self::Ttl => "its time to live is over",
            Self::Idle => "it was idle for too long",
            Self::Session => "the session that it was created for has ended",
            Self::Host => "the host shut down, or its user logged out",
            Self::Restored => "its disk was restored from a snapshot without memory; start it",
        }
    }

    /// Why a paused VM cannot be used, after "it is paused".
    #[must_use]
    pub const fn paused_because(self) -> &'static str {
        match self {
            Self::DiskFull => "it is paused because the host's disk is full",
            Self::IoError => "it is paused because the host could not read or write its disk",
            Self::GuestSuspended => "the guest suspended itself",
            _ => "it is paused; resume it",
        }
    }
}

/// Why a VM failed, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FailureCause {
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest did not reply in time.
    GuestTimeout,
    /// The guest agent and this nido have no version of their protocol in common.
    AgentVersion,
    /// The guest agent replied, but rejected the VM's token or violated the protocol.
    AgentRefused,
    /// QEMU was killed by a signal.
    QemuSignal,
    /// QEMU exited with an error.
    QemuError,
    /// KVM failed.
    KvmInternalError,
    /// The host ran out of memory.
    OutOfMemory,
    /// The host's disk is full.
    DiskFull,
    /// The guest was loaded, but its identity could not be reset.
    RenewalFailed,
    /// The host restarted, or QEMU and its supervisor were both killed.
    HostRestart,
    /// Its directory, with its disk, was removed by something other than nido.
    FilesLost,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FACTS: [Fact; 10] = [
        Fact::QmpReady,
        Fact::GuestPaused,
        Fact::GuestResumed,
        Fact::GuestReset,
        Fact::GuestShutdown,
        Fact::GuestPanicked,
        Fact::StopAsked,
        Fact::QemuExited { clean: true },
        Fact::QemuExited { clean: false },
        Fact::DeadlinePassed,
    ];

    #[test]
    fn stop_is_never_denied() {
        for state in VmState::ALL {
            assert!(!matches!(admit(state, Request::Stop), Admission::Denied(_)), "{state:?}");
        }
    }

    #[test]
    fn state_names_parse() {
        for state in VmState::ALL {
            assert_eq!(VmState::from_word(state.word()), Some(state));
            assert_eq!(serde_json::to_string(&state).unwrap(), format!("\"{}\"", state.word()));
        }
    }

    #[test]
    fn causes_have_the_same_name_in_the_store_and_in_json() {
        for cause in StateCause::ALL {
            assert_eq!(StateCause::from_word(cause.word()), Some(cause));
            assert_eq!(serde_json::to_string(&cause).unwrap(), format!("\"{}\"", cause.word()));
        }
    }

    // A row with `running` kept a resume from ever reaching QEMU.
    #[test]
    fn a_resume_reaches_qemu_in_every_recorded_state() {
        for state in [VmState::Running, VmState::Paused] {
            assert_eq!(admit(state, Request::Resume), Admission::Do);
        }
    }

    #[test]
    fn a_requested_stop_ends_in_stopped() {
        for clean in [true, false] {
            let stopping = advance(VmState::Running, Fact::StopAsked);
            assert_eq!(advance(stopping, Fact::QemuExited { clean }), VmState::Stopped);
        }
        assert_eq!(advance(VmState::Running, Fact::QemuExited { clean: false }), VmState::Failed);
        assert_eq!(advance(VmState::Starting, Fact::QemuExited { clean: true }), VmState::Failed);
    }

    proptest! {
        #[test]
        fn any_history_stays_in_the_table(steps in proptest::collection::vec((0usize..6, 0usize..10, any::<bool>()), 0..60)) {
            let mut state = VmState::Created;
            for (request, fact, ask) in steps {
                if ask {
                    // A request only changes the state where it is admitted, and then as its caller does it.
                    state = match (admit(state, Request::ALL[request]), Request::ALL[request]) {
                        (Admission::Do, Request::Start) => VmState::Starting,
                        (Admission::Do, Request::Stop) => advance(state, Fact::StopAsked),
                        _ => state,
                    };
                } else {
                    let next = advance(state, FACTS[fact]);
                    if matches!(FACTS[fact], Fact::QemuExited { .. }) {
                        prop_assert!(next.is_inactive());
                    }
                    prop_assert!(!state.is_inactive() || next == state);
                    state = next;
                }
            }
        }
    }
}
