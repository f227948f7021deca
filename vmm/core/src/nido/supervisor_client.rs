//! Supervisors as a command sees them: starting one, finding the one there is, asking it something.
//!
//! A supervisor is this same program, started with the verb `supervise`. Its standard input is the locked
//! `supervisor.lock` (so the lock is never free in between), its standard output a pipe on which it writes one line: that it
//! listens, or why it does not.

use std::process::Stdio;
use std::time::{Duration, Instant};

use nido_api::StartStage;
use nido_api::error::{Code, Error, ErrorRecord, Hint, Result};
use nido_api::operation as op;
use nido_engine::home::{CONTROL_SOCKET, SUPERVISOR_LOCK, SUPERVISOR_LOG, VM_LOCK, VmDir};
use nido_files::lock::{HeldLock, is_held};
use nido_store::VmRow;
use nido_supervisor::LISTENING;
use nido_supervisor::control::{MAX_LINE, Reply, Request, UNVERSIONED, VERSION, decode_reply, encode};
use tokio::io::{AsyncBufReadExt, AsyncReadExt as _, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::time::timeout;

use super::Nido;

/// The most bytes of a supervisor's first line.
const FIRST_LINE_MAX: u64 = 1 << 16;
/// How long a supervisor may take until it listens.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the search for a supervisor that answers may take.
const DISCOVERY_TIMEOUT: Duration = Duration::from_secs(15);
/// How long the reply to any request but a stop or a snapshot, or the next stage of a start, may take.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);
/// How much longer than the guest's own time a stop may take: QEMU is asked to quit, and killed.
const STOP_MARGIN: Duration = Duration::from_secs(60);
/// How long a snapshot may take: freezing, saving memory, copying and syncing the disk.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(3600);

/// How many supervisors of one VM may die over one request before it is given up.
const REQUEST_ATTEMPTS_MAX: u32 = 3;

/// A start that a supervisor carries out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Launch {
    /// When the user asked for it.
    pub asked_at: Instant,
    /// How long the guest may take to become ready.
    pub timeout_ms: Option<u64>,
}

impl Nido {
    /// Starts a supervisor and hands it the lock; returns once it listens.
    pub(super) async fn start_supervisor(&self, id: &str, held: HeldLock, launch: Option<Launch>) -> Result<()> {
        let dir = self.vm_dir(id);
        let broken = |e| Error::io("cannot start a supervisor", e);
        let log = nido_supervisor::context::open_log(&dir.file(SUPERVISOR_LOG)).map_err(broken)?;
        let lock = held.file().try_clone().map_err(broken)?;
        // In a session of its own: a Ctrl-C meant for the command does not reach it.
        let mut command = self.context.daemon(dir.path())?;
        command.arg("supervise").arg(id);
        if let Some(launch) = launch {
            command.arg("--asked-ms-ago").arg(format!("{:.3}", launch.asked_at.elapsed().as_secs_f64() * 1000.0));
            if let Some(timeout_ms) = launch.timeout_ms {
                command.arg("--ready-within-ms").arg(timeout_ms.to_string());
            }
        }
        command.stdin(Stdio::from(lock)).stdout(Stdio::piped()).stderr(Stdio::from(log));
        let mut child = Command::from(command).spawn().map_err(broken)?;
        nido_files::failpoint!("supervisor.spawned");
        nido_files::failpoint!("supervisor.handed-over");
        drop(held);
        let Some(stdout) = child.stdout.take() else {
            return Err(Error::internal("a supervisor without standard output"));
        };
        let mut line = String::new();
        match timeout(LISTEN_TIMEOUT, BufReader::new(stdout.take(FIRST_LINE_MAX)).read_line(&mut line)).await {
            Ok(Ok(_)) if line == LISTENING => Ok(()),
            Ok(_) => Err(ended_at_once(&line, &dir)),
            Err(_) => Err(Error::new(Code::Timeout, "the VM's supervisor did not start in time")),
        }
    }

