//! `fork`: copies a running VM, which keeps running.

use std::time::Duration;

use nido_api::name::VmName;
use nido_api::operation as op;
use nido_core::ForkSecrets;

use super::Context;
use super::vm_args::{paused, summarize};
use crate::exit::{Exit, Outcome, until_signal};
use crate::progress::Progress;

const EXAMPLES: &str = "\
Examples:
  nido fork web web-2
  nido fork warmed-up worker-1 worker-2 worker-3

Prints the names of the copies. Each has the memory, disk and processes of the original at one
moment, but its own host name, machine id, host keys and random numbers. Commands of nido exec,
run or shell that run at that moment end in the copies; background processes of earlier ones
continue. Published ports stay with the original.";

/// Copy a running VM, which keeps running
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Name of the running VM
    name: VmName,
    /// Names of the copies
    #[arg(required = true, value_name = "NEW")]
    copies: Vec<VmName>,
    /// Let the copies use the secrets of the VM [default: none]
    #[arg(long)]
    secrets: bool,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let forked = {
            let mut progress = Progress::new(&cx.output, self.name.as_str());
            let mut told = |_: &VmName, stage| progress.start(stage);
            let arguments = serde_json::json!({ "name": self.name, "copies": self.copies, "secrets": self.secrets });
            let grant = Context::grant();
            let secrets = if self.secrets { ForkSecrets::Same } else { ForkSecrets::None };
            let forked = nido.fork_with(&self.name, &self.copies, secrets, &grant, &mut told);
            let forked = until_signal(Duration::ZERO, forked);
            cx.audited(&nido, op::VM_FORK, arguments, forked).await?
        };
        forked.copies.iter().for_each(|copy| summarize(&cx.output, copy));
        paused(&cx.output, &self.name, forked.paused_ms);
        cx.output.answer(&forked, || forked.copies.iter().map(|copy| format!("{}\n", copy.name)).collect())?;
        Ok(Exit::Success)
    }
}
