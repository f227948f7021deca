//! `supervise`, hidden: the process that owns one running VM. Only nido itself starts it.

use nido_core::Nido;
use nido_core::SuperviseRequest;

use super::Context;
use crate::exit::{Exit, Outcome};

/// Supervise a VM until it is stopped
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Id of the VM
    id: String,
    /// Time since the start was requested, in milliseconds
    #[arg(long, default_value_t = 0.0)]
    asked_ms_ago: f64,
    /// Time limit for the guest to become ready, in milliseconds
    #[arg(long)]
    ready_within_ms: Option<u64>,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let Self { id, asked_ms_ago, ready_within_ms } = self;
        let request = SuperviseRequest { id, asked_ms_ago, ready_within_ms };
        Box::pin(Nido::supervise(cx.options.clone(), request)).await?;
        Ok(Exit::Success)
    }
}
