//! The client of QEMU's monitor (QMP).
//!
//! One task owns the socket; [`Monitor`] sends it commands, the owner of the VM receives the events. Invariants: every
//! command ends within its deadline, or at once when QEMU has exited; a reply belongs to its command by number; the
//! guest cannot stall the monitor by causing events (they are dropped, and counted, when the owner does not keep up).

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use qapi::{Command, qmp};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, Interest};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout_at};

pub use super::monitor_wire::Event;
use super::monitor_wire::{self as wire, Lines, Message, WireError};

/// How many events may wait for their owner.
const EVENTS_MAX: usize = 256;
/// How long QEMU may take over the first command.
const NEGOTIATION_TIMEOUT: Duration = Duration::from_secs(10);
/// How soon a monitor that does not listen yet is dialled again.
const REDIAL: Duration = Duration::from_millis(2);

/// Why a command has no reply.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// QEMU closed the monitor: it has ended, or is about to.
    #[error("QEMU has exited")]
    QemuGone,
    /// No reply came in time.
    #[error("QEMU did not reply to {command} within {timeout_ms} ms")]
    Timeout {
        /// The command.
        command: &'static str,
        /// How long it was waited for.
        timeout_ms: u128,
    },
    /// QEMU refused.
    #[error("QEMU refused {command}: {desc}")]
    Refused {
        /// The command.
        command: &'static str,
        /// QEMU's class of error.
        class: String,
        /// QEMU's sentence; escape it before showing it.
        desc: String,
    },
    /// The other end does not speak QMP, or sent a reply that the command cannot have.
    #[error("the monitor does not speak QMP: {reason}")]
    Protocol {
        /// What was wrong.
        reason: String,
    },
    /// The socket cannot be used.
    #[error("the monitor cannot be reached: {0}")]
    Io(#[from] io::Error),
}

impl From<WireError> for MonitorError {
    fn from(error: WireError) -> Self {
        Self::Protocol { reason: error.to_string() }
    }
}

/// The monitor's events. The stream ends when QEMU closes the monitor.
#[derive(Clone, Debug, PartialEq)]
pub enum MonitorEvent {
    /// Something happened.
    Event(Event),
    /// This many events were dropped before the next one: query the status again.
    Lost(u64),
}

/// A connection to a monitor, ready for commands. Clones share it; it closes when the last is dropped.
#[derive(Clone, Debug)]
pub struct Monitor {
    requests: mpsc::Sender<Request>,
    last_id: Arc<AtomicU64>,
    nonsense: Arc<OnceLock<WireError>>,
}

#[derive(Debug)]
struct Request {
    id: u64,
    message: OutgoingMessage,
    answer: oneshot::Sender<QmpReply>,
}

type QmpReply = Result<Value, QmpError>;

#[derive(Debug)]
struct QmpError {
    class: String,
    desc: String,
}

impl Monitor {
    /// Dials the monitor until it listens, and negotiates. Needs a runtime, which then drives the connection. The death of
    /// QEMU before it listens cannot be seen from here: watch its process beside this.
    ///
    /// # Errors
    /// No process listened in time, or it does not speak QMP.
    pub async fn connect(path: &Path, timeout: Duration) -> Result<(Self, mpsc::Receiver<MonitorEvent>), MonitorError> {
        let deadline = Instant::now() + timeout;
        let late = |_| MonitorError::Timeout { command: "the connection", timeout_ms: timeout.as_millis() };
        let stream = timeout_at(deadline, dial(path)).await.map_err(late)??;
        timeout_at(deadline, Self::negotiate(stream)).await.map_err(late)?
    }

    /// Negotiates on a connected socket; as [`Monitor::connect`].
    ///
    /// # Errors
    /// The other end does not speak QMP, sends nothing for a while, or closes.
    pub async fn negotiate(mut stream: UnixStream) -> Result<(Self, mpsc::Receiver<MonitorEvent>), MonitorError> {
        let mut lines = Lines::default();
        let late = |_| MonitorError::Timeout { command: "the greeting", timeout_ms: NEGOTIATION_TIMEOUT.as_millis() };
        tokio::time::timeout(NEGOTIATION_TIMEOUT, greeting(&mut stream, &mut lines)).await.map_err(late)??;
        let (requests, commands) = mpsc::channel(16);
        let (events, received) = mpsc::channel(EVENTS_MAX);
        let monitor = Self { requests, last_id: Arc::default(), nonsense: Arc::default() };
        let (nonsense, waiting) = (monitor.nonsense.clone(), HashMap::new());
        let driver = Driver { commands, events, waiting, lost: 0, output: VecDeque::new(), nonsense };
        tokio::spawn(driver.run(stream, lines));
        monitor.execute(qmp::qmp_capabilities { enable: None }, NEGOTIATION_TIMEOUT).await?;
        Ok((monitor, received))
    }

