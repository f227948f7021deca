//! `approvals`: what programs have asked a person to approve.

use std::collections::HashSet;

use jiff::Timestamp;
use nido_api::{Approval, ApprovalState};
use nido_core::{Nido, Watch};
use nido_server::signals::Signals;

use super::Context;
use crate::exit::{Exit, Outcome};
use crate::output::{json, table};
use crate::parse::show_seconds;

const EXAMPLES: &str = "\
Examples:
  nido approvals
  nido approvals --all
  nido approvals --watch
  nido approvals -q | xargs nido deny

Lists operations that a program requested and that failed with approval_required. Check the
operation and the VM before you approve it; the program's name is not verified. An approval is
valid for two minutes, and for one use with exactly these arguments.";

/// List operations that await approval
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Include those approved, denied, used or expired within the last hour
    #[arg(long, short)]
    all: bool,
    /// Keep running, and print each new one
    #[arg(long, short, conflicts_with = "all")]
    watch: bool,
}

const HEAD: [&str; 8] = ["ID", "STATE", "OPERATION", "VM", "REQUESTED BY", "AGE", "LEFT", "ARGUMENTS"];
/// How much of the arguments a row shows, in characters; `--json` has more of them.
const ARGUMENTS_MAX: usize = 200;

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        if self.watch {
            return watch(cx, &nido).await;
        }
        let mut list = nido.approvals()?;
        list.approvals.retain(|approval| self.all || approval.state == ApprovalState::Pending);
        cx.output.answer(&list, || {
            if cx.output.quiet {
                return list.approvals.iter().map(|approval| format!("{}\n", approval.id)).collect();
            }
            let now = Timestamp::now();
            table(HEAD, list.approvals.iter().map(|approval| row(approval, now)))
        })?;
        Ok(Exit::Success)
    }
}

/// Prints what waits and what comes, a line each, until a signal ends it.
async fn watch(cx: &Context, nido: &Nido) -> Outcome {
    let (mut signals, mut store) = (Signals::listen()?, Watch::new(nido));
    let mut told = HashSet::new();
    loop {
        let mut waiting = nido.approvals()?.approvals;
        waiting.retain(|approval| approval.state == ApprovalState::Pending);
        told.retain(|id| waiting.iter().any(|approval| approval.id == *id));
        for approval in waiting.iter().rev().filter(|approval| !told.contains(&approval.id)) {
            let words = format!(
                "{} {} {} {} {}\n",
                approval.id,
                approval.tool,
                approval.vm_name,
                requester(approval),
                json(&approval.arguments, false)
            );
            let line = if cx.output.quiet { format!("{}\n", approval.id) } else { words };
            cx.output.data(&if cx.output.json {
                json(approval, false) + "\n"
            } else {
                nido_server::sanitize::line(line.trim_end()).to_string() + "\n"
            })?;
        }
        told.extend(waiting.into_iter().map(|approval| approval.id));
        tokio::select! {
            () = store.changed() => {}
            _ = signals.next_end() => return Ok(Exit::Success),
        }
    }
}

fn row(approval: &Approval, now: Timestamp) -> [String; 8] {
    let seconds = |from: Timestamp, to: Timestamp| u64::try_from(to.duration_since(from).as_secs()).unwrap_or(0);
    let open = matches!(approval.state, ApprovalState::Pending | ApprovalState::Approved);
    let mut arguments = json(&approval.arguments, false);
    if arguments.chars().count() > ARGUMENTS_MAX {
        arguments = arguments.chars().take(ARGUMENTS_MAX - 3).chain("...".chars()).collect();
    }
    [
        approval.id.clone(),
        approval.state.word().into(),
        approval.tool.clone(),
        approval.vm_name.to_string(),
        requester(approval),
        show_seconds(seconds(approval.created_at, now)),
        if open { show_seconds(seconds(now, approval.expires_at)) } else { "-".into() },
        arguments,
    ]
}

/// The caller, and the client's own name.
pub fn requester(approval: &Approval) -> String {
    match &approval.agent {
        Some(agent) => format!("{} ({agent})", approval.actor),
        None => approval.actor.clone(),
    }
}
