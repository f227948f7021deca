//! The table `webhooks`: endpoints and their events; and lists of their deliveries.

use jiff::Timestamp;
use nido_api::error::{Code, Error, Hint, Result};
use nido_api::operation as op;
use nido_api::{
    DELIVERIES_MAX, Delivery, DeliveryCounts, DeliveryState, EventKind, WEBHOOKS_MAX, WebhookFormat, WebhookInfo,
    WebhookSecret, webhook_message_id,
};
use rusqlite::{OptionalExtension, Row, params};

use super::{Store, decode, encode, fault, readable_rows};

/// One endpoint as the store knows it. All but `disabled` never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebhookRow {
    /// Its id.
    pub id: String,
    /// Where messages are posted.
    pub url: String,
    /// The events that it selects; empty means all.
    pub events: Vec<EventKind>,
    /// What it is sent.
    pub format: WebhookFormat,
    /// What its messages are signed with.
    pub secret: WebhookSecret,
    /// Whether it may lie in a private network or on this very host.
    pub allow_private: bool,
    /// When it was added.
    pub created_at: Timestamp,
    /// Why it is sent nothing any more.
    pub disabled: Option<String>,
}

impl WebhookRow {
    /// The same without the secret.
    #[must_use]
    pub fn info(&self, pending: u64) -> WebhookInfo {
        WebhookInfo {
            id: self.id.clone(),
            url: self.url.clone(),
            events: self.events.clone(),
            format: self.format,
            allow_private: self.allow_private,
            created_at: self.created_at,
            disabled: self.disabled.clone(),
            pending,
        }
    }
}

const COLUMNS: &str = "id, url, events, format, secret, allow_private, created_ms, disabled";

/// The columns of a delivery that is listed.
const DELIVERY: &str = "id, webhook_id, event, cursor, state, attempts, max(due_ms, coalesce((SELECT rests_until_ms FROM webhooks WHERE \
     webhooks.id = webhook_id), 0)), last_status, last_error, created_ms, done_ms";

/// A row as SQLite gives it, to be decoded by [`row_of`].
type Raw = (String, String, String, String, String, bool, i64, Option<String>);

fn raw(row: &Row<'_>) -> rusqlite::Result<Raw> {
    Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?, row.get(5)?, row.get(6)?, row.get(7)?))
}

fn row_of((id, url, events, format, secret, allow_private, created_ms, disabled): Raw) -> Result<WebhookRow> {
    let created_at = time(created_ms)?;
    let (events, format, secret) = (decode("events", &events)?, format.parse()?, WebhookSecret::parse_kept(&secret)?);
    Ok(WebhookRow { id, url, events, format, secret, allow_private, created_at, disabled })
}

fn time(ms: i64) -> Result<Timestamp> {
    Timestamp::from_millisecond(ms).map_err(|e| Error::internal(format!("the store has an invalid time: {e}")))
}

impl Store {
    /// Adds an endpoint.
    ///
    /// # Errors
    /// `limit_exceeded` if there are [`WEBHOOKS_MAX`].
    pub fn add_webhook(&self, row: &WebhookRow) -> Result<()> {
        self.in_transaction(|| {
            let count = self.connection.query_row("SELECT count(*) FROM webhooks", [], |row| row.get::<_, u32>(0));
            if count.map_err(fault)? as usize >= WEBHOOKS_MAX {
                return Err(Error::new(
                    Code::LimitExceeded,
                    format!("there are {WEBHOOKS_MAX} webhooks, which is the limit"),
                )
                .hint(Hint::run(op::WEBHOOK_LIST).to("list them, and remove one")));
            }
            let insert = format!("INSERT INTO webhooks ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)");
            let values = params![
                row.id,
                row.url,
                encode(&row.events)?,
                row.format.word(),
                row.secret.reveal(),
                row.allow_private,
                row.created_at.as_millisecond(),
                row.disabled
            ];
            self.connection.execute(&insert, values).map_err(fault).map(drop)
        })
    }

    /// All endpoints in order of their making, each with the number of deliveries that wait for it.
    ///
    /// # Errors
    /// Of the store.
    pub fn webhooks(&self) -> Result<Vec<(WebhookRow, u64)>> {
        let pending = "SELECT count(*) FROM deliveries d WHERE d.webhook_id = w.id AND d.state = 'pending'";
        let query = format!("SELECT {COLUMNS}, ({pending}) FROM webhooks w ORDER BY created_ms, id");
        let mut statement = self.connection.prepare(&query).map_err(fault)?;
        let rows = statement.query_map([], |row| Ok((raw(row)?, row.get::<_, i64>(8)?))).map_err(fault)?;
        let row_of = |(raw, pending): (Raw, i64)| Ok((row_of(raw)?, pending.unsigned_abs()));
        readable_rows("webhooks", rows.map(|row| row.map(row_of)))
    }

