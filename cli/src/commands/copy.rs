//! What `upload`, `download` and `cp` share: one copy, watched, and its report.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt as _;
use std::time::Duration;

use nido_vmm::api::{CopyResult, DownloadRequest, DownloadTarget, UploadRequest, UploadSource};
use nido_vmm::error::Error;
use nido_vmm::name::VmName;
use nido_vmm::nido::Nido;

use super::Context;
use crate::audit;
use crate::exit::{Exit, Failure, Outcome, until_signal};
use crate::parse::show_bytes;
use crate::progress::Progress;

/// How long an interrupted copy may take to remove what it left half done.
const UNDO_LIMIT: Duration = Duration::from_secs(5);
/// Mode of a file whose bytes come from standard input.
const STDIN_MODE: u16 = 0o644;

/// The host's side of a copy into the guest; `-` is standard input.
pub fn source(path: OsString) -> Result<UploadSource, Error> {
    if path != "-" {
        return Ok(UploadSource::Path(path.into()));
    }
    let file = own(std::io::stdin()).map_err(|e| Error::io("cannot read standard input", e))?;
    Ok(UploadSource::Stream { file, mode: STDIN_MODE })
}

/// The host's side of a copy out of the guest; `-` is standard output.
pub fn target(path: OsString) -> Result<DownloadTarget, Error> {
    if path != "-" {
        return Ok(DownloadTarget::Path(path.into()));
    }
    let file = own(std::io::stdout()).map_err(|e| Error::io("cannot write to standard output", e))?;
    Ok(DownloadTarget::Stream(file))
}

fn own(stream: impl AsFd) -> std::io::Result<File> {
    stream.as_fd().try_clone_to_owned().map(File::from)
}

/// A path in the guest.
pub fn guest(path: OsString) -> Vec<u8> {
    path.into_vec()
}

/// Copies into the guest. A signal undoes it.
pub async fn upload(cx: &Context, nido: &Nido, name: &VmName, request: UploadRequest) -> Result<CopyResult, Failure> {
    let mut progress = Progress::new(&cx.output, "uploading");
    // Somebody who types may take for ever.
    let typed = matches!(request.source, UploadSource::Stream { .. });
    let undo = if typed { Duration::ZERO } else { UNDO_LIMIT };
    let arguments = audit::upload(name, &request);
    let mut told = |at| progress.copy(at);
    let copied = until_signal(undo, nido.upload(name, request, &mut told));
    cx.audited(nido, "vm_upload", arguments, copied).await
}

/// Copies out of the guest. A signal undoes it.
pub async fn download(
    cx: &Context,
    nido: &Nido,
    name: &VmName,
    request: DownloadRequest,
) -> Result<CopyResult, Failure> {
    let mut progress = Progress::new(&cx.output, "downloading");
    let arguments = audit::download(name, &request);
    let mut told = |at| progress.copy(at);
    let copied = until_signal(UNDO_LIMIT, nido.download(name, request, &mut told));
    cx.audited(nido, "vm_download", arguments, copied).await
}

/// Tells what was copied: one line on stderr, or JSON on stdout (unless that carries the file itself).
pub fn report(cx: &Context, done: &CopyResult, to_stdout: bool) -> Outcome {
    if cx.output.json && !to_stdout {
        cx.output.answer(done, String::new)?;
    }
    cx.output.talk(&sentence(done));
    if done.skipped > 0 && !cx.output.json {
        cx.output.warn(&format!("{} sockets, pipes or devices were left out", done.skipped));
    }
    Ok(Exit::Success)
}

fn sentence(done: &CopyResult) -> String {
    let rate = done.bytes.saturating_mul(1000) / done.duration_ms.max(1);
    let entries = if done.entries == 1 { "1 entry".into() } else { format!("{} entries", done.entries) };
    let seconds = Duration::from_millis(done.duration_ms).as_secs_f64();
    format!("copied {entries}, {} in {seconds:.2} s ({}/s) to {}", show_bytes(done.bytes), show_bytes(rate), done.path)
}
