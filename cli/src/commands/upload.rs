//! `upload`: a file or directory of the host, copied into the guest.

use std::ffi::OsString;

use nido_api::UploadRequest;
use nido_api::error::Error;
use nido_api::name::VmName;

use super::{Context, copy};
use crate::exit::Outcome;

const EXAMPLES: &str = "\
Examples:
  nido upload web ./site /srv/site
  nido upload web app.conf /etc/app/ --user user
  pg_dump shop | nido upload web - /var/tmp/shop.sql
  tar -C site -c . | nido upload web - /srv/site/

If the destination is a directory, the copy is created in it under the source's name. - is
standard input: one file, or a tar archive if the destination ends with a slash. A file appears
under its name when it is complete. An existing file is replaced and keeps its mode, owner,
attributes and hard links; a device, pipe or socket is never replaced. Set-id bits are not copied.
Holes of sparse files and hard links within a tree are kept. Entries that cannot be read are
skipped and listed, and the exit code is 1.";

/// Copy a file or directory into a VM
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Name of the VM
    name: VmName,
    /// File or directory of the host; - is standard input
    #[arg(value_name = "SRC", value_hint = clap::ValueHint::AnyPath)]
    source: OsString,
    /// Path in the guest
    #[arg(value_name = "DST")]
    destination: OsString,
    #[command(flatten)]
    how: UploadArgs,
}

/// How an upload is done; shared with `cp`.
#[derive(Debug, Clone, clap::Args)]
pub struct UploadArgs {
    /// Owner of the copy in the guest, by name or number [default: root; an existing file keeps its owner]
    #[arg(long, short, value_name = "USER")]
    user: Option<String>,
    /// Create missing parent directories in the guest
    #[arg(long)]
    parents: bool,
    /// Keep owners and groups (by number) and modes; also for existing files
    #[arg(long, short)]
    pub preserve: bool,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let request = self.how.request(self.source, self.destination)?;
        let done = copy::upload(cx, &nido, &self.name, request).await?;
        copy::report(cx, &done, false)
    }
}

impl UploadArgs {
    /// The core's request.
    pub fn request(self, source: OsString, destination: OsString) -> Result<UploadRequest, Error> {
        let source = copy::source(source, &destination)?;
        let (destination, preserve) = (copy::guest(destination), self.preserve);
        Ok(UploadRequest { source, destination, user: self.user, parents: self.parents, preserve, set_mode: false })
    }
}
