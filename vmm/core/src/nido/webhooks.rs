//! Webhooks: added, listed, removed, tried out; their deliveries, looked at and sent again.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use nido_api::error::{Code, Error, Result};
use nido_api::{
    Delivery, DeliveryCounts, DeliveryList, WebhookAdded, WebhookBody, WebhookFormat, WebhookInfo, WebhookList,
    WebhookRequest, WebhookSecret, WebhookTest, encode_webhook_body, moment,
};
use nido_files::random;
use nido_store::WebhookRow;

use super::Nido;
use crate::webhook::{Sender, Verdict, resolve, target};

/// How long the addresses of a new endpoint's name are waited for.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

impl Nido {
    /// Adds an endpoint, which gets every later event that it selects.
    ///
    /// # Errors
    /// `webhook_invalid`, `limit_exceeded`.
    pub async fn webhook_add(&self, request: WebhookRequest) -> Result<WebhookAdded> {
        let WebhookRequest { url, mut events, secret, format, allow_private } = request;
        let url = target::parse(&url, allow_private)?;
        if let Some(host) = url.host_str().filter(|host| target::literal(host).is_none()) {
            // To report it immediately. A name that cannot be resolved now may be later; and every attempt checks again.
            if let Ok(Err(error)) = tokio::time::timeout(RESOLVE_TIMEOUT, resolve(host, allow_private)).await
                && error.code() == Code::WebhookInvalid
            {
                return Err(error);
            }
        }
        let format = format.unwrap_or_else(|| WebhookFormat::usual_at(url.host_str().unwrap_or_default()));
        let secret = match (secret, format) {
            (Some(text), WebhookFormat::PagerDuty) => WebhookSecret::parse_routing_key(&text)?,
            (None, WebhookFormat::PagerDuty) => {
                return Err(Error::new(Code::WebhookInvalid, "PagerDuty requires an integration key").hint(
                    "pass it as the secret; PagerDuty shows it on the service's page, under Integrations, Events API v2",
                ));
            }
            (Some(text), _) => WebhookSecret::parse(&text)?,
            (None, _) => WebhookSecret::new(random::bytes()?),
        };
        if events.is_empty() {
            events = format.usual_events();
        }
        events.sort_unstable();
        events.dedup();
        let row = WebhookRow {
            id: random::id()?,
            url: url.to_string(),
            events,
            format,
            secret,
            allow_private,
            created_at: moment::now(),
            disabled: None,
        };
        self.store().add_webhook(&row)?;
        Ok(WebhookAdded { webhook: row.info(0), secret: row.secret.reveal() })
    }

    /// All endpoints.
    ///
    /// # Errors
    /// Of the store.
    pub fn webhook_list(&self) -> Result<WebhookList> {
        let rows = self.store().webhooks()?;
        Ok(WebhookList { webhooks: rows.iter().map(|(row, pending)| row.info(*pending)).collect() })
    }

    /// How many deliveries of each state every endpoint has.
    ///
    /// # Errors
    /// Of the store.
    pub fn delivery_counts(&self) -> Result<Vec<DeliveryCounts>> {
        self.store().delivery_counts()
    }

    /// Removes an endpoint; what waits for it is never sent. The answer is how it was.
    ///
    /// # Errors
    /// `webhook_not_found`.
    pub fn webhook_remove(&self, id: &str) -> Result<WebhookInfo> {
        let info = self.store().webhook(id)?.info(0);
        self.store().remove_webhook(id)?;
        Ok(info)
    }

    /// The newest deliveries, of one endpoint or of all.
    ///
    /// # Errors
    /// `webhook_not_found`.
    pub fn webhook_deliveries(&self, id: Option<&str>) -> Result<DeliveryList> {
        if let Some(id) = id {
            self.store().webhook(id)?;
        }
        Ok(DeliveryList { deliveries: self.store().deliveries(id)? })
    }

    /// Sends a delivery again, under the same message id; one that is pending, at once. The answer is how it is now.
    ///
    /// # Errors
    /// `webhook_not_found`, `webhook_invalid` if its endpoint is disabled.
    pub fn webhook_redeliver(&self, delivery: u64) -> Result<Delivery> {
        self.store().redeliver(delivery, Timestamp::now().as_millisecond())?;
        self.store().delivery(delivery)
    }

    /// Sends an endpoint one message that is about nothing, now and from this very process.
    ///
    /// # Errors
    /// `webhook_not_found`. A message that does not arrive is an answer, not an error.
    pub async fn webhook_test(&self, id: &str) -> Result<WebhookTest> {
        let row = self.store().webhook(id)?;
        let message_id = format!("msg_{id}_test_{}", random::id()?);
        let body = encode_webhook_body(&WebhookBody::test(moment::now()))?;
        let began = Instant::now();
        let answer = Sender::new(&row)?.post(&message_id, body).await;
        let error = match answer.verdict {
            Verdict::Delivered => None,
            Verdict::Gone => Some("the endpoint responded 410 Gone".to_owned()),
            Verdict::Again { why, .. } => Some(why),
        };
        Ok(WebhookTest {
            webhook_id: row.id,
            message_id,
            delivered: error.is_none(),
            status: answer.status,
            error,
            duration_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nido::OpenOptions;

    fn send<T: Send>(_: &T) {}

    /// Servers call the API from several threads.
    #[test]
    fn every_operation_can_wander_between_threads() {
        let check = |nido: &Nido, request: WebhookRequest| {
            send(&nido.webhook_add(request));
            send(&nido.webhook_test("1"));
        };
        let _ = check;
        send(&Nido::deliver(OpenOptions::default()));
    }
}
