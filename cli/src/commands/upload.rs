//! `upload`: a file or directory of the host, copied into the guest.

use std::ffi::OsString;

use nido_vmm::api::UploadRequest;
use nido_vmm::error::Error;
use nido_vmm::name::VmName;

use super::{Context, copy};
use crate::exit::Outcome;

const EXAMPLES: &str = "\
Examples:
  nido upload web ./site /srv/site
  nido upload web app.conf /etc/app/ --user user
  pg_dump shop | nido upload web - /var/tmp/shop.sql

An existing directory takes the copy under the source's name. A file is written beside its place and moved
there when it is complete.";

/// Copy a file or directory into a VM
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Name of the VM
    name: VmName,
    /// File or directory here; - is standard input
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
    /// Owner of the copy in the guest, by name or number [default: root]
    #[arg(long, short, value_name = "USER")]
    user: Option<String>,
    /// Make missing parent directories in the guest
    #[arg(long)]
    parents: bool,
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
        let (source, destination) = (copy::source(source)?, copy::guest(destination));
        Ok(UploadRequest { source, destination, user: self.user, parents: self.parents })
    }
}
