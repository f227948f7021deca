//! The control socket: reads one request a connection, passes it to the loop, writes what comes of it.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nido_api::error::{Code, Error, Problem, Result};
use nido_api::name::SnapshotName;
use nido_api::{ForwardSpec, StartStage, StopRequest};
use nido_images::Bake;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::OwnedReadHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use super::control::{Answer, ClaimOrder, MAX_LINE, Request};

/// How long a client may take to say what it wants.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);

/// How often a client that waits for a start gets the current stage.
const ALIVE_EVERY: Duration = Duration::from_secs(10);

/// How far the VM's life has come.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Life {
    /// QEMU does not answer yet.
    Launching,
    /// The agent does not.
    Booting,
    /// It does.
    Ready,
    /// It is over, and the store says so. Why, if it was not wanted.
    Ended(Option<Problem>),
    /// It was there to be baked, and has been: its parts are in the store.
    Baked(Box<Bake>),
}

/// What the loop is asked to do.
#[derive(Debug)]
pub(super) enum ControlCommand {
    Stop(StopRequest),
    StopKept,
    Pause(oneshot::Sender<Result<()>>),
    Resume(oneshot::Sender<Result<()>>),
    Snapshot(SnapshotName, Option<String>, oneshot::Sender<Result<()>>),
    ForwardAdd(ForwardSpec, oneshot::Sender<Result<ForwardSpec>>),
    ForwardRemove(ForwardSpec, oneshot::Sender<Result<()>>),
    Claim(Box<ClaimOrder>, oneshot::Sender<Result<()>>),
    Retire(oneshot::Sender<Result<()>>),
    Status(oneshot::Sender<Option<Duration>>),
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
    pub orders: mpsc::Sender<ControlCommand>,
    pub life: watch::Receiver<Life>,
    pub users: ActiveSessions,
}

/// Accepts connections until dropped.
pub(super) async fn serve(listener: UnixListener, desk: ControlQueue) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let desk = desk.clone();
                tokio::spawn(async move {
                    if let Err(error) = attend(stream, desk).await {
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

async fn attend(stream: UnixStream, mut desk: ControlQueue) -> std::io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::with_capacity(1024, reader).take(MAX_LINE as u64);
    let mut line = Vec::new();
    let read = timeout(REQUEST_WITHIN, reader.read_until(b'\n', &mut line)).await;
    if !matches!(read, Ok(Ok(n)) if n > 0) {
        return Ok(());
    }
    let answer = match serde_json::from_slice(&line) {
        Err(error) => failed(&Error::new(Code::SpecInvalid, format!("not a request to a supervisor: {error}"))),
        Ok(Request::Ready) => {
            let _use = desk.users.enter();
            until_ready(&mut desk.life, &mut writer, reader.get_mut()).await?
        }
        Ok(Request::Stop(stop)) => {
            // If the loop is over already, its last word is in `life`.
            let _ = desk.orders.send(ControlCommand::Stop(stop)).await;
            until_ended(&mut desk).await
        }
        Ok(Request::StopKept) => {
            let _ = desk.orders.send(ControlCommand::StopKept).await;
            until_ended(&mut desk).await
        }
        Ok(Request::Claim(order)) => match until_claimed(&mut desk, order, &mut writer, reader.get_mut()).await? {
            Some(answer) => answer,
            None => return Ok(()),
        },
        Ok(Request::Retire) => match desk.ask(ControlCommand::Retire).await {
            Ok(()) => until_ended(&mut desk).await,
            Err(error) => failed(&error),
        },
        Ok(Request::Lease) => {
            let _use = desk.users.enter();
            // It does not care how the VM ends, and must not hold up the end.
            drop(desk);
            // Held until the client closes it, or ends.
            let mut rest = [0; 64];
            while matches!(reader.get_mut().read(&mut rest).await, Ok(n) if n > 0) {}
            return Ok(());
        }
        Ok(Request::Pause) => done(desk.ask(ControlCommand::Pause).await),
        Ok(Request::Snapshot { name, into }) => {
            let _use = desk.users.enter();
            done(desk.ask(|reply| ControlCommand::Snapshot(name, into, reply)).await)
        }
        Ok(Request::Resume) => done(desk.ask(ControlCommand::Resume).await),
        Ok(Request::ForwardAdd { forward }) => match desk.ask(|reply| ControlCommand::ForwardAdd(forward, reply)).await
        {
            Ok(forward) => Answer::Forward { forward },
            Err(error) => failed(&error),
        },
        Ok(Request::ForwardRemove { forward }) => {
            done(desk.ask(|reply| ControlCommand::ForwardRemove(forward, reply)).await)
        }
        Ok(Request::Status) => match desk.ask(|reply| ControlCommand::Status(reply_ok(reply))).await {
            Ok(idle) => Answer::Status { idle_ms: idle.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)) },
            Err(error) => failed(&error),
        },
    };
    send(&mut writer, &answer).await
}

