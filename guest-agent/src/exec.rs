//! Running a command for a session.
//!
//! Four tasks run at once, and none may block another: frames from the host are handled (a signal arrives even
//! when the command neither reads its input nor has its output read), standard input is fed, output is sent, the
//! time limit is watched. Invariant: a session that goes away, and a command whose time is up, take all processes of the
//! command with them ([`Scope`]); what a command that ended by itself has left in the background keeps running and can continue
//! to write. An exit is reported only after the output that preceded it.

use std::collections::VecDeque;
use std::future::pending;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nido_guest_agent::wire::{self, Exec, Exited, HEAD, STDIN_WINDOW, ToGuest, ToHost, kind};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use crate::agent::Agent;
use crate::framing::{FrameError, FrameReader, FrameWriter, Incoming, raw_frame};
use crate::program::{self, RunningCommand};
use crate::reaper::ExitStatus;
use crate::refusal::Refusal;
use crate::scope::Scope;

/// Largest payload of an output frame, in bytes: what a pipe holds.
const OUTPUT_CHUNK: usize = 64 * 1024;
/// How long a finished command's output is still read when something else keeps it open.
const OUTPUT_DRAIN_TIMEOUT: Duration = Duration::from_millis(100);
/// More than a terminal holds of what was written to it and not yet read, in bytes.
const TERMINAL_HOLDS: usize = 128 * 1024;
/// How long a command's processes may run between SIGHUP and SIGKILL when its session is gone.
const HANGUP_GRACE: Duration = Duration::from_millis(500);
/// How often it is checked whether they have ended.
const HANGUP_POLL_INTERVAL: Duration = Duration::from_millis(25);
/// How many output pipes of ended commands are kept open for their background processes. Further ones are closed.
const MAX_DRAINS: usize = 256;
/// How long the next request of a session waits until everything is ready for the next command.
const READY_TIMEOUT: Duration = Duration::from_secs(1);
/// Credit is returned in pieces of at least this size, in bytes, or when everything was taken.
const CREDIT_PIECE: u32 = STDIN_WINDOW / 4;

/// Runs a command to its end. Failures of the command or the host were reported to the host.
///
/// # Errors
/// The session is at its end.
pub async fn run(
    agent: &Arc<Agent>,
    request: Exec,
    input: &mut FrameReader,
    output: &mut FrameWriter,
) -> Result<(), FrameError> {
    let begun = Instant::now();
    let limit = request.timeout_ms.map(Duration::from_millis);
    let has_stdin = request.stdin;
    let starter = agent.clone();
    // Guarded from its first moment: the session may be gone before it hears that the command runs.
    let start = move || {
        let mut scope = starter.scopes.scope();
        let started = program::start(&starter, &request, &mut scope)?;
        Ok((ProcessGuard { pid: started.pid, scope: Some(Arc::new(Mutex::new(scope))) }, started))
    };
    let (mut guard, started) = match tokio::task::spawn_blocking(start).await.map_err(io::Error::other)? {
        Ok(started) => started,
        Err(Refusal { fault, message }) => {
            return Ok(output.send(&ToHost::Failed(wire::Failed { fault, message })).await?);
        }
    };
    output.send(&ToHost::Started(started.pid.as_raw_nonzero().get().cast_unsigned())).await?;

    let RunningCommand { stdin, stdout, stderr, terminal, ended, .. } = started;
    let feed = Feed::default();
    let sent = send_output([stdout, stderr], ended, &feed, output);
    let window = terminal.as_deref();
    let status = tokio::select! {
        status = sent => status?,
        over = handle_control(&guard, has_stdin, window, &feed, input) => return Err(over),
        () = feed_stdin(stdin, terminal.is_some(), &feed) => unreachable_end().await?,
        () = kill_at(&guard, limit.map(|limit| begun + limit), &feed) => unreachable_end().await?,
    };
    // What is still there was left on purpose.
    let scope = guard.scope.take();
    let (code, signal) = match status {
        ExitStatus::Code(code) => (Some(code), None),
        ExitStatus::Signal(signal) => (None, Some(signal)),
    };
    let timed_out = feed.state().timed_out;
    let duration_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    output.send(&ToHost::Exited(Exited { code, signal, timed_out, duration_ms })).await?;
    // The host has the command's end already; only the next request of this session waits for this, and not for long.
    let agent = agent.clone();
    let made_ready = tokio::task::spawn_blocking(move || {
        drop(scope);
        agent.scopes.make_ready();
    });
    let _ = timeout(READY_TIMEOUT, made_ready).await;
    Ok(())
}

