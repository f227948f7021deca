//! The delivery worker: takes due deliveries, attempts them, records the results, until nothing is pending.
//!
//! Invariants: of a lane the next delivery is begun after the one before has been recorded. Each endpoint has its own
//! [`CONCURRENT_DELIVERIES_MAX`] and nothing that endpoints share runs out, so a slow one delays no other. A result that cannot be written
//! is kept, and nothing new is begun until it is.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use nido_api::error::Result;
use nido_api::webhook_message_id;
use nido_files::random;
use nido_store::{Attempt, DueDelivery, Outcome, WebhookRow};
use tokio::task::{AbortHandle, Id, JoinSet};

use super::{Nido, Watch};
use crate::webhook::{AttemptResult, FailedDelivery, RETRY_AFTER_MAX_MS, Sender, Verdict, next_attempt};

/// How many messages one endpoint is sent at the same time, each of another lane.
const CONCURRENT_DELIVERIES_MAX: usize = 8;
/// How often old deliveries are deleted, in results.
const PRUNE_INTERVAL: usize = 500;
/// How often a result is written again that could not be, a second apart.
const WRITES_MAX: u32 = 60;

/// Delivers everything there is. The caller holds the lock.
///
/// # Errors
/// Of the store.
pub async fn drain(nido: &Nido) -> Result<()> {
    let mut queue = DeliveryQueue::default();
    let mut watch = Watch::new(nido);
    nido.store().prune_deliveries(now_ms())?;
    loop {
        let next = queue.begin(nido)?;
        if queue.flights.is_empty() && !nido.store().has_pending()? {
            break;
        }
        queue.wait(&mut watch, next).await;
        queue.record_results(nido).await?;
    }
    nido.store().prune_deliveries(now_ms())
}

fn now_ms() -> i64 {
    Timestamp::now().as_millisecond()
}

/// A message that is under way.
#[derive(Debug)]
struct PendingDelivery {
    delivery: i64,
    webhook_id: String,
    attempts: u32,
    queued_ms: i64,
    abort: AbortHandle,
}

/// The delivery worker's current deliveries.
#[derive(Debug, Default)]
struct DeliveryQueue {
    senders: HashMap<String, Arc<Sender>>,
    tasks: JoinSet<AttemptResult>,
    flights: HashMap<Id, PendingDelivery>,
    landed: Vec<(PendingDelivery, AttemptResult)>,
    settled: usize,
}

impl DeliveryQueue {
    /// Begins what is due. Returns when the next is, in milliseconds since 1970.
    fn begin(&mut self, nido: &Nido) -> Result<Option<i64>> {
        let webhooks = nido.store().webhooks_enabled()?;
        self.drop_removed_webhooks(&webhooks);
        let now = now_ms();
        let mut next: Option<i64> = None;
        for webhook in &webhooks {
            let under_way = self.flights.values().filter(|flight| flight.webhook_id == webhook.id).count();
            // What is under way is due as well.
            if under_way < CONCURRENT_DELIVERIES_MAX {
                let due = nido.store().due(&webhook.id, now, CONCURRENT_DELIVERIES_MAX)?;
                let known = |due: &DueDelivery| self.flights.values().any(|flight| flight.delivery == due.id);
                let fresh: Vec<_> =
                    due.into_iter().filter(|due| !known(due)).take(CONCURRENT_DELIVERIES_MAX - under_way).collect();
                fresh.into_iter().for_each(|due| self.send(webhook, due));
            }
            let later = nido.store().next_due(&webhook.id, now)?;
            next = next.into_iter().chain(later).min();
        }
        Ok(next)
    }

    /// Drops what belongs to endpoints that were removed or disabled.
    fn drop_removed_webhooks(&mut self, webhooks: &[WebhookRow]) {
        let is_there = |id: &str| webhooks.iter().any(|webhook| webhook.id == id);
        self.senders.retain(|id, _| is_there(id));
        for flight in self.flights.values().filter(|flight| !is_there(&flight.webhook_id)) {
            flight.abort.abort();
        }
    }

