//! Webhooks: endpoints that are told of events, and what became of each message.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::EventKind;
use crate::error::{Code, Error};

/// How many endpoints a home has at most.
pub const WEBHOOKS_MAX: usize = 64;
/// How many deliveries are listed at most: the newest.
pub const DELIVERIES_MAX: usize = 1000;

/// What an endpoint is sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum WebhookFormat {
    /// The event as JSON, signed.
    #[default]
    Standard,
    /// A sentence, as Slack's incoming webhooks take it.
    Slack,
    /// An alert, as PagerDuty's Events API v2 takes it: a crash triggers one for its VM, the VM's next start or its deletion
    /// resolves it.
    PagerDuty,
}

/// Where Slack's incoming webhooks live.
const SLACKS_HOSTS: [&str; 2] = ["hooks.slack.com", "hooks.slack-gov.com"];

/// Where PagerDuty's Events API is.
const PAGERDUTY_HOSTS: [&str; 2] = ["events.pagerduty.com", "events.eu.pagerduty.com"];

impl WebhookFormat {
    /// Every format.
    pub const ALL: [Self; 3] = [Self::Standard, Self::Slack, Self::PagerDuty];

    /// What a host is usually sent.
    #[must_use]
    pub fn usual_at(host: &str) -> Self {
        match host {
            _ if SLACKS_HOSTS.contains(&host) => Self::Slack,
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

/// The endpoint to be added.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct WebhookRequest {
    /// Where messages are posted: `https://…`; `http://…` only with `allow_private`. At most 2048 bytes.
    pub url: String,
    /// The events it is told of; none named is all, and for `pagerduty` those that trigger and resolve alerts: `vm.crashed`,
    /// `vm.started`, `vm.deleted`.
    #[serde(default)]
    pub events: Vec<EventKind>,
    /// What messages are signed with: `whsec_` and 24 to 64 bytes in base64. Absent: a new one. For `pagerduty` it is needed: the
    /// integration key of the service, 32 letters and digits.
    #[serde(default, serialize_with = "hidden")]
    pub secret: Option<String>,
    /// What it is sent. Absent: `slack` or `pagerduty` where the host is theirs, `standard` elsewhere.
    #[serde(default)]
    pub format: Option<WebhookFormat>,
    /// Whether it may lie in a private network or on this very host.
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

/// One endpoint. Its secret is told once, when it is added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct WebhookInfo {
    /// Its id.
    pub id: String,
    /// Where messages are posted.
    pub url: String,
    /// The events it is told of; none named is all.
    pub events: Vec<EventKind>,
    /// What it is sent.
    pub format: WebhookFormat,
    /// Whether it may lie in a private network or on this very host.
    pub allow_private: bool,
    /// When it was added.
    pub created_at: Timestamp,
    /// Why it is sent nothing any more; null while it is.
    pub disabled: Option<String>,
    /// How many deliveries wait for it.
    pub pending: u64,
}

/// The endpoint that was added.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct WebhookAdded {
    /// It.
    #[serde(flatten)]
    pub webhook: WebhookInfo,
    /// What its messages are signed with. It is not told again.
    pub secret: String,
}

impl std::fmt::Debug for WebhookAdded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WebhookAdded").field("webhook", &self.webhook).finish_non_exhaustive()
    }
}

/// All endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct WebhookList {
    /// In order of their making.
    pub webhooks: Vec<WebhookInfo>,
}

/// What became of a delivery so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeliveryState {
    /// It is, or will be, attempted.
    Pending,
    /// The endpoint took it.
    Delivered,
    /// It was given up.
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

/// One event on its way to one endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Delivery {
    /// Its number.
    pub id: u64,
    /// The endpoint.
    pub webhook_id: String,
    /// The header `webhook-id`: the same at every attempt and every redelivery.
    pub message_id: String,
    /// The event.
    pub event: EventKind,
    /// The cursor of the event.
    pub cursor: u64,
    /// What became of it so far.
    pub state: DeliveryState,
    /// How often it was attempted since it was queued, or queued again.
    pub attempts: u32,
    /// When it is attempted next; null if it is finished, or waits for another one ahead of it.
    pub next_at: Option<Timestamp>,
    /// The HTTP status of the last answer; null if there was none.
    pub last_status: Option<u16>,
    /// Why the last attempt failed.
    pub last_error: Option<String>,
    /// When it was queued.
    pub created_at: Timestamp,
    /// When it was finished.
    pub done_at: Option<Timestamp>,
}

/// Some deliveries, the oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DeliveryList {
    /// The newest [`DELIVERIES_MAX`] at most.
    pub deliveries: Vec<Delivery>,
}

/// How a test message fared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct WebhookTest {
    /// The endpoint.
    pub webhook_id: String,
    /// The header `webhook-id`.
    pub message_id: String,
    /// Whether the endpoint took it.
    pub delivered: bool,
    /// The HTTP status of its answer; null if there was none.
    pub status: Option<u16>,
    /// Why it did not.
    pub error: Option<String>,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
}
