//! Logs of a VM, and the host's health.

use serde::{Deserialize, Serialize};

/// A log of a VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogSource {
    /// The guest's serial console.
    #[default]
    Console,
    /// QEMU's output.
    Qemu,
    /// The supervisor's log.
    Supervisor,
}

/// What to read of a log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogRequest {
    /// Which one.
    pub source: LogSource,
    /// Only so many of the last lines; all that is kept if absent.
    pub tail_lines: Option<usize>,
    /// Keep following until the VM is stopped.
    pub follow: bool,
}

/// The host's health, as `doctor` reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DoctorReport {
    /// Whether a VM can be started.
    pub ok: bool,
    /// The checks, in order.
    pub checks: Vec<DoctorCheck>,
}

/// A check of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DoctorCheck {
    /// Its name.
    pub name: String,
    /// Its result.
    pub status: CheckStatus,
    /// The finding in one sentence.
    pub detail: String,
    /// The command or change that fixes it.
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

/// Result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CheckStatus {
    /// No problem.
    Ok,
    /// nido works, but with restrictions.
    Warning,
    /// nido cannot start a VM.
    Failed,
}
