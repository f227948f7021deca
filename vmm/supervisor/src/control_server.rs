//! The control socket: reads one request a connection, passes it to the loop, writes what comes of it.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nido_api::StartStage;
use nido_api::error::{Code, Error, ErrorRecord, Result};
use nido_images::Bake;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use super::control::{MAX_LINE, Reply, Request, decode_request, encode};

/// How long a client may take to send its request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a client that waits for a start gets the current stage.
const STAGE_REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// How far the start of the VM has come.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum StartupPhase {
    /// QEMU does not answer yet.
    Launching,
    /// The agent does not.
    Booting,
    /// It does.
    Ready,
    /// It is over, and the store says so. Why, if it was not wanted.
    Ended(Option<ErrorRecord>),
    /// It was there to be baked, and has been: its parts are in the store.
    Baked(Box<Bake>),
}

/// Where the reply to a request goes.
pub(super) type ReplySender = oneshot::Sender<Result<Reply>>;

/// A request on its way to the loop.
#[derive(Debug)]
pub(super) struct ControlRequest {
    pub request: Request,
    /// Closed once the client no longer waits.
    pub reply: ReplySender,
}

/// What the last reply to a request waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Completion {
    /// The loop's reply.
    Reply,
    /// The guest's agent; the loop is not involved.
    Ready,
    /// The end of the VM, once the loop has accepted the request.
    Ended,
    /// The guest's agent, once the loop has claimed the clone.
    Claimed,
    /// The client, which closes the connection.
    Held,
}

/// What the last reply to `request` waits for.
const fn completion(request: &Request) -> Completion {
    match request {
        Request::Ready => Completion::Ready,
        Request::Stop(_) | Request::StopKept | Request::Retire => Completion::Ended,
        Request::Claim(_) => Completion::Claimed,
        Request::Lease => Completion::Held,
        Request::Pause
        | Request::Resume
        | Request::Snapshot { .. }
        | Request::ForwardAdd { .. }
        | Request::ForwardRemove { .. }
        | Request::ApplyRules
        | Request::Status => Completion::Reply,
    }
}

/// Counts who uses the VM on ways that the channel does not see.
#[derive(Debug, Clone)]
pub(super) struct ActiveSessions(Arc<watch::Sender<usize>>);

/// One use; ends when dropped.
#[derive(Debug)]
pub(super) struct SessionGuard(Arc<watch::Sender<usize>>);

impl ActiveSessions {
    pub(super) fn new() -> Self {
        Self(Arc::new(watch::channel(0).0))
    }

    pub(super) fn enter(&self) -> SessionGuard {
        self.0.send_modify(|users| *users += 1);
        SessionGuard(Arc::clone(&self.0))
    }

    pub(super) fn watch(&self) -> watch::Receiver<usize> {
        self.0.subscribe()
    }
}

impl Drop for SessionGuard {
    fn drop(&mut self) {
        self.0.send_modify(|users| *users -= 1);
    }
}

/// What each connection needs.
#[derive(Debug, Clone)]
pub(super) struct ControlQueue {
    pub calls: mpsc::Sender<ControlRequest>,
    pub life: watch::Receiver<StartupPhase>,
    pub users: ActiveSessions,
}

/// Accepts connections until dropped.
pub(super) async fn serve(listener: UnixListener, queue: ControlQueue) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let queue = queue.clone();
                tokio::spawn(async move {
                    if let Err(error) = serve_connection(stream, queue).await {
                        tracing::debug!("a control connection ended: {error}");
                    }
                });
            }
            Err(error) => {
                tracing::warn!("cannot accept a control connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_connection(stream: UnixStream, queue: ControlQueue) -> std::io::Result<()> {
    let (reader, writer) = stream.into_split();
    let mut reader = BufReader::with_capacity(1024, reader).take(MAX_LINE as u64);
    let mut line = Vec::new();
    let read = timeout(REQUEST_TIMEOUT, reader.read_until(b'\n', &mut line)).await;
    if !matches!(read, Ok(Ok(n)) if n > 0) {
        return Ok(());
    }
    let (version, request) = decode_request(&line);
    let mut client = Client { reader: reader.into_inner(), writer, version };
    match request {
        Ok(request) => carry_out(request, queue, &mut client).await,
        Err(refusal) => client.send(&refusal).await,
    }
}

/// The client at the other end.
struct Client {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    /// The version of the protocol that it speaks.
    version: u32,
}

impl Client {
    async fn send(&mut self, reply: &Reply) -> std::io::Result<()> {
        let line = encode(reply, self.version).map_err(std::io::Error::other)?;
        self.writer.write_all(&line).await
    }

    /// Returns when the client has closed the connection, or ended.
    async fn closed(&mut self) {
        let mut rest = [0; 64];
        while matches!(self.reader.read(&mut rest).await, Ok(n) if n > 0) {}
    }

    /// Whether it has closed the connection already.
    fn is_gone(&self) -> bool {
        let stream = AsRef::<UnixStream>::as_ref(self.reader.get_ref());
        let mut fds = [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::empty())];
        poll(&mut fds, Some(&Timespec::default())).is_ok() && fds[0].revents().contains(PollFlags::HUP)
    }
}

