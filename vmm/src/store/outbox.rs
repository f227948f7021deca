//! The table `deliveries`: what still has to be told to whom, written with the event itself.
//!
//! ```text
//!  append ──> queue ──> pending ──due──> an attempt ──settle──> delivered
//!                          ^                          │
//!                          ├──── again, later ────────┤
//!                          └──── redeliver ──── failed <┘  given up, or the endpoint is gone
//! ```
//!
//! Invariant: of each lane (an endpoint, and a VM or a template) the first pending delivery has a `due_ms`, and no other
//! has. So whoever takes what is due sends in order, and finds it without a look at what waits behind.

use rusqlite::{OptionalExtension, params};

use super::{Store, decode, fault};
use crate::api::{DeliveryState, Event, EventKind};
use crate::error::{Code, Error, Result};
use crate::webhook::{Body, encode_body};

/// Finished deliveries older than this are forgotten, in milliseconds: 7 days.
const KEPT_MS: i64 = 7 * 24 * 3600 * 1000;
/// So many of an endpoint's finished deliveries are kept at most.
const KEPT: u32 = 1000;

/// A delivery that is to be attempted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Due {
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
        /// How it said so.
        why: String,
    },
}

impl Store {
    /// Writes a delivery of an event for every endpoint that is told of it, into the transaction that is open.
    pub(super) fn queue(&self, event: &Event) -> Result<()> {
        let query = "SELECT id, events FROM webhooks WHERE disabled IS NULL";
        let mut statement = self.connection.prepare_cached(query).map_err(fault)?;
        let rows = statement.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)));
        let mut body = None;
        for row in rows.map_err(fault)? {
            let (webhook_id, events) = row.map_err(fault)?;
            let events: Vec<EventKind> = decode("events", &events)?;
            if !events.is_empty() && !events.contains(&event.event) {
                continue;
            }
            if body.is_none() {
                body = Some(encode_body(&Body::of(event))?);
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

    /// The first `limit` deliveries of an endpoint that are due.
    ///
    /// # Errors
    /// Of the store.
    pub fn due(&self, webhook_id: &str, now_ms: i64, limit: usize) -> Result<Vec<Due>> {
        let query = "SELECT id, cursor, body, attempts, queued_ms FROM deliveries \
                     WHERE webhook_id = ?1 AND due_ms <= ?2 ORDER BY due_ms LIMIT ?3";
        let mut statement = self.connection.prepare_cached(query).map_err(fault)?;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = statement.query_map(params![webhook_id, now_ms, limit], |row| {
            Ok(Due {
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
        let query = "SELECT min(due_ms) FROM deliveries WHERE webhook_id = ?1 AND due_ms > ?2";
        let mut statement = self.connection.prepare_cached(query).map_err(fault)?;
        statement.query_row(params![webhook_id, now_ms], |row| row.get(0)).map_err(fault)
    }

    /// Writes down what came of attempts.
    ///
    /// # Errors
    /// Of the store; then nothing is written.
    pub fn settle(&self, attempts: &[Attempt], now_ms: i64) -> Result<()> {
        self.in_transaction(|| attempts.iter().try_for_each(|attempt| self.settle_one(attempt, now_ms)))
    }

    fn settle_one(&self, attempt: &Attempt, now_ms: i64) -> Result<()> {
        let Attempt { id, attempts, status, outcome } = attempt;
        let (state, due, why) = match outcome {
            Outcome::Delivered => (DeliveryState::Delivered, None, None),
            Outcome::Again { at_ms, why } => (DeliveryState::Pending, Some(*at_ms), Some(why)),
            Outcome::Failed { why } | Outcome::Gone { why } => (DeliveryState::Failed, None, Some(why)),
        };
        let done = (state != DeliveryState::Pending).then_some(now_ms);
        // What was given up while it was under way is delivered all the same if it was taken.
        let update = "UPDATE deliveries SET state = ?2, attempts = ?3, due_ms = ?4, last_status = ?5, last_error = ?6, \
                      done_ms = ?7 WHERE id = ?1 AND (state = 'pending' OR ?2 = 'delivered') RETURNING webhook_id, lane";
        let values = params![id, state.word(), attempts, due, status, why, done];
        let mut update = self.connection.prepare_cached(update).map_err(fault)?;
        let lane = update.query_row(values, |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)));
        // It may have been removed meanwhile.
        let Some((webhook_id, lane)) = lane.optional().map_err(fault)? else { return Ok(()) };
        match outcome {
            Outcome::Again { .. } => Ok(()),
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

    /// Sends an endpoint nothing any more; what waits for it is given up.
    fn disable(&self, webhook_id: &str, why: &str, now_ms: i64) -> Result<()> {
        let disable = "UPDATE webhooks SET disabled = ?2 WHERE id = ?1";
        self.connection.execute(disable, params![webhook_id, why]).map_err(fault)?;
        let give_up = "UPDATE deliveries SET state = 'failed', due_ms = NULL, last_error = ?2, done_ms = ?3 \
                       WHERE webhook_id = ?1 AND state = 'pending'";
        self.connection.execute(give_up, params![webhook_id, why, now_ms]).map_err(fault).map(drop)
    }

    /// Queues a delivery again, with a fresh series of attempts. One that is pending is due at once, unless it waits for
    /// another one ahead of it; one that is finished waits for nobody, and nobody for it.
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
            self.queued.set(true);
            Ok(())
        })
    }

    /// Forgets finished deliveries that are old, or too many.
    ///
    /// # Errors
    /// Of the store.
    pub fn prune_deliveries(&self, now_ms: i64) -> Result<()> {
        for (webhook, _) in self.webhooks()? {
            let old = "DELETE FROM deliveries WHERE webhook_id = ?1 AND done_ms < ?2";
            self.connection.execute(old, params![webhook.id, now_ms - KEPT_MS]).map_err(fault)?;
            let many = "DELETE FROM deliveries WHERE id IN (SELECT id FROM deliveries WHERE webhook_id = ?1 AND \
                        done_ms IS NOT NULL ORDER BY done_ms DESC, id DESC LIMIT -1 OFFSET ?2)";
            self.connection.execute(many, params![webhook.id, KEPT]).map_err(fault)?;
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
mod tests {
    use jiff::Timestamp;
    use proptest::prelude::*;

    use super::*;
    use crate::api::{Delivery, EventDetails, WebhookFormat};
    use crate::store::WebhookRow;
    use crate::webhook::Secret;

    fn open() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        (dir, store)
    }

    fn add(store: &Store, id: &str, events: &[EventKind]) {
        let row = WebhookRow {
            id: id.into(),
            url: "https://example.com/".into(),
            events: events.to_vec(),
            format: WebhookFormat::Slack,
            secret: Secret::new([7; 32]),
            allow_private: true,
            created_at: Timestamp::from_second(1).unwrap(),
            disabled: None,
        };
        store.add_webhook(&row).unwrap();
        assert_eq!(store.webhook(id).unwrap(), row);
    }

    fn happen(store: &Store, vm: &str, event: EventKind) {
        let details = EventDetails { vm_id: Some(vm.into()), ..EventDetails::default() };
        store.in_transaction(|| store.append(event, None, &details)).unwrap();
    }

    fn due(store: &Store, webhook: &str) -> Vec<i64> {
        let mut ids: Vec<_> = store.due(webhook, i64::MAX, 100).unwrap().into_iter().map(|due| due.id).collect();
        ids.sort_unstable();
        ids
    }

    fn settle(store: &Store, id: i64, outcome: Outcome) {
        store.settle(&[Attempt { id, attempts: 1, status: None, outcome }], 5).unwrap();
    }

    fn states(store: &Store) -> Vec<(u64, DeliveryState)> {
        store.deliveries(None).unwrap().into_iter().map(|delivery| (delivery.id, delivery.state)).collect()
    }

    #[test]
    fn whoever_asked_for_an_event_is_told_of_it_and_nobody_else() {
        let (_dir, store) = open();
        add(&store, "all", &[]);
        add(&store, "crash", &[EventKind::VmCrashed]);
        assert!(!store.take_queued() && !store.has_pending().unwrap());
        happen(&store, "1", EventKind::VmCreated);
        happen(&store, "1", EventKind::VmCrashed);
        assert!(store.take_queued() && !store.take_queued() && store.has_pending().unwrap());
        let told = store.deliveries(None).unwrap();
        let told: Vec<_> = told.iter().map(|it| (it.webhook_id.as_str(), it.event, it.message_id.as_str())).collect();
        let (created, crashed) = (EventKind::VmCreated, EventKind::VmCrashed);
        assert_eq!(
            told,
            [("all", created, "msg_all_1"), ("all", crashed, "msg_all_2"), ("crash", crashed, "msg_crash_2")]
        );
        let pending: Vec<_> = store.webhooks().unwrap().into_iter().map(|(_, pending)| pending).collect();
        assert_eq!(pending, [2, 1]);
    }

    #[test]
    fn what_is_not_committed_is_not_queued() {
        let (_dir, store) = open();
        add(&store, "w", &[]);
        let failed: Result<()> = store.in_transaction(|| {
            store.append(EventKind::VmCreated, None, &EventDetails::default())?;
            Err(Error::internal("no"))
        });
        failed.unwrap_err();
        assert_eq!((states(&store), store.last_cursor().unwrap()), (vec![], 0));
    }

    #[test]
    fn a_lane_goes_one_by_one_and_lanes_do_not_wait_for_each_other() {
        let (_dir, store) = open();
        add(&store, "w", &[]);
        for vm in ["1", "1", "2", "1"] {
            happen(&store, vm, EventKind::VmPaused);
        }
        assert_eq!(due(&store, "w"), [1, 3]);
        settle(&store, 1, Outcome::Again { at_ms: i64::MAX - 1, why: "no".into() });
        assert_eq!(due(&store, "w"), [1, 3], "the rest waits behind it");
        assert_eq!(store.due("w", i64::MAX - 2, 9).unwrap().len(), 1);
        assert_eq!(store.next_due("w", Timestamp::now().as_millisecond()).unwrap(), Some(i64::MAX - 1));
        settle(&store, 1, Outcome::Delivered);
        settle(&store, 3, Outcome::Failed { why: "no".into() });
        assert_eq!(due(&store, "w"), [2]);
        settle(&store, 2, Outcome::Delivered);
        settle(&store, 4, Outcome::Delivered);
        assert!(!store.has_pending().unwrap());
    }

    #[test]
    fn an_endpoint_that_is_gone_is_sent_nothing_any_more() {
        let (_dir, store) = open();
        add(&store, "w", &[]);
        add(&store, "other", &[]);
        for vm in ["1", "1", "2"] {
            happen(&store, vm, EventKind::VmPaused);
        }
        settle(&store, 1, Outcome::Gone { why: "410".into() });
        // One that was under way at that moment was taken all the same.
        settle(&store, 5, Outcome::Delivered);
        happen(&store, "1", EventKind::VmPaused);
        assert_eq!(due(&store, "w"), [0; 0]);
        assert_eq!(store.webhooks_enabled().unwrap().len(), 1);
        assert_eq!(store.webhook("w").unwrap().disabled.as_deref(), Some("410"));
        assert_eq!(store.redeliver(1, 5).unwrap_err().code(), Code::WebhookInvalid);
        let of_w: Vec<_> = store.deliveries(Some("w")).unwrap().into_iter().map(|delivery| delivery.state).collect();
        assert_eq!(of_w, [DeliveryState::Failed, DeliveryState::Failed, DeliveryState::Delivered]);
    }

    #[test]
    fn what_is_sent_again_waits_for_nobody_and_nobody_for_it() {
        let (_dir, store) = open();
        add(&store, "w", &[]);
        for _ in 0..3 {
            happen(&store, "1", EventKind::VmPaused);
        }
        settle(&store, 1, Outcome::Failed { why: "no".into() });
        store.take_queued();
        store.redeliver(1, 7).unwrap();
        assert!(store.take_queued());
        assert_eq!(due(&store, "w"), [1, 2]);
        let again: Delivery = store.delivery(1).unwrap();
        assert_eq!((again.state, again.attempts, again.message_id.as_str()), (DeliveryState::Pending, 0, "msg_w_1"));
        // One that waits behind another goes on waiting, one that was to wait is due.
        settle(&store, 2, Outcome::Again { at_ms: 1 << 47, why: "no".into() });
        store.redeliver(3, 7).unwrap();
        store.redeliver(2, 7).unwrap();
        assert_eq!(store.due("w", 8, 9).unwrap().len(), 2);
        assert_eq!(store.redeliver(99, 7).unwrap_err().code(), Code::WebhookNotFound);
    }

    #[test]
    fn with_an_endpoint_goes_what_waits_for_it() {
        let (_dir, store) = open();
        add(&store, "w", &[]);
        happen(&store, "1", EventKind::VmPaused);
        store.remove_webhook("w").unwrap();
        settle(&store, 1, Outcome::Delivered);
        assert!(!store.has_pending().unwrap() && states(&store).is_empty());
        assert_eq!(store.remove_webhook("w").unwrap_err().code(), Code::WebhookNotFound);
        for number in 0..crate::api::WEBHOOKS_MAX {
            add(&store, &number.to_string(), &[]);
        }
        let many = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| add(&store, "more", &[])));
        assert!(many.is_err());
    }

    #[test]
    fn what_is_finished_is_kept_for_a_while() {
        let (_dir, store) = open();
        add(&store, "w", &[]);
        for number in 0..i64::from(KEPT) + 20 {
            happen(&store, "1", EventKind::VmPaused);
            settle(&store, number + 1, Outcome::Delivered);
        }
        happen(&store, "1", EventKind::VmPaused);
        store.prune_deliveries(5).unwrap();
        let query = "SELECT count(*), min(id) FROM deliveries";
        let left = || store.connection.query_row(query, [], |row| Ok((row.get::<_, u32>(0)?, row.get::<_, u32>(1)?)));
        assert_eq!(left().unwrap(), (KEPT + 1, 21));
        store.prune_deliveries(KEPT_MS + 6).unwrap();
        assert_eq!(left().unwrap().0, 1, "what is pending stays");
    }

    #[test]
    fn no_question_of_the_deliverer_looks_at_everything() {
        let (_dir, store) = open();
        for query in [
            "SELECT id FROM deliveries WHERE webhook_id = 'a' AND due_ms <= 1 ORDER BY due_ms LIMIT 8",
            "SELECT min(due_ms) FROM deliveries WHERE webhook_id = 'a' AND due_ms > 1",
            "SELECT EXISTS (SELECT 1 FROM deliveries WHERE due_ms IS NOT NULL)",
            "SELECT min(id) FROM deliveries WHERE webhook_id = 'a' AND lane = 'b' AND state = 'pending'",
            "SELECT id FROM deliveries WHERE webhook_id = 'a' AND done_ms < 1",
            "SELECT id FROM deliveries WHERE webhook_id = 'a' AND done_ms IS NOT NULL ORDER BY done_ms DESC, id DESC LIMIT 9",
        ] {
            let explain = format!("EXPLAIN QUERY PLAN {query}");
            let plan: Vec<String> = store
                .connection
                .prepare(&explain)
                .unwrap()
                .query_map([], |row| row.get(3))
                .unwrap()
                .map(Result::unwrap)
                .collect();
            let plan = plan.join("; ");
            assert!(plan.contains("INDEX deliveries_") && !plan.contains("TEMP"), "{query}: {plan}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Whatever happens in whatever order, of each lane the first pending one is due and no other.
        #[test]
        fn the_first_of_each_lane_is_due(steps in proptest::collection::vec((0..6u8, 0..12i64, 0..3u8), 1..60)) {
            let (_dir, store) = open();
            add(&store, "w", &[]);
            for (what, id, vm) in steps {
                match what {
                    0 | 1 => happen(&store, &vm.to_string(), EventKind::VmPaused),
                    2 => settle(&store, id, Outcome::Delivered),
                    3 if due(&store, "w").contains(&id) => settle(&store, id, Outcome::Again { at_ms: 9, why: "no".into() }),
                    4 => settle(&store, id, Outcome::Failed { why: "no".into() }),
                    5 => drop(store.redeliver(id.unsigned_abs(), 9)),
                    _ => {}
                }
                let wrong = "SELECT count(*) FROM deliveries d WHERE (due_ms IS NOT NULL) <> (state = 'pending' AND id = \
                             (SELECT min(id) FROM deliveries o WHERE o.webhook_id = d.webhook_id AND o.lane = d.lane AND \
                              o.state = 'pending'))";
                let wrong: u32 = store.connection.query_row(wrong, [], |row| row.get(0)).unwrap();
                prop_assert_eq!(wrong, 0);
            }
        }
    }
}
