//! `watch-ttl`, hidden: the process that ends a VM whose supervisor is not there to. Only nido itself starts it.

use nido_core::Nido;

use super::Context;
use crate::exit::{Exit, Outcome};

/// End a VM when its time to live is over
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Id of the VM
    id: String,
    /// When its time to live is over, in milliseconds since 1970
    #[arg(long)]
    at_ms: i64,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        Nido::watch_ttl(cx.options.clone(), &self.id, self.at_ms).await?;
        Ok(Exit::Success)
    }
}
