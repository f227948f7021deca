//! Running a command in the guest: a stream of events, and a control half that other tasks can use at the same time.
//!
//! Back-pressure goes end to end: events that are not taken fill the stream and in the end stop the process that
//! writes; standard input waits for the credit the agent gives (which arrives with the events).
//!
//! Invariant: dropping [`Events`] cancels the command (the agent kills its process group), however many [`Control`]s
//! are still about.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nido_guest_agent::wire::{Exec, Exited, STDIN_WINDOW, ToGuest, ToHost, WindowSize, kind};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::client::Guest;
use super::deadline::in_time;
use super::error::GuestError;
use super::session::{Link, Session, next_frame, unexpected};

/// Largest piece of standard input sent at once, in bytes. Signals travel behind it.
const STDIN_PIECE: usize = 64 * 1024;
/// How much longer than the command's own time limit the host waits for the agent to report it.
const GRACE: Duration = Duration::from_secs(15);

/// A command that runs.
#[derive(Debug)]
pub struct RunningCommand {
    /// Its process id in the guest.
    pub pid: u32,
    /// Its messages.
    pub events: Events,
    /// Its input, signals and size.
    pub control: Control,
}

/// A message of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Bytes of its standard output, or of its terminal.
    Stdout(Vec<u8>),
    /// Bytes of its standard error.
    Stderr(Vec<u8>),
    /// It has ended; nothing follows.
    Exited(Exited),
}

impl Guest {
    /// Runs a command; returns once it has started. `deadline` is for the start, `request.timeout_ms` for the command.
    ///
    /// # Errors
    /// Those of [`Guest::session`]; [`GuestError::Guest`] if it cannot be started.
    pub async fn exec(&self, request: Exec, deadline: Instant) -> Result<RunningCommand, GuestError> {
        let limit = request.timeout_ms;
        let session = self.begin(&ToGuest::Exec(request), deadline).await?;
        session.started(limit, deadline).await
    }
}

impl Session {
    /// Runs a command in this session. [`Events::finish`] gives the session back.
    ///
    /// # Errors
    /// Those of a request; [`GuestError::Guest`] if it cannot be started.
    pub async fn exec(self, request: Exec, deadline: Instant) -> Result<RunningCommand, GuestError> {
        let limit = request.timeout_ms;
        self.link.send(&ToGuest::Exec(request)).await?;
        self.started(limit, deadline).await
    }

    async fn started(mut self, limit_ms: Option<u64>, deadline: Instant) -> Result<RunningCommand, GuestError> {
        let pid = match self.answer(deadline, "to start the command").await? {
            ToHost::Started(pid) => pid,
            other => return Err(unexpected(other)),
        };
        let state = Arc::new(State { credit: Semaphore::new(STDIN_WINDOW as usize), ended: AtomicBool::new(false) });
        let control = Control { link: Arc::clone(&self.link), state: Arc::clone(&state) };
        let deadline = limit_ms.and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms) + GRACE));
        Ok(RunningCommand { pid, events: Events { session: Some(self), state, deadline, exited: false }, control })
    }
}

/// The state that both halves share.
#[derive(Debug)]
struct State {
    /// One permit per byte of standard input that may be sent. Closed at the end.
    credit: Semaphore,
    ended: AtomicBool,
}

impl State {
    fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.credit.close();
    }

    /// Takes back credit; more than was ever out is a breach.
    fn refill(&self, bytes: u32) -> Result<(), GuestError> {
        if bytes as usize > (STDIN_WINDOW as usize).saturating_sub(self.credit.available_permits()) {
            return Err(GuestError::breach("more credit for standard input than was used"));
        }
        self.credit.add_permits(bytes as usize);
        Ok(())
    }
}

/// The messages of a command, in order.
#[derive(Debug)]
pub struct Events {
    /// Absent once it was given back.
    session: Option<Session>,
    state: Arc<State>,
    deadline: Option<Instant>,
    exited: bool,
}

