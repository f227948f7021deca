//! `pause`: the CPUs of a VM halted.

use nido_vmm::name::VmName;

use super::Context;
use crate::exit::Outcome;

const EXAMPLES: &str = "\
Examples:
  nido pause web";

/// Halt the CPUs of a VM; its memory stays
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Name of the VM
    name: VmName,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        cx.acted(&nido.pause(&self.name).await?)
    }
}
