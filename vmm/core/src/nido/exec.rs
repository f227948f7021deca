//! Running commands, seen from the API: the guest's client with the VM's state and our errors around it.

use std::time::Duration;

use jiff::Timestamp;
use nido_api::error::{Code, Error, Hint, Result};
use nido_api::name::VmName;
use nido_api::operation as op;
use nido_api::state::{Admission, Request as StateRequest, VmState, admit};
use nido_api::{ExecEvent, ExecExit, ExecRequest, VmRef, secret_environment};
use nido_engine::guest::{AgentAddress, Control, Event, Events, Guest};
use nido_guest_agent::wire::{Exec, WindowSize};
use nido_supervisor::control::Request;
use tokio::net::UnixStream;
use tokio::time::Instant;

use super::Nido;
use super::denied::denied;

/// How long the agent of a running VM may take to answer a request.
pub(super) const AGENT_REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// A running VM's agent, and the connection that marks the VM as in use.
pub(super) struct ReachableAgent {
    pub guest: Guest,
    /// With virtio-serial the supervisor detects the use itself; with vsock this connection reports it.
    pub lease: Option<UnixStream>,
    /// What its commands find in their environment, for the VM's secrets.
    pub environment: Vec<String>,
}

impl Nido {
    /// Starts a command. Dropping the events kills it.
    ///
    /// # Errors
    /// `vm_not_found`, `vm_replaced`, `vm_not_running`, `command_not_found`, `command_cannot_run`, `user_not_found`,
    /// `directory_not_found`, `agent_unreachable`.
    pub async fn exec(&self, vm: impl Into<VmRef<'_>>, request: ExecRequest) -> Result<(ExecControl, ExecEvents)> {
        let which = vm.into();
        let name = which.name;
        let reached = self.reach(which).await?;
        let running = reached
            .guest
            .exec(wire_exec(request, reached.environment), Instant::now() + AGENT_REPLY_TIMEOUT)
            .await
            .map_err(|e| guest_error(name, e))?;
        let name = name.clone();
        let control = ExecControl { control: running.control, name: name.clone() };
        Ok((control, ExecEvents { events: running.events, started: Some(running.pid), name, _lease: reached.lease }))
    }

    /// The agent of a VM that can be used, or why it cannot. Waits for one that is still starting, and for the
    /// supervisor of one that has lost it.
    pub(super) async fn reach(&self, vm: impl Into<VmRef<'_>>) -> Result<ReachableAgent> {
        let vm = vm.into();
        let mut row = self.current(self.resolve(vm)?);
        if let Admission::Denied(why) = admit(row.state, StateRequest::UseAgent) {
            return Err(denied(&row, "used", why));
        }
        if row.state == VmState::Starting || !row.agent.ready {
            self.request(&row, &Request::Ready).await?;
            // This very VM, whatever has its name by now.
            let gone = || Error::new(Code::VmNotFound, format!("VM '{}' was deleted", vm.name));
            row = self.store().vm_by_id(&row.id)?.ok_or_else(gone)?;
        }
        let guest = self.context.guest(&row)?;
        let lease = match guest.endpoint() {
            AgentAddress::Vsock { .. } => Some(self.lease(&row).await?),
            AgentAddress::Serial { .. } => {
                // The agent's socket is the supervisor's: there must be one.
                drop(self.supervisor(&row).await?);
                None
            }
        };
        Ok(ReachableAgent { guest, lease, environment: secret_environment(&row.spec) })
    }

    /// What has become of a VM since then, if it is no longer the running VM that it was.
    #[must_use]
    pub fn changed_since(&self, name: &VmName, then: Timestamp) -> Option<String> {
        let what = match self.store().vm_by_name(name) {
            Err(error) if error.code() == Code::VmNotFound => "was deleted",
            Err(_) => return None,
            Ok(row) if row.created_at > then => "was replaced by another VM",
            Ok(row) => match row.state {
                VmState::Stopping | VmState::Stopped | VmState::Created => "was stopped",
                VmState::Failed => "failed",
                _ if row.started_at.is_some_and(|started| started > then) => "was restarted or restored",
                VmState::Starting | VmState::Running | VmState::Paused | VmState::Unknown => return None,
            },
        };
        Some(format!("VM '{name}' {what}"))
    }