/// The type of a branch that never completes.
async fn unreachable_end() -> Result<ExitStatus, FrameError> {
    pending().await
}

/// The command's processes; hung up and killed when the session ends before the command.
struct ProcessGuard {
    pid: Pid,
    /// Absent once the command has ended by itself.
    scope: Option<Arc<Mutex<Scope>>>,
}

impl ProcessGuard {
    /// Kills everything that the command has started.
    fn kill(&self) {
        if let Some(scope) = &self.scope {
            lock(scope).kill();
        }
    }
}

fn lock(scope: &Mutex<Scope>) -> std::sync::MutexGuard<'_, Scope> {
    scope.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for ProcessGuard {
    fn drop(&mut self) {
        let Some(scope) = self.scope.take() else { return };
        // Found before they are hung up: the death of one in between makes orphans of others.
        lock(&scope).refresh();
        // An error means that the group is gone already, as intended.
        let _ = kill_process_group(self.pid, Signal::HUP);
        tokio::spawn(async move {
            let deadline = Instant::now() + HANGUP_GRACE;
            while !lock(&scope).is_empty() && Instant::now() < deadline {
                tokio::time::sleep(HANGUP_POLL_INTERVAL).await;
            }
            lock(&scope).kill();
        });
    }
}

/// What the branches of one command share.
#[derive(Default)]
struct Feed {
    state: Mutex<FeedState>,
    /// Notified when input or its end has arrived.
    more: Notify,
    /// Notified when there is credit to return.
    credit: Notify,
}

#[derive(Default)]
struct FeedState {
    /// Input on its way to the command; with `credit` never more than the window.
    bytes: VecDeque<u8>,
    /// No more input will come.
    end: bool,
    /// Read by the command and not yet returned as credit.
    credit: u32,
    /// Sent by the host and not yet credited.
    outstanding: u32,
    timed_out: bool,
}

impl Feed {
    fn state(&self) -> std::sync::MutexGuard<'_, FeedState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes input from the host, if it keeps to its window.
    fn push(&self, bytes: &[u8]) -> Result<(), FrameError> {
        let mut state = self.state();
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        if state.outstanding.saturating_add(length) > STDIN_WINDOW {
            return Err(protocol("more standard input than was allowed"));
        }
        state.outstanding += length;
        state.bytes.extend(bytes);
        drop(state);
        self.more.notify_one();
        Ok(())
    }

    /// The command has read `count` bytes, or will never read them.
    fn taken(&self, count: usize) {
        let mut state = self.state();
        state.bytes.drain(..count);
        state.credit += u32::try_from(count).unwrap_or(u32::MAX);
        if state.credit >= CREDIT_PIECE || state.bytes.is_empty() {
            self.credit.notify_one();
        }
    }

    fn take_credit(&self) -> u32 {
        let mut state = self.state();
        let credit = std::mem::take(&mut state.credit);
        state.outstanding -= credit;
        credit
    }
}

fn protocol(message: &str) -> FrameError {
    FrameError::Wire(wire::WireError::Malformed(message.into()))
}