    /// Runs one command. Dropping the future discards the reply, not the command.
    ///
    /// # Errors
    /// See [`MonitorError`].
    pub async fn execute<C: Command>(&self, command: C, timeout: Duration) -> Result<C::Ok, MonitorError> {
        self.exchange(command, None, timeout).await
    }

    /// Hands a copy of an open file to QEMU, which knows it by that name until a command uses it, or another file gets the name.
    ///
    /// # Errors
    /// See [`MonitorError`].
    pub async fn send_file(&self, name: &str, file: &File, timeout: Duration) -> Result<(), MonitorError> {
        let copy = OwnedFd::from(file.try_clone()?);
        self.exchange(qmp::getfd { fdname: name.into() }, Some(copy), timeout).await.map(drop)
    }

    async fn exchange<C: Command>(
        &self,
        command: C,
        file: Option<OwnedFd>,
        timeout: Duration,
    ) -> Result<C::Ok, MonitorError> {
        let id = self.last_id.fetch_add(1, Ordering::Relaxed);
        let strange = |e: serde_json::Error| MonitorError::Protocol { reason: format!("{}: {e}", C::NAME) };
        let line = wire::write(&command, id).map_err(strange)?;
        let (sender, answer) = oneshot::channel();
        let exchange = async {
            self.requests
                .send(Request { id, message: OutgoingMessage { line, file }, answer: sender })
                .await
                .map_err(|_| self.why_closed())?;
            answer.await.map_err(|_| self.why_closed())
        };
        let late = |_| MonitorError::Timeout { command: C::NAME, timeout_ms: timeout.as_millis() };
        match tokio::time::timeout(timeout, exchange).await.map_err(late)?? {
            Ok(value) => serde_json::from_value(value).map_err(strange),
            Err(QmpError { class, desc }) => Err(MonitorError::Refused { command: C::NAME, class, desc }),
        }
    }

    fn why_closed(&self) -> MonitorError {
        self.nonsense.get().map_or(MonitorError::QemuGone, |error| (*error).into())
    }

    /// What the machine is doing.
    ///
    /// # Errors
    /// See [`MonitorError`]; so too below.
    pub async fn query_status(&self, timeout: Duration) -> Result<qmp::RunState, MonitorError> {
        Ok(self.execute(qmp::query_status {}, timeout).await?.status)
    }

    /// QEMU's version.
    ///
    /// # Errors
    /// As above.
    pub async fn query_version(&self, timeout: Duration) -> Result<qmp::VersionInfo, MonitorError> {
        self.execute(qmp::query_version {}, timeout).await
    }

    /// Lets the vCPUs run.
    ///
    /// # Errors
    /// As above.
    pub async fn cont(&self, timeout: Duration) -> Result<(), MonitorError> {
        self.execute(qmp::cont {}, timeout).await.map(drop)
    }

    /// Pauses the vCPUs.
    ///
    /// # Errors
    /// As above.
    pub async fn stop(&self, timeout: Duration) -> Result<(), MonitorError> {
        self.execute(qmp::stop {}, timeout).await.map(drop)
    }

    /// Presses the power button: a request to the guest.
    ///
    /// # Errors
    /// As above.
    pub async fn system_powerdown(&self, timeout: Duration) -> Result<(), MonitorError> {
        self.execute(qmp::system_powerdown {}, timeout).await.map(drop)
    }

    /// Presses the reset button.
    ///
    /// # Errors
    /// As above.
    pub async fn system_reset(&self, timeout: Duration) -> Result<(), MonitorError> {
        self.execute(qmp::system_reset {}, timeout).await.map(drop)
    }

