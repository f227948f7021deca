//! `download`: a file or directory of the guest, copied to the host.

use std::ffi::OsString;

use nido_vmm::api::{DownloadRequest, DownloadTarget};
use nido_vmm::name::VmName;

use super::{Context, copy};
use crate::exit::Outcome;

const EXAMPLES: &str = "\
Examples:
  nido download web /var/log/app.log .
  nido download web /srv/site ./site --force
  nido download web /etc/os-release - | grep VERSION

What exists is only replaced with --force. Devices, sockets and pipes of the guest are left out; owners and
set-id bits are not taken over.";

/// Copy a file or directory out of a VM
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Name of the VM
    name: VmName,
    /// Path in the guest
    #[arg(value_name = "SRC")]
    source: OsString,
    /// Path here; - is standard output
    #[arg(value_name = "DST", value_hint = clap::ValueHint::AnyPath)]
    destination: OsString,
    /// Replace what exists
    #[arg(long, short)]
    force: bool,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let request = DownloadRequest {
            source: copy::guest(self.source),
            destination: copy::target(self.destination)?,
            overwrite: self.force,
            max_bytes: None,
        };
        let to_stdout = matches!(request.destination, DownloadTarget::Stream(_));
        let done = copy::download(cx, &nido, &self.name, request).await?;
        copy::report(cx, &done, to_stdout)
    }
}
