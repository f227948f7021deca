//! What an endpoint is sent about an event: the specification's body, or a sentence for Slack.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::api::{Event, EventDetails, WebhookFormat};
use crate::error::{Error, Result};

/// The event of a message that [`crate::nido::Nido::webhook_test`] sends.
pub const TEST_EVENT: &str = "webhook.test";
/// The longest text for Slack, in characters; Slack cuts at 40000.
const SLACK_MAX: usize = 3000;

/// The body of a message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Body {
    /// What happened: an [`crate::api::EventKind`], or [`TEST_EVENT`].
    pub event: String,
    /// When.
    pub timestamp: Timestamp,
    /// The VM, by the name it had; none for what happens to templates.
    pub vm_name: Option<String>,
    /// More about it.
    pub details: EventDetails,
}

impl Body {
    /// Of an event.
    #[must_use]
    pub fn of(event: &Event) -> Self {
        let Event { cursor: _, event, timestamp, vm_name, details } = event;
        Self {
            event: event.word().into(),
            timestamp: *timestamp,
            vm_name: vm_name.as_ref().map(ToString::to_string),
            details: details.clone(),
        }
    }

    /// Of a test.
    #[must_use]
    pub fn test(now: Timestamp) -> Self {
        Self { event: TEST_EVENT.into(), timestamp: now, vm_name: None, details: EventDetails::default() }
    }
}

/// The body of a message about an event, as it is kept until it is delivered.
///
/// # Errors
/// `internal`.
pub fn encode(body: &Body) -> Result<String> {
    serde_json::to_string(body).map_err(|e| Error::internal(format!("an event cannot be written: {e}")))
}

/// What is posted for a kept body.
///
/// # Errors
/// `internal` if it cannot be read.
pub fn render(kept: String, format: WebhookFormat) -> Result<String> {
    match format {
        WebhookFormat::Standard => Ok(kept),
        WebhookFormat::Slack => {
            let body: Body =
                serde_json::from_str(&kept).map_err(|e| Error::internal(format!("a message cannot be read: {e}")))?;
            Ok(serde_json::json!({ "text": slack_text(&body) }).to_string())
        }
    }
}

/// A sentence, and the last lines of a crash.
fn slack_text(body: &Body) -> String {
    let details = &body.details;
    let mut text = format!("*{}*", escaped(&body.event));
    let about = match (&body.vm_name, &details.template) {
        (Some(vm), _) => format!("VM `{}`", escaped(vm)),
        (None, Some(template)) => format!("template `{template}`"),
        (None, None) => "a test message of nido".into(),
    };
    text.push_str(&format!(" {about}"));
    if let Some(snapshot) = &details.snapshot {
        text.push_str(&format!(", snapshot `{snapshot}`"));
    }
    if let Some(message) = &details.message {
        text.push_str(&format!(": {}", escaped(message)));
    }
    if !details.last_log_entries.is_empty() {
        let lines: Vec<_> = details.last_log_entries.iter().map(|line| escaped(line).replace('`', "'")).collect();
        let lines = lines.join("\n");
        // The end of a log says more than its beginning.
        let room = SLACK_MAX.saturating_sub(text.chars().count());
        let skipped = lines.chars().count().saturating_sub(room);
        text.push_str(&format!("\n```{}```", lines.chars().skip(skipped).collect::<String>()));
    }
    text
}

/// Text of unknown worth, so that Slack makes no link, mention or command of it.
fn escaped(text: &str) -> String {
    let plain: String = text.chars().filter(|c| !c.is_control()).take(SLACK_MAX).collect();
    plain.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::EventKind;

    fn crash() -> Event {
        let details = EventDetails {
            ip_address: Some("10.0.2.15".into()),
            message: Some("the guest <!channel> panicked".into()),
            last_log_entries: vec!["```<@U1>".into(), "x".repeat(SLACK_MAX), "the end".into()],
            ..EventDetails::default()
        };
        Event {
            cursor: 7,
            event: EventKind::VmCrashed,
            timestamp: "2026-01-04T14:30:00Z".parse().unwrap(),
            vm_name: Some("web".parse().unwrap()),
            details,
        }
    }

    #[test]
    fn the_body_is_the_specifications() {
        let event = Event {
            details: EventDetails { ip_address: Some("192.168.122.45".into()), ..EventDetails::default() },
            ..crash()
        };
        let kept = encode(&Body::of(&event)).unwrap();
        assert_eq!(
            render(kept, WebhookFormat::Standard).unwrap(),
            r#"{"event":"vm.crashed","timestamp":"2026-01-04T14:30:00Z","vm_name":"web","details":{"ip_address":"192.168.122.45","last_log_entries":[]}}"#
        );
    }

    #[test]
    fn slack_gets_a_sentence_and_no_commands() {
        let posted = render(encode(&Body::of(&crash())).unwrap(), WebhookFormat::Slack).unwrap();
        let posted: serde_json::Value = serde_json::from_str(&posted).unwrap();
        let text = posted["text"].as_str().unwrap();
        assert!(text.starts_with("*vm.crashed* VM `web`: the guest &lt;!channel&gt; panicked\n```"), "{text}");
        assert!(text.ends_with("the end```") && !text.contains('<') && text.matches("```").count() == 2, "{text}");
        assert!(text.chars().count() < SLACK_MAX + 10);
        let test = encode(&Body::test("2026-01-04T14:30:00Z".parse().unwrap())).unwrap();
        assert_eq!(render(test, WebhookFormat::Slack).unwrap(), r#"{"text":"*webhook.test* a test message of nido"}"#);
    }
}
