//! What can go wrong, as data: a stable code, one sentence, hints. The front ends only render it.
//!
//! Invariant: a code belongs to exactly one kind, and neither ever changes its spelling once released.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

mod code;
mod hint;
pub mod host;

pub use code::{Code, Kind};
pub use hint::{Call, CallOption, Hint};

use self::host::{HostRefusal, Subject};
use crate::FrontEnd;

/// The result of every operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure, for the person or program who must act on it.
#[derive(Debug)]
pub struct Error {
    code: Code,
    message: String,
    hints: Vec<Hint>,
    log_tail: Vec<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// A failure with one sentence (no full stop, no line break).
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hints: Vec::new(), log_tail: Vec::new(), source: None }
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
        let hints = refusal.hint(Subject::Home).into_iter().collect();
        Self { code: refusal.code(), message, hints, log_tail: Vec::new(), source: Some(Box::new(source)) }
    }

    /// The same for a path, which the message names: `cannot ACTION PATH: …`.
    pub fn io_at(action: &str, path: &Path, source: std::io::Error) -> Self {
        Self::io(format!("cannot {action} {}", path.display().to_string().escape_debug()), source)
    }

    /// Says what to do about it, instead of what was said before.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<Hint>) -> Self {
        self.hints = vec![hint.into()];
        self
    }

    /// Says what else can be done about it.
    #[must_use]
    pub fn or_hint(mut self, hint: impl Into<Hint>) -> Self {
        self.hints.push(hint.into());
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

    /// What to do about it, in the words of a front end.
    #[must_use]
    pub fn hint_for(&self, front_end: FrontEnd) -> Option<String> {
        hint::text(&self.hints, front_end)
    }

    /// Last lines of the log that has the cause.
    #[must_use]
    pub fn log_lines(&self) -> &[String] {
        &self.log_tail
    }

    /// The same as an RFC 9457 problem object, with a hint in the words of a front end.
    #[must_use]
    pub fn problem_for(&self, front_end: FrontEnd) -> Problem {
        Problem {
            r#type: format!("urn:nido:error:{}", self.code.slug()),
            title: self.code.title().into(),
            status: self.code.status(),
            detail: self.message.clone(),
            code: self.code.slug().into(),
            hint: self.hint_for(front_end),
            log_tail: self.log_tail.clone(),
        }
    }

    /// The same for the store and for another process of nido.
    #[must_use]
    pub fn record(&self) -> ErrorRecord {
        ErrorRecord { problem: self.problem_for(FrontEnd::Cli), hints: Some(self.hints.clone()) }
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

/// An error between processes of nido, and in the store: a problem for the command line, which every version reads, and its hints
/// as data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorRecord {
    #[serde(flatten)]
    problem: Problem,
    /// Absent if a version wrote it that had hints only as text, or if the text is what the client may read.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    hints: Option<Vec<Hint>>,
}

impl ErrorRecord {
    /// As a user of a front end reads it.
    #[must_use]
    pub fn problem_for(&self, front_end: FrontEnd) -> Problem {
        Error::from(self.clone()).problem_for(front_end)
    }

    /// The same, to be serialized for a user of that front end. It is not parsed again.
    #[must_use]
    pub fn worded_for(&self, front_end: FrontEnd) -> Self {
        Self { problem: self.problem_for(front_end), hints: None }
    }

    /// The sentence.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.problem.detail
    }

    /// The stable code, as it is written.
    #[must_use]
    pub fn slug(&self) -> &str {
        &self.problem.code
    }
}

impl From<ErrorRecord> for Error {
    fn from(ErrorRecord { problem, hints }: ErrorRecord) -> Self {
        let code = Code::from_slug(&problem.code);
        let of_earlier_version = || problem.hint.map(|text| Hint::CommandLine { text }).into_iter().collect();
        let hints = hints.unwrap_or_else(of_earlier_version);
        Self { code, message: problem.detail, hints, log_tail: problem.log_tail, source: None }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::operation as op;

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
    fn a_record_comes_back_as_the_same_error() {
        for &code in Code::ALL {
            let error = Error::new(code, "it failed").hint("try again").log_tail(vec!["last".into()]);
            let json = serde_json::to_string(&error.record()).unwrap();
            let back = Error::from(serde_json::from_str::<ErrorRecord>(&json).unwrap());
            assert_eq!((back.code(), back.message()), (code, "it failed"));
            assert_eq!((back.hints, back.log_tail), (error.hints, error.log_tail));
        }
    }

    #[test]
    fn a_record_keeps_hints_that_name_an_operation() {
        let hint = Hint::run_on(op::VM_START, "web").cold().to("boot it");
        let json = serde_json::to_string(&Error::new(Code::VmBusy, "x").hint(hint.clone()).record()).unwrap();
        assert_eq!(Error::from(serde_json::from_str::<ErrorRecord>(&json).unwrap()).hints, [hint], "{json}");
    }

    #[test]
    fn versions_with_hints_as_text_and_as_data_read_each_other() {
        let error = Error::new(Code::VmNotRunning, "VM 'web' is stopped").hint(Hint::run_on(op::VM_START, "web"));
        let json = serde_json::to_string(&error.record()).unwrap();
        let earlier: Problem = serde_json::from_str(&json).unwrap();
        assert_eq!(earlier.hint.as_deref(), Some("nido start web"));
        let read: ErrorRecord = serde_json::from_str(&serde_json::to_string(&earlier).unwrap()).unwrap();
        assert_eq!(read.problem_for(FrontEnd::Cli), earlier);
        assert_eq!(read.problem_for(FrontEnd::Api).hint, None);
    }

    #[test]
    fn a_full_disk_has_a_code_of_its_own() {
        let error = Error::io("cannot write x", std::io::Error::from_raw_os_error(libc::ENOSPC));
        assert_eq!(error.code(), Code::DiskFull);
        assert!(error.hint_for(FrontEnd::Cli).is_some());
    }
}