impl Events {
    /// The next event; `None` after [`Event::Exited`]. May be dropped and called again without loss.
    ///
    /// # Errors
    /// [`GuestError::Gone`] if the guest or its agent ended, [`GuestError::Timeout`] if the command's time limit and a
    /// grace have passed without a message, [`GuestError::Protocol`], [`GuestError::Guest`].
    pub async fn next(&mut self) -> Result<Option<Event>, GuestError> {
        while !self.state.ended.load(Ordering::Acquire) {
            let outcome = self.step().await;
            self.exited = matches!(outcome, Ok(Some(Event::Exited(_))));
            if self.exited || outcome.is_err() {
                self.state.end();
            }
            if outcome.is_err() {
                self.end_stream();
            }
            if let Some(event) = outcome? {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }

    /// Reads one frame.
    async fn step(&mut self) -> Result<Option<Event>, GuestError> {
        let Some(session) = &mut self.session else { return Err(GuestError::Gone) };
        let next = next_frame(&session.link.stream, &mut session.frames);
        let frame = match self.deadline {
            Some(deadline) => in_time(next, deadline, "to report the end of a command whose time ran out").await?,
            None => next.await?,
        };
        match frame.kind {
            kind::STDOUT => return Ok(Some(Event::Stdout(frame.payload.to_vec()))),
            kind::STDERR => return Ok(Some(Event::Stderr(frame.payload.to_vec()))),
            _ => {}
        }
        match frame.must_be_message()? {
            ToHost::StdinCredit(bytes) => self.state.refill(bytes).map(|()| None),
            ToHost::Exited(exited) if exited.code.is_some() == exited.signal.is_some() => {
                Err(GuestError::breach("an exit without one status"))
            }
            ToHost::Exited(exited) => Ok(Some(Event::Exited(exited))),
            other => Err(unexpected(other)),
        }
    }

    /// Gives the session back for another request; `None` unless [`Event::Exited`] was reported.
    #[must_use]
    pub fn finish(mut self) -> Option<Session> {
        if self.exited { self.session.take() } else { None }
    }

    fn end_stream(&self) {
        if let Some(session) = &self.session {
            session.link.stream.end();
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.state.end();
        self.end_stream();
    }
}

/// The control handle of a command. Clones control the same command.
#[derive(Debug, Clone)]
pub struct Control {
    link: Arc<Link>,
    state: Arc<State>,
}

impl Control {
    /// Sends standard input; returns once all of it has been sent. Waits for the process to take it, so drive
    /// [`Events::next`] at the same time. Dropped halfway, an unknown part has been sent.
    ///
    /// # Errors
    /// [`GuestError::Gone`] if the command has ended.
    pub async fn stdin(&self, bytes: &[u8]) -> Result<(), GuestError> {
        for piece in bytes.chunks(STDIN_PIECE) {
            let length = u32::try_from(piece.len()).unwrap_or(u32::MAX);
            let credit = self.state.credit.acquire_many(length).await.map_err(|_| GuestError::Gone)?;
            credit.forget();
            self.link.send_raw(kind::STDIN, piece).await?;
        }
        Ok(())
    }

    /// Sends the end of standard input.
    ///
    /// # Errors
    /// [`GuestError::Gone`] if the command has ended.
    pub async fn eof(&self) -> Result<(), GuestError> {
        self.send_control(&ToGuest::StdinEof).await
    }

    /// Sends a signal to the command's process group.
    ///
    /// # Errors
    /// [`GuestError::Gone`] if the command has ended.
    pub async fn signal(&self, signal: u8) -> Result<(), GuestError> {
        self.send_control(&ToGuest::Signal(signal)).await
    }

    /// Sends the terminal's new size.
    ///
    /// # Errors
    /// [`GuestError::Gone`] if the command has ended.
    pub async fn resize(&self, size: WindowSize) -> Result<(), GuestError> {
        self.send_control(&ToGuest::Resize(size)).await
    }

    async fn send_control(&self, message: &ToGuest) -> Result<(), GuestError> {
        if self.state.ended.load(Ordering::Acquire) {
            return Err(GuestError::Gone);
        }
        self.link.send(message).await
    }
}
