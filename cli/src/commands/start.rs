//! `start`: starts stopped VMs.

use nido_api::name::VmName;

use super::Context;
use super::selection::Selection;
use super::vm_args::{StartAccelArgs, StartArgs, summarize};
use crate::exit::Outcome;
use crate::progress::Progress;

const EXAMPLES: &str = "\
Examples:
  nido start web
  nido start web db --no-wait
  nido start --all

Starting a running VM changes nothing. Ctrl-C ends the command, not the VM.";

/// Start VMs and wait until they are ready
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    vms: Selection,
    #[command(flatten)]
    start: StartArgs,
    #[command(flatten)]
    accel: StartAccelArgs,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let names = self.vms.names(&nido, |vm| vm.status.at_rest())?;
        let start = async |name: &VmName| {
            let mut progress = Progress::new(&cx.output, name.as_str());
            let request = self.accel.with(self.start.request());
            let vm = nido.start(name, request, &mut |stage| progress.start(stage)).await?;
            drop(progress);
            summarize(&cx.output, &vm);
            Ok(vm)
        };
        self.vms.each(cx, names, start).await
    }
}
