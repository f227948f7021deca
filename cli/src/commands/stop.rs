//! `stop`: a VM powered off, in order or at once.

use nido_vmm::api::StopRequest;
use nido_vmm::name::VmName;

use super::Context;
use crate::exit::Outcome;
use crate::parse;

const EXAMPLES: &str = "\
Examples:
  nido stop web
  nido stop web --timeout 2m
  nido stop web --force

Stopping a VM that is at rest changes nothing. An ephemeral VM is deleted when it stops.";

/// Stop a VM: power it off in order, or pull the plug
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Name of the VM
    name: VmName,
    /// Pull the plug at once
    #[arg(long, short)]
    force: bool,
    /// How long an orderly power-off may take before the plug is pulled, at most 1h [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
    timeout: Option<u64>,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let timeout_ms = self.timeout.unwrap_or(StopRequest::default().timeout_ms);
        let request = StopRequest { force: self.force, timeout_ms };
        let arguments = serde_json::json!({ "name": self.name, "force": self.force, "timeout_ms": timeout_ms });
        cx.acted(&cx.audited(&nido, "vm_stop", arguments, nido.stop(&self.name, request)).await?)
    }
}