/// Turns a channel for results into one for plain values.
fn reply_ok<T: Send + 'static>(reply: oneshot::Sender<Result<T>>) -> oneshot::Sender<T> {
    let (plain, value) = oneshot::channel();
    tokio::spawn(async move {
        if let Ok(value) = value.await {
            let _ = reply.send(Ok(value));
        }
    });
    plain
}

impl ControlQueue {
    async fn ask<T>(&self, order: impl FnOnce(oneshot::Sender<Result<T>>) -> ControlCommand) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let ending = || Error::new(Code::VmNotRunning, "the VM has just ended");
        self.orders.send(order(reply)).await.map_err(|_| ending())?;
        answer.await.map_err(|_| ending())?
    }
}

async fn until_ready(
    life: &mut watch::Receiver<Life>,
    writer: &mut (impl AsyncWriteExt + Unpin),
    reader: &mut (impl AsyncReadExt + Unpin),
) -> std::io::Result<Answer> {
    loop {
        let now = life.borrow_and_update().clone();
        let stage = match now {
            Life::Launching => StartStage::Launching,
            Life::Booting => StartStage::Booting,
            Life::Ready => {
                send(writer, &Answer::Stage { stage: StartStage::Ready }).await?;
                return Ok(Answer::Done);
            }
            Life::Baked(bake) => return Ok(Answer::Baked { bake }),
            Life::Ended(problem) => return Ok(Answer::Failed { problem: problem.unwrap_or_else(ended_early) }),
        };
        send(writer, &Answer::Stage { stage }).await?;
        let mut rest = [0; 16];
        tokio::select! {
            changed = life.changed() => if changed.is_err() {
                return Ok(Answer::Failed { problem: ended_early() });
            },
            // The same stage again: a sign of life.
            () = tokio::time::sleep(ALIVE_EVERY) => {}
            // The client has disconnected. (It sends nothing more.)
            _ = reader.read(&mut rest) => return Err(std::io::ErrorKind::BrokenPipe.into()),
        }
    }
}

/// `None`: the client has disconnected, and gets no VM.
async fn until_claimed(
    desk: &mut ControlQueue,
    order: Box<ClaimOrder>,
    writer: &mut (impl AsyncWriteExt + Unpin),
    reader: &mut BufReader<OwnedReadHalf>,
) -> std::io::Result<Option<Answer>> {
    if gone(reader) {
        return Ok(None);
    }
    let mut rest = [0; 16];
    let claimed = tokio::select! {
        claimed = desk.ask(|reply| ControlCommand::Claim(order, reply)) => claimed,
        _ = reader.read(&mut rest) => return Ok(None),
    };
    if let Err(error) = claimed {
        return Ok(Some(failed(&error)));
    }
    let _use = desk.users.enter();
    send(writer, &Answer::Stage { stage: StartStage::Preparing }).await?;
    until_ready(&mut desk.life, writer, reader).await.map(Some)
}

async fn until_ended(desk: &mut ControlQueue) -> Answer {
    match desk.life.wait_for(|life| matches!(life, Life::Ended(_) | Life::Baked(_))).await {
        Ok(_) => Answer::Done,
        Err(_) => failed(&Error::internal("the supervisor ended before the VM did")),
    }
}

/// Whether the other end has been closed.
fn gone(reader: &BufReader<OwnedReadHalf>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(AsRef::<UnixStream>::as_ref(reader.get_ref()).as_fd(), PollFlags::empty())];
    poll(&mut fds, Some(&Timespec::default())).is_ok() && fds[0].revents().contains(PollFlags::HUP)
}

fn ended_early() -> Problem {
    Error::new(Code::VmNotRunning, "the VM was stopped, or powered itself off, before its agent answered").problem()
}

fn done(outcome: Result<()>) -> Answer {
    outcome.map_or_else(|error| failed(&error), |()| Answer::Done)
}

fn failed(error: &Error) -> Answer {
    Answer::Failed { problem: error.problem() }
}

async fn send(writer: &mut (impl AsyncWriteExt + Unpin), answer: &Answer) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    writer.write_all(&line).await
}