    /// Starts a supervisor for a QEMU that lost its own; false if that QEMU has ended meanwhile.
    pub(super) async fn supervise_again(&self, id: &str, held: HeldLock) -> Result<bool> {
        match self.start_supervisor(id, held, None).await {
            Ok(()) => Ok(true),
            Err(error) if is_held(&self.vm_dir(id).file(VM_LOCK)) => Err(error),
            Err(_nothing_left) => Ok(false),
        }
    }

    /// Asks the VM's supervisor; starts one if QEMU lost it.
    ///
    /// # Errors
    /// `vm_not_running` if there is nothing to supervise any more, `timeout`, and whatever it answers.
    pub(super) async fn request(&self, row: &VmRow, request: &Request) -> Result<Reply> {
        self.request_with_stages(row, request, &mut |_| {}).await
    }

    pub(super) async fn request_with_stages(
        &self,
        row: &VmRow,
        request: &Request,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<Reply> {
        for _ in 0..REQUEST_ATTEMPTS_MAX {
            if let Some(answer) = self.request_once(row, request, progress).await? {
                return Ok(answer);
            }
            // For a supervisor that was killed, the store has the result.
            let why = self.gone_error(row).await;
            let goes_on = self.store().vm_by_id(&row.id)?.is_some_and(|now| !now.state.is_inactive());
            let may_repeat = !matches!(
                request,
                Request::ForwardAdd { .. } | Request::ForwardRemove { .. } | Request::Snapshot { .. }
            );
            // It was killed, and QEMU has another one now.
            if !(goes_on && may_repeat) {
                return Err(why);
            }
        }
        Err(self.gone_error(row).await)
    }

    /// Asks whichever supervisor there is, in the version of the protocol that it speaks. `None` if it is gone before its reply.
    async fn request_once(
        &self,
        row: &VmRow,
        request: &Request,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<Option<Reply>> {
        let mut reply = self.request_in_version(row, request, VERSION, progress).await?;
        // One of an older nido has done nothing yet: it may know the request without a version.
        if matches!(reply, Some(Reply::Unsupported { supported: UNVERSIONED, .. })) {
            reply = self.request_in_version(row, request, UNVERSIONED, progress).await?;
        }
        match reply {
            Some(Reply::Failed { problem }) => Err(problem.into()),
            Some(Reply::Unsupported { why, .. }) => Err(of_another_nido(row, &why)),
            reply => Ok(reply),
        }
    }

    /// The last reply to a request in that version.
    async fn request_in_version(
        &self,
        row: &VmRow,
        request: &Request,
        version: u32,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<Option<Reply>> {
        let mut connection = BufReader::new(self.supervisor(row).await?);
        let line = encode(request, version)?;
        if connection.get_mut().write_all(&line).await.is_err() {
            return Ok(None);
        }
        let limit = reply_timeout(request);
        let mut last = None;
        loop {
            match timeout(limit, read_reply(&mut connection)).await.map_err(|_| silent(row))?? {
                // Repeated, to show that the supervisor still works.
                Some(Reply::Stage { stage }) if last == Some(stage) => {}
                Some(Reply::Stage { stage }) => {
                    last = Some(stage);
                    progress(stage);
                }
                reply => return Ok(reply),
            }
        }
    }

    /// Holds a connection that counts as activity until it is dropped.
    pub(super) async fn lease(&self, row: &VmRow) -> Result<UnixStream> {
        let mut connection = self.supervisor(row).await?;
        let line = encode(&Request::Lease, VERSION)?;
        connection.write_all(&line).await.map_err(|e| Error::io("cannot reach the VM's supervisor", e))?;
        Ok(connection)
    }

    /// A connection to the VM's supervisor.
    pub(super) async fn supervisor(&self, row: &VmRow) -> Result<UnixStream> {
        let deadline = Instant::now() + DISCOVERY_TIMEOUT;
        let dir = self.vm_dir(&row.id);
        let mut pause = Duration::from_millis(1);
        loop {
            if let Ok(sockets) = dir.sockets()
                && let Ok(connection) = UnixStream::connect(sockets.path(CONTROL_SOCKET)).await
            {
                return Ok(connection);
            }
            match HeldLock::try_take_existing(&dir.file(SUPERVISOR_LOCK)) {
                Ok(Some(held)) if is_held(&dir.file(VM_LOCK)) => drop(self.supervise_again(&row.id, held).await?),
                Ok(Some(held)) => {
                    drop(held);
                    return Err(self.gone_error(row).await);
                }
                Err(_) => return Err(self.gone_error(row).await),
                // A supervisor has just started, or is about to end.
                Ok(None) if Instant::now() < deadline => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_millis(50));
                }
                Ok(None) => return Err(silent(row)),
            }
        }
    }

    /// There is no supervisor any more: how the VM ended according to the store.
    async fn gone_error(&self, row: &VmRow) -> Error {
        let name = &row.spec.name;
        // The supervisor frees its lock only when it has written everything down.
        let lock = self.vm_dir(&row.id).file(SUPERVISOR_LOCK);
        let _ = HeldLock::take(&lock, Instant::now() + Duration::from_secs(2)).await;
        let now = match self.reconcile_vm(row).await {
            Ok(now) => now,
            Err(error) => return error,
        };
        match now {
            Some(now) => match &now.failure {
                Some(failure) => nido_supervisor::failure_error(name, failure),
                // Another supervisor has it now.
                None if !now.state.is_inactive() => Error::new(
                    Code::VmBusy,
                    format!("the supervisor of VM '{name}' was lost meanwhile; the VM keeps running"),
                )
                .hint("try again"),
                None => super::denied::denied(&now, "used", "it is not running"),
            },
            None => Error::new(Code::VmNotRunning, format!("VM '{name}' has ended and was deleted")),
        }
    }
}

/// How long the supervisor may be silent: what it allows itself, and some more.
fn reply_timeout(request: &Request) -> Duration {
    match request {
        Request::StopKept => STOP_MARGIN,
        Request::Stop(stop) if stop.force => STOP_MARGIN,
        Request::Stop(stop) => Duration::from_millis(stop.timeout_ms).saturating_add(STOP_MARGIN),
        Request::Snapshot { .. } => SNAPSHOT_TIMEOUT,
        // While it waits for the guest it reports that every few seconds.
        _ => REPLY_TIMEOUT,
    }
}

/// The next reply; `None` if the supervisor is gone.
pub(super) async fn read_reply(connection: &mut BufReader<UnixStream>) -> Result<Option<Reply>> {
    let mut line = Vec::new();
    loop {
        let Ok(buffer) = connection.fill_buf().await else { return Ok(None) };
        if buffer.is_empty() {
            return Ok(None);
        }
        let end = buffer.iter().position(|&b| b == b'\n');
        let used = end.map_or(buffer.len(), |at| at + 1);
        line.extend_from_slice(&buffer[..used]);
        connection.consume(used);
        if line.len() > MAX_LINE {
            return Err(Error::internal("the supervisor's reply is too long"));
        }
        if end.is_some() {
            break;
        }
    }
    decode_reply(&line).map(Some)
}

/// The error of a supervisor that ended before it listened: as it reports, or with its log if it was killed.
fn ended_at_once(line: &str, dir: &VmDir) -> Error {
    serde_json::from_str::<ErrorRecord>(line).map(Error::from).unwrap_or_else(|_| {
        Error::internal("the VM's supervisor ended at once")
            .log_tail(nido_engine::logs::log_tail(dir, &[SUPERVISOR_LOG]))
            .hint("see the lines above, from its log")
    })
}

/// The supervisor of another nido, which does not know the request.
fn of_another_nido(row: &VmRow, why: &str) -> Error {
    let name = &row.spec.name;
    tracing::info!("the supervisor of VM '{name}' does not know a request: {why}");
    Error::new(
        Code::VmBusy,
        format!("the supervisor of VM '{name}' belongs to another version of nido, which does not know this request"),
    )
    .hint(Hint::run_on(op::VM_RESTART, name).to("restart the VM"))
    .or_hint(Hint::host("use the nido that started it"))
}

fn silent(row: &VmRow) -> Error {
    Error::new(Code::Timeout, format!("the supervisor of VM '{}' does not reply", row.spec.name)).hint(Hint::host(
        format!(
            "end it with kill -9; the next command starts another (its log: nido logs {} --source supervisor)",
            row.spec.name
        ),
    ))
}
