//! `start`: a VM at rest is started.

use nido_vmm::name::VmName;

use super::Context;
use super::vm_args::{StartArgs, summarize};
use crate::exit::Outcome;
use crate::progress::Progress;

const EXAMPLES: &str = "\
Examples:
  nido start web
  nido start web --no-wait

Starting a VM that runs changes nothing. Ctrl-C stops the waiting, not the VM.";

/// Start a VM and wait until it is ready
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Name of the VM
    name: VmName,
    #[command(flatten)]
    start: StartArgs,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let vm = {
            let mut progress = Progress::new(&cx.output, self.name.as_str());
            nido.start(&self.name, self.start.request(), &mut |stage| progress.start(stage)).await?
        };
        summarize(&cx.output, &vm);
        cx.acted(&vm)
    }
}
