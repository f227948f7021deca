//! `webhook`: endpoints to which events are posted, and their deliveries.

use clap::Subcommand;
use nido_api::operation as op;
use nido_api::{Delivery, EventKind, WebhookFormat, WebhookInfo, WebhookRequest, WebhookTest};
use serde_json::json;

use super::Context;
use super::confirmation::Confirmation;
use crate::exit::{Exit, Outcome};
use crate::output::table;

const EXAMPLES: &str = "\
Examples:
  nido webhook add --url https://example.com/hooks/nido
  nido webhook add --event vm.crashed --url https://hooks.slack.com/services/T0/B0/x
  nido webhook add --url https://events.pagerduty.com/v2/enqueue --secret 0123456789abcdef0123456789abcdef
  nido webhook add --event vm.started,vm.stopped --url http://127.0.0.1:8080/ --allow-private
  nido webhook test 3f2a9c1e5b7d8046
  nido webhook deliveries 3f2a9c1e5b7d8046
  nido webhook redeliver 17
  nido webhook remove 3f2a9c1e5b7d8046

Messages are signed as in Standard Webhooks: headers webhook-id, webhook-timestamp,
webhook-signature. Each is delivered at least once, those of one VM in order; failed attempts are
repeated for 3 days. No server has to run: the nido process that writes an event starts a delivery
worker, which exits when nothing is pending. Finished deliveries are kept for 7 days, at most 1000
for each endpoint.

Events: vm.created vm.started vm.stopped vm.deleted vm.crashed vm.paused vm.resumed vm.expired
vm.limit_hit net.denied secret.used snapshot.created snapshot.restored template.created template.deleted.";

/// Post events to endpoints on the web
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Add an endpoint; prints its id and its secret, which is not shown again
    Add(AddArgs),
    /// List endpoints
    #[command(visible_alias = "ls")]
    List,
    /// Remove an endpoint; its pending messages are not sent
    #[command(visible_alias = "rm")]
    Remove {
        /// Id of the endpoint
        #[arg(value_name = "ID")]
        id: String,
        #[command(flatten)]
        confirmation: Confirmation,
    },
    /// List deliveries, the newest last
    Deliveries {
        /// Deliveries to this endpoint
        #[arg(value_name = "ID")]
        id: Option<String>,
    },
    /// Send a delivery again, under the same message id
    Redeliver {
        /// Number of the delivery
        delivery: u64,
    },
    /// Send an endpoint a test message
    Test {
        /// Id of the endpoint
        #[arg(value_name = "ID")]
        id: String,
    },
}

#[derive(Debug, clap::Args)]
struct AddArgs {
    /// URL to post messages to: https://…
    #[arg(long, value_hint = clap::ValueHint::Url)]
    url: String,
    /// Events to send; may be repeated [default: all; for PagerDuty vm.crashed, vm.started and vm.deleted]
    #[arg(long = "event", short, value_name = "EVENT", value_delimiter = ',')]
    events: Vec<EventKind>,
    /// Key that signs messages: whsec_ and 24 to 64 bytes in base64 [default: a new one]. For PagerDuty its integration
    /// key. Other users of this host may see it while nido runs
    #[arg(long, value_name = "SECRET")]
    secret: Option<String>,
    /// Format of messages: standard (the event, in JSON), slack (a sentence) or pagerduty (Events API v2) [default: the
    /// one of Slack's or PagerDuty's hosts, else standard]
    #[arg(long, value_name = "FORMAT")]
    format: Option<WebhookFormat>,
    /// Allow an endpoint in a private network or on this host, and plain http
    #[arg(long)]
    allow_private: bool,
}

