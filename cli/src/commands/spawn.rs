//! `spawn`: creates and starts a VM. An interrupt undoes it.

use std::time::Duration;

use nido_api::error::{Code, Error};
use nido_api::name::VmName;
use nido_api::{StartRequest, VmInfo, VmSpec};
use nido_core::{Nido, VmInProgress};
use nido_server::signals::Signals;

use super::Context;
use super::vm_args::{StartArgs, VmArgs, summarize};
use crate::exit::{Failure, Outcome};
use crate::progress::Progress;

const EXAMPLES: &str = "\
Examples:
  nido spawn web
  nido spawn web --template debian-12 --cpus 2 --memory 1G --disk 8G
  nido spawn web -p 8080:80 --ttl 2h --label role=demo
  nido spawn bot --net restricted --allow pypi.org --allow '*.pythonhosted.org:443'
  nido spawn box --net none --require-isolation --ephemeral
  nido spawn web --json | jq .status

Prints the VM's name. Ctrl-C while it starts deletes it.";

/// Create and start a VM, wait until ready
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Name of the new VM
    name: VmName,
    #[command(flatten)]
    start: StartArgs,
    #[command(flatten)]
    vm: VmArgs,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let start = self.start.request();
        let vm = spawn(cx, &nido, self.vm.spec(&nido, self.name), start).await?;
        summarize(&cx.output, &vm);
        cx.acted(&vm)
    }
}

/// Makes and starts a VM; a signal undoes it, and a second one stops waiting for that.
pub async fn spawn(cx: &Context, nido: &Nido, spec: VmSpec, start: StartRequest) -> Result<VmInfo, Failure> {
    let name = spec.name.clone();
    let (mut signals, grant) = (Signals::listen()?, Context::grant());
    let begun = VmInProgress::default();
    let interrupted = {
        let mut progress = Progress::new(&cx.output, name.as_str());
        let mut told = |stage| progress.start(stage);
        tokio::select! {
            vm = nido.spawn_tracked(spec, start, &grant, &begun, &mut told) => return Ok(vm?),
            number = signals.next_end() => number,
        }
    };
    if begun.id().is_some() {
        cx.output.note(&format!("interrupted; removing {name}"));
        tokio::select! {
            gone = nido.undo(&begun) => gone?,
            _ = signals.next_end() => cx.output.warn(&format!("{name} may still exist; delete it with 'nido delete {name} --force'")),
        }
    }
    Err(Failure::Interrupted { signal: interrupted, undo: Duration::ZERO })
}

/// A VM that is not there, or whose name belongs to another one by now, counts as deleted.
pub fn absent(deleted: Result<VmInfo, Error>) -> Result<(), Error> {
    match deleted {
        Err(error) if !matches!(error.code(), Code::VmNotFound | Code::VmReplaced) => Err(error),
        _ => Ok(()),
    }
}
