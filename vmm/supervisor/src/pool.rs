//! A clone of a pool: paused after its identity reset, and handed to the command that claims it.
//!
//! ```text
//!  fork - identity reset - paused (agent.sock closed) - claimed: row - resize - cont - identity reset - agent.sock open
//! ```
//!
//! Invariant: the row belongs to the claimer before the CPUs run again, and names the token that the guest has; so the next
//! supervisor completes an interrupted claim, whichever process was killed.

use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use nido_api::error::{Error, Result};
use nido_api::{ForwardSpec, StartPath, Timings, VmSpec};
use nido_engine::machine::Machine;
use nido_store::{Claim, Origin, VmRow};
use tokio::net::TcpListener;

use super::control::ClaimCommand;
use super::control_server::StartupPhase;
use super::forwards::bind;
use super::launch::RunningQemu;
use super::lifecycle::{AgentReply, Event, taken};
use super::limits::Limits;
use super::loaded_guest::enlarge_disk;
use super::qmp::{QMP_TIMEOUT, qmp_error};
use super::state::{RECORD_JOB, RECORD_TIMEOUT, Supervisor};
use crate::context::write_guest_config;

impl Supervisor {
    /// Makes this clone the claimer's VM. When this returns without an error the row is the VM's, and the guest is on its way to
    /// being ready; else the clone waits on as before.
    pub(super) async fn claim(&mut self, order: ClaimCommand, running: &RunningQemu) -> Result<()> {
        self.lifecycle.admit_claim()?;
        running.monitor()?;
        let spec = VmSpec::from(order.spec.clone());
        let asked_at = Instant::now().checked_sub(Duration::from_secs_f64(order.asked_ms_ago.clamp(0.0, 1e9) / 1000.0));
        let ports = take_ports(&spec.forwards).await?;
        nido_files::failpoint!("claim.ports");
        let row = self.take_row(&order, &spec, &ports)?;
        tracing::info!("the clone {} is VM {} now", self.row.spec.name, row.spec.name);
        nido_files::failpoint!("claim.row");
        self.row = row;
        self.machine = self.row.machine.clone().unwrap_or_else(|| self.machine.clone());
        self.asked_at = asked_at.unwrap_or_else(Instant::now);
        self.life.send_replace(StartupPhase::Booting);
        let now = Instant::now();
        let expires_at = spec.ttl_ms.and_then(|ttl| now.checked_add(Duration::from_millis(ttl)));
        let limits = Limits::new(now, expires_at, spec.idle_ms.map(Duration::from_millis));
        let ready_within = order.ready_within_ms.map_or(self.lifecycle.ready_within(), Duration::from_millis);
        self.step(Event::Claimed(limits, ready_within), running);
        // The row has everything: the owner does not wait for the disk, and the next supervisor would write the record.
        match self.context.prepare_record(&self.row) {
            Ok(write) => self.report_end(self.jobs.start(RECORD_JOB, write), RECORD_TIMEOUT),
            Err(error) => tracing::warn!("the record of VM {} is not up to date: {error}", self.row.id),
        }
        let awake = self.wake(ports, running).await;
        if let Err(error) = awake {
            tracing::error!("the claimed VM cannot be resumed: {error}");
            let why = error.message().chars().take(400).collect();
            self.step(Event::Agent(AgentReply::NotRenewed(why)), running);
        }
        Ok(())
    }

    /// Writes down, in one step, whose the clone is now.
    fn take_row(&self, order: &ClaimCommand, spec: &VmSpec, ports: &[(ForwardSpec, TcpListener)]) -> Result<VmRow> {
        let Origin::Fork(mut saved) = self.row.origin.clone() else {
            return Err(Error::internal("a clone that was not forked"));
        };
        // The token that the guest accepts until the next identity reset.
        saved.token = nido_api::hex::encode(self.guest.token());
        // A clone waits with the network of its pool; its rules are those of its owner.
        let machine = Machine {
            reason: order.reason.clone(),
            warnings: order.warnings.clone(),
            net: spec.net,
            ..self.machine.clone()
        };
        let now = Timestamp::now();
        let life = |ttl| SignedDuration::from_millis(i64::try_from(ttl).unwrap_or(i64::MAX));
        let forwards: Vec<_> = ports.iter().map(|(bound, _)| bound.clone()).collect();
        let claim = Claim {
            spec,
            disk_bytes: order.disk_bytes,
            machine: &machine,
            origin: &Origin::Fork(saved),
            forwards: &forwards,
            now,
            expires_at: spec.ttl_ms.and_then(|ttl| now.checked_add(life(ttl)).ok()),
            ticket: &order.ticket,
            owner: order.owner.as_deref(),
            max_vms: order.max_vms,
        };
        let store = self.context.store();
        if !store.claim_vm(&self.row.id, &claim)? {
            return Err(taken());
        }
        store.vm_by_id(&self.row.id)?.ok_or_else(taken)
    }

    /// Resumes the guest, and resets its identity for its new owner.
    async fn wake(&mut self, ports: Vec<(ForwardSpec, TcpListener)>, running: &RunningQemu) -> Result<()> {
        write_guest_config(&self.dir, &self.row, &self.machine)?;
        self.guest = self.context.guest(&self.row)?;
        nido_files::failpoint!("claim.config");
        self.apply_network_policy().await?;
        enlarge_disk(&self.row, running.monitor()?).await?;
        running.monitor()?.cont(QMP_TIMEOUT).await.map_err(|e| qmp_error(&e))?;
        nido_files::failpoint!("claim.resumed");
        self.step(Event::Woken, running);
        let awake_ms = self.since_request_ms();
        let timings =
            Timings { path: StartPath::Pool, qemu_ms: awake_ms, load_ms: awake_ms, agent_ms: 0.0, total_ms: 0.0 };
        self.row.timings = Some(timings);
        for (bound, listener) in ports {
            self.forwards.start(bound, listener, self.guest.clone(), self.forward_users());
        }
        self.awaited = Some(self.watch_for_agent(running));
        Ok(())
    }
}

async fn take_ports(forwards: &[ForwardSpec]) -> Result<Vec<(ForwardSpec, TcpListener)>> {
    let mut ports = Vec::with_capacity(forwards.len());
    for spec in forwards {
        ports.push(bind(spec).await?);
    }
    Ok(ports)
}
