//! One command of a guest, wired to our own standard streams, signals and terminal.
//!
//! ```text
//!  stdin thread --> feed ----> ExecControl            ExecEvents --> pump --> sanitizer --> writer thread
//!  signals -----> escalation -^                                        \--> collected, with --json
//! ```
//!
//! Invariant: leaving this function, on whatever way, drops the command's events, which kills it if it still runs; and
//! no step waits for the guest in a way that a third Ctrl-C, or some seconds after one SIGTERM, cannot end.

use std::future::Future;
use std::time::Duration;

use jiff::Timestamp;
use nido_api::error::Error;
use nido_api::name::VmName;
use nido_api::{Collected, ExecEvent, ExecExit, ExecRequest, ExecResult};
use nido_core::{ExecControl, Nido};
use nido_server::sanitize::Sanitizer;
use nido_server::signals::{HANGUP, KILL, SignalEvent, Signals, TERMINATE};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::exit::{Exit, Failure, Outcome};
use crate::output::Output;
use crate::parse;
use crate::stdio::{self, Stream, Writer};
use crate::terminal::{self, RawMode};

/// How much of each stream `--json` keeps, in bytes.
const COLLECT_LIMIT: usize = 16 << 20;
/// How long passing on a signal may take before nido listens again.
const SIGNAL_FORWARD_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the command may take to end after SIGTERM or SIGHUP was passed on. Those who send them (`timeout`, systemd, a CI
/// runner) send one, and expect the process to end soon, even if the guest does not respond.
const TERMINATION_TIMEOUT: Duration = Duration::from_secs(4);

/// Runs a command to its end. `raw` lets the guest's bytes reach a terminal as they are.
pub async fn run(output: &Output, nido: &Nido, name: &VmName, request: ExecRequest, raw: bool) -> Outcome {
    if output.json {
        collected(output, nido, name, request).await
    } else {
        streamed(output, nido, name, request, raw).await
    }
}

/// What can happen next while a command runs.
enum SessionEvent {
    Event(Option<Result<ExecEvent, Error>>),
    Signal(SignalEvent),
    /// The command had its time to end.
    Leave(u8),
    Written(bool),
}

async fn streamed(output: &Output, nido: &Nido, name: &VmName, request: ExecRequest, raw: bool) -> Outcome {
    let pty = request.pty.is_some();
    let wants_stdin = request.stdin;
    let mut signals = Signals::listen()?;
    let mut escalation = Escalation::default();
    let watch = Watch::new(nido, name, &request);
    let (control, mut events) = match begin(nido, name, request, &mut signals).await? {
        Ok(command) => command,
        Err(number) => return Ok(Exit::Signal(number)),
    };
    let raw_mode = if pty && wants_stdin { Some(RawMode::enter()?) } else { None };
    let _feed = Feed::start(output, &control, wants_stdin);
    let mut screens = TerminalSanitizers::new(output, raw || pty);
    let writer = Writer::start();
    // A piece that waits for the writer keeps further events from being read.
    let mut waiting: Option<(Stream, Vec<u8>)> = None;
    let exit = loop {
        let next = tokio::select! {
            signal = signals.next() => SessionEvent::Signal(signal),
            number = escalation.time_to_leave() => SessionEvent::Leave(number),
            event = events.next(), if waiting.is_none() => SessionEvent::Event(event),
            room = writer.room(), if waiting.is_some() => {
                if let (Some(room), Some(piece)) = (room, waiting.take()) {
                    room.send(piece);
                    SessionEvent::Written(true)
                } else {
                    SessionEvent::Written(false)
                }
            }
        };
        match next {
            SessionEvent::Signal(SignalEvent::Resized) if pty => {
                let (rows, columns) = terminal::size();
                send_with_timeout(control.resize(rows, columns)).await;
            }
            SessionEvent::Signal(SignalEvent::Resized) => {}
            SessionEvent::Signal(SignalEvent::End(number)) => {
                let step = escalation.next(number);
                send_with_timeout(control.signal(step.signal)).await;
                if step.leave {
                    return Ok(Exit::Signal(number));
                }
            }
            SessionEvent::Leave(number) => return Ok(Exit::Signal(number)),
            SessionEvent::Event(Some(event)) => match event {
                Ok(ExecEvent::Started(_)) => {}
                Ok(ExecEvent::Stdout(bytes)) => waiting = screens.show(Stream::Out, bytes),
                Ok(ExecEvent::Stderr(bytes)) => waiting = screens.show(Stream::Err, bytes),
                Ok(ExecEvent::Exited(exit)) => break exit,
                Err(error) => {
                    if raw_mode.is_some() {
                        // The error does not begin in the middle of the guest's line.
                        let _ = stdio::write(Stream::Err, b"\r\n");
                    }
                    return Err(watch.lost(error).into());
                }
            },
            SessionEvent::Event(None) => return Err(Error::internal("the command ended without an exit status").into()),
            SessionEvent::Written(true) => {}
            // The writer's error has the reason, below.
            SessionEvent::Written(false) => {
                return Err(writer.finish().await.err().unwrap_or(std::io::ErrorKind::BrokenPipe.into()).into());
            }
        }
    };
    drop(raw_mode);
    drain(writer, screens, &mut signals).await?;
    watch.ended(output, &exit);
    Ok(Exit::of_command(&exit))
}

/// Starts the command; a signal before it runs ends the attempt.
async fn begin(
    nido: &Nido,
    name: &VmName,
    request: ExecRequest,
    signals: &mut Signals,
) -> Result<Result<(ExecControl, nido_core::ExecEvents), u8>, Error> {
    tokio::select! {
        command = nido.exec(name, request) => command.map(Ok),
        number = signals.next_end() => Ok(Err(number)),
    }
}

/// Writes what is left; a signal ends the wait.
async fn drain(writer: Writer, mut screens: TerminalSanitizers, signals: &mut Signals) -> Result<(), Failure> {
    let write = async {
        for piece in screens.finish() {
            if let Some(room) = writer.room().await {
                room.send(piece);
            }
        }
        writer.finish().await
    };
    tokio::select! {
        written = write => Ok(written?),
        signal = signals.next_end() => Err(Failure::Interrupted { signal, undo: Duration::ZERO }),
    }
}

/// What is known of a command and its VM, to report why it ended.
struct Watch<'a> {
    nido: &'a Nido,
    name: &'a VmName,
    begun: Timestamp,
    timeout_ms: Option<u64>,
}