const HEAD: [&str; 5] = ["ID", "URL", "EVENTS", "PENDING", "STATUS"];
const DELIVERIES_HEAD: [&str; 8] = ["ID", "WEBHOOK", "EVENT", "CURSOR", "STATE", "ATTEMPTS", "RESPONSE", "NEXT OR WHY"];

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        match self.verb {
            Verb::Add(args) => {
                let AddArgs { url, events, secret, format, allow_private } = args;
                let given = secret.is_some();
                let arguments =
                    json!({ "url": url, "events": events, "format": format, "allow_private": allow_private });
                let added = nido.webhook_add(WebhookRequest { url, events, secret, format, allow_private });
                let added = cx.audited(&nido, op::WEBHOOK_ADD, arguments, added).await?;
                cx.output.answer(&added, || match given {
                    true => format!("{}\n", added.webhook.id),
                    false => format!("{}\n{}\n", added.webhook.id, added.secret),
                })?;
                if !given {
                    cx.output.note("keep the secret: it is not shown again");
                }
            }
            Verb::List => {
                let list = nido.webhook_list()?;
                cx.output.answer(&list, || {
                    if cx.output.quiet {
                        return list.webhooks.iter().map(|webhook| format!("{}\n", webhook.id)).collect();
                    }
                    table(HEAD, list.webhooks.iter().map(row))
                })?;
            }
            Verb::Remove { id, confirmation } => {
                if !confirmation.given(cx, &format!("remove the webhook {id} and its pending messages?")) {
                    return Ok(Exit::Failure);
                }
                let removed = async { nido.webhook_remove(&id) };
                let removed = cx.audited(&nido, op::WEBHOOK_REMOVE, json!({ "id": id }), removed).await?;
                cx.output.answer(&removed, || format!("{}\n", removed.id))?;
            }
            Verb::Deliveries { id } => {
                let list = nido.webhook_deliveries(id.as_deref())?;
                cx.output.answer(&list, || {
                    if cx.output.quiet {
                        return list.deliveries.iter().map(|delivery| format!("{}\n", delivery.id)).collect();
                    }
                    table(DELIVERIES_HEAD, list.deliveries.iter().map(delivery_row))
                })?;
            }
            Verb::Redeliver { delivery } => {
                let queued = nido.webhook_redeliver(delivery)?;
                cx.output.answer(&queued, || format!("{}\n", queued.id))?;
            }
            Verb::Test { id } => {
                let test = nido.webhook_test(&id).await?;
                cx.output.answer(&test, || summary(&test))?;
                if !test.delivered {
                    return Ok(Exit::Failure);
                }
            }
        }
        Ok(Exit::Success)
    }
}

fn row(webhook: &WebhookInfo) -> [String; 5] {
    let events: Vec<_> = webhook.events.iter().map(|event| event.word()).collect();
    [
        webhook.id.clone(),
        webhook.url.clone(),
        if events.is_empty() { "all".into() } else { events.join(",") },
        webhook.pending.to_string(),
        webhook.disabled.as_ref().map_or_else(|| "enabled".into(), |why| format!("disabled: {why}")),
    ]
}

fn delivery_row(delivery: &Delivery) -> [String; 8] {
    let dash = || "-".to_owned();
    let next = delivery.next_at.map(|at| format!("{at:.0}"));
    [
        delivery.id.to_string(),
        delivery.webhook_id.clone(),
        delivery.event.word().into(),
        delivery.cursor.to_string(),
        delivery.state.word().into(),
        delivery.attempts.to_string(),
        delivery.last_status.map_or_else(dash, |status| status.to_string()),
        match (next, &delivery.last_error) {
            (Some(next), Some(why)) => format!("{next}: {why}"),
            (next, why) => next.or_else(|| why.clone()).unwrap_or_else(dash),
        },
    ]
}

fn summary(test: &WebhookTest) -> String {
    let status = test.status.map(|status| format!("the endpoint responded {status}"));
    let what = test.error.clone().or(status).unwrap_or_default();
    format!(
        "{}: {}, {} ms\n",
        if test.delivered { "delivered" } else { "failed" },
        nido_server::sanitize::line(&what),
        test.duration_ms
    )
}
