//! `stop`: a VM powered off, in order or at once.

use nido_api::name::VmName;
use nido_api::operation as op;
use nido_api::{QEMU_KILLED_WARNING, StopRequest, VmInfo};

use super::Context;
use super::confirmation::Confirmation;
use super::selection::Selection;
use crate::exit::{Exit, Outcome};
use crate::parse;

const EXAMPLES: &str = "\
Examples:
  nido stop web
  nido stop web --timeout 2m
  nido stop web db --force
  nido stop --all
  nido stop --filter label=team=ci

The guest powers off; after --timeout, or with --force, nido terminates QEMU. Stopping a stopped
VM changes nothing. An ephemeral VM is deleted when it stops: on a terminal nido asks for
confirmation, unless --yes is given.";

/// Stop VMs
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    vms: Selection,
    #[command(flatten)]
    confirmation: Confirmation,
    /// Terminate QEMU at once
    #[arg(long, short)]
    force: bool,
    /// Time limit for the power-off before QEMU is terminated, at most 1h [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
    timeout: Option<u64>,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let timeout_ms = self.timeout.unwrap_or(StopRequest::default().timeout_ms);
        let names = self.vms.names(&nido, |vm| !vm.status.is_inactive())?;
        let goes = |vm: &VmInfo| vm.ephemeral && names.contains(&vm.name);
        let gone: Vec<_> = nido.list()?.vms.iter().filter(|vm| goes(vm)).map(|vm| vm.name.to_string()).collect();
        let question = format!("{} and all data in it is deleted when it stops: stop it?", gone.join(", "));
        if !gone.is_empty() && !self.confirmation.given(cx, &question) {
            return Ok(Exit::Failure);
        }
        let stop = async |name: &VmName| {
            let request = StopRequest { force: self.force, timeout_ms };
            let arguments = serde_json::json!({ "name": name, "force": self.force, "timeout_ms": timeout_ms });
            let vm = cx.audited(&nido, op::VM_STOP, arguments, nido.stop(name, request)).await?;
            if !self.force && !cx.output.json && vm.warnings.iter().any(|warning| warning == QEMU_KILLED_WARNING) {
                cx.output.warn(QEMU_KILLED_WARNING);
            }
            Ok(vm)
        };
        self.vms.each(cx, names, stop).await
    }
}
