//! `snapshot`: a VM as it was at one moment, to go back to.

use std::time::Duration;

use clap::Subcommand;
use nido_api::error::Error;
use nido_api::name::{SnapshotName, VmName};
use nido_api::operation as op;
use nido_api::{RestoreRequest, SnapshotInfo};
use serde_json::json;

use super::Context;
use super::confirmation::Confirmation;
use super::vm_args::{paused, summarize};
use crate::exit::{Exit, Outcome, until_signal};
use crate::output::table;
use crate::parse::{self, show_bytes};
use crate::progress::Progress;

const EXAMPLES: &str = "\
Examples:
  nido snapshot create web                 prints its name
  nido snapshot create web before-upgrade
  nido snapshot ls web
  nido snapshot restore web before-upgrade
  nido snapshot delete web before-upgrade

A snapshot of a running VM contains memory, devices and disk; the VM is paused meanwhile, usually
for less than a second. A snapshot of a stopped VM contains the disk. What the VM has done since
is lost when a snapshot is restored.";

/// How long what is interrupted may take to be undone. The supervisor ends a snapshot by itself.
const UNDO_LIMIT: Duration = Duration::ZERO;

/// Save and restore the state of VMs
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Take a snapshot; prints its name
    Create {
        /// Name of the VM
        name: VmName,
        /// Name of the snapshot [default: derived from the time]
        snapshot: Option<SnapshotName>,
    },
    /// List a VM's snapshots, the oldest first
    #[command(visible_alias = "list")]
    Ls {
        /// Name of the VM
        name: VmName,
    },
    /// Restore a VM to a snapshot
    Restore {
        /// Name of the VM
        name: VmName,
        /// Name of the snapshot
        snapshot: SnapshotName,
        /// Restore the disk only, and leave the VM stopped
        #[arg(long)]
        disk_only: bool,
        /// Time limit for the guest to become ready, for example 60s [default: depends on the accelerator]
        #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
        timeout: Option<u64>,
        #[command(flatten)]
        confirmation: Confirmation,
    },
    /// Delete a snapshot
    Delete {
        /// Name of the VM
        name: VmName,
        /// Name of the snapshot
        snapshot: SnapshotName,
        #[command(flatten)]
        confirmation: Confirmation,
    },
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        match self.verb {
            Verb::Create { name, snapshot } => {
                let snapshot = snapshot.map_or_else(fresh_name, Ok)?;
                let made = until_signal(UNDO_LIMIT, nido.snapshot_create(&name, &snapshot)).await?;
                paused(&cx.output, &name, made.paused_ms);
                cx.output.answer(&made, || format!("{}\n", made.name))?;
            }
            Verb::Ls { name } => {
                let list = nido.snapshot_list(&name)?;
                cx.output.answer(&list, || {
                    if cx.output.quiet {
                        return list.snapshots.iter().map(|snapshot| format!("{}\n", snapshot.name)).collect();
                    }
                    table(["NAME", "HOLDS", "SIZE", "CREATED"], list.snapshots.iter().map(row))
                })?;
            }
            Verb::Restore { name, snapshot, disk_only, timeout, confirmation } => {
                let is_there = nido.snapshot_list(&name).is_ok();
                if is_there
                    && !confirmation.given(cx, &format!("restore {snapshot} and lose what {name} has done since then?"))
                {
                    return Ok(Exit::Failure);
                }
                let request = RestoreRequest { disk_only, timeout_ms: timeout };
                let vm = {
                    let mut progress = Progress::new(&cx.output, name.as_str());
                    let mut told = |stage| progress.start(stage);
                    let arguments = json!({ "name": name, "snapshot": snapshot, "disk_only": disk_only });
                    let restored =
                        until_signal(UNDO_LIMIT, nido.snapshot_restore(&name, &snapshot, request, &mut told));
                    cx.audited(&nido, op::VM_RESTORE, arguments, restored).await?
                };
                summarize(&cx.output, &vm);
                return cx.acted(&vm);
            }
            Verb::Delete { name, snapshot, confirmation } => {
                let is_there = nido.snapshot_list(&name).is_ok();
                if is_there && !confirmation.given(cx, &format!("delete the snapshot {snapshot} of {name}?")) {
                    return Ok(Exit::Failure);
                }
                let arguments = json!({ "name": name, "snapshot": snapshot });
                let gone = async { nido.snapshot_delete(&name, &snapshot) };
                let gone = cx.audited(&nido, op::VM_SNAPSHOT_DELETE, arguments, gone).await?;
                cx.output.answer(&gone, || format!("{}\n", gone.name))?;
            }
        }
        Ok(Exit::Success)
    }
}

fn row(snapshot: &SnapshotInfo) -> [String; 4] {
    let holds = match (&snapshot.damaged, snapshot.running) {
        (Some(_), _) => "damaged",
        (None, true) => "memory, disk",
        (None, false) => "disk",
    };
    [snapshot.name.to_string(), holds.into(), show_bytes(snapshot.size_bytes), format!("{:.0}", snapshot.created_at)]
}

/// The time to the second, as a name.
fn fresh_name() -> Result<SnapshotName, Error> {
    jiff::Timestamp::now().strftime("%Y%m%d-%H%M%S").to_string().parse()
}
