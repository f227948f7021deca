//! `proxy`: our standard streams, connected to a port of the guest.

use std::time::Duration;

use nido_api::name::VmName;
use nido_api::operation as op;
use serde_json::json;

use super::Context;
use crate::exit::{Exit, Outcome, until_signal};

const EXAMPLES: &str = "\
Examples:
  nido proxy web 5432 < request > answer
  ssh -o ProxyCommand='nido proxy web 22' user@web
  printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nido proxy web 80";

/// Connect standard input and output to a port of a VM
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Name of the VM
    name: VmName,
    /// Port in the guest
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let arguments = json!({ "name": self.name, "guest_port": self.port });
        let carried = until_signal(Duration::ZERO, nido.proxy(&self.name, self.port));
        cx.audited(&nido, op::VM_PROXY, arguments, carried).await?;
        Ok(Exit::Success)
    }
}
