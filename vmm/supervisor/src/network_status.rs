//! What the supervisor asks its VM's network for, and records of it.

use std::pin::pin;
use std::time::Duration;

use nido_api::egress::{Denial, NetworkInfo};
use nido_api::error::{Code, Error, Result};
use nido_engine::home::NAME_PINS;
use nido_net::UseReport;
use nido_net::names::PinRecord;
use nido_store::{Transition, TransitionOutcome};
use tokio::time::timeout;

use super::name_pins;
use super::network::policy;
use super::old_connections;
use super::recorded_limits;
use super::state::{Report, Supervisor};

/// How long the engine may take to reply.
const REPLY_TIMEOUT: Duration = Duration::from_secs(2);
/// The job that stores what the guest has resolved, and after how long that is worth a warning.
const PINS_JOB: &str = "storing what the guest has resolved";
const PINS_TIMEOUT: Duration = Duration::from_secs(30);
/// How many refusals are reported with the VM.
const DENIALS_SHOWN: usize = 20;

impl Supervisor {
    /// Has the network follow the VM's row. When this returns, nothing else is allowed any more.
    ///
    /// # Errors
    /// The network does not reply.
    pub(super) async fn apply_network_policy(&self) -> Result<()> {
        let Some(network) = &self.network else { return Ok(()) };
        match timeout(REPLY_TIMEOUT, network.set_policy(policy(&self.row))).await {
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => Err(Error::internal("the VM's network does not take its rules")),
        }
    }

    /// Has the network follow the rules that the store has now.
    ///
    /// # Errors
    /// The row cannot be read, or the network does not reply.
    pub(super) async fn apply_stored_rules(&mut self) -> Result<()> {
        let row = self.context.store().vm_by_id(&self.row.id)?;
        let row = row.ok_or_else(|| Error::new(Code::VmNotRunning, "the VM has just been deleted"))?;
        if let Some(why) = row.unreadable {
            return Err(Error::new(Code::StoreDamaged, format!("the VM's row in the store cannot be read: {why}")));
        }
        self.row.spec.allow = row.spec.allow;
        self.row.spec.presets = row.spec.presets;
        nido_files::failpoint!("net.applying");
        self.apply_network_policy().await
    }

    /// What the network has done.
    pub(super) async fn network_info(&self) -> Option<NetworkInfo> {
        let report = timeout(REPLY_TIMEOUT, self.network.as_ref()?.report()).await.ok()??;
        Some(NetworkInfo {
            sent_bytes: report.sent_bytes,
            received_bytes: report.received_bytes,
            connections: report.connections,
            open: report.open as u64,
            denied: report.denied,
            denials: report.denials.into_iter().take(DENIALS_SHOWN).collect(),
        })
    }

    /// Has the guest asked, once, for connections that this network does not know, so that they are reset.
    pub(super) fn find_old_connections(&mut self) {
        if !std::mem::take(&mut self.has_old_connections) {
            return;
        }
        let (guest, reports) = (self.guest.clone(), self.reports.0.clone());
        tokio::spawn(async move {
            match old_connections::list(&guest).await {
                Ok(ends) => drop(reports.send(Report::OldConnections(ends)).await),
                Err(error) => tracing::warn!("the guest does not report its old connections: {error}"),
            }
        });
    }

    /// Stores what the guest has resolved. If the disk is slow, the change after this one is stored with it.
    pub(super) fn keep_pins(&self, pins: Vec<PinRecord>) {
        if self.jobs.is_running(PINS_JOB) {
            return;
        }
        let path = self.dir.file(NAME_PINS);
        let job = self.jobs.start(PINS_JOB, move || name_pins::write(&path, &name_pins::encode_new(pins)?));
        self.report_end(job, PINS_TIMEOUT);
    }

    /// Records uses of a secret. The request waits for it: what the store does not take now is refused, and not repeated.
    pub(super) fn on_secret_used(&mut self, report: UseReport) {
        tracing::info!("{} requests use the secret {}", report.requests, report.used);
        self.flush();
        let is_recorded = self.unwritten.is_empty() && {
            let used = Transition::SecretUsed(Box::new(report.used), report.requests);
            match self.context.store().transition(&self.row.id, &used) {
                Ok(outcome) => outcome == TransitionOutcome::Yes,
                Err(error) => {
                    tracing::error!("the use of a secret cannot be recorded: {error}");
                    false
                }
            }
        };
        let _ = report.recorded.send(is_recorded);
    }

    /// Has the uses of secrets recorded that were only counted: the VM ends.
    pub(super) async fn record_counted_uses(&mut self) {
        let Some(network) = self.network.clone().filter(|_| self.certificate.is_some()) else { return };
        let mut taken = pin!(timeout(REPLY_TIMEOUT, network.take_uses()));
        let uses = loop {
            tokio::select! {
                uses = &mut taken => break uses.ok().flatten().unwrap_or_default(),
                // A request that waits for its record keeps the counts locked.
                Some(report) = self.reports.1.recv() => {
                    if let Report::SecretUsed(report) = report {
                        self.on_secret_used(*report);
                    }
                }
            }
        };
        for (used, requests) in uses {
            self.unwritten.push(Transition::SecretUsed(Box::new(used), requests));
        }
    }

    /// Records a refusal.
    pub(super) fn on_denied(&mut self, denial: Box<Denial>) {
        tracing::info!(reason = denial.reason.name(), "the network refused {}", denial.what());
        let hit = recorded_limits::of_denial(&denial);
        self.write(Transition::NetDenied(denial));
        hit.into_iter().for_each(|hit| self.on_limit_hit(hit));
    }
}
