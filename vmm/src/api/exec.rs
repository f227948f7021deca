//! Running commands in a guest.

use serde::{Deserialize, Serialize};

/// A command to run. Bytes are as the caller's operating system gave them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecRequest {
    /// Program and arguments. Empty: the user's login shell.
    pub argv: Vec<Vec<u8>>,
    /// Environment on top of the user's own: `KEY=VALUE`.
    pub env: Vec<Vec<u8>>,
    /// Working directory; the user's home if absent.
    pub directory: Option<Vec<u8>>,
    /// Name or numeric id; root if absent.
    pub user: Option<String>,
    /// Whether standard input will be sent.
    pub stdin: bool,
    /// Run on a terminal of so many rows and columns.
    pub pty: Option<(u16, u16)>,
    /// The terminal's type (`TERM`).
    pub term: Option<String>,
    /// Kill the command and its children after so long.
    pub timeout_ms: Option<u64>,
}

/// What happens while a command runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    /// It runs; its process id in the guest.
    Started(u32),
    /// Bytes of its standard output, or of its terminal.
    Stdout(Vec<u8>),
    /// Bytes of its standard error.
    Stderr(Vec<u8>),
    /// It has ended. Nothing follows.
    Exited(ExecExit),
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecExit {
    /// Its exit code.
    pub exit_code: Option<u8>,
    /// The signal that killed it.
    pub signal: Option<u8>,
    /// Whether its time ran out.
    pub timed_out: bool,
    /// How long it ran, by the guest's clock.
    pub duration_ms: u64,
}

/// A command that was run to its end, its output collected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecResult {
    /// Its standard output, if it is UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stdout: Option<String>,
    /// Its standard output, if it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stdout_base64: Option<String>,
    /// Its standard error, if it is UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stderr: Option<String>,
    /// Its standard error, if it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stderr_base64: Option<String>,
    /// How it ended.
    #[serde(flatten)]
    pub exit: ExecExit,
    /// Which streams were cut.
    pub truncated: Truncated,
}

/// Which streams were cut because they were longer than the limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Truncated {
    /// Standard output.
    pub stdout: bool,
    /// Standard error.
    pub stderr: bool,
}
