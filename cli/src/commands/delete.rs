//! `delete`: VMs and everything of them, gone. Asks first where there is somebody to ask.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};

use nido_vmm::api::VmList;
use nido_vmm::name::VmName;

use super::Context;
use crate::exit::{Codes, Exit, Failure, Outcome};

const EXAMPLES: &str = "\
Examples:
  nido delete web
  nido delete web db --force --yes
  nido ls -q | xargs nido delete --force

On a terminal nido asks before it deletes, unless --yes is given; in a script it does not ask.
A VM that runs is only deleted with --force. If one of several cannot be deleted, the others still are.";

/// Delete VMs with their disks
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Names of the VMs
    #[arg(required = true)]
    name: Vec<VmName>,
    /// Delete VMs that run, too
    #[arg(long, short)]
    force: bool,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

impl Args {
    pub async fn run(mut self, cx: &Context) -> Outcome {
        self.name.sort();
        self.name.dedup();
        if !self.yes && io::stdin().is_terminal() && cx.output.stderr_is_terminal && !confirmed(&self.name) {
            cx.output.talk("nothing was deleted");
            return Ok(Exit::Failure);
        }
        let nido = cx.nido().await?;
        let mut vms = Vec::new();
        let mut exit = Exit::Success;
        for name in &self.name {
            let arguments = serde_json::json!({ "name": name, "force": self.force });
            match cx.audited(&nido, "vm_delete", arguments, nido.delete(name, self.force)).await {
                Ok(vm) => vms.push(vm),
                Err(Failure::Nido(error)) => {
                    cx.output.error(&error);
                    exit = Exit::of_error(&error, Codes::Own);
                }
                Err(other) => return Err(other),
            }
        }
        let list = VmList { vms };
        cx.output.answer(&list, || list.vms.iter().map(|vm| format!("{}\n", vm.name)).collect())?;
        Ok(exit)
    }
}

fn confirmed(names: &[VmName]) -> bool {
    let names: Vec<_> = names.iter().map(VmName::as_str).collect();
    let mut stderr = io::stderr().lock();
    let mut answer = String::new();
    write!(stderr, "delete {} and all data in it? [y/N] ", names.join(", ")).is_ok()
        && io::stdin().lock().read_line(&mut answer).is_ok()
        && matches!(answer.trim(), "y" | "Y" | "yes" | "Yes")
}
