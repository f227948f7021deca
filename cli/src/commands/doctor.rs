//! `doctor`: can VMs be started here, and if not, what is missing.

use nido_api::error::Error;
use nido_api::operation as op;
use nido_api::{CheckStatus, DoctorReport};
use nido_core::{Adoption, Nido, RebuildReport};
use nido_server::sanitize::line;

use super::Context;
use super::confirmation::Confirmation;
use crate::exit::{Exit, Outcome};

const EXAMPLES: &str = "\
Examples:
  nido doctor
  nido doctor --gc       also remove orphans
  nido doctor --adopt    restore VMs that have files but no row in nido.db
  nido doctor --rebuild  make a new nido.db if it is missing or damaged
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
    /// Rebuild nido.db if it is missing or damaged
    ///
    /// Keeps the damaged file as nido.db.damaged-DATE. Takes what can be read of it and of its backups, and the rows of other VMs
    /// from their directories. VMs keep running; their supervisors are replaced. Changes nothing if nido.db is sound and knows
    /// every VM.
    #[arg(long, conflicts_with_all = ["gc", "adopt"])]
    rebuild: bool,
    #[command(flatten)]
    confirmation: Confirmation,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        if self.rebuild {
            return rebuild(cx, self.confirmation).await;
        }
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
            print_adoption(cx, &adopted);
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

async fn rebuild(cx: &Context, confirmation: Confirmation) -> Outcome {
    if !confirmation.given(cx, "rebuild nido.db if it is missing or damaged, and replace all supervisors?") {
        return Ok(Exit::Failure);
    }
    let rebuilt = Nido::rebuild(cx.options.clone()).await?;
    // Only now is there a store that the audit log can be continued with.
    let nido = cx.nido().await?;
    let done = async { Ok::<_, Error>(rebuilt) };
    let rebuilt = cx.audited(&nido, op::DOCTOR_REBUILD, serde_json::json!({}), done).await?;
    cx.output.answer(&rebuilt, || rebuilt_text(&rebuilt))?;
    Ok(if rebuilt.skipped.is_empty() { Exit::Success } else { Exit::Failure })
}

fn rebuilt_text(done: &RebuildReport) -> String {
    let mut out = match &done.reason {
        Some(reason) => format!("{}: a new one was made\n", line(reason)),
        None => "nido.db is sound and was not replaced\n".to_owned(),
    };
    if let Some(kept) = &done.kept {
        out.push_str(&format!("kept      {}\n", line(&kept.display().to_string())));
    }
    for vm in &done.vms {
        let from = if vm.from_directory { "from its directory" } else { "from the old store" };
        let was = vm.renamed_from.as_ref().map(|was| format!(", was {was}")).unwrap_or_default();
        out.push_str(&format!("VM        {}{} ({from})\n", line(&vm.name), line(&was)));
    }
    for rows in &done.restored {
        out.push_str(&format!("restored  {} {} (from {})\n", rows.count, rows.what, line(&rows.from)));
    }
    for lost in &done.lost {
        out.push_str(&format!("lost      {}\n", line(lost)));
    }
    for directory in &done.skipped {
        out.push_str(&format!("skipped   vms/{}: {}\n", line(&directory.id), line(&directory.reason)));
    }
    out
}

/// What was adopted, on standard error.
fn print_adoption(cx: &Context, adoption: &Adoption) {
    for (name, before) in &adoption.adopted {
        match before {
            None => cx.output.note(&format!("adopted VM {name}")),
            Some(before) => {
                cx.output.note(&format!("adopted VM {name}, which was {before}: that name belongs to another VM"));
            }
        }
    }
    for (id, why) in &adoption.skipped {
        cx.output.warn(&format!("cannot adopt directory vms/{}: {}", line(id), line(why)));
    }
    if adoption.adopted.is_empty() && adoption.skipped.is_empty() {
        cx.output.note("every VM has its row");
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
