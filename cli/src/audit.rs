//! The command line's side of the audit log: attempt and outcome around a verb, and its recorded arguments.
//!
//! Invariant: what must be audited is given to [`Context::audited`] unbegun; where the attempt cannot be recorded it never
//! begins.

use std::future::Future;
use std::os::unix::ffi::OsStrExt as _;
use std::pin::Pin;

use nido_api::name::VmName;
use nido_api::operation::Operation;
use nido_api::redact::bytes;
use nido_api::{Caller, DownloadRequest, DownloadTarget, ExecRequest, UploadRequest, UploadSource};
use nido_core::Nido;
use nido_core::audit::AuditOutcome;
use nido_core::execute::{Request, Verdict};
use serde_json::{Value, json};

use crate::context::Context;
use crate::exit::{Exit, Failure, Outcome};

impl Context {
    /// Does `act`, with its attempt in the audit log before and its outcome behind.
    pub fn audited<'a, T: 'a, E: Into<Failure> + 'a>(
        &'a self,
        nido: &'a Nido,
        operation: &'static Operation,
        arguments: Value,
        act: impl Future<Output = Result<T, E>> + 'a,
    ) -> impl Future<Output = Result<T, Failure>> + 'a {
        self.audited_as(nido, operation, arguments, Box::pin(act), |_| String::new())
    }

    /// As [`Self::audited`], for what ends as a command of a guest ends.
    pub fn audited_command<'a>(
        &'a self,
        nido: &'a Nido,
        operation: &'static Operation,
        arguments: Value,
        act: impl Future<Output = Outcome> + 'a,
    ) -> impl Future<Output = Outcome> + 'a {
        self.audited_as(nido, operation, arguments, Box::pin(act), |exit| ended(*exit))
    }

    /// `act` comes boxed: what it is made of would be kept twice otherwise.
    async fn audited_as<T, E: Into<Failure>>(
        &self,
        nido: &Nido,
        operation: &'static Operation,
        arguments: Value,
        act: Pin<Box<dyn Future<Output = Result<T, E>> + '_>>,
        word: fn(&T) -> String,
    ) -> Result<T, Failure> {
        let request = Request { operation, caller: Caller::command_line(), arguments };
        // A verb asks on the terminal before, once for everything that it does.
        let confirmed = async { Ok::<_, Failure>(()) };
        let work = async move |()| act.await.map_err(Into::into);
        let executed = nido.execute(request, confirmed, work, |outcome| verdict(outcome, word)).await;
        if let Some(error) = executed.unrecorded {
            // It has been done; only the line about it is missing.
            self.output.warn(&error.to_string());
        }
        executed.outcome
    }
}

/// The outcome of a verb for the audit log.
fn verdict<T>(outcome: &Result<T, Failure>, word: fn(&T) -> String) -> Verdict {
    match outcome {
        Ok(value) => Verdict::success(word(value)),
        Err(Failure::Nido(error)) => Verdict::failure(error),
        Err(Failure::Stdout(_)) => Verdict { ending: AuditOutcome::Error, reason: "output_lost".into() },
        Err(Failure::Interrupted { .. }) => Verdict { ending: AuditOutcome::Unknown, reason: "interrupted".into() },
    }
}

/// How a command of a guest ended, in a word.
fn ended(exit: Exit) -> String {
    match exit {
        Exit::Guest(code) => format!("exit_code:{code}"),
        Exit::Signal(number) => format!("signal:{number}"),
        Exit::TimedOut => "timed_out".into(),
        _ => String::new(),
    }
}

/// The arguments of a command in a guest.
pub fn exec(name: &VmName, request: &ExecRequest) -> Value {
    json!({
        "name": name,
        "command": list(&request.argv),
        "user": request.user,
        "workdir": request.directory.as_deref().map(bytes),
        "env": list(&request.env),
        "interactive": request.stdin,
        "tty": request.pty.is_some(),
        "timeout_ms": request.timeout_ms,
    })
}

/// The arguments of a copy into a guest.
pub fn upload(name: &VmName, request: &UploadRequest) -> Value {
    let source = match &request.source {
        UploadSource::Path(path) => bytes(path.as_os_str().as_bytes()),
        UploadSource::Stream { .. } | UploadSource::Directory { .. } | UploadSource::Archive(_) => "-".into(),
    };
    json!({ "name": name, "source": source, "destination": bytes(&request.destination), "user": request.user })
}

/// The arguments of a copy out of a guest.
pub fn download(name: &VmName, request: &DownloadRequest) -> Value {
    let destination = match &request.destination {
        DownloadTarget::Path(path) => bytes(path.as_os_str().as_bytes()),
        DownloadTarget::Stream(_) | DownloadTarget::Archive(_) | DownloadTarget::FileOrArchive(_) => "-".into(),
    };
    json!({ "name": name, "source": bytes(&request.source), "destination": destination, "overwrite": request.overwrite })
}

fn list(items: &[Vec<u8>]) -> Value {
    items.iter().map(|item| bytes(item)).collect()
}
