//! `supervise`, hidden: the process that owns one running VM. Only nido itself starts it.

use nido_core::Nido;
use nido_core::SuperviseRequest;

use super::Context;
use crate::exit::{Exit, Outcome};

/// Supervise one VM until it is at rest
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Id of the VM
    id: String,
    /// How long ago the start was asked for, in milliseconds
    #[arg(long, default_value_t = 0.0)]
    asked_ms_ago: f64,
    /// How long the guest may take to become ready, in milliseconds
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
