//! `doctor`: can VMs be started here, and if not, what is missing.

use nido_vmm::api::{CheckStatus, DoctorReport};

use super::Context;
use crate::exit::{Exit, Outcome};
use crate::sanitize::line;

const EXAMPLES: &str = "\
Examples:
  nido doctor
  nido doctor --gc       also remove what crashes have left behind
  nido doctor --json | jq .ok

Exit code 1 if no VM can be started.";

/// Look at the host: can VMs be started, and how well
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Remove what crashes have left behind
    #[arg(long)]
    gc: bool,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let report = if self.gc {
            cx.audited(&nido, "doctor_gc", serde_json::json!({}), nido.doctor(true)).await?
        } else {
            nido.doctor(false).await?
        };
        cx.output.answer(&report, || text(&report))?;
        Ok(if report.ok { Exit::Success } else { Exit::Failure })
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
    out.push_str(if report.ok { "VMs can be started here.\n" } else { "No VM can be started here yet.\n" });
    out
}
