//! What can go wrong, as data: a stable code, one sentence, a hint. The front ends only render it.
//!
//! Invariant: a code belongs to exactly one kind, and neither ever changes its spelling once released.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

mod code;
pub mod host;

pub use code::{Code, Kind};

use self::host::{HostRefusal, Subject};

/// The result of every operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure, for the person or program who must act on it.
#[derive(Debug)]
pub struct Error {
    code: Code,
    message: String,
    hint: Option<String>,
    log_tail: Vec<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// A failure with one sentence (no full stop, no line break).
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, log_tail: Vec::new(), source: None }
    }

    /// A defect of nido.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, message)
    }

    /// A failed system call on something that has a name. What the host refuses has a code of its own (`host.rs`);
    /// only what no state of the host explains is `internal`.
    pub fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        let refusal = HostRefusal::of(&source);
        let message = format!("{}: {source}", what.into());
        let hint = refusal.hint(Subject::Home).map(str::to_owned);
        Self { code: refusal.code(), message, hint, log_tail: Vec::new(), source: Some(Box::new(source)) }
    }

    /// The same for a path, which the message names: `cannot ACTION PATH: …`.
    pub fn io_at(action: &str, path: &Path, source: std::io::Error) -> Self {
        Self::io(format!("cannot {action} {}", path.display().to_string().escape_debug()), source)
    }

    /// Says what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the last lines of a log. They are shown escaped.
    #[must_use]
    pub fn log_tail(mut self, lines: Vec<String>) -> Self {
        self.log_tail = lines;
        self
    }

    /// Keeps what caused it.
    #[must_use]
    pub fn because(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// The stable code.
    #[must_use]
    pub const fn code(&self) -> Code {
        self.code
    }

    /// The kind.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.code.kind()
    }

    /// The sentence.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The hint for clients of the servers, without those that name a command or flag of the command line, which would lead past the
    /// confirmations and limits of the front end that they use.
    #[must_use]
    pub fn remote_hint(&self) -> Option<&str> {
        self.hint_text().filter(|hint| !is_of_command_line(hint))
    }

    /// What to do about it.
    #[must_use]
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// Last lines of the log that has the cause.
    #[must_use]
    pub fn log_lines(&self) -> &[String] {
        &self.log_tail
    }

    /// The same as an RFC 9457 problem object.
    #[must_use]
    pub fn problem(&self) -> Problem {
        Problem {
            r#type: format!("urn:nido:error:{}", self.code.slug()),
            title: self.code.title().into(),
            status: self.code.status(),
            detail: self.message.clone(),
            code: self.code.slug().into(),
            hint: self.hint.clone(),
            log_tail: self.log_tail.clone(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

impl From<Problem> for Error {
    /// An error that came over a socket from another nido process.
    fn from(problem: Problem) -> Self {
        let code = Code::ALL.iter().copied().find(|c| c.slug() == problem.code).unwrap_or(Code::Internal);
        Self { code, message: problem.detail, hint: problem.hint, log_tail: problem.log_tail, source: None }
    }
}

/// An error as JSON: RFC 9457 with `code`, `hint` and `log_tail` as extension members.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Problem {
    /// A URN made from the code.
    pub r#type: String,
    /// A summary that is the same for every occurrence.
    pub title: String,
    /// HTTP status.
    pub status: u16,
    /// One sentence about this occurrence.
    pub detail: String,
    /// The stable error code.
    pub code: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(nullable = false)]
    pub hint: Option<String>,
    /// The last lines of the log that shows the cause.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub log_tail: Vec<String>,
}

/// Whether a hint is a command, or a flag, for the user at the command line. What only an operator can do (tokens, flags of a server) may be
/// said to everybody.
fn is_of_command_line(hint: &str) -> bool {
    let is_letter = |c: char| c.is_ascii_lowercase() || c == '-';
    let mut verbs = hint.split("nido ").skip(1).map(|rest| rest.split(|c| !is_letter(c)).next().unwrap_or_default());
    let words =
        hint.split_whitespace().map(|word| word.trim_matches(|c: char| !(c.is_ascii_alphanumeric() || c == '-')));
    let mut flags = words.filter(|word| word.len() > 2 && word.starts_with("--"));
    let of_operators = hint.contains("nido token") || hint.contains("nido approve");
    verbs.any(|verb| VERBS.contains(&verb)) || (!of_operators && flags.any(|flag| !SERVER_FLAGS.contains(&flag)))
}

/// Verbs that act on VMs and on what belongs to them.
const VERBS: [&str; 26] = [
    "spawn", "create", "start", "stop", "pause", "resume", "restart", "delete", "ls", "info", "exec", "shell", "run",
    "upload", "download", "cp", "logs", "events", "forward", "proxy", "snapshot", "fork", "template", "pool",
    "webhook", "doctor",
];
/// Flags of servers, which only who starts one can give.
const SERVER_FLAGS: [&str; 5] = ["--allow-host", "--allow-origin", "--allow-remote", "--socket", "--public-url"];

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    // Over MCP and REST errors taught the way around the question: `nido delete --force web`.
    #[test]
    fn hints_for_the_command_line_are_shown_only_there() {
        let remote = |hint: &str| Error::new(Code::VmBusy, "x").hint(hint).remote_hint().is_some();
        for hint in [
            "nido stop web, or: nido delete --force web",
            "leave --disk out, or ask for more",
            "use another with --home",
            "list them with nido forward ls web",
            "choose another with --port",
        ] {
            assert!(!remote(hint), "{hint}");
        }
        for hint in [
            "send Authorization: Bearer TOKEN; create one with nido token create",
            "ask the user to run: nido approve apr_1",
            "start it with --allow-host NAME to accept them",
            "choose another name",
            "create one for the REST API with nido token create, without --only",
        ] {
            assert!(remote(hint), "{hint}");
        }
    }

    #[test]
    fn slugs_are_unique_and_well_formed() {
        let slugs: HashSet<_> = Code::ALL.iter().map(|c| c.slug()).collect();
        assert_eq!(slugs.len(), Code::ALL.len());
        assert!(slugs.iter().all(|s| s.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')));
    }

    #[test]
    fn statuses_agree_with_kinds() {
        for code in Code::ALL {
            let fits = match code.kind() {
                Kind::Invalid => matches!(code.status(), 400 | 405 | 408 | 413 | 415 | 422),
                Kind::NotFound => matches!(code.status(), 404 | 410 | 422),
                Kind::Conflict => matches!(code.status(), 409 | 412),
                Kind::Denied => matches!(code.status(), 401 | 403 | 422),
                Kind::Unavailable => matches!(code.status(), 429 | 503 | 504 | 507),
                Kind::Internal => code.status() == 500,
            };
            assert!(fits, "{code:?}");
        }
    }

    #[test]
    fn a_problem_parses_to_the_same_error() {
        for &code in Code::ALL {
            let error = Error::new(code, "it failed").hint("try again").log_tail(vec!["last".into()]);
            let back = Error::from(error.problem());
            assert_eq!((back.code(), back.message(), back.hint_text()), (code, "it failed", Some("try again")));
            assert_eq!(back.log_lines(), ["last"]);
        }
    }

    #[test]
    fn a_full_disk_has_its_own_code() {
        let error = Error::io("cannot write x", std::io::Error::from_raw_os_error(libc::ENOSPC));
        assert_eq!(error.code(), Code::DiskFull);
        assert!(error.hint_text().is_some());
    }
}