    /// The error of a session with a guest that broke off. Where its VM has changed `since` the session began, that is the
    /// reason, and not the agent.
    #[must_use]
    pub fn lost_while_in_use(&self, name: &VmName, since: Timestamp, error: Error) -> Error {
        if error.code() != Code::AgentUnreachable {
            return error;
        }
        match self.changed_since(name, since) {
            Some(why) => Error::new(Code::VmNotRunning, format!("{why} while the command ran"))
                .hint(Hint::run(op::EVENTS).to("see when and why")),
            None => error,
        }
    }
}

/// An error of the guest's client about the VM `name`.
pub(super) fn guest_error(name: &VmName, error: nido_engine::guest::GuestError) -> Error {
    nido_engine::error_sources::guest_error(name.as_str(), error)
}

/// A request in the words of the agent. Of variables that are given twice the last one counts, so the command's own win.
fn wire_exec(request: ExecRequest, environment: Vec<String>) -> Exec {
    let size = |(rows, columns)| WindowSize { rows, columns };
    Exec {
        login_shell: request.argv.is_empty(),
        argv: request.argv.into_iter().map(Into::into).collect(),
        env: environment.into_iter().map(String::into_bytes).chain(request.env).map(Into::into).collect(),
        directory: request.directory.map(Into::into),
        user: request.user,
        stdin: request.stdin,
        pty: request.pty.map(size),
        timeout_ms: request.timeout_ms,
        term: request.term,
    }
}

/// The caller's requests to a running command.
#[derive(Debug, Clone)]
pub struct ExecControl {
    control: Control,
    name: VmName,
}

impl ExecControl {
    /// Sends bytes to its standard input; waits while it does not take them. Drive it on a task of its own: a signal
    /// waits for its turn behind a piece that is half sent.
    ///
    /// # Errors
    /// `agent_unreachable` if the connection is gone.
    pub async fn stdin(&self, bytes: &[u8]) -> Result<()> {
        self.control.stdin(bytes).await.map_err(|e| guest_error(&self.name, e))
    }

    /// Ends its standard input.
    ///
    /// # Errors
    /// As [`ExecControl::stdin`].
    pub async fn stdin_eof(&self) -> Result<()> {
        self.control.eof().await.map_err(|e| guest_error(&self.name, e))
    }

    /// Sends a signal to it and its children.
    ///
    /// # Errors
    /// As [`ExecControl::stdin`].
    pub async fn signal(&self, signal: u8) -> Result<()> {
        self.control.signal(signal).await.map_err(|e| guest_error(&self.name, e))
    }

    /// Sends the terminal's new size.
    ///
    /// # Errors
    /// As [`ExecControl::stdin`].
    pub async fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        self.control.resize(WindowSize { rows, columns }).await.map_err(|e| guest_error(&self.name, e))
    }
}

/// The output of a running command. Dropping it kills the command.
#[derive(Debug)]
pub struct ExecEvents {
    events: Events,
    started: Option<u32>,
    name: VmName,
    _lease: Option<UnixStream>,
}

impl ExecEvents {
    /// The next event; `None` after [`ExecEvent::Exited`].
    pub async fn next(&mut self) -> Option<Result<ExecEvent>> {
        if let Some(pid) = self.started.take() {
            return Some(Ok(ExecEvent::Started(pid)));
        }
        match self.events.next().await {
            Ok(event) => event.map(|event| Ok(api_event(event))),
            Err(error) => Some(Err(guest_error(&self.name, error))),
        }
    }
}

fn api_event(event: Event) -> ExecEvent {
    match event {
        Event::Stdout(bytes) => ExecEvent::Stdout(bytes),
        Event::Stderr(bytes) => ExecEvent::Stderr(bytes),
        Event::Exited(exited) => ExecEvent::Exited(ExecExit {
            exit_code: exited.code,
            signal: exited.signal,
            timed_out: exited.timed_out,
            duration_ms: exited.duration_ms,
        }),
    }
}
