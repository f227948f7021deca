//! `ls`: all VMs, one a line.

use jiff::Timestamp;
use nido_api::state::StateCause;
use nido_api::{VmInfo, VmQuery};

use super::Context;
use super::selection::Filter;
use crate::exit::{Exit, Outcome};
use crate::output::table;
use crate::parse::{show_bytes, show_seconds};

const EXAMPLES: &str = "\
Examples:
  nido ls
  nido ls -q
  nido ls --filter label=team=ci
  nido ls --json | jq -r '.vms[] | select(.status == \"running\") | .name'";

const HEAD: [&str; 11] =
    ["NAME", "STATUS", "TEMPLATE", "MACHINE", "ACCEL", "CPUS", "MEMORY", "AGE", "EXPIRES", "PORTS", "LABELS"];

/// List VMs
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, visible_alias = "list")]
pub struct Args {
    /// VMs with a label, as label=KEY or label=KEY=VALUE; if repeated, those with all of them
    #[arg(long, value_name = "FILTER")]
    filter: Vec<Filter>,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let labels = self.filter.into_iter().map(Filter::label).collect();
        let list = nido.list_page(&VmQuery { labels, ..VmQuery::default() }).await?;
        let unknown = nido.unknown_vms()?.len();
        if unknown > 0 && nido.notice().is_none() {
            cx.output.warn(&format!(
                "{unknown} VMs are missing in nido.db and not listed; restore them with nido doctor --adopt"
            ));
        }
        let now = Timestamp::now();
        cx.output.answer(&list, || {
            if cx.output.quiet {
                list.vms.iter().map(|vm| format!("{}\n", vm.name)).collect()
            } else {
                table(HEAD, list.vms.iter().map(|vm| row(vm, now)))
            }
        })?;
        Ok(Exit::Success)
    }
}

fn row(vm: &VmInfo, now: Timestamp) -> [String; 11] {
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
    // Of the two ends that may be set, the nearer one counts.
    let end = [vm.expires_at, vm.idle_at].into_iter().flatten().min();
    [
        vm.name.to_string(),
        status(vm),
        vm.template.to_string(),
        or_dash(&vm.machine),
        or_dash(&vm.accel),
        vm.cpus.to_string(),
        show_bytes(u64::from(vm.memory_mib) << 20),
        show_seconds(between(vm.created_at, now)),
        end.map_or_else(|| "-".into(), |end| format!("in {}", show_seconds(between(now, end)))),
        joined(vm.forwards.iter().map(ToString::to_string)),
        joined(vm.labels.iter().map(|(key, value)| format!("{key}={value}"))),
    ]
}

fn joined(parts: impl Iterator<Item = String>) -> String {
    let parts: Vec<_> = parts.collect();
    if parts.is_empty() { "-".into() } else { parts.join(",") }
}

/// The state, with the cause that the user may not know: `paused(disk_full)`, `stopped(ttl)`.
fn status(vm: &VmInfo) -> String {
    match vm.status_cause.filter(|cause| *cause != StateCause::User) {
        Some(cause) => format!("{}({})", vm.status.word(), cause.word()),
        None => vm.status.word().into(),
    }
}

/// Whole seconds from one moment to a later one; 0 if it is not later.
pub fn between(from: Timestamp, to: Timestamp) -> u64 {
    u64::try_from(to.as_second() - from.as_second()).unwrap_or(0)
}
