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
  nido start --all --wanted     those that a restart policy wants to run, after the host has booted

Starting a running VM changes nothing. Ctrl-C ends the command, not the VM.";

/// Start VMs and wait until they are ready
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    vms: Selection,
    /// With --all: only VMs with a restart policy that were not stopped by a user or a limit
    #[arg(long, requires = "all")]
    wanted: bool,
    #[command(flatten)]
    start: StartArgs,
    #[command(flatten)]
    accel: StartAccelArgs,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let wanted = if self.wanted { Some(nido.wanted()?) } else { None };
        let is_wanted = |name: &VmName| wanted.as_ref().is_none_or(|wanted| wanted.contains(name));
        let names = self.vms.names(&nido, |vm| vm.status.is_inactive() && is_wanted(&vm.name))?;
        let start = async |name: &VmName| {
            let mut progress = Progress::new(&cx.output, name.as_str());
            let request = self.accel.with(self.start.request());
            let mut report = |stage| progress.start(stage);
            let vm = match self.wanted {
                true => nido.start_wanted(name, request, &mut report).await?,
                false => nido.start(name, request, &mut report).await?,
            };
            drop(progress);
            summarize(&cx.output, &vm);
            Ok(vm)
        };
        self.vms.each(cx, names, start).await
    }
}
