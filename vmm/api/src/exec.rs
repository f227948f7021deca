//! Running commands in a guest.

use std::collections::BTreeMap;

use base64::Engine as _;
use serde::{Deserialize, Serialize};

use crate::error::{Code, Error};

/// The default timeout of a command.
const TIMEOUT_MS: u64 = 60_000;

/// A command to run. Bytes are as the caller's operating system gave them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecRequest {
    /// Program and arguments. Empty: the user's login shell.
    pub argv: Vec<Vec<u8>>,
    /// Environment on top of the user's own: `KEY=VALUE`.
    pub env: Vec<Vec<u8>>,
    /// Working directory; the user's home if absent.
    pub directory: Option<Vec<u8>>,
    /// USER, USER:GROUP or :GROUP, each a name or a number; root if absent.
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

/// A command.
#[derive(Debug, Default, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ExecBody {
    /// Program and arguments, run without a shell. Either this or `command`.
    pub argv: Option<Vec<String>>,
    /// A line for the guest's `sh -c`, instead of `argv`.
    pub command: Option<String>,
    /// Environment variables, added to the user's own.
    pub env: BTreeMap<String, String>,
    /// Working directory; the user's home if absent.
    pub directory: Option<String>,
    /// USER, USER:GROUP or :GROUP, each a name or a number; root if absent.
    pub user: Option<String>,
    /// Its standard input, as text. Either this or `stdin_base64`, if any.
    pub stdin: Option<String>,
    /// Its standard input, as base64.
    pub stdin_base64: Option<String>,
    /// `timeout_ms` in seconds; give only one of them.
    #[schema(ignore)]
    pub timeout_seconds: Option<u64>,
    /// Kill the command and its children after this time, in milliseconds; absent is a minute, 0 is never.
    pub timeout_ms: Option<u64>,
}

impl ExecBody {
    /// The core's request, and the standard input.
    ///
    /// # Errors
    /// `spec_invalid`, with the field.
    pub fn split(self) -> Result<(ExecRequest, Vec<u8>), Error> {
        let bad = |words: &str| Error::new(Code::SpecInvalid, words);
        let argv = match (self.argv, self.command) {
            (Some(argv), None) if !argv.is_empty() => argv,
            (None, Some(line)) => vec!["sh".into(), "-c".into(), line],
            (Some(_), Some(_)) => return Err(bad("command: give either argv or command")),
            (_, None) => return Err(bad("argv: there is no command").hint("argv is a list, command a line for sh")),
        };
        if argv.iter().any(|word| word.contains('\0')) {
            return Err(bad("argv: a word holds a zero byte"));
        }
        let variable = |(key, value): (String, String)| {
            if key.is_empty() || key.contains(['=', '\0']) || value.contains('\0') {
                return Err(bad("env: a name is empty or holds '=', or there is a zero byte"));
            }
            Ok(format!("{key}={value}").into_bytes())
        };
        let stdin = match (self.stdin, self.stdin_base64) {
            (Some(_), Some(_)) => return Err(bad("stdin_base64: give either stdin or stdin_base64")),
            (Some(text), None) => Some(text.into_bytes()),
            (None, Some(text)) => {
                let bytes = base64::engine::general_purpose::STANDARD.decode(text);
                Some(bytes.map_err(|_| bad("stdin_base64: it is not base64"))?)
            }
            (None, None) => None,
        };
        let timeout_ms = match (self.timeout_seconds, self.timeout_ms) {
            (Some(_), Some(_)) => return Err(bad("timeout_ms: give either timeout_ms or timeout_seconds")),
            (Some(seconds), None) => seconds.saturating_mul(1000),
            (None, ms) => ms.unwrap_or(TIMEOUT_MS),
        };
        let request = ExecRequest {
            argv: argv.into_iter().map(String::into_bytes).collect(),
            env: self.env.into_iter().map(variable).collect::<Result<_, Error>>()?,
            directory: self.directory.map(String::into_bytes),
            user: self.user,
            stdin: stdin.is_some(),
            timeout_ms: Some(timeout_ms).filter(|ms| *ms > 0),
            ..ExecRequest::default()
        };
        Ok((request, stdin.unwrap_or_default()))
    }
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

/// Exit status of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ExecExit {
    /// Its exit code.
    pub exit_code: Option<u8>,
    /// The signal that killed it.
    pub signal: Option<u8>,
    /// Whether it was killed because of its timeout.
    pub timed_out: bool,
    /// Duration, by the guest's clock.
    pub duration_ms: u64,
}

