//! `restart-by-policy`, hidden: starts a VM because its restart policy requires it. Only the guardian starts it.

use super::Context;
use crate::exit::{Exit, Outcome};

/// Restart a VM that has ended
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Id of the VM
    id: String,
    /// Number of restarts in a row that did not work
    #[arg(long)]
    in_row: u32,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        Box::pin(cx.nido().await?.restart_by_policy(&self.id, self.in_row)).await?;
        Ok(Exit::Success)
    }
}
