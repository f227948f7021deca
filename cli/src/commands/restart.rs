//! `restart`: stop and start again.

use nido_vmm::api::StopRequest;
use nido_vmm::name::VmName;

use super::Context;
use super::vm_args::{StartArgs, summarize};
use crate::exit::Outcome;
use crate::parse;
use crate::progress::Progress;

const EXAMPLES: &str = "\
Examples:
  nido restart web
  nido restart web --force --no-wait";

/// Stop a VM and start it again
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Name of the VM
    name: VmName,
    /// Pull the plug instead of powering off in order
    #[arg(long, short)]
    force: bool,
    /// How long an orderly power-off may take before the plug is pulled, at most 1h [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
    stop_timeout: Option<u64>,
    #[command(flatten)]
    start: StartArgs,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let timeout_ms = self.stop_timeout.unwrap_or(StopRequest::default().timeout_ms);
        let stop = StopRequest { force: self.force, timeout_ms };
        let vm = {
            let mut progress = Progress::new(&cx.output, self.name.as_str());
            let mut told = |stage| progress.start(stage);
            let arguments =
                serde_json::json!({ "name": self.name, "force": self.force, "stop_timeout_ms": timeout_ms });
            let restarted = nido.restart(&self.name, stop, self.start.request(), &mut told);
            cx.audited(&nido, "vm_restart", arguments, restarted).await?
        };
        summarize(&cx.output, &vm);
        cx.acted(&vm)
    }
}