async fn carry_out(request: Request, mut queue: ControlQueue, client: &mut Client) -> std::io::Result<()> {
    let completion = completion(&request);
    let is_use =
        matches!(completion, Completion::Ready | Completion::Held) || matches!(request, Request::Snapshot { .. });
    let _use = is_use.then(|| queue.users.enter());
    // A stop is carried out also if the loop is over: then its last word is in `life`.
    let is_stop = matches!(request, Request::Stop(_) | Request::StopKept);
    match completion {
        Completion::Held => {
            // It does not care how the VM ends, and must not delay the end.
            drop(queue);
            client.closed().await;
            Ok(())
        }
        Completion::Ready => until_ready(&mut queue.life, client).await,
        Completion::Reply => {
            let reply = queue.send_request(request).await;
            client.send(&reply.unwrap_or_else(|error| Reply::failed(&error))).await
        }
        Completion::Ended => {
            let reply = match queue.send_request(request).await {
                Err(error) if !is_stop => Reply::failed(&error),
                _ => until_ended(&mut queue).await,
            };
            client.send(&reply).await
        }
        Completion::Claimed => until_claimed(request, &mut queue, client).await,
    }
}

impl ControlQueue {
    async fn send_request(&self, request: Request) -> Result<Reply> {
        let (reply, answer) = oneshot::channel();
        let ending = || Error::new(Code::VmNotRunning, "the VM has just ended");
        self.calls.send(ControlRequest { request, reply }).await.map_err(|_| ending())?;
        answer.await.map_err(|_| ending())?
    }
}

async fn until_ready(life: &mut watch::Receiver<StartupPhase>, client: &mut Client) -> std::io::Result<()> {
    loop {
        let now = life.borrow_and_update().clone();
        let stage = match now {
            StartupPhase::Launching => StartStage::Launching,
            StartupPhase::Booting => StartStage::Booting,
            StartupPhase::Ready => {
                client.send(&Reply::Stage { stage: StartStage::Ready }).await?;
                return client.send(&Reply::Done).await;
            }
            StartupPhase::Baked(bake) => return client.send(&Reply::Baked { bake }).await,
            StartupPhase::Ended(problem) => {
                return client.send(&Reply::Failed { problem: problem.unwrap_or_else(ended_early) }).await;
            }
        };
        client.send(&Reply::Stage { stage }).await?;
        tokio::select! {
            changed = life.changed() => if changed.is_err() {
                return client.send(&Reply::Failed { problem: ended_early() }).await;
            },
            // The same stage again, to show that the start continues.
            () = tokio::time::sleep(STAGE_REPORT_INTERVAL) => {}
            () = client.closed() => return Err(std::io::ErrorKind::BrokenPipe.into()),
        }
    }
}

/// A client that has disconnected gets no VM.
async fn until_claimed(request: Request, queue: &mut ControlQueue, client: &mut Client) -> std::io::Result<()> {
    if client.is_gone() {
        return Ok(());
    }
    let claimed = tokio::select! {
        claimed = queue.send_request(request) => claimed,
        () = client.closed() => return Ok(()),
    };
    if let Err(error) = claimed {
        return client.send(&Reply::failed(&error)).await;
    }
    let _use = queue.users.enter();
    client.send(&Reply::Stage { stage: StartStage::Preparing }).await?;
    until_ready(&mut queue.life, client).await
}

async fn until_ended(queue: &mut ControlQueue) -> Reply {
    match queue.life.wait_for(|life| matches!(life, StartupPhase::Ended(_) | StartupPhase::Baked(_))).await {
        Ok(_) => Reply::Done,
        Err(_) => Reply::failed(&Error::internal("the supervisor ended before the VM did")),
    }
}

fn ended_early() -> ErrorRecord {
    Error::new(Code::VmNotRunning, "the VM was stopped, or powered itself off, before its agent answered").record()
}
