//! Taking a clone that waits in a pool, instead of making a VM.
//!
//! The clone's supervisor assigns it to the caller, in one transaction: so there is no moment in which it is claimed and
//! not supervised, and the claiming command may be killed at any point.
//!
//! Invariant: a pool is never the reason for an error. What cannot be claimed is forked, and the machine's reason states
//! which of the two it was.

use std::time::{Duration, Instant};

use nido_api::error::{Code, Error, Result};
use nido_api::{Grant, PathChoice, StartRequest, StartStage, VmInfo, VmSpec};
use nido_engine::bake::{choose, qemu_id, shape};
use nido_engine::home::CONTROL_SOCKET;
use nido_engine::machine;
use nido_files::random;
use nido_supervisor::control::{ClaimCommand, MAX_LINE, Reply, Request, VERSION, encode};
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::Nido;
use super::create::{boot_parts, check_spec, check_template_rules, disk_bytes, machine_request};
use super::supervisor_client::read_reply;
use super::vm_in_progress::VmInProgress;

/// How long a clone's supervisor may take to reply to a claim.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(2);

/// The result of claiming one clone.
enum ClaimOutcome {
    /// It is ours, and ready.
    Ready,
    /// It waits no longer, or its supervisor is gone.
    Lost,
    /// It was ours, and could not be resumed.
    Broken(Error),
}

