//! `pool-fill`, hidden: the process that fills the pools in the background. Only nido itself starts it.

use nido_core::Nido;

use super::Context;
use crate::exit::{Exit, Outcome};

/// Create and delete clones until every pool is full
#[derive(Debug, clap::Args)]
pub struct Args {}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        Nido::pool_fill(cx.options.clone()).await?;
        Ok(Exit::Success)
    }
}
