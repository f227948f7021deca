//! What a VM is there for, and the rules that follow from it: pure.

use nido_store::{Origin, Purpose, VmRow};

/// What a VM is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// A user's VM.
    Use,
    /// A clone that waits, paused, in a pool.
    Clone,
    /// It is saved as a warm image, and ends then.
    WarmImage {
        /// It is a copy of a running guest, loaded only to be saved again: its CPUs never run.
        twin: bool,
    },
}

/// What follows when the agent replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReadyAction {
    /// Clients are notified.
    Report,
    /// It is paused until it is claimed.
    Park,
    /// It is saved.
    Save,
}

impl Role {
    pub(super) fn of(row: &VmRow) -> Self {
        match row.purpose {
            Purpose::Use => Self::Use,
            Purpose::Pool => Self::Clone,
            Purpose::Bake => Self::WarmImage { twin: row.origin != Origin::Boot },
        }
    }

    /// Whether it counts as used while its agent is awaited. A process waits for a guest that is saved, and one without it is idle.
    pub(super) const fn is_used_while_it_boots(self) -> bool {
        !matches!(self, Self::WarmImage { .. })
    }

    /// Whether it counts as used while it is paused: no client can use it then.
    pub(super) const fn is_used_while_paused(self) -> bool {
        matches!(self, Self::Use)
    }

    /// Whether the guest is asked to power off before QEMU ends. What is saved, or waits in a pool, has nothing to lose, and must
    /// not run for that.
    pub(super) const fn powers_off(self) -> bool {
        matches!(self, Self::Use)
    }

    /// Whether clients may open sessions when the agent replies.
    pub(super) const fn opens_to_clients(self) -> bool {
        !matches!(self, Self::Clone)
    }

    /// What follows when the agent replies.
    pub(super) const fn at_ready(self) -> ReadyAction {
        match self {
            Self::Use => ReadyAction::Report,
            Self::Clone => ReadyAction::Park,
            Self::WarmImage { .. } => ReadyAction::Save,
        }
    }

    /// Whether it never runs.
    pub(super) const fn is_twin(self) -> bool {
        matches!(self, Self::WarmImage { twin: true })
    }
}
