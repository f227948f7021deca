//! `delete`: deletes VMs with their disks. Asks for confirmation on a terminal.

use nido_api::VmInfo;
use nido_api::operation as op;

use super::Context;
use super::confirmation::Confirmation;
use super::selection::{Selection, each, every};
use crate::exit::{Exit, Outcome};

const EXAMPLES: &str = "\
Examples:
  nido delete web
  nido delete web db --force --yes
  nido delete --all --force
  nido delete --filter label=team=ci --force

On a terminal nido asks for confirmation, unless --yes is given; in a script it does not. A
running VM is only deleted with --force. If one of several VMs cannot be deleted, the others still
are.";

/// Delete VMs with their disks
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    vms: Selection,
    /// Delete running VMs, too
    #[arg(long, short)]
    force: bool,
    #[command(flatten)]
    confirmation: Confirmation,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let mut names = self.vms.names(&nido, every)?;
        names.sort();
        // Ask only about VMs that can be deleted; report the errors of the others.
        let can = |vm: &VmInfo| names.contains(&vm.name) && (self.force || vm.status.is_inactive());
        let gone: Vec<_> = nido.list()?.vms.iter().filter(|vm| can(vm)).map(|vm| vm.name.to_string()).collect();
        let question = format!("delete {} and all data in it?", gone.join(", "));
        if !gone.is_empty() && !self.confirmation.given(cx, &question) {
            return Ok(Exit::Failure);
        }
        each(cx, &names, async |name| {
            let arguments = serde_json::json!({ "name": name, "force": self.force });
            cx.audited(&nido, op::VM_DELETE, arguments, nido.delete(name, self.force)).await
        })
        .await
    }
}
