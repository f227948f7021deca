//! The table `deliveries`: pending webhook messages, written with the event itself.
//!
//! ```text
//!  append ──> queue ──> pending ──due──> an attempt ──record_attempts──> delivered
//!                          ^                          │
//!                          ├──── again, later ────────┤
//!                          └──── redeliver ──── failed <┘  given up, or the endpoint is gone
//! ```
//!
//! Invariant: of each lane (an endpoint, and a VM or a template) the first pending delivery has a `due_ms`, and no other
//! has. So the delivery worker sends in order, and finds what is due without reading what waits behind it.

use nido_api::error::{Code, Error, Result};
use nido_api::{DeliveryState, Event, WebhookBody, encode_webhook_body};
use rusqlite::{OptionalExtension, params};

use super::{Store, decode, fault, readable};

/// Finished deliveries older than this are deleted, in milliseconds: 7 days.
const RETENTION_MS: i64 = 7 * 24 * 3600 * 1000;
/// So many of an endpoint's finished deliveries are kept at most.
const DELIVERIES_MAX: u32 = 1000;

/// A delivery that is to be attempted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DueDelivery {
    /// Its number.
    pub id: i64,
    /// The cursor of its event.
    pub cursor: u64,
    /// The body, as it was written with the event.
    pub body: String,
    /// How often it was attempted.
    pub attempts: u32,
    /// When it was queued, in milliseconds since 1970.
    pub queued_ms: i64,
}

/// An attempt that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// The delivery.
    pub id: i64,
    /// How often it was attempted, this attempt included.
    pub attempts: u32,
    /// The HTTP status, if there was an answer.
    pub status: Option<u16>,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The endpoint took it.
    Delivered,
    /// It is attempted again.
    Again {
        /// When, in milliseconds since 1970.
        at_ms: i64,
        /// Until when the endpoint requested a pause, if it did; in milliseconds since 1970.
        rests_until_ms: Option<i64>,
        /// Why.
        why: String,
    },
    /// It is given up.
    Failed {
        /// Why.
        why: String,
    },
    /// The endpoint does not want to be sent anything any more.
    Gone {
        /// How it requested that.
        why: String,
    },
}

