//! Running commands in a guest.

use base64::Engine as _;
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
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
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Truncated {
    /// Standard output.
    pub stdout: bool,
    /// Standard error.
    pub stderr: bool,
}

/// What a command has written so far, each stream up to a limit.
#[derive(Debug)]
pub struct Collected {
    out: Piece,
    err: Piece,
    limit: usize,
}

#[derive(Debug, Default)]
struct Piece {
    bytes: Vec<u8>,
    truncated: bool,
}

impl Collected {
    /// Nothing yet. `limit` is the most that is kept of a stream, in bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { out: Piece::default(), err: Piece::default(), limit }
    }

    /// Takes in what the command has said.
    pub fn add(&mut self, event: &ExecEvent) {
        let (piece, bytes) = match event {
            ExecEvent::Stdout(bytes) => (&mut self.out, bytes),
            ExecEvent::Stderr(bytes) => (&mut self.err, bytes),
            ExecEvent::Started(_) | ExecEvent::Exited(_) => return,
        };
        let room = self.limit - piece.bytes.len();
        piece.truncated |= bytes.len() > room;
        piece.bytes.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    /// The whole of it, when the command has ended.
    #[must_use]
    pub fn result(self, exit: ExecExit) -> ExecResult {
        let truncated = Truncated { stdout: self.out.truncated, stderr: self.err.truncated };
        let (stdout, stdout_base64) = self.out.text();
        let (stderr, stderr_base64) = self.err.text();
        ExecResult { stdout, stdout_base64, stderr, stderr_base64, exit, truncated }
    }
}

impl Piece {
    /// As text, or as base64 where it is none. A character cut by the limit is left out.
    fn text(mut self) -> (Option<String>, Option<String>) {
        if self.truncated {
            let whole = match std::str::from_utf8(&self.bytes) {
                Err(error) if error.error_len().is_none() => error.valid_up_to(),
                _ => self.bytes.len(),
            };
            self.bytes.truncate(whole);
        }
        match String::from_utf8(self.bytes) {
            Ok(text) => (Some(text), None),
            Err(error) => (None, Some(base64::engine::general_purpose::STANDARD.encode(error.as_bytes()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENDED: ExecExit = ExecExit { exit_code: Some(0), signal: None, timed_out: false, duration_ms: 1 };

    fn collect(limit: usize, pieces: &[&[u8]]) -> ExecResult {
        let mut collected = Collected::new(limit);
        pieces.iter().for_each(|piece| collected.add(&ExecEvent::Stdout(piece.to_vec())));
        collected.result(ENDED)
    }

    #[test]
    fn what_is_no_text_comes_as_base64() {
        let text = collect(100, &["grün".as_bytes()]);
        assert_eq!((text.stdout.as_deref(), text.stdout_base64), (Some("grün"), None));
        let bytes = collect(100, &[b"\xff\x00"]);
        assert_eq!((bytes.stdout, bytes.stdout_base64.as_deref()), (None, Some("/wA=")));
    }

    #[test]
    fn a_stream_is_cut_at_the_limit_and_says_so() {
        assert!(!collect(3, &[b"abc"]).truncated.stdout);
        let cut = collect(3, &[b"ab", "é".as_bytes()]);
        assert_eq!((cut.stdout.as_deref(), cut.truncated.stdout, cut.truncated.stderr), (Some("ab"), true, false));
    }
}
