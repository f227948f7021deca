//! `ls`: all VMs, one a line.

use jiff::Timestamp;
use nido_vmm::api::VmInfo;

use super::Context;
use crate::exit::{Exit, Outcome};
use crate::output::table;
use crate::parse::{show_bytes, show_seconds};

const EXAMPLES: &str = "\
Examples:
  nido ls
  nido ls -q
  nido ls --json | jq -r '.vms[] | select(.status == \"running\") | .name'";

const HEAD: [&str; 9] = ["NAME", "STATUS", "TEMPLATE", "MACHINE", "ACCEL", "CPUS", "MEMORY", "AGE", "EXPIRES"];

/// List VMs
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, visible_alias = "list")]
pub struct Args {}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let list = cx.nido().await?.list()?;
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

fn row(vm: &VmInfo, now: Timestamp) -> [String; 9] {
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
    // Of the two ends that may be set, the nearer one counts.
    let end = [vm.expires_at, vm.idle_at].into_iter().flatten().min();
    [
        vm.name.to_string(),
        vm.status.word().into(),
        vm.template.to_string(),
        or_dash(&vm.machine),
        or_dash(&vm.accel),
        vm.cpus.to_string(),
        show_bytes(u64::from(vm.memory_mib) << 20),
        show_seconds(between(vm.created_at, now)),
        end.map_or_else(|| "-".into(), |end| format!("in {}", show_seconds(between(now, end)))),
    ]
}

/// Whole seconds from one moment to a later one; 0 if it is not later.
pub fn between(from: Timestamp, to: Timestamp) -> u64 {
    u64::try_from(to.as_second() - from.as_second()).unwrap_or(0)
}
