//! `pause`: pauses the CPUs of VMs.

use nido_api::state::VmState;

use super::Context;
use super::selection::Selection;
use crate::exit::Outcome;

const EXAMPLES: &str = "\
Examples:
  nido pause web db
  nido pause --all
  nido pause --filter label=team=ci";

/// Pause the CPUs of VMs; their memory stays
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    vms: Selection,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let names = self.vms.names(&nido, |vm| vm.status == VmState::Running)?;
        self.vms.each(cx, names, async |name| Ok(nido.pause(name).await?)).await
    }
}
