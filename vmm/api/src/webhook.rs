//! Webhooks: endpoints to which events are posted, and their deliveries.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::EventKind;
use crate::error::{Code, Error};

/// How many endpoints a home has at most.
pub const WEBHOOKS_MAX: usize = 64;
/// How many deliveries are listed at most: the newest.
pub const DELIVERIES_MAX: usize = 1000;

/// Format of the messages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum WebhookFormat {
    /// The event as JSON, signed.
    #[default]
    Standard,
    /// A sentence, for Slack's incoming webhooks.
    Slack,
    /// An alert for PagerDuty's Events API v2: a crash triggers one for its VM; the VM's next start or its deletion
    /// resolves it.
    PagerDuty,
}

/// Where Slack's incoming webhooks live.
const SLACK_HOSTS: [&str; 2] = ["hooks.slack.com", "hooks.slack-gov.com"];

/// Where PagerDuty's Events API is.
const PAGERDUTY_HOSTS: [&str; 2] = ["events.pagerduty.com", "events.eu.pagerduty.com"];

impl WebhookFormat {
    /// Every format.
    pub const ALL: [Self; 3] = [Self::Standard, Self::Slack, Self::PagerDuty];

    /// What a host is usually sent.
    #[must_use]
    pub fn usual_at(host: &str) -> Self {
        match host {
            _ if SLACK_HOSTS.contains(&host) => Self::Slack,
            _ if PAGERDUTY_HOSTS.contains(&host) => Self::PagerDuty,
            _ => Self::Standard,
        }
    }

    /// The events that an endpoint is sent if none is named; none is all.
    #[must_use]
    pub fn usual_events(self) -> Vec<EventKind> {
        match self {
            Self::Standard | Self::Slack => Vec::new(),
            Self::PagerDuty => vec![EventKind::VmStarted, EventKind::VmDeleted, EventKind::VmCrashed],
        }
    }

    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Slack => "slack",
            Self::PagerDuty => "pagerduty",
        }
    }
}

impl std::str::FromStr for WebhookFormat {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|format| format.word() == word).ok_or_else(|| {
            Error::new(Code::WebhookInvalid, format!("there is no format '{}'", word.escape_debug()))
                .hint("one of standard, slack, pagerduty")
        })
    }
}

/// An endpoint to add.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct WebhookRequest {
    /// URL to post messages to: `https://…`; `http://…` only with `allow_private`. At most 2048 bytes.
    pub url: String,
    /// Events to send; empty means all, and for `pagerduty` those that trigger and resolve alerts: `vm.crashed`,
    /// `vm.started`, `vm.deleted`.
    #[serde(default)]
    pub events: Vec<EventKind>,
    /// Key that signs the messages: `whsec_` and 24 to 64 bytes in base64; generated if absent. Required for
    /// `pagerduty`: the integration key of the service, 32 letters and digits.
    #[serde(default, serialize_with = "hidden")]
    pub secret: Option<String>,
    /// Format. If absent, `slack` or `pagerduty` for their hosts, `standard` otherwise.
    #[serde(default)]
    pub format: Option<WebhookFormat>,
    /// Whether the endpoint may be in a private network or on this host.
    #[serde(default)]
    pub allow_private: bool,
}

/// A secret that was given is not written anywhere again.
fn hidden<S: serde::Serializer>(_: &Option<String>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_none()
}

impl std::fmt::Debug for WebhookRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { url: _, events, secret: _, format, allow_private } = self;
        f.debug_struct("WebhookRequest")
            .field("events", events)
            .field("format", format)
            .field("allow_private", allow_private)
            .finish_non_exhaustive()
    }
}

/// An endpoint, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct WebhookInfo {
    /// Its id.
    pub id: String,
    /// URL to post messages to.
    pub url: String,
    /// Events to send; empty means all.
    pub events: Vec<EventKind>,
    /// Format of the messages.
    pub format: WebhookFormat,
    /// Whether the endpoint may be in a private network or on this host.
    pub allow_private: bool,
    /// When it was added.
    pub created_at: Timestamp,
    /// Why nothing is sent to it; null while it is enabled.
    pub disabled: Option<String>,
    /// Number of pending deliveries.
    pub pending: u64,
}

/// The endpoint that was added.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct WebhookAdded {
    /// The endpoint.
    #[serde(flatten)]
    pub webhook: WebhookInfo,
    /// Key that signs the messages. It is returned only once.
    pub secret: String,
}

impl std::fmt::Debug for WebhookAdded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WebhookAdded").field("webhook", &self.webhook).finish_non_exhaustive()
    }
}

/// A list of endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct WebhookList {
    /// In order of creation.
    pub webhooks: Vec<WebhookInfo>,
}

/// State of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeliveryState {
    /// Pending.
    Pending,
    /// Accepted by the endpoint.
    Delivered,
    /// Given up.
    Failed,
}

impl DeliveryState {
    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Delivered => "delivered",
            Self::Failed => "failed",
        }
    }
}

/// How many deliveries an endpoint has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeliveryCounts {
    /// The endpoint's id.
    pub webhook_id: String,
    /// How many there are of each state: those that wait, and those that are remembered.
    pub by_state: [(DeliveryState, u64); 3],
}

impl std::str::FromStr for DeliveryState {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self, Error> {
        let all = [Self::Pending, Self::Delivered, Self::Failed];
        let found = all.into_iter().find(|state| state.word() == word);
        found.ok_or_else(|| Error::internal(format!("there is no state of a delivery '{}'", word.escape_debug())))
    }
}

/// The delivery of one event to one endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Delivery {
    /// Its number.
    pub id: u64,
    /// The endpoint.
    pub webhook_id: String,
    /// The header `webhook-id`: the same for every attempt and every redelivery.
    pub message_id: String,
    /// The event.
    pub event: EventKind,
    /// The cursor of the event.
    pub cursor: u64,
    /// Its state.
    pub state: DeliveryState,
    /// Number of attempts since it was last queued.
    pub attempts: u32,
    /// Time of the next attempt; null if it is finished, or waits for an earlier delivery.
    pub next_at: Option<Timestamp>,
    /// HTTP status of the last response; null if there was none.
    pub last_status: Option<u16>,
    /// Why the last attempt failed.
    pub last_error: Option<String>,
    /// When it was queued.
    pub created_at: Timestamp,
    /// When it was finished.
    pub done_at: Option<Timestamp>,
}

/// Deliveries, the oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DeliveryList {
    /// At most the newest [`DELIVERIES_MAX`].
    pub deliveries: Vec<Delivery>,
}

/// Result of a test message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct WebhookTest {
    /// The endpoint.
    pub webhook_id: String,
    /// The header `webhook-id`.
    pub message_id: String,
    /// Whether the endpoint accepted it.
    pub delivered: bool,
    /// HTTP status of the response; null if there was none.
    pub status: Option<u16>,
    /// Why it was not accepted.
    pub error: Option<String>,
    /// Duration, in milliseconds.
    pub duration_ms: u64,
}