impl Store {
    /// Writes a delivery of an event for every endpoint that selects it, in the open transaction.
    pub(super) fn queue(&self, event: &Event) -> Result<()> {
        let query = "SELECT id, events FROM webhooks WHERE disabled IS NULL";
        let mut statement = self.connection.prepare_cached(query).map_err(fault)?;
        let rows = statement.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)));
        let mut body = None;
        for row in rows.map_err(fault)? {
            let (webhook_id, events) = row.map_err(fault)?;
            // Words, not kinds: neither a kind that this version does not know nor a damaged row may keep the change that the
            // event is about from being made.
            let events: Result<Vec<String>> = decode("events", &events);
            let Some(events) = readable("webhooks", events) else { continue };
            if !events.is_empty() && !events.iter().any(|word| word == event.event.word()) {
                continue;
            }
            if body.is_none() {
                body = Some(encode_webhook_body(&WebhookBody::of(event))?);
            }
            let insert = "INSERT INTO deliveries (webhook_id, lane, event, cursor, body, created_ms, queued_ms, due_ms) \
                          VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?6, CASE WHEN EXISTS (SELECT 1 FROM deliveries \
                          WHERE webhook_id = ?1 AND lane = ?2 AND state = 'pending') THEN NULL ELSE ?6 END)";
            let (cursor, now) = (event.cursor.cast_signed(), event.timestamp.as_millisecond());
            let values = params![webhook_id, lane(event), event.event.word(), cursor, body, now];
            self.connection.prepare_cached(insert).and_then(|mut insert| insert.execute(values)).map_err(fault)?;
            self.queued.set(true);
        }
        Ok(())
    }

    /// Whether a delivery was queued through this store since this was asked for the last time.
    pub fn take_queued(&self) -> bool {
        self.queued.take()
    }

    /// Whether any delivery is pending. Quick.
    ///
    /// # Errors
    /// Of the store.
    pub fn has_pending(&self) -> Result<bool> {
        let query = "SELECT EXISTS (SELECT 1 FROM deliveries WHERE due_ms IS NOT NULL)";
        self.connection.query_row(query, [], |row| row.get(0)).map_err(fault)
    }

    /// The first `limit` deliveries of an endpoint that are due. None while it wants to be left alone.
    ///
    /// # Errors
    /// Of the store.
    pub fn due(&self, webhook_id: &str, now_ms: i64, limit: usize) -> Result<Vec<DueDelivery>> {
        let query = "SELECT id, cursor, body, attempts, queued_ms FROM deliveries \
                     WHERE webhook_id = ?1 AND due_ms <= ?2 AND NOT EXISTS (SELECT 1 FROM webhooks \
                     WHERE id = ?1 AND rests_until_ms > ?2) ORDER BY due_ms LIMIT ?3";
        let mut statement = self.connection.prepare_cached(query).map_err(fault)?;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = statement.query_map(params![webhook_id, now_ms, limit], |row| {
            Ok(DueDelivery {
                id: row.get(0)?,
                cursor: row.get::<_, i64>(1)?.unsigned_abs(),
                body: row.get(2)?,
                attempts: row.get(3)?,
                queued_ms: row.get(4)?,
            })
        });
        rows.map_err(fault)?.collect::<Result<_, _>>().map_err(fault)
    }

    /// When an endpoint's next delivery is due that is not due yet, in milliseconds since 1970.
    ///
    /// # Errors
    /// Of the store.
    pub fn next_due(&self, webhook_id: &str, now_ms: i64) -> Result<Option<i64>> {
        let query = "WITH w (rest) AS (SELECT coalesce(rests_until_ms, 0) FROM webhooks WHERE id = ?1) \
                     SELECT max(min(due_ms), rest) FROM deliveries, w WHERE webhook_id = ?1 AND max(due_ms, rest) > ?2";
        let mut statement = self.connection.prepare_cached(query).map_err(fault)?;
        statement.query_row(params![webhook_id, now_ms], |row| row.get(0)).map_err(fault)
    }

    /// Records what came of attempts.
    ///
    /// # Errors
    /// Of the store; then nothing is written.
    pub fn record_attempts(&self, attempts: &[Attempt], now_ms: i64) -> Result<()> {
        self.in_transaction(|| attempts.iter().try_for_each(|attempt| self.record_attempt(attempt, now_ms)))
    }

    fn record_attempt(&self, attempt: &Attempt, now_ms: i64) -> Result<()> {
        let Attempt { id, attempts, status, outcome } = attempt;
        let (state, due, why) = match outcome {
            Outcome::Delivered => (DeliveryState::Delivered, None, None),
            Outcome::Again { at_ms, why, .. } => (DeliveryState::Pending, Some(*at_ms), Some(why)),
            Outcome::Failed { why } | Outcome::Gone { why } => (DeliveryState::Failed, None, Some(why)),
        };
        let done = (state != DeliveryState::Pending).then_some(now_ms);
        // What was given up while it was under way is delivered nevertheless if it was taken.
        let update = "UPDATE deliveries SET state = ?2, attempts = ?3, due_ms = ?4, last_status = ?5, last_error = ?6, \
                      done_ms = ?7 WHERE id = ?1 AND (state = 'pending' OR ?2 = 'delivered') RETURNING webhook_id, lane";
        let values = params![id, state.word(), attempts, due, status, why, done];
        let mut update = self.connection.prepare_cached(update).map_err(fault)?;
        let lane = update.query_row(values, |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)));
        // It may have been removed meanwhile.
        let Some((webhook_id, lane)) = lane.optional().map_err(fault)? else { return Ok(()) };
        match outcome {
            Outcome::Again { rests_until_ms, .. } => self.postpone(&webhook_id, *rests_until_ms),
            Outcome::Gone { why } => self.disable(&webhook_id, why, now_ms),
            _ => self.next_of_lane(&webhook_id, &lane, now_ms),
        }
    }

    /// Lets the next one of a lane go.
    fn next_of_lane(&self, webhook_id: &str, lane: &str, now_ms: i64) -> Result<()> {
        let update = "UPDATE deliveries SET due_ms = ?3 WHERE due_ms IS NULL AND id = (SELECT min(id) FROM deliveries \
                      WHERE webhook_id = ?1 AND lane = ?2 AND state = 'pending')";
        let mut update = self.connection.prepare_cached(update).map_err(fault)?;
        update.execute(params![webhook_id, lane, now_ms]).map_err(fault).map(drop)
    }

    /// Leaves an endpoint alone until then.
    fn postpone(&self, webhook_id: &str, until_ms: Option<i64>) -> Result<()> {
        let update = "UPDATE webhooks SET rests_until_ms = max(coalesce(rests_until_ms, 0), ?2) WHERE id = ?1";
        match until_ms {
            Some(until_ms) => self.connection.execute(update, params![webhook_id, until_ms]).map_err(fault).map(drop),
            None => Ok(()),
        }
    }

    /// Sends an endpoint nothing any more; what waits for it is given up.
    fn disable(&self, webhook_id: &str, why: &str, now_ms: i64) -> Result<()> {
        let disable = "UPDATE webhooks SET disabled = ?2 WHERE id = ?1";
        self.connection.execute(disable, params![webhook_id, why]).map_err(fault)?;
        let give_up = "UPDATE deliveries SET state = 'failed', due_ms = NULL, last_error = ?2, done_ms = ?3 \
                       WHERE webhook_id = ?1 AND state = 'pending'";
        self.connection.execute(give_up, params![webhook_id, why, now_ms]).map_err(fault).map(drop)
    }

    /// Queues a delivery again, with a fresh series of attempts. One that is pending is due at once, unless it waits for
    /// another one ahead of it; a finished one waits for no other, and no other waits for it. A caller that requests that knows better than
    /// the endpoint whether it wants to be left alone.
    ///
    /// # Errors
    /// `webhook_not_found`, `webhook_invalid` if its endpoint is disabled.
    pub fn redeliver(&self, id: u64, now_ms: i64) -> Result<()> {
        self.in_transaction(|| {
            let delivery = self.delivery(id)?;
            let webhook = self.webhook(&delivery.webhook_id)?;
            if let Some(why) = webhook.disabled {
                return Err(Error::new(Code::WebhookInvalid, format!("webhook {} is disabled: {why}", webhook.id))
                    .hint("remove it, and add the endpoint again"));
            }
            let update = "UPDATE deliveries SET attempts = 0, queued_ms = ?2, state = 'pending', done_ms = NULL, \
                          due_ms = CASE WHEN state = 'pending' AND due_ms IS NULL THEN NULL ELSE ?2 END, \
                          lane = CASE WHEN state = 'pending' THEN lane ELSE 'again:' || id END WHERE id = ?1";
            self.connection.execute(update, params![id.cast_signed(), now_ms]).map_err(fault)?;
            let wake = "UPDATE webhooks SET rests_until_ms = NULL WHERE id = ?1";
            self.connection.execute(wake, [&webhook.id]).map_err(fault)?;
            self.queued.set(true);
            Ok(())
        })
    }

    /// Deletes finished deliveries that are old, or too many.
    ///
    /// # Errors
    /// Of the store.
    pub fn prune_deliveries(&self, now_ms: i64) -> Result<()> {
        for (webhook, _) in self.webhooks()? {
            let old = "DELETE FROM deliveries WHERE webhook_id = ?1 AND done_ms < ?2";
            self.connection.execute(old, params![webhook.id, now_ms - RETENTION_MS]).map_err(fault)?;
            let many = "DELETE FROM deliveries WHERE id IN (SELECT id FROM deliveries WHERE webhook_id = ?1 AND \
                        done_ms IS NOT NULL ORDER BY done_ms DESC, id DESC LIMIT -1 OFFSET ?2)";
            self.connection.execute(many, params![webhook.id, DELIVERIES_MAX]).map_err(fault)?;
        }
        Ok(())
    }
}

/// What an event is about: what is about the same arrives in order.
fn lane(event: &Event) -> String {
    match (&event.details.vm_id, &event.details.template) {
        (Some(vm), _) => format!("vm:{vm}"),
        (None, Some(template)) => format!("template:{template}"),
        (None, None) => String::new(),
    }
}

#[cfg(test)]
mod tests;
