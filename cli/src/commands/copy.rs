//! What `upload`, `download` and `cp` share: one copy, watched, and its report.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::time::Duration;

use nido_api::error::{Code, Error};
use nido_api::name::VmName;
use nido_api::operation as op;
use nido_api::{CopyResult, DownloadRequest, DownloadTarget, UploadRequest, UploadSource};
use nido_core::Nido;
use nido_server::sanitize;

use super::Context;
use crate::audit;
use crate::exit::{Exit, Failure, Outcome, until_signal};
use crate::parse::show_bytes;
use crate::progress::Progress;

/// How long an interrupted copy may take to remove its incomplete files.
const UNDO_LIMIT: Duration = Duration::from_secs(5);
/// How many of the entries that could not be read are named.
const SHOWN: usize = 20;
/// Mode of a new file whose bytes come from standard input.
const STDIN_MODE: u16 = 0o644;

/// The host's side of a copy into the guest; `-` is standard input: a file, or a tar archive where the destination ends in a
/// slash.
pub fn source(path: OsString, destination: &OsStr) -> Result<UploadSource, Error> {
    if path != "-" {
        return Ok(UploadSource::Path(path.into()));
    }
    let file = own(std::io::stdin()).map_err(|e| Error::io("cannot read standard input", e))?;
    if destination.as_bytes().ends_with(b"/") {
        return Ok(UploadSource::Archive(file));
    }
    Ok(UploadSource::Stream { file, mode: STDIN_MODE })
}

/// The host's side of a copy out of the guest. `-` is standard output; a character device or a pipe is written to, never
/// replaced.
pub fn target(path: OsString) -> Result<DownloadTarget, Error> {
    if is_stdout(&path) {
        let file = own(std::io::stdout()).map_err(|e| Error::io("cannot write to standard output", e))?;
        return Ok(DownloadTarget::FileOrArchive(file));
    }
    let path = PathBuf::from(path);
    let kind = std::fs::metadata(&path).map(|meta| meta.file_type());
    if kind.is_ok_and(|kind| kind.is_char_device() || kind.is_fifo()) {
        let flags = rustix::fs::OFlags::NOCTTY.bits().cast_signed();
        let opened = File::options().write(true).custom_flags(flags).open(&path);
        return opened.map(DownloadTarget::FileOrArchive).map_err(|e| Error::io_at("write to", &path, e));
    }
    Ok(DownloadTarget::Path(path))
}

/// Whether a path is this process's standard output. What that is may be a file, which is not to be replaced either.
pub fn is_stdout(path: &OsStr) -> bool {
    ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"].iter().any(|name| path == *name)
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
    // A user who types may take any time.
    let typed = matches!(request.source, UploadSource::Stream { .. } | UploadSource::Archive(_));
    let undo = if typed { Duration::ZERO } else { UNDO_LIMIT };
    let arguments = audit::upload(name, &request);
    let mut told = |at| progress.copy(at);
    let copied = until_signal(undo, nido.upload(name, request, &mut told));
    cx.audited(nido, op::VM_UPLOAD, arguments, copied).await
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
    let to_stdout = matches!(request.destination, DownloadTarget::Stream(_) | DownloadTarget::FileOrArchive(_));
    let copied = until_signal(UNDO_LIMIT, nido.download(name, request, &mut told));
    match cx.audited(nido, op::VM_DOWNLOAD, arguments, copied).await {
        // As any Unix tool whose reader has what it wants: silent.
        Err(Failure::Nido(error)) if to_stdout && is_broken_pipe(&error) => {
            Err(Failure::Stdout(std::io::ErrorKind::BrokenPipe.into()))
        }
        done => done,
    }
}

/// A result with the destination of the bytes. The core knows a device or pipe of the host as an open file only.
pub fn with_destination(destination: &OsStr, mut done: CopyResult) -> CopyResult {
    if done.path.is_empty() && !is_stdout(destination) {
        done.path = destination.to_string_lossy().into_owned();
    }
    done
}

/// Whether the root cause of an error is that no process reads the output.
fn is_broken_pipe(error: &Error) -> bool {
    let reasons = std::iter::successors(std::error::Error::source(error), |reason| reason.source());
    reasons
        .filter_map(|reason| reason.downcast_ref::<std::io::Error>())
        .any(|reason| reason.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Reports what was copied: one line on stderr, or JSON on stdout (unless that carries the file itself). Fails if something
/// could not be read.
pub fn report(cx: &Context, done: &CopyResult, to_stdout: bool) -> Outcome {
    if cx.output.json && !to_stdout {
        cx.output.answer(done, String::new)?;
    }
    cx.output.note(&sentence(done, to_stdout));
    if done.skipped > 0 && !cx.output.json {
        let what = if done.skipped == 1 { "socket, pipe or device" } else { "sockets, pipes or devices" };
        cx.output.warn(&format!("skipped {} {what}", done.skipped));
    }
    if done.unreadable == 0 {
        return Ok(Exit::Success);
    }
    for entry in done.unreadable_entries.iter().take(SHOWN) {
        cx.output.warn(&format!("cannot read {}: {}", sanitize::line(&entry.path), sanitize::line(&entry.reason)));
    }
    let entries = if done.unreadable == 1 { "entry" } else { "entries" };
    let what = format!("{} {entries} could not be read; everything else was copied", done.unreadable);
    if cx.output.json {
        // The result states that already, and standard output holds one JSON value.
        cx.output.warn(&what);
    } else {
        cx.output.error(&Error::new(Code::PermissionDenied, what).hint("check the permissions of these entries"));
    }
    Ok(Exit::Failure)
}

fn sentence(done: &CopyResult, to_stdout: bool) -> String {
    let rate = done.bytes.saturating_mul(1000) / done.duration_ms.max(1);
    let entries = if done.entries == 1 { "1 entry".into() } else { format!("{} entries", done.entries) };
    let seconds = Duration::from_millis(done.duration_ms).as_secs_f64();
    let place = if to_stdout { "standard output" } else { &done.path };
    format!("copied {entries}, {} in {seconds:.2} s ({}/s) to {place}", show_bytes(done.bytes), show_bytes(rate))
}
