//! What an endpoint is sent about an event: the specification's body, a sentence for Slack, or an alert for PagerDuty.

use nido_api::error::{Error, Result};
use nido_api::{EventKind, WebhookBody as Body, WebhookFormat};

/// The longest text for Slack, in characters; Slack cuts at 40000.
const SLACK_MAX: usize = 3000;
/// The longest summary that PagerDuty takes, in characters.
const SUMMARY_MAX: usize = 1024;

/// Whom a body is posted to.
#[derive(Debug)]
pub struct Recipient<'a> {
    /// What the endpoint is sent.
    pub format: WebhookFormat,
    /// The message's id.
    pub message_id: &'a str,
    /// PagerDuty's integration key.
    pub routing_key: Option<&'a str>,
}

/// What is posted for a kept body.
///
/// # Errors
/// `internal` if it cannot be read.
pub fn render(kept: String, to: &Recipient<'_>) -> Result<String> {
    let read = |kept: &str| -> Result<Body> {
        serde_json::from_str(kept).map_err(|e| Error::internal(format!("a message cannot be read: {e}")))
    };
    match to.format {
        WebhookFormat::Standard => Ok(kept),
        WebhookFormat::Slack => Ok(serde_json::json!({ "text": slack_text(&read(&kept)?) }).to_string()),
        WebhookFormat::PagerDuty => Ok(pagerduty(&read(&kept)?, to).to_string()),
    }
}

/// An event of PagerDuty's Events API v2. A crash triggers the alert of its VM; when the VM runs again, or is gone, it is
/// resolved. Every other event is an alert of its own.
fn pagerduty(body: &Body, to: &Recipient<'_>) -> serde_json::Value {
    let is = |kind: EventKind| body.event == kind.word();
    let key = body.details.vm_id.as_ref().map_or_else(|| to.message_id.to_owned(), |id| format!("nido-{id}"));
    let routing_key = to.routing_key.unwrap_or_default();
    if is(EventKind::VmStarted) || is(EventKind::VmDeleted) {
        return serde_json::json!({ "routing_key": routing_key, "event_action": "resolve", "dedup_key": key });
    }
    let crashed = is(EventKind::VmCrashed);
    let (severity, key) = if crashed { ("critical", key.as_str()) } else { ("info", to.message_id) };
    serde_json::json!({
        "routing_key": routing_key,
        "event_action": "trigger",
        "dedup_key": key,
        "client": "nido",
        "payload": {
            "summary": summary(body),
            "source": body.vm_name.as_deref().unwrap_or("nido"),
            "severity": severity,
            "timestamp": body.timestamp,
            "component": "nido",
            "class": body.event,
            "custom_details": body.details,
        },
    })
}

/// One line about an event.
fn summary(body: &Body) -> String {
    let about = match (&body.vm_name, &body.details.template) {
        (Some(vm), _) => format!("VM {vm}"),
        (None, Some(template)) => format!("template {template}"),
        (None, None) => "a test message of nido".into(),
    };
    let why = body.details.message.as_ref().map(|message| format!(": {message}")).unwrap_or_default();
    let line = format!("{} {about}{why}", body.event);
    line.chars().map(|c| if c.is_control() { ' ' } else { c }).take(SUMMARY_MAX).collect()
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
        // The end of a log is more useful than its beginning.
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
    use nido_api::{Event, EventDetails, encode_webhook_body};

    const KEY: &str = "0123456789abcdef0123456789abcdef";

    fn to(format: WebhookFormat) -> Recipient<'static> {
        Recipient { format, message_id: "msg_w1_7", routing_key: Some(KEY) }
    }

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
        let kept = encode_webhook_body(&Body::of(&event)).unwrap();
        assert_eq!(
            render(kept, &to(WebhookFormat::Standard)).unwrap(),
            r#"{"event":"vm.crashed","timestamp":"2026-01-04T14:30:00Z","vm_name":"web","details":{"ip_address":"192.168.122.45","last_log_entries":[]}}"#
        );
    }

    #[test]
    fn slack_gets_a_sentence_and_no_commands() {
        let posted = render(encode_webhook_body(&Body::of(&crash())).unwrap(), &to(WebhookFormat::Slack)).unwrap();
        let posted: serde_json::Value = serde_json::from_str(&posted).unwrap();
        let text = posted["text"].as_str().unwrap();
        assert!(text.starts_with("*vm.crashed* VM `web`: the guest &lt;!channel&gt; panicked\n```"), "{text}");
        assert!(text.ends_with("the end```") && !text.contains('<') && text.matches("```").count() == 2, "{text}");
        assert!(text.chars().count() < SLACK_MAX + 10);
        let test = encode_webhook_body(&Body::test("2026-01-04T14:30:00Z".parse().unwrap())).unwrap();
        assert_eq!(
            render(test, &to(WebhookFormat::Slack)).unwrap(),
            r#"{"text":"*webhook.test* a test message of nido"}"#
        );
    }

    fn alert(event: &Event) -> serde_json::Value {
        let posted = render(encode_webhook_body(&Body::of(event)).unwrap(), &to(WebhookFormat::PagerDuty)).unwrap();
        serde_json::from_str(&posted).unwrap()
    }

    #[test]
    fn a_crash_triggers_an_alert_that_the_next_start_resolves() {
        let crash = || {
            let mut crash = crash();
            crash.details.vm_id = Some("0123456789abcdef".into());
            crash
        };
        let trigger = alert(&crash());
        assert_eq!(trigger["dedup_key"], "nido-0123456789abcdef");
        assert_eq!((&trigger["routing_key"], &trigger["event_action"]), (&KEY.into(), &"trigger".into()));
        let payload = &trigger["payload"];
        assert_eq!((&payload["source"], &payload["severity"]), (&"web".into(), &"critical".into()));
        assert_eq!(payload["timestamp"], "2026-01-04T14:30:00Z");
        assert_eq!(payload["summary"], "vm.crashed VM web: the guest <!channel> panicked");
        assert_eq!(payload["custom_details"]["last_log_entries"][2], "the end");
        for kind in [EventKind::VmStarted, EventKind::VmDeleted] {
            let resolve = alert(&Event { event: kind, ..crash() });
            assert_eq!(resolve["event_action"], "resolve");
            assert_eq!(resolve["dedup_key"], trigger["dedup_key"]);
        }
        let other = alert(&Event { event: EventKind::VmExpired, ..crash() });
        assert_eq!((&other["dedup_key"], &other["payload"]["severity"]), (&"msg_w1_7".into(), &"info".into()));
        let long = EventDetails { message: Some("\u{1b}[31m".repeat(900)), ..EventDetails::default() };
        let long = alert(&Event { details: long, ..crash() });
        let summary = long["payload"]["summary"].as_str().unwrap();
        assert!(summary.chars().count() == SUMMARY_MAX && !summary.contains('\u{1b}'));
    }
}
