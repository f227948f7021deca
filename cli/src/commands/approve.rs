//! `approve` and `deny`: a person's decision about an operation that a program requested.

use nido_api::operation as op;
use nido_api::{Approval, Caller};

use super::Context;
use super::approvals::requester;
use super::confirmation::Confirmation;
use crate::exit::{Exit, Failure, Outcome};
use crate::output::json;

const APPROVE_EXAMPLES: &str = "\
Examples:
  nido approvals
  nido approve apr_0123456789abcdef
  nido approve apr_0123456789abcdef --yes --json

On a terminal nido asks for confirmation, unless --yes is given; without a terminal --yes is
required. The program may then run the operation once, with exactly these arguments, within two
minutes of its request. Check them first with nido approvals. Until it was used, an approval can
be revoked with nido deny.";

const DENY_EXAMPLES: &str = "\
Examples:
  nido deny apr_0123456789abcdef
  nido approvals -q | xargs nido deny
  nido deny apr_0123456789abcdef --json

The program's next attempt is denied. An approval that was not used yet is revoked.";

/// Approve a requested operation
#[derive(Debug, clap::Args)]
#[command(after_help = APPROVE_EXAMPLES)]
pub struct Args {
    /// Id of the approval
    id: String,
    #[command(flatten)]
    confirmation: Confirmation,
}

/// Deny requested operations
#[derive(Debug, clap::Args)]
#[command(after_help = DENY_EXAMPLES)]
pub struct DenyArgs {
    /// Ids of the approvals
    #[arg(required = true, value_name = "ID")]
    ids: Vec<String>,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let asked = cx.nido().await?.approval(&self.id)?;
        if !self.confirmation.required(cx, "approve", &approval_text(&asked))? {
            return Ok(Exit::Failure);
        }
        let decided = decide(cx, &self.id, true).await?;
        cx.output.answer(&decided, || format!("{}\n", decided.id))?;
        cx.output.note(&decision_text(&decided, true));
        Ok(Exit::Success)
    }
}

impl DenyArgs {
    pub async fn run(self, cx: &Context) -> Outcome {
        let mut all = Vec::new();
        for id in &self.ids {
            all.push(decide(cx, id, false).await?);
        }
        cx.answer_each("approvals", &all, |decided| format!("{}\n", decided.id))?;
        all.iter().for_each(|decided| cx.output.note(&decision_text(decided, false)));
        Ok(Exit::Success)
    }
}

async fn decide(cx: &Context, id: &str, yes: bool) -> Result<Approval, Failure> {
    let nido = cx.nido().await?;
    let asked = nido.approval(id)?;
    let by = Caller::command_line().actor;
    let arguments = serde_json::json!({
        "approval_id": id, "tool": asked.tool, "vm_name": asked.vm_name, "vm_id": asked.vm_id, "actor": asked.actor,
    });
    let tool = if yes { op::APPROVAL_APPROVE } else { op::APPROVAL_DENY };
    let decided =
        cx.audited(&nido, tool, arguments, async { if yes { nido.approve(id, &by) } else { nido.deny(id, &by) } });
    decided.await
}

fn decision_text(decided: &Approval, yes: bool) -> String {
    format!("{}: {}", if yes { "approved" } else { "denied" }, approval_text(decided))
}

fn approval_text(approval: &Approval) -> String {
    let (asker, arguments) = (requester(approval), json(&approval.arguments, false));
    format!("{} of VM {}, requested by {asker}, with {arguments}", approval.tool, approval.vm_name)
}