    fn send(&mut self, webhook: &WebhookRow, due: DueDelivery) {
        let sender = match self.senders.get(&webhook.id) {
            Some(sender) => Ok(sender.clone()),
            None => Sender::new(webhook).map(Arc::new),
        };
        if let Ok(sender) = &sender {
            self.senders.entry(webhook.id.clone()).or_insert_with(|| sender.clone());
        }
        let DueDelivery { id: delivery, cursor, body, attempts, queued_ms } = due;
        let message_id = webhook_message_id(&webhook.id, cursor);
        let abort = self.tasks.spawn(async move {
            match sender {
                Ok(sender) => sender.post(&message_id, body).await,
                Err(error) => AttemptResult::none(error.message()),
            }
        });
        let (webhook_id, attempts) = (webhook.id.clone(), attempts.saturating_add(1));
        self.flights.insert(abort.id(), PendingDelivery { delivery, webhook_id, attempts, queued_ms, abort });
    }

    /// Waits until something has landed, something is due, or something was written.
    async fn wait(&mut self, watch: &mut Watch, next_ms: Option<i64>) {
        let pause = next_ms.map(|at| Duration::from_millis((at - now_ms()).max(0).unsigned_abs()));
        tokio::select! {
            Some(landed) = self.tasks.join_next_with_id() => self.land(landed),
            () = watch.changed() => {}
            () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => {}
        }
        while let Some(landed) = self.tasks.try_join_next_with_id() {
            self.land(landed);
        }
    }

    fn land(&mut self, landed: Result<(Id, AttemptResult), tokio::task::JoinError>) {
        let (id, answer) = match landed {
            Ok((id, answer)) => (id, answer),
            Err(error) if error.is_cancelled() => {
                self.flights.remove(&error.id());
                return;
            }
            Err(error) => (error.id(), AttemptResult::none("nido failed while it sent the message")),
        };
        if let Some(flight) = self.flights.remove(&id) {
            self.landed.push((flight, answer));
        }
    }

    /// Records what has landed.
    async fn record_results(&mut self, nido: &Nido) -> Result<()> {
        if self.landed.is_empty() {
            return Ok(());
        }
        nido_files::failpoint!("delivery.answered");
        let now = now_ms();
        let attempts: Vec<_> = self.landed.drain(..).map(|(flight, answer)| judge(&flight, answer, now)).collect();
        let mut tries = 0;
        loop {
            // The store is released before any wait.
            let written = nido.store().record_attempts(&attempts, now);
            let Err(error) = written else { break };
            tries += 1;
            if tries == WRITES_MAX {
                return Err(error);
            }
            tracing::warn!("results of deliveries cannot be stored yet: {error}");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        self.settled += attempts.len();
        if self.settled >= PRUNE_INTERVAL {
            self.settled = 0;
            nido.store().prune_deliveries(now)?;
        }
        Ok(())
    }
}

/// What comes of an attempt, by the answer and the delivery's history.
fn judge(flight: &PendingDelivery, answer: AttemptResult, now_ms: i64) -> Attempt {
    let PendingDelivery { delivery: id, attempts, queued_ms, .. } = *flight;
    let outcome = match answer.verdict {
        Verdict::Delivered => Outcome::Delivered,
        Verdict::Gone => {
            let why = "the endpoint responded 410 Gone".to_owned();
            tracing::warn!("webhook {} is disabled: {why}", flight.webhook_id);
            Outcome::Gone { why }
        }
        Verdict::Again { why, retry_after_ms } => {
            let failed = FailedDelivery { attempts, queued_ms, now_ms, retry_after_ms };
            match next_attempt(&failed, chance()) {
                Some(at_ms) => {
                    tracing::debug!("delivery {id} failed: {why}");
                    let asked = retry_after_ms.map(|ms| ms.clamp(0, RETRY_AFTER_MAX_MS));
                    Outcome::Again { at_ms, rests_until_ms: asked.map(|ms| now_ms.saturating_add(ms)), why }
                }
                None => {
                    tracing::warn!("delivery {id} failed permanently after {attempts} attempts: {why}");
                    Outcome::Failed { why }
                }
            }
        }
    };
    Attempt { id, attempts, status: answer.status, outcome }
}

/// A random number from 0 to 1; 0.5 without a source of random numbers.
fn chance() -> f64 {
    random::bytes().map_or(0.5, |bytes| f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX))
}
