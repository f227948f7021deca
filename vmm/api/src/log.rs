//! Logs of a VM, and the host's health.

use serde::{Deserialize, Serialize};

/// Which log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogSource {
    /// The guest's serial console.
    #[default]
    Console,
    /// QEMU's own output.
    Qemu,
    /// The supervisor's.
    Supervisor,
}

/// What to read of a log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogRequest {
    /// Which one.
    pub source: LogSource,
    /// Only so many of the last lines; all that is kept if absent.
    pub tail_lines: Option<usize>,
    /// Go on until the VM is at rest.
    pub follow: bool,
}

/// The host's health, as `doctor` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DoctorReport {
    /// Whether a VM could be started.
    pub ok: bool,
    /// What was looked at, in order.
    pub checks: Vec<DoctorCheck>,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DoctorCheck {
    /// What.
    pub name: String,
    /// How it is.
    pub status: CheckStatus,
    /// One sentence.
    pub detail: String,
    /// The command or change that mends it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(nullable = false)]
    pub hint: Option<String>,
}

impl DoctorCheck {
    /// Says what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CheckStatus {
    /// As it should be.
    Ok,
    /// nido works, but not as well as it could.
    Warning,
    /// nido cannot start a VM.
    Failed,
}
