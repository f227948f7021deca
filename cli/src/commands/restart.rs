//! `restart`: stop and start again.

use nido_api::StopRequest;
use nido_api::name::VmName;
use nido_api::operation as op;

use super::Context;
use super::selection::{Selection, every};
use super::vm_args::{StartAccelArgs, StartArgs, summarize};
use crate::exit::Outcome;
use crate::parse;
use crate::progress::Progress;

const EXAMPLES: &str = "\
Examples:
  nido restart web
  nido restart web db --force --no-wait
  nido restart --filter label=team=ci";

/// Stop VMs and start them again
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    vms: Selection,
    /// Terminate QEMU instead of powering off
    #[arg(long, short)]
    force: bool,
    /// Time limit for the power-off before QEMU is terminated, at most 1h [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
    stop_timeout: Option<u64>,
    #[command(flatten)]
    start: StartArgs,
    #[command(flatten)]
    accel: StartAccelArgs,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let timeout_ms = self.stop_timeout.unwrap_or(StopRequest::default().timeout_ms);
        let names = self.vms.names(&nido, every)?;
        let restart = async |name: &VmName| {
            let stop = StopRequest { force: self.force, timeout_ms };
            let mut progress = Progress::new(&cx.output, name.as_str());
            let mut told = |stage| progress.start(stage);
            let arguments = serde_json::json!({ "name": name, "force": self.force, "stop_timeout_ms": timeout_ms });
            let restarted = nido.restart(name, stop, self.accel.with(self.start.request()), &mut told);
            let vm = cx.audited(&nido, op::VM_RESTART, arguments, restarted).await?;
            drop(progress);
            summarize(&cx.output, &vm);
            Ok(vm)
        };
        self.vms.each(cx, names, restart).await
    }
}
