//! `watch`, hidden: the guardian of a home, which starts a supervisor for a QEMU that has none. Only nido itself starts it.

use nido_core::Nido;

use super::Context;
use crate::exit::{Exit, Outcome};

/// Watch the supervisors of all running VMs until no VM runs
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Stay when no VM runs, and wait for the end of another guardian
    #[arg(long)]
    stay: bool,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        Box::pin(Nido::watch(cx.options.clone(), self.stay)).await?;
        Ok(Exit::Success)
    }
}
