//! `resume`: resumes paused VMs.

use nido_api::state::VmState;

use super::Context;
use super::selection::Selection;
use crate::exit::Outcome;

const EXAMPLES: &str = "\
Examples:
  nido resume web db
  nido resume --all
  nido resume --filter label=team=ci";

/// Resume paused VMs
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    vms: Selection,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let names = self.vms.names(&nido, |vm| vm.status == VmState::Paused)?;
        self.vms.each(cx, names, async |name| Ok(nido.resume(name).await?)).await
    }
}
