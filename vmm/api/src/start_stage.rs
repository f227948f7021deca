//! How far a start is.

use serde::{Deserialize, Serialize};

/// Stages of a start, for progress displays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StartStage {
    /// Disk and configuration are created.
    Preparing,
    /// QEMU starts.
    Launching,
    /// The guest boots; the guest agent has not replied yet.
    Booting,
    /// The guest agent replies.
    Ready,
}

impl StartStage {
    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Launching => "launching",
            Self::Booting => "booting",
            Self::Ready => "ready",
        }
    }
}
