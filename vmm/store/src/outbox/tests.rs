//! What the outbox promises.

use jiff::Timestamp;
use nido_api::{Delivery, EventDetails, EventKind, WebhookFormat, WebhookSecret};
use proptest::prelude::*;

use super::*;
use crate::WebhookRow;

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
        secret: WebhookSecret::new([7; 32]),
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

fn record_attempts(store: &Store, id: i64, outcome: Outcome) {
    store.record_attempts(&[Attempt { id, attempts: 1, status: None, outcome }], 5).unwrap();
}

fn states(store: &Store) -> Vec<(u64, DeliveryState)> {
    store.deliveries(None).unwrap().into_iter().map(|delivery| (delivery.id, delivery.state)).collect()
}

#[test]
fn events_are_queued_only_for_their_webhooks() {
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
    assert_eq!(told, [("all", created, "msg_all_1"), ("all", crashed, "msg_all_2"), ("crash", crashed, "msg_crash_2")]);
    let pending: Vec<_> = store.webhooks().unwrap().into_iter().map(|(_, pending)| pending).collect();
    assert_eq!(pending, [2, 1]);
}

#[test]
fn uncommitted_events_are_not_queued() {
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
    record_attempts(&store, 1, Outcome::Again { rests_until_ms: None, at_ms: i64::MAX - 1, why: "no".into() });
    assert_eq!(due(&store, "w"), [1, 3], "the rest waits behind it");
    assert_eq!(store.due("w", i64::MAX - 2, 9).unwrap().len(), 1);
    assert_eq!(store.next_due("w", Timestamp::now().as_millisecond()).unwrap(), Some(i64::MAX - 1));
    record_attempts(&store, 1, Outcome::Delivered);
    record_attempts(&store, 3, Outcome::Failed { why: "no".into() });
    assert_eq!(due(&store, "w"), [2]);
    record_attempts(&store, 2, Outcome::Delivered);
    record_attempts(&store, 4, Outcome::Delivered);
    assert!(!store.has_pending().unwrap());
}

#[test]
fn a_disabled_endpoint_gets_no_deliveries() {
    let (_dir, store) = open();
    add(&store, "w", &[]);
    add(&store, "other", &[]);
    for vm in ["1", "1", "2"] {
        happen(&store, vm, EventKind::VmPaused);
    }
    record_attempts(&store, 1, Outcome::Gone { why: "410".into() });
    // One that was under way at that moment was taken nevertheless.
    record_attempts(&store, 5, Outcome::Delivered);
    happen(&store, "1", EventKind::VmPaused);
    assert_eq!(due(&store, "w"), [0; 0]);
    assert_eq!(store.webhooks_enabled().unwrap().len(), 1);
    assert_eq!(store.webhook("w").unwrap().disabled.as_deref(), Some("410"));
    assert_eq!(store.redeliver(1, 5).unwrap_err().code(), Code::WebhookInvalid);
    let of_w: Vec<_> = store.deliveries(Some("w")).unwrap().into_iter().map(|delivery| delivery.state).collect();
    assert_eq!(of_w, [DeliveryState::Failed, DeliveryState::Failed, DeliveryState::Delivered]);
}

