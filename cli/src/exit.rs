//! Exit codes: the one place that knows them, and how an operation ends other than well.
//!
//! | code | `exec`, `run`, `shell` | every other verb |
//! |---|---|---|
//! | 0 | the command ended well | done |
//! | 1 | the command's own | failed |
//! | 2 | the command's own | usage: unknown flags, values that are not valid |
//! | 70 | the command's own | a defect of nido |
//! | 124 | its time ran out | |
//! | 125 | nido failed, usage included | |
//! | 126 | the command cannot be run | |
//! | 127 | the command was not found | |
//! | 128+n | killed by signal n | nido itself was ended by signal n (130: Ctrl-C, 141: its reader is gone) |
//!
//! Invariant: only the guest's own codes overlap with these; nido itself never uses another one.

use std::future::Future;
use std::io;
use std::process::ExitCode;
use std::time::Duration;

use nido_api::ExecExit;
use nido_api::error::{Code, Error, Kind};
use nido_server::signals::Signals;

/// SIGPIPE's number: the signal that ends a Unix tool when its reader is gone.
const SIGPIPE: u8 = 13;

/// How nido ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Success,
    /// The operation failed.
    Failure,
    /// It was asked for wrongly.
    Usage,
    /// A defect of nido.
    Internal,
    /// The guest's command ran out of time.
    TimedOut,
    /// nido failed before, or while, the guest's command ran.
    NidoFailed,
    /// The guest's command cannot be run.
    CannotRun,
    /// The guest has no such command.
    CommandNotFound,
    /// The guest's command ended with this code.
    Guest(u8),
    /// The guest's command, or nido itself, was ended by this signal.
    Signal(u8),
}

/// Which column of the table above applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codes {
    /// `exec`, `run`, `shell`: small codes belong to the guest's command.
    Guest,
    /// Every other verb.
    Own,
}

/// Why a verb did not come to its end.
#[derive(Debug)]
pub enum Failure {
    /// The core denied it.
    Nido(Error),
    /// Standard output cannot be written.
    Stdout(io::Error),
    /// A signal came.
    Interrupted {
        /// Its number.
        signal: u8,
        /// How long work that was dropped may take to undo itself before nido leaves.
        undo: Duration,
    },
}

/// How every verb ends.
pub type Outcome = Result<Exit, Failure>;

impl Exit {
    /// The number the shell sees.
    pub const fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failure => 1,
            Self::Usage => 2,
            Self::Internal => 70,
            Self::TimedOut => 124,
            Self::NidoFailed => 125,
            Self::CannotRun => 126,
            Self::CommandNotFound => 127,
            Self::Guest(code) => code,
            Self::Signal(number) => 128 | (number & 0x7f),
        }
    }

    /// What an error of the core ends in.
    pub const fn of_error(error: &Error, codes: Codes) -> Self {
        match (codes, error.code(), error.kind()) {
            (Codes::Guest, Code::CommandNotFound, _) => Self::CommandNotFound,
            (Codes::Guest, Code::CommandCannotRun | Code::UserNotFound | Code::DirectoryNotFound, _) => Self::CannotRun,
            (Codes::Guest, ..) => Self::NidoFailed,
            (Codes::Own, _, Kind::Invalid) => Self::Usage,
            (Codes::Own, _, Kind::Internal) => Self::Internal,
            (Codes::Own, ..) => Self::Failure,
        }
    }

    /// What a finished command of the guest ends in.
    pub const fn of_command(exit: &ExecExit) -> Self {
        match (exit.timed_out, exit.signal, exit.exit_code) {
            (true, ..) => Self::TimedOut,
            (false, Some(signal), _) => Self::Signal(signal),
            (false, None, Some(code)) => Self::Guest(code),
            (false, None, None) => Self::NidoFailed,
        }
    }

    /// What a lost standard output ends in.
    pub fn of_stdout(error: &io::Error, codes: Codes) -> Self {
        match (error.kind(), codes) {
            (io::ErrorKind::BrokenPipe, _) => Self::Signal(SIGPIPE),
            (_, Codes::Guest) => Self::NidoFailed,
            (_, Codes::Own) => Self::Failure,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Nido(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Stdout(error)
    }
}

/// Does `work` until it ends or a signal comes; then it is dropped, and has `undo` to clean up incomplete work.
pub async fn until_signal<T>(undo: Duration, work: impl Future<Output = Result<T, Error>>) -> Result<T, Failure> {
    let mut signals = Signals::listen()?;
    tokio::select! {
        result = work => Ok(result?),
        signal = signals.next_end() => Err(Failure::Interrupted { signal, undo }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(exit_code: Option<u8>, signal: Option<u8>, timed_out: bool) -> u8 {
        Exit::of_command(&ExecExit { exit_code, signal, timed_out, duration_ms: 0 }).code()
    }

    #[test]
    fn the_guests_codes_are_its_own() {
        for code in 0..=255 {
            assert_eq!(ended(Some(code), None, false), code);
        }
        assert_eq!(ended(None, Some(9), false), 137);
        assert_eq!(ended(None, Some(9), true), 124);
    }

    #[test]
    fn nidos_exit_codes_differ_from_the_guests() {
        for &code in Code::ALL {
            let exit = Exit::of_error(&Error::new(code, "x"), Codes::Guest).code();
            assert!((125..=127).contains(&exit), "{code:?}");
            let exit = Exit::of_error(&Error::new(code, "x"), Codes::Own).code();
            assert!([1, 2, 70].contains(&exit), "{code:?}");
        }
    }

    #[test]
    fn a_reader_that_left_is_no_error_of_ours() {
        let gone = io::Error::from(io::ErrorKind::BrokenPipe);
        assert_eq!(Exit::of_stdout(&gone, Codes::Own).code(), 141);
    }
}
