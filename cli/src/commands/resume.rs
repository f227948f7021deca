//! `resume`: a paused VM goes on.

use nido_vmm::name::VmName;

use super::Context;
use crate::exit::Outcome;

const EXAMPLES: &str = "\
Examples:
  nido resume web";

/// Let a paused VM run on
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Name of the VM
    name: VmName,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        cx.acted(&nido.resume(&self.name).await?)
    }
}