impl Nido {
    /// A VM out of a pool, if one fits. `None`: there is no clone for it, and one is to be forked or booted.
    ///
    /// # Errors
    /// Only those that any VM of this name and these ports would meet.
    pub(super) async fn spawn_from_pool(
        &self,
        spec: &VmSpec,
        start: StartRequest,
        grant: &Grant,
        (asked_at, begun): (Instant, &VmInProgress),
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<Option<VmInfo>> {
        // A clone has its network already, without secrets.
        if !spec.secrets.is_empty() || start.path == PathChoice::Cold || !self.store().has_waiting_clones()? {
            return Ok(None);
        }
        // Errors in the request are reported by the code that creates a VM for it.
        let Ok((memory, mut order)) = self.claim_command(spec, start, grant).await else { return Ok(None) };
        let mut tried = Vec::new();
        loop {
            let waiting = self.store().waiting_clones(&memory)?;
            let Some(id) = waiting.into_iter().find(|id| !tried.contains(id)) else { return Ok(None) };
            order.ticket = random::id()?;
            order.asked_ms_ago = asked_at.elapsed().as_secs_f64() * 1000.0;
            let mut told = |stage| {
                begun.set(&id);
                progress(stage);
            };
            match self.claim(&id, &order, &mut told).await? {
                ClaimOutcome::Ready => {
                    nido_files::failpoint!("claim.ready");
                    let row = self.store().vm_by_id(&id)?;
                    let row = row.ok_or_else(|| Error::new(Code::VmNotRunning, "the VM has just ended"))?;
                    return Ok(Some(self.describe(&row)));
                }
                ClaimOutcome::Lost => tried.push(id),
                ClaimOutcome::Broken(error) => {
                    tracing::warn!("a clone of the pool could not be resumed: {error}");
                    self.delete_id(&id).await?;
                    return Ok(None);
                }
            }
        }
    }

    /// What a clone is asked to become, and the memory image of the clones that can.
    async fn claim_command(&self, spec: &VmSpec, start: StartRequest, grant: &Grant) -> Result<(String, ClaimCommand)> {
        check_spec(spec)?;
        if spec.disk_quota_bytes.is_some() {
            // Its QEMU runs already, without one.
            return Err(Error::new(Code::TemplateMismatch, "a clone of the pool has no disk quota"));
        }
        if spec.max_processes.is_some() {
            // Its commands are limited before it takes any.
            return Err(Error::new(Code::TemplateMismatch, "a clone of the pool has no limit of processes"));
        }
        if !spec.net_limits.is_empty() {
            // Its network runs already, with the usual ones.
            return Err(Error::new(Code::TemplateMismatch, "a clone of the pool has the usual limits of its network"));
        }
        let (host, qemu) = self.host_facts().await?;
        let manifest = self.manifest(&spec.template)?;
        let disk_bytes = disk_bytes(spec, &boot_parts(&manifest))?;
        grant.limits.check(spec, disk_bytes)?;
        check_template_rules(spec, manifest.allow.as_deref())?;
        let request = machine_request(spec, disk_bytes, *machine::GUEST_CIDS.start());
        let machine = machine::decide(&request, &host, &qemu)?;
        let bake = choose(&manifest.bakes, &shape(&machine, &host), &qemu_id(&qemu))
            .map_err(|unfit| Error::new(Code::TemplateMismatch, unfit.why()))?;
        let order = ClaimCommand {
            spec: spec.clone().into(),
            disk_bytes,
            reason: format!("{}; taken from the pool", machine.reason),
            warnings: machine.warnings,
            asked_ms_ago: 0.0,
            ready_within_ms: start.timeout_ms,
            ticket: String::new(),
            owner: grant.owner.clone(),
            max_vms: grant.limits.max_vms,
        };
        Ok((bake.memory.sha256.clone(), order))
    }

    async fn claim(
        &self,
        id: &str,
        order: &ClaimCommand,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<ClaimOutcome> {
        let line = encode(&Request::Claim(Box::new(order.clone())), VERSION)?;
        let Ok(sockets) = self.vm_dir(id).sockets() else { return Ok(ClaimOutcome::Lost) };
        let Ok(mut connection) = UnixStream::connect(sockets.path(CONTROL_SOCKET)).await else {
            return Ok(ClaimOutcome::Lost);
        };
        if line.len() > MAX_LINE || connection.write_all(&line).await.is_err() {
            return Ok(ClaimOutcome::Lost);
        }
        let mut connection = BufReader::new(connection);
        nido_files::failpoint!("claim.requested");
        match timeout(CLAIM_TIMEOUT, read_reply(&mut connection)).await {
            Ok(Ok(Some(Reply::Stage { stage }))) => progress(stage),
            Ok(Ok(Some(Reply::Failed { problem }))) => {
                let error = Error::from(problem);
                return match error.code() {
                    // Another clone, or a fork, would meet the same.
                    Code::VmExists | Code::PortInUse | Code::Denied | Code::LimitExceeded => Err(error),
                    _ => Ok(ClaimOutcome::Lost),
                };
            }
            // The clone belongs to another nido: it has not been claimed.
            Ok(Ok(Some(Reply::Unsupported { .. }))) => return Ok(ClaimOutcome::Lost),
            // It is slow, or was killed. The store decides whether the clone is ours: once the attempt is given up there,
            // the supervisor cannot carry it out any more.
            _ => {
                if self.store().give_up_claim(&order.ticket, jiff::Timestamp::now())?.is_none() {
                    return Ok(ClaimOutcome::Lost);
                }
                progress(StartStage::Preparing);
                return self.await_claimed(id, progress).await;
            }
        }
        loop {
            match read_reply(&mut connection).await {
                Ok(Some(Reply::Stage { stage })) => progress(stage),
                Ok(Some(Reply::Done)) => return Ok(ClaimOutcome::Ready),
                Ok(Some(Reply::Failed { problem })) => return Ok(ClaimOutcome::Broken(problem.into())),
                Ok(Some(other)) => {
                    return Ok(ClaimOutcome::Broken(Error::internal(format!(
                        "unexpected reply of the supervisor: {other:?}"
                    ))));
                }
                Ok(None) | Err(_) => break,
            }
        }
        // Its supervisor was killed. The next one completes the start.
        self.await_claimed(id, progress).await
    }

    /// Waits until a clone that is ours is ready.
    async fn await_claimed(&self, id: &str, progress: &mut (dyn FnMut(StartStage) + Send)) -> Result<ClaimOutcome> {
        let Some(row) = self.store().vm_by_id(id)? else {
            return Ok(ClaimOutcome::Broken(Error::new(Code::VmNotRunning, "the VM has just ended")));
        };
        Ok(match self.request_with_stages(&row, &Request::Ready, progress).await {
            Ok(_) => ClaimOutcome::Ready,
            Err(error) => ClaimOutcome::Broken(error),
        })
    }
}