    /// How many deliveries of each state every endpoint has, in the order of their making.
    ///
    /// # Errors
    /// Of the store.
    pub fn delivery_counts(&self) -> Result<Vec<DeliveryCounts>> {
        let states = [DeliveryState::Pending, DeliveryState::Delivered, DeliveryState::Failed];
        let [pending, delivered, failed] =
            states.map(|state| format!("count(*) FILTER (WHERE d.state = '{}')", state.word()));
        let query = format!(
            "SELECT w.id, {pending}, {delivered}, {failed} FROM webhooks w \
             LEFT JOIN deliveries d ON d.webhook_id = w.id GROUP BY w.id ORDER BY w.created_ms, w.id"
        );
        let mut statement = self.connection.prepare_cached(&query).map_err(fault)?;
        let count = |row: &Row<'_>, at| Ok::<_, rusqlite::Error>(row.get::<_, i64>(at)?.unsigned_abs());
        let rows = statement.query_map([], |row| {
            let [pending, delivered, failed] = states;
            let by_state = [(pending, count(row, 1)?), (delivered, count(row, 2)?), (failed, count(row, 3)?)];
            Ok(DeliveryCounts { webhook_id: row.get(0)?, by_state })
        });
        rows.map_err(fault)?.collect::<Result<_, _>>().map_err(fault)
    }

    /// The endpoints that are sent something.
    ///
    /// # Errors
    /// Of the store.
    pub fn webhooks_enabled(&self) -> Result<Vec<WebhookRow>> {
        let query = format!("SELECT {COLUMNS} FROM webhooks WHERE disabled IS NULL ORDER BY created_ms, id");
        let mut statement = self.connection.prepare_cached(&query).map_err(fault)?;
        let rows = statement.query_map([], raw).map_err(fault)?;
        readable_rows("webhooks", rows.map(|row| row.map(row_of)))
    }

    /// The endpoint with that id.
    ///
    /// # Errors
    /// `webhook_not_found`.
    pub fn webhook(&self, id: &str) -> Result<WebhookRow> {
        let query = format!("SELECT {COLUMNS} FROM webhooks WHERE id = ?1");
        let found = self.connection.query_row(&query, [id], raw).optional().map_err(fault)?;
        found.map(row_of).transpose()?.ok_or_else(|| no_such_webhook(id))
    }

    /// Removes an endpoint and everything that waits for it.
    ///
    /// # Errors
    /// `webhook_not_found`.
    pub fn remove_webhook(&self, id: &str) -> Result<()> {
        let gone = self.connection.execute("DELETE FROM webhooks WHERE id = ?1", [id]).map_err(fault)?;
        if gone == 0 { Err(no_such_webhook(id)) } else { Ok(()) }
    }

    /// The newest deliveries, of one endpoint or of all; the oldest of them first.
    ///
    /// # Errors
    /// Of the store.
    pub fn deliveries(&self, webhook_id: Option<&str>) -> Result<Vec<Delivery>> {
        let of = if webhook_id.is_some() { "WHERE webhook_id = ?1" } else { "WHERE ?1 IS NULL" };
        let query = format!("SELECT {DELIVERY} FROM deliveries {of} ORDER BY id DESC LIMIT ?2");
        let mut statement = self.connection.prepare(&query).map_err(fault)?;
        let limit = i64::try_from(DELIVERIES_MAX).unwrap_or(i64::MAX);
        let mut rows = statement.query(params![webhook_id, limit]).map_err(fault)?;
        let mut deliveries = Vec::new();
        while let Some(row) = rows.next().map_err(fault)? {
            deliveries.push(delivery(row)?);
        }
        deliveries.reverse();
        Ok(deliveries)
    }

    /// The delivery with that number.
    ///
    /// # Errors
    /// `webhook_not_found`.
    pub fn delivery(&self, id: u64) -> Result<Delivery> {
        let mut statement =
            self.connection.prepare(&format!("SELECT {DELIVERY} FROM deliveries WHERE id = ?1")).map_err(fault)?;
        let mut rows = statement.query([i64::try_from(id).unwrap_or(i64::MAX)]).map_err(fault)?;
        rows.next().map_err(fault)?.map(delivery).transpose()?.ok_or_else(|| {
            Error::new(Code::WebhookNotFound, format!("there is no delivery {id}"))
                .hint(Hint::run(op::WEBHOOK_DELIVERIES).to("list those that are kept"))
        })
    }
}

/// A delivery of a row with the columns of [`DELIVERY`].
fn delivery(row: &Row<'_>) -> Result<Delivery> {
    fn get<T: rusqlite::types::FromSql>(row: &Row<'_>, column: usize) -> Result<T> {
        row.get(column).map_err(fault)
    }
    let webhook_id: String = get(row, 1)?;
    let cursor = get::<i64>(row, 3)?.unsigned_abs();
    Ok(Delivery {
        id: get::<i64>(row, 0)?.unsigned_abs(),
        message_id: webhook_message_id(&webhook_id, cursor),
        webhook_id,
        event: get::<String>(row, 2)?.parse()?,
        cursor,
        state: get::<String>(row, 4)?.parse()?,
        attempts: get(row, 5)?,
        next_at: get::<Option<i64>>(row, 6)?.map(time).transpose()?,
        last_status: get(row, 7)?,
        last_error: get(row, 8)?,
        created_at: time(get(row, 9)?)?,
        done_at: get::<Option<i64>>(row, 10)?.map(time).transpose()?,
    })
}

fn no_such_webhook(id: &str) -> Error {
    Error::new(Code::WebhookNotFound, format!("there is no webhook '{}'", id.escape_debug()))
        .hint(Hint::run(op::WEBHOOK_LIST).to("list them"))
}