    /// Ends QEMU at once. That QEMU has exited before it answers counts as done.
    ///
    /// # Errors
    /// As above.
    pub async fn quit(&self, timeout: Duration) -> Result<(), MonitorError> {
        match self.execute(qmp::quit {}, timeout).await {
            Ok(_) | Err(MonitorError::QemuGone) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Connects until a process listens; other failures are final.
async fn dial(path: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Ok(stream) => return Ok(stream),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                sleep(REDIAL).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Reads the first message, which has to be the greeting.
async fn greeting(stream: &mut UnixStream, lines: &mut Lines) -> Result<(), MonitorError> {
    let mut chunk = [0; 4096];
    loop {
        match lines.next_line()?.map(|line| wire::read(&line)).transpose()? {
            Some(Message::Greeting(_)) => return Ok(()),
            Some(_) => return Err(MonitorError::Protocol { reason: "it did not begin with a greeting".into() }),
            None => {}
        }
        match stream.read(&mut chunk).await? {
            0 => return Err(MonitorError::QemuGone),
            n => lines.push(&chunk[..n]),
        }
    }
}

/// Writes bytes, and passes a descriptor with them (`SCM_RIGHTS`).
fn send_with_file(stream: &UnixStream, bytes: &[u8], file: BorrowedFd<'_>) -> io::Result<usize> {
    let files = [file];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&files));
    Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

/// A command on its way to QEMU, and the descriptor that goes with it.
#[derive(Debug)]
struct OutgoingMessage {
    line: Vec<u8>,
    file: Option<OwnedFd>,
}

/// The task that owns the socket.
struct Driver {
    commands: mpsc::Receiver<Request>,
    events: mpsc::Sender<MonitorEvent>,
    waiting: HashMap<u64, oneshot::Sender<QmpReply>>,
    lost: u64,
    output: VecDeque<OutgoingMessage>,
    nonsense: Arc<OnceLock<WireError>>,
}

impl Driver {
    /// Runs until QEMU closes the connection, sends invalid QMP, or all handles are dropped. Ending drops the senders, which notifies
    /// every waiting command and the events' owner.
    async fn run(mut self, mut stream: UnixStream, mut lines: Lines) {
        let (mut input, output) = stream.split();
        let mut chunk = vec![0; 16 << 10];
        loop {
            loop {
                match lines.next_line().and_then(|line| line.map(|l| wire::read(&l)).transpose()) {
                    Ok(Some(message)) => self.receive(message),
                    Ok(None) => break,
                    Err(error) => {
                        let _ = self.nonsense.set(error);
                        return;
                    }
                }
            }
            tokio::select! {
                read = input.read(&mut chunk) => match read {
                    Ok(n) if n > 0 => lines.push(&chunk[..n]),
                    _ => return,
                },
                writable = output.writable(), if !self.output.is_empty() => {
                    if writable.and_then(|()| self.write(output.as_ref())).is_err_and(|e| e.kind() != io::ErrorKind::WouldBlock) {
                        return;
                    }
                }
                request = self.commands.recv() => match request {
                    Some(request) => {
                        self.waiting.retain(|_, answer| !answer.is_closed());
                        self.output.push_back(request.message);
                        self.waiting.insert(request.id, request.answer);
                    }
                    None => return,
                },
            }
        }
    }

    /// Writes as much of the next message as the socket takes.
    fn write(&mut self, stream: &UnixStream) -> io::Result<()> {
        let Some(message) = self.output.front_mut() else { return Ok(()) };
        let written = match &message.file {
            None => stream.try_write(&message.line)?,
            Some(file) => stream.try_io(Interest::WRITABLE, || send_with_file(stream, &message.line, file.as_fd()))?,
        };
        // It went with the first byte.
        message.file = None;
        message.line.drain(..written);
        if message.line.is_empty() {
            self.output.pop_front();
        }
        Ok(())
    }

    fn receive(&mut self, message: Message) {
        match message {
            Message::Return { id, value } => self.answer(id, Ok(value)),
            Message::Error { id, class, desc } => self.answer(id, Err(QmpError { class, desc })),
            Message::Event(event) => self.notify_listeners(event),
            Message::Greeting(_) | Message::Other => {}
        }
    }

    /// A reply without a waiting command is dropped.
    fn answer(&mut self, id: Option<u64>, answer: QmpReply) {
        if let Some(waiting) = id.and_then(|id| self.waiting.remove(&id)) {
            let _ = waiting.send(answer);
        }
    }

    fn notify_listeners(&mut self, event: Event) {
        if self.lost > 0 && self.events.try_send(MonitorEvent::Lost(self.lost)).is_ok() {
            self.lost = 0;
        }
        if self.lost > 0 || self.events.try_send(MonitorEvent::Event(event)).is_err() {
            self.lost += 1;
        }
    }
}

#[cfg(test)]
mod tests;
