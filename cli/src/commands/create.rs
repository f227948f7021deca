//! `create`: a VM made, not started.

use nido_api::name::VmName;

use super::Context;
use super::vm_args::VmArgs;
use crate::exit::Outcome;

const EXAMPLES: &str = "\
Examples:
  nido create web --memory 1G
  nido create web && nido start web";

/// Create a VM without starting it
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Name of the new VM
    name: VmName,
    #[command(flatten)]
    vm: VmArgs,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let vm = nido.create(self.vm.spec(&nido, self.name), &Context::grant()).await?;
        if !cx.output.json {
            vm.warnings.iter().for_each(|warning| cx.output.warn(warning));
        }
        cx.acted(&vm)
    }
}