impl ExecExit {
    /// The same in a word, for the audit log.
    #[must_use]
    pub fn word(&self) -> String {
        match (self.exit_code, self.signal) {
            _ if self.timed_out => "timed_out".into(),
            (Some(code), _) => format!("exit_code:{code}"),
            (None, Some(signal)) => format!("signal:{signal}"),
            (None, None) => String::new(),
        }
    }
}

/// A command that has ended, with its output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ExecResult {
    /// Its standard output, if it is UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub stdout: Option<String>,
    /// Its standard output, if it is not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub stdout_base64: Option<String>,
    /// Its standard error, if it is UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub stderr: Option<String>,
    /// Its standard error, if it is not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub stderr_base64: Option<String>,
    /// Its exit status.
    #[serde(flatten)]
    pub exit: ExecExit,
    /// Which streams were truncated.
    pub truncated: Truncated,
}

/// Which streams were truncated because they were longer than the limit.
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
    out: OutputChunk,
    err: OutputChunk,
    limit: usize,
}

#[derive(Debug, Default)]
struct OutputChunk {
    bytes: Vec<u8>,
    truncated: bool,
}

impl Collected {
    /// Nothing yet. `limit` is the most that is kept of a stream, in bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { out: OutputChunk::default(), err: OutputChunk::default(), limit }
    }

    /// Adds output of the command.
    pub fn add(&mut self, event: &ExecEvent) {
        let (piece, bytes) = match event {
            ExecEvent::Stdout(bytes) => (&mut self.out, bytes),
            ExecEvent::Stderr(bytes) => (&mut self.err, bytes),
            ExecEvent::Started(_) | ExecEvent::Exited(_) => return,
        };
        let room = self.limit - piece.bytes.len();
        // Behind a gap nothing is added: it would look like what came next.
        let room = if piece.truncated { 0 } else { room };
        piece.truncated |= bytes.len() > room;
        piece.bytes.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    /// How many of these bytes would be kept.
    #[must_use]
    pub fn room(&self, event: &ExecEvent) -> usize {
        match event {
            ExecEvent::Stdout(bytes) => bytes.len().min(self.limit - self.out.bytes.len()),
            ExecEvent::Stderr(bytes) => bytes.len().min(self.limit - self.err.bytes.len()),
            ExecEvent::Started(_) | ExecEvent::Exited(_) => 0,
        }
    }

    /// Drops the command's output.
    pub fn cut(&mut self, event: &ExecEvent) {
        match event {
            ExecEvent::Stdout(bytes) => self.out.truncated |= !bytes.is_empty(),
            ExecEvent::Stderr(bytes) => self.err.truncated |= !bytes.is_empty(),
            ExecEvent::Started(_) | ExecEvent::Exited(_) => {}
        }
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

impl OutputChunk {
    /// As text, or as base64 if it is not UTF-8. A character that the limit splits is omitted.
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
    fn binary_output_is_base64() {
        let text = collect(100, &["grün".as_bytes()]);
        assert_eq!((text.stdout.as_deref(), text.stdout_base64), (Some("grün"), None));
        let bytes = collect(100, &[b"\xff\x00"]);
        assert_eq!((bytes.stdout, bytes.stdout_base64.as_deref()), (None, Some("/wA=")));
    }

    #[test]
    fn a_stream_is_truncated_at_the_limit_and_marked() {
        assert!(!collect(3, &[b"abc"]).truncated.stdout);
        let cut = collect(3, &[b"ab", "é".as_bytes()]);
        assert_eq!((cut.stdout.as_deref(), cut.truncated.stdout, cut.truncated.stderr), (Some("ab"), true, false));
    }

    // The specification's name for it was an unknown field.
    #[test]
    fn a_timeout_is_given_in_seconds_or_in_milliseconds() {
        let timeout = |text: &str| {
            let body: ExecBody = serde_json::from_str(text).unwrap();
            body.split().map(|(request, _)| request.timeout_ms).map_err(|error| error.code())
        };
        assert_eq!(timeout(r#"{"command": "id", "timeout_seconds": 5}"#), Ok(Some(5000)));
        assert_eq!(timeout(r#"{"command": "id", "timeout_ms": 5}"#), Ok(Some(5)));
        assert_eq!(timeout(r#"{"command": "id"}"#), Ok(Some(TIMEOUT_MS)));
        assert_eq!(timeout(r#"{"command": "id", "timeout_seconds": 0}"#), Ok(None));
        assert_eq!(timeout(r#"{"command": "id", "timeout_seconds": 1, "timeout_ms": 1}"#), Err(Code::SpecInvalid));
    }
}
