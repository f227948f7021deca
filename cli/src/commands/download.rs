//! `download`: a file or directory of the guest, copied to the host.

use std::ffi::OsString;

use nido_api::DownloadRequest;
use nido_api::name::VmName;

use super::{Context, copy};
use crate::exit::Outcome;

const EXAMPLES: &str = "\
Examples:
  nido download web /var/log/app.log .
  nido download web /srv/site ./site --force
  nido download web /etc/os-release - | grep VERSION
  nido download web /srv/site - | tar -t

Existing files are only replaced with --force; they keep their mode, owner, attributes and hard
links. - is standard output: the bytes of a file, or a tar archive of a directory. A character
device or pipe of the host is written to, never replaced. Devices, sockets and pipes of the guest
are skipped; set-id bits are not copied, owners only with --preserve and as root. Modes are masked
with the umask, unless --preserve is given. Holes of sparse files and hard links within a tree are
kept. Entries that cannot be read are skipped and listed, and the exit code is 1.";

/// Copy a file or directory out of a VM
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Name of the VM
    name: VmName,
    /// Path in the guest
    #[arg(value_name = "SRC")]
    source: OsString,
    /// Path on the host; - is standard output
    #[arg(value_name = "DST", value_hint = clap::ValueHint::AnyPath)]
    destination: OsString,
    /// Replace existing files
    #[arg(long, short)]
    force: bool,
    /// Keep modes exactly, and (as root) owners and groups by number
    #[arg(long, short)]
    preserve: bool,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let (destination, to_stdout) = (self.destination.clone(), copy::is_stdout(&self.destination));
        let request = DownloadRequest {
            source: copy::guest(self.source),
            destination: copy::target(self.destination)?,
            overwrite: self.force,
            preserve: self.preserve,
            max_bytes: None,
        };
        let done = copy::with_destination(&destination, copy::download(cx, &nido, &self.name, request).await?);
        copy::report(cx, &done, to_stdout)
    }
}