/// Carries out the host's requests while the command runs. Returns only when the session is over.
async fn handle_control(
    guard: &ProcessGuard,
    has_stdin: bool,
    terminal: Option<&AsyncFd<OwnedFd>>,
    feed: &Feed,
    input: &mut FrameReader,
) -> FrameError {
    loop {
        match input.next().await {
            Ok(Some(Incoming::Raw(kind::STDIN, bytes))) if has_stdin => {
                if let Err(error) = feed.push(bytes.as_ref()) {
                    return error;
                }
            }
            Ok(Some(Incoming::Message(ToGuest::StdinEof))) => {
                feed.state().end = true;
                feed.more.notify_one();
            }
            Ok(Some(Incoming::Message(ToGuest::Signal(number)))) => send_signal(guard, number),
            Ok(Some(Incoming::Message(ToGuest::Resize(size)))) => {
                if let Some(terminal) = terminal {
                    // Fails only if the terminal is closed already.
                    let _ = rustix::termios::tcsetwinsize(terminal, program::winsize(size));
                }
            }
            Ok(Some(_)) => return protocol("a frame that does not belong to a running command"),
            Ok(None) => return io::Error::from(io::ErrorKind::UnexpectedEof).into(),
            Err(error) => return error,
        }
    }
}

/// Sends a signal to the process group, as a terminal does; a kill reaches everything. An unknown number and a group that
/// is gone are the same to the host: nothing happens.
fn send_signal(guard: &ProcessGuard, number: u8) {
    match Signal::from_named_raw(i32::from(number)) {
        Some(Signal::KILL) => guard.kill(),
        Some(signal) => drop(kill_process_group(guard.pid, signal)),
        None => {}
    }
}

/// Writes input to the command as it takes it. Never returns.
async fn feed_stdin(stdin: Option<AsyncFd<OwnedFd>>, is_terminal: bool, feed: &Feed) {
    let mut stdin = stdin;
    loop {
        let (piece, end) = {
            let state = feed.state();
            let waiting = state.bytes.as_slices().0;
            (waiting[..waiting.len().min(OUTPUT_CHUNK)].to_vec(), state.end)
        };
        if piece.is_empty() {
            if end && let Some(closing) = stdin.take() {
                if is_terminal {
                    // On a terminal the end of input is a character (Ctrl-D).
                    let _ = write_some(&closing, b"\x04").await;
                    stdin = Some(closing);
                    feed.state().end = false;
                }
                continue;
            }
            feed.more.notified().await;
            continue;
        }
        let count = match &stdin {
            Some(open) => write_some(open, &piece).await,
            None => Ok(piece.len()),
        };
        match count {
            Ok(count) => feed.taken(count),
            // The command has closed its input: what comes is dropped, so that the host is not kept waiting.
            Err(_closed) => stdin = None,
        }
    }
}

async fn write_some(file: &AsyncFd<OwnedFd>, bytes: &[u8]) -> io::Result<usize> {
    file.async_io(Interest::WRITABLE, |file| Ok(rustix::io::write(file, bytes)?)).await
}

/// Kills the command and all that it started when its time has run out. Never returns.
async fn kill_at(guard: &ProcessGuard, deadline: Option<Instant>, feed: &Feed) {
    if let Some(deadline) = deadline {
        sleep_until(deadline).await;
        feed.state().timed_out = true;
        guard.kill();
    }
    pending::<()>().await;
}

type OutputPipe = Option<Arc<AsyncFd<OwnedFd>>>;

