//! `doctor`: can VMs be started here, and if not, what is missing.

use nido_api::operation as op;
use nido_api::{CheckStatus, DoctorReport};
use nido_core::{Adoption, Nido};
use nido_server::sanitize::line;

use super::Context;
use crate::exit::{Exit, Outcome};

const EXAMPLES: &str = "\
Examples:
  nido doctor
  nido doctor --gc       also remove orphans
  nido doctor --adopt    restore VMs that have files but no row in nido.db
  nido doctor --json | jq .ok

Exit code 1 if no VM can be started.";

/// Check whether this host can run VMs
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Remove orphans: what interrupted commands did not remove
    #[arg(long)]
    gc: bool,
    /// Restore VMs that are missing in nido.db
    ///
    /// Rebuilds their rows from the vm.json in their directories. If a name is in use, a number is appended to it;
    /// ephemeral VMs are kept from then on.
    #[arg(long, conflicts_with = "gc")]
    adopt: bool,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = match cx.nido().await {
            Ok(nido) => nido,
            // The home is one of the things to be checked.
            Err(error) if !self.gc && !self.adopt => {
                let report = Nido::doctor_without_home(&cx.options, &error).await?;
                cx.output.answer(&report, || text(&report))?;
                return Ok(Exit::Failure);
            }
            Err(error) => return Err(error.into()),
        };
        if self.adopt {
            let adopted = async { nido.adopt_unknown_vms().await };
            let adopted = cx.audited(&nido, op::DOCTOR_ADOPT, serde_json::json!({}), adopted).await?;
            tell(cx, &adopted);
        }
        let report = if self.gc {
            cx.audited(&nido, op::DOCTOR_GC, serde_json::json!({}), nido.doctor(true)).await?
        } else {
            nido.doctor(false).await?
        };
        cx.output.answer(&report, || text(&report))?;
        Ok(if report.ok { Exit::Success } else { Exit::Failure })
    }
}

/// What was adopted, on standard error.
fn tell(cx: &Context, adoption: &Adoption) {
    for (name, before) in &adoption.adopted {
        match before {
            None => cx.output.talk(&format!("adopted VM {name}")),
            Some(before) => {
                cx.output.talk(&format!("adopted VM {name}, which was {before}: that name belongs to another VM"));
            }
        }
    }
    for (id, why) in &adoption.skipped {
        cx.output.warn(&format!("cannot adopt directory vms/{}: {}", line(id), line(why)));
    }
    if adoption.adopted.is_empty() && adoption.skipped.is_empty() {
        cx.output.talk("every VM has its row");
    }
}

fn text(report: &DoctorReport) -> String {
    let width = report.checks.iter().map(|check| check.name.chars().count()).max().unwrap_or(0);
    let mut out = String::new();
    for check in &report.checks {
        let mark = match check.status {
            CheckStatus::Ok => "ok     ",
            CheckStatus::Warning => "warning",
            CheckStatus::Failed => "failed ",
        };
        out.push_str(&format!("{mark}  {:width$}  {}\n", line(&check.name), line(&check.detail)));
        if let Some(hint) = &check.hint {
            out.push_str(&format!("         {:width$}  hint: {}\n", "", line(hint)));
        }
    }
    out.push_str(if report.ok { "This host can start VMs.\n" } else { "This host cannot start VMs yet.\n" });
    out
}
