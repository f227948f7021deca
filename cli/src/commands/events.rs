//! `events`: what happened, and what happens.

use nido_api::name::VmName;
use nido_api::{Event, EventDetails, EventKind, EventList, EventsRequest, Limit};
use nido_server::sanitize;

use super::Context;
use super::vm_args::path_words;
use crate::exit::{Exit, Outcome};
use crate::output::{json, table};
use crate::stdio::{self, Stream};

const EXAMPLES: &str = "\
Examples:
  nido events
  nido events -f
  nido events -f --event vm.crashed --json | jq -r .details.message
  nido events --since 1200 --json

Events: vm.created vm.started vm.stopped vm.deleted vm.crashed vm.paused vm.resumed vm.expired
vm.limit_hit net.denied secret.used snapshot.created snapshot.restored template.created template.deleted. They are kept
for 30 days, at most the last 100000. Each has a cursor; pass the last one as --since to continue after it.";

/// Show what happened to VMs, snapshots and templates
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Keep running, and print new events; without --since only those
    #[arg(long, short)]
    follow: bool,
    /// Events after this cursor; 0 is all
    #[arg(long, value_name = "CURSOR")]
    since: Option<u64>,
    /// Events of this type; may be repeated
    #[arg(long = "event", short, value_name = "EVENT", value_delimiter = ',')]
    events: Vec<EventKind>,
    /// Events of this VM
    #[arg(long, value_name = "NAME")]
    vm: Option<VmName>,
}

const HEAD: [&str; 5] = ["CURSOR", "TIME", "EVENT", "NAME", "DETAILS"];

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let since = match self.since {
            Some(cursor) => cursor,
            None if self.follow => nido.last_event()?,
            None => 0,
        };
        let mut request = EventsRequest { since, kinds: self.events, vm: self.vm };
        if self.follow {
            let mut feed = nido.follow_events(request);
            loop {
                let event = feed.next().await?;
                let line = if cx.output.json { json(&event, false) + "\n" } else { line(&event) };
                stdio::write(Stream::Out, line.as_bytes())?;
            }
        }
        let mut all = EventList { events: Vec::new(), cursor: since, oldest: 0 };
        loop {
            let more = nido.events(&request)?;
            (all.cursor, all.oldest, request.since) = (more.cursor, more.oldest, more.cursor);
            if more.events.is_empty() {
                break;
            }
            all.events.extend(more.events);
        }
        cx.output.answer(&all, || {
            if cx.output.quiet {
                return all.events.iter().map(|event| format!("{}\n", event.cursor)).collect();
            }
            table(HEAD, all.events.iter().map(row))
        })?;
        Ok(Exit::Success)
    }
}

fn row(event: &Event) -> [String; 5] {
    [
        event.cursor.to_string(),
        format!("{:.0}", event.timestamp),
        event.event.word().into(),
        name(event),
        about(&event.details),
    ]
}

fn line(event: &Event) -> String {
    let [cursor, time, kind, name, about] = row(event);
    format!("{cursor:<7} {time} {kind:<17} {name}  {about}\n").trim_end().to_owned() + "\n"
}

fn name(event: &Event) -> String {
    match (&event.vm_name, &event.details.template) {
        (Some(vm), _) => vm.to_string(),
        (None, Some(template)) => template.to_string(),
        (None, None) => "-".into(),
    }
}

/// What a person wants to know of the details, in a few words.
fn about(details: &EventDetails) -> String {
    let mut words = Vec::new();
    if let Some(snapshot) = &details.snapshot {
        words.push(format!("snapshot {snapshot}"));
    }
    if let Some(limit) = details.limit {
        let what = match limit {
            Limit::Ttl => "time to live",
            Limit::Idle => "idle time",
            Limit::Session => "its session",
        };
        words.push(format!("{what} is over"));
    }
    if let Some(timings) = &details.timings {
        words.push(format!("{} in {:.0} ms", path_words(timings.path), timings.total_ms));
    }
    if let Some(denial) = &details.denial {
        words.push(sanitize::line(&super::info::refusal(denial)));
    }
    if let Some(message) = &details.message {
        words.push(sanitize::line(message));
    }
    if let Some(ms) = details.ran_ms {
        words.push(format!("after {}", crate::parse::show_seconds(ms / 1000)));
    }
    words.join(", ")
}