#[test]
fn a_pause_applies_to_one_whole_endpoint() {
    let (_dir, store) = open();
    add(&store, "w", &[]);
    add(&store, "other", &[]);
    for vm in ["1", "2", "2"] {
        happen(&store, vm, EventKind::VmPaused);
    }
    let of = |webhook: &str, at: i64| store.due(webhook, at, 9).unwrap().len();
    let (now, until) = (Timestamp::now().as_millisecond() + 1, 1 << 47);
    assert_eq!((of("w", now), of("other", now)), (2, 2));
    let first = store.due("w", now, 9).unwrap()[0].id;
    let again = |until| Outcome::Again { rests_until_ms: until, at_ms: now + 9, why: "429".into() };
    record_attempts(&store, first, again(Some(until)));
    assert_eq!((of("w", now), of("w", until - 1), of("other", now)), (0, 0, 2));
    happen(&store, "3", EventKind::VmPaused);
    assert_eq!((of("w", until - 1), of("w", until)), (0, 3), "also of what came later");
    assert_eq!(store.next_due("w", now).unwrap(), Some(until));
    let next: Vec<_> =
        store.deliveries(Some("w")).unwrap().into_iter().filter_map(|delivery| delivery.next_at).collect();
    assert_eq!(next, [Timestamp::from_millisecond(until).unwrap(); 3]);
    // A shorter pause does not end a longer one, but a user's request does.
    record_attempts(&store, first, again(Some(until - 5)));
    assert_eq!(of("w", until - 1), 0);
    store.redeliver(first.unsigned_abs(), now).unwrap();
    assert_eq!(of("w", now + 1000), 3);
}

#[test]
fn a_redelivery_does_not_wait_and_does_not_block() {
    let (_dir, store) = open();
    add(&store, "w", &[]);
    for _ in 0..3 {
        happen(&store, "1", EventKind::VmPaused);
    }
    record_attempts(&store, 1, Outcome::Failed { why: "no".into() });
    store.take_queued();
    store.redeliver(1, 7).unwrap();
    assert!(store.take_queued());
    assert_eq!(due(&store, "w"), [1, 2]);
    let again: Delivery = store.delivery(1).unwrap();
    assert_eq!((again.state, again.attempts, again.message_id.as_str()), (DeliveryState::Pending, 0, "msg_w_1"));
    // One that waits behind another keeps waiting, one that was to wait is due.
    record_attempts(&store, 2, Outcome::Again { rests_until_ms: None, at_ms: 1 << 47, why: "no".into() });
    store.redeliver(3, 7).unwrap();
    store.redeliver(2, 7).unwrap();
    assert_eq!(store.due("w", 8, 9).unwrap().len(), 2);
    assert_eq!(store.redeliver(99, 7).unwrap_err().code(), Code::WebhookNotFound);
}

#[test]
fn pending_deliveries_are_deleted_with_their_endpoint() {
    let (_dir, store) = open();
    add(&store, "w", &[]);
    happen(&store, "1", EventKind::VmPaused);
    store.remove_webhook("w").unwrap();
    record_attempts(&store, 1, Outcome::Delivered);
    assert!(!store.has_pending().unwrap() && states(&store).is_empty());
    assert_eq!(store.remove_webhook("w").unwrap_err().code(), Code::WebhookNotFound);
    for number in 0..nido_api::WEBHOOKS_MAX {
        add(&store, &number.to_string(), &[]);
    }
    let many = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| add(&store, "more", &[])));
    assert!(many.is_err());
}

#[test]
fn finished_deliveries_are_kept_for_a_while() {
    let (_dir, store) = open();
    add(&store, "w", &[]);
    for number in 0..i64::from(DELIVERIES_MAX) + 20 {
        happen(&store, "1", EventKind::VmPaused);
        record_attempts(&store, number + 1, Outcome::Delivered);
    }
    happen(&store, "1", EventKind::VmPaused);
    store.prune_deliveries(5).unwrap();
    let query = "SELECT count(*), min(id) FROM deliveries";
    let left = || store.connection.query_row(query, [], |row| Ok((row.get::<_, u32>(0)?, row.get::<_, u32>(1)?)));
    assert_eq!(left().unwrap(), (DELIVERIES_MAX + 1, 21));
    store.prune_deliveries(RETENTION_MS + 6).unwrap();
    assert_eq!(left().unwrap().0, 1, "what is pending stays");
}

#[test]
fn the_delivery_workers_queries_use_indexes() {
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
                2 => record_attempts(&store, id, Outcome::Delivered),
                3 if due(&store, "w").contains(&id) => record_attempts(&store, id, Outcome::Again { rests_until_ms: None, at_ms: 9, why: "no".into() }),
                4 => record_attempts(&store, id, Outcome::Failed { why: "no".into() }),
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
