//! `deliver`, hidden: the process that delivers messages to webhooks in the background. Only nido itself starts it.

use nido_core::Nido;

use super::Context;
use crate::exit::{Exit, Outcome};

/// Deliver pending webhook messages, then exit
#[derive(Debug, clap::Args)]
pub struct Args {}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        Nido::deliver(cx.options.clone()).await?;
        Ok(Exit::Success)
    }
}