impl<'a> Watch<'a> {
    fn new(nido: &'a Nido, name: &'a VmName, request: &ExecRequest) -> Self {
        Self { nido, name, begun: Timestamp::now(), timeout_ms: request.timeout_ms }
    }

    /// The error of a command whose VM was lost: what happened to that is more useful than the error of the connection.
    fn lost(&self, error: Error) -> Error {
        self.nido.lost_while_in_use(self.name, self.begun, error)
    }

    /// Reports why a command did not end by itself, if that is known.
    fn ended(&self, output: &Output, exit: &ExecExit) {
        match (exit.timed_out, self.timeout_ms) {
            (true, Some(ms)) => output.note(&format!("timed out after {}; killed", parse::show_ms(ms))),
            (true, None) => output.note("timed out; killed"),
            (false, _) if exit.signal.is_some() => {
                if let Some(why) = self.nido.changed_since(self.name, self.begun) {
                    output.note(&format!("{why} while the command ran"));
                }
            }
            (false, _) => {}
        }
    }
}

/// Passes on standard input to its end, in a task of its own: a piece that is half sent must be completed while a signal waits
/// for its turn behind it. Dropped, it ends.
struct Feed(Option<AbortHandle>);

impl Feed {
    fn start(output: &Output, control: &ExecControl, wanted: bool) -> Self {
        Self(wanted.then(|| tokio::spawn(feed(output.clone(), control.clone())).abort_handle()))
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// An error means that the command is gone, which its events report better.
async fn feed(output: Output, control: ExecControl) {
    let mut pieces = stdio::read();
    while let Some(piece) = pieces.recv().await {
        match piece {
            Ok(bytes) => {
                if control.stdin(&bytes).await.is_err() {
                    return;
                }
            }
            Err(error) => output.warn(&format!("standard input cannot be read: {error}")),
        }
    }
    let _ = control.stdin_eof().await;
}

/// Sends a message to the command, with a timeout for a guest that does not respond.
async fn send_with_timeout(message: impl Future<Output = Result<(), Error>>) {
    let _ = tokio::time::timeout(SIGNAL_FORWARD_TIMEOUT, message).await;
}

/// Repeated signals become harsher: as it came, then SIGTERM, then SIGKILL and out. After SIGTERM and SIGHUP there is a
/// deadline as well.
#[derive(Debug, Default)]
struct Escalation {
    count: u32,
    leave: Option<(Instant, u8)>,
}

struct Step {
    signal: u8,
    leave: bool,
}

impl Escalation {
    fn next(&mut self, number: u8) -> Step {
        self.count += 1;
        if matches!(number, TERMINATE | HANGUP) && self.leave.is_none() {
            self.leave = Some((Instant::now() + TERMINATION_TIMEOUT, number));
        }
        match self.count {
            1 => Step { signal: number, leave: false },
            2 => Step { signal: TERMINATE, leave: false },
            _ => Step { signal: KILL, leave: true },
        }
    }

    /// Ready, with the signal that asked for it, once the command had its time to end.
    async fn time_to_leave(&self) -> u8 {
        match self.leave {
            Some((deadline, number)) => {
                tokio::time::sleep_until(deadline).await;
                number
            }
            None => std::future::pending().await,
        }
    }
}

/// A sanitizer for each stream that leads to a terminal.
#[derive(Debug)]
struct TerminalSanitizers {
    out: Option<Sanitizer>,
    err: Option<Sanitizer>,
}

impl TerminalSanitizers {
    fn new(output: &Output, raw: bool) -> Self {
        let screen = |terminal: bool| (terminal && !raw).then(Sanitizer::default);
        Self { out: screen(output.stdout_is_terminal), err: screen(output.stderr_is_terminal) }
    }

    fn show(&mut self, stream: Stream, bytes: Vec<u8>) -> Option<(Stream, Vec<u8>)> {
        let screen = match stream {
            Stream::Out => &mut self.out,
            Stream::Err => &mut self.err,
        };
        let bytes = match screen {
            Some(screen) => screen.push(&bytes),
            None => bytes,
        };
        (!bytes.is_empty()).then_some((stream, bytes))
    }

    fn finish(&mut self) -> Vec<(Stream, Vec<u8>)> {
        let out = self.out.as_mut().map(|screen| (Stream::Out, screen.finish()));
        let err = self.err.as_mut().map(|screen| (Stream::Err, screen.finish()));
        out.into_iter().chain(err).filter(|(_, bytes)| !bytes.is_empty()).collect()
    }
}

async fn collected(output: &Output, nido: &Nido, name: &VmName, request: ExecRequest) -> Outcome {
    match collect(output, nido, name, request).await? {
        Ok(result) => {
            let exit = Exit::of_command(&result.exit);
            output.answer(&result, String::new)?;
            Ok(exit)
        }
        Err(exit) => Ok(exit),
    }
}

/// Runs a command to its end and collects what it writes. A signal that ends nido before is the other outcome.
pub async fn collect(
    output: &Output,
    nido: &Nido,
    name: &VmName,
    request: ExecRequest,
) -> Result<Result<ExecResult, Exit>, Failure> {
    let wants_stdin = request.stdin;
    let mut signals = Signals::listen()?;
    let mut escalation = Escalation::default();
    let watch = Watch::new(nido, name, &request);
    let (control, mut events) = match begin(nido, name, request, &mut signals).await? {
        Ok(command) => command,
        Err(number) => return Ok(Err(Exit::Signal(number))),
    };
    let _feed = Feed::start(output, &control, wants_stdin);
    let mut output_so_far = Collected::new(COLLECT_LIMIT);
    loop {
        tokio::select! {
            signal = signals.next() => if let SignalEvent::End(number) = signal {
                let step = escalation.next(number);
                send_with_timeout(control.signal(step.signal)).await;
                if step.leave {
                    return Ok(Err(Exit::Signal(number)));
                }
            },
            number = escalation.time_to_leave() => return Ok(Err(Exit::Signal(number))),
            event = events.next() => match event {
                Some(Ok(ExecEvent::Exited(exit))) => return Ok(Ok(output_so_far.result(exit))),
                Some(Ok(event)) => output_so_far.add(&event),
                Some(Err(error)) => return Err(watch.lost(error).into()),
                None => return Err(Error::internal("the command ended without an exit status").into()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nido_server::signals::INTERRUPT;

    #[test]
    fn the_third_interrupt_kills() {
        let mut escalation = Escalation::default();
        let steps: Vec<_> = (0..4).map(|_| escalation.next(INTERRUPT)).map(|s| (s.signal, s.leave)).collect();
        assert_eq!(steps, [(2, false), (15, false), (9, true), (9, true)]);
    }
}