/// Sends output and credit until the command has ended and its output is through.
async fn send_output(
    [mut stdout, mut stderr]: [OutputPipe; 2],
    mut ended: oneshot::Receiver<ExitStatus>,
    feed: &Feed,
    host: &mut FrameWriter,
) -> Result<ExitStatus, FrameError> {
    let (mut first, mut second) = (raw_frame(OUTPUT_CHUNK), raw_frame(OUTPUT_CHUNK));
    let mut status = None;
    // Bytes that lay in the pipes when the command ended: these are its own and must go out, however slow the host.
    let mut owed = 0;
    let mut deadline = Instant::now();
    // Of a terminal only a part of them can be counted: the rest shows as that is read. More than it holds is not owed.
    let is_terminal = stderr.is_none();
    let mut uncounted = if is_terminal { TERMINAL_HOLDS } else { 0 };
    loop {
        if let Some(status) = status
            && stdout.is_none()
            && stderr.is_none()
        {
            return Ok(status);
        }
        let count = tokio::select! {
            () = feed.credit.notified() => {
                let credit = feed.take_credit();
                if credit > 0 {
                    host.send(&ToHost::StdinCredit(credit)).await?;
                }
                0
            }
            count = read_some(stdout.as_deref(), &mut first), if stdout.is_some() => {
                forward(count, kind::STDOUT, &mut stdout, &mut first, host).await?
            }
            count = read_some(stderr.as_deref(), &mut second), if stderr.is_some() => {
                forward(count, kind::STDERR, &mut stderr, &mut second, host).await?
            }
            end = &mut ended, if status.is_none() => {
                status = Some(end.map_err(|_| io::Error::other("the command was lost"))?);
                owed = waiting(stdout.as_deref()) + waiting(stderr.as_deref());
                deadline = Instant::now() + OUTPUT_DRAIN_TIMEOUT;
                0
            }
            () = sleep_until(deadline), if status.is_some() && owed == 0 => 0,
        };
        owed = owed.saturating_sub(count);
        if status.is_some() && owed == 0 && Instant::now() >= deadline {
            if !is_terminal {
                [stdout.take(), stderr.take()].into_iter().flatten().for_each(drain);
                continue;
            }
            let rest = if uncounted > 0 { read_at_once(stdout.as_deref(), &mut first) } else { Ok(0) };
            uncounted = uncounted.saturating_sub(forward(rest, kind::STDOUT, &mut stdout, &mut first, host).await?);
            if stdout.is_none() {
                stderr = None;
            }
        }
    }
}

/// Sends what was read; at its end or an error the outlet is closed.
async fn forward(
    count: io::Result<usize>,
    kind: u8,
    outlet: &mut OutputPipe,
    frame: &mut Vec<u8>,
    host: &mut FrameWriter,
) -> Result<usize, FrameError> {
    match count {
        // A terminal whose last user has gone gives EIO, a pipe gives zero bytes.
        Ok(0) | Err(_) => {
            *outlet = None;
            Ok(0)
        }
        Ok(count) => {
            host.send_raw(kind, frame).await?;
            frame.truncate(HEAD);
            Ok(count)
        }
    }
}

/// Reads and drops what background processes of an ended command write: without a reader the first line would kill them.
fn drain(outlet: Arc<AsyncFd<OwnedFd>>) {
    static OPEN: AtomicUsize = AtomicUsize::new(0);
    if OPEN.fetch_add(1, Ordering::Relaxed) >= MAX_DRAINS {
        OPEN.fetch_sub(1, Ordering::Relaxed);
        return;
    }
    tokio::spawn(async move {
        let read = |file: &OwnedFd| Ok(rustix::io::read(file, &mut [0; 4096])?);
        while matches!(outlet.async_io(Interest::READABLE, read).await, Ok(1..)) {}
        OPEN.fetch_sub(1, Ordering::Relaxed);
    });
}

async fn read_some(outlet: Option<&AsyncFd<OwnedFd>>, frame: &mut Vec<u8>) -> io::Result<usize> {
    let Some(outlet) = outlet else { return pending().await };
    let buffer = |file: &OwnedFd| Ok(rustix::io::read(file, rustix::buffer::spare_capacity(frame))?);
    let mut buffer = buffer;
    outlet.async_io(Interest::READABLE, |file| buffer(file)).await
}

/// Reads what there is. Unlike a poll, it also returns what the kernel still has on its way.
fn read_at_once(outlet: Option<&AsyncFd<OwnedFd>>, frame: &mut Vec<u8>) -> io::Result<usize> {
    let Some(outlet) = outlet else { return Ok(0) };
    Ok(rustix::io::read(outlet, rustix::buffer::spare_capacity(frame))?)
}

fn waiting(outlet: Option<&AsyncFd<OwnedFd>>) -> usize {
    outlet
        .and_then(|outlet| rustix::io::ioctl_fionread(outlet).ok())
        .map_or(0, |count| usize::try_from(count).unwrap_or(usize::MAX))
}
