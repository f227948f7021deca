//! Copies between host and guest, seen from the API.

use std::fs::{File, Metadata};
use std::io::Seek as _;
use std::time::Instant;

use nido_api::error::Result;
use nido_api::name::VmName;
use nido_api::{
    CopyProgress, CopyResult, DownloadRequest, DownloadTarget, UnreadableEntry, UploadRequest, UploadSource, VmRef,
};
use nido_engine::guest::{CopyTotals, Download, Form, GuestError, Limits, Progress, SkippedEntry, Source, Upload};
use tokio::sync::mpsc;
use tokio::time::Instant as TokioInstant;

use super::Nido;
use super::exec::{AGENT_REPLY_TIMEOUT, guest_error};

impl Nido {
    /// Copies from the host into the guest. Dropping the future stops it; the guest keeps nothing half-written.
    ///
    /// # Errors
    /// `vm_not_found`, `vm_not_running`, `path_not_found`, `disk_full`, `denied`, `user_not_found`, `path_invalid`; of an
    /// archive `spec_invalid`, `limit_exceeded`.
    pub async fn upload(
        &self,
        vm: impl Into<VmRef<'_>>,
        request: UploadRequest,
        progress: &mut (dyn FnMut(CopyProgress) + Send),
    ) -> Result<CopyResult> {
        let began = Instant::now();
        let which = vm.into();
        let name = which.name;
        let reached = self.reach(which).await?;
        let (source, total_bytes) = match request.source {
            UploadSource::Path(path) => {
                let total = std::fs::metadata(&path).ok().filter(Metadata::is_file).map(|meta| meta.len());
                (Source::Path(path), total)
            }
            UploadSource::Stream { file, mode } => {
                let total = left(&file);
                (Source::Reader { reader: Box::new(file), mode, bytes: total }, total)
            }
            UploadSource::Directory { fd, hidden } => (Source::Directory { fd, hidden }, None),
            UploadSource::Archive(file) => (Source::Archive(Box::new(file)), None),
        };
        let UploadRequest { destination, user, parents, preserve, set_mode, .. } = request;
        let upload = Upload { source, destination, user, parents, preserve, set_mode };
        let (tell, heard) = mpsc::unbounded_channel();
        let send = move |now| {
            let _ = tell.send(now);
        };
        let work = reached.guest.upload(upload, throttled(send), TokioInstant::now() + AGENT_REPLY_TIMEOUT);
        finish(name, began, follow(work, heard, total_bytes, progress).await)
    }

    /// Copies from the guest to the host. Dropping the future stops it; nothing half-written is left.
    ///
    /// # Errors
    /// `vm_not_found`, `vm_not_running`, `path_not_found`, `path_exists`, `disk_full`, `denied`, `limit_exceeded`.
    pub async fn download(
        &self,
        vm: impl Into<VmRef<'_>>,
        request: DownloadRequest,
        progress: &mut (dyn FnMut(CopyProgress) + Send),
    ) -> Result<CopyResult> {
        let began = Instant::now();
        let which = vm.into();
        let name = which.name;
        let reached = self.reach(which).await?;
        let (tell, heard) = mpsc::unbounded_channel();
        let send = throttled(move |now| {
            let _ = tell.send(now);
        });
        let deadline = TokioInstant::now() + AGENT_REPLY_TIMEOUT;
        let limits = Limits::default();
        let limits = Limits { bytes: request.max_bytes.unwrap_or(limits.bytes), ..limits };
        let copied = match request.destination {
            DownloadTarget::Path(destination) => {
                let (source, overwrite, preserve) = (request.source, request.overwrite, request.preserve);
                let download = Download { source, destination, overwrite, preserve, limits };
                follow(reached.guest.download(download, send, deadline), heard, None, progress).await
            }
            DownloadTarget::Stream(file) => {
                let work = reached.guest.download_to((request.source, Form::File), file, limits, send, deadline);
                follow(work, heard, None, progress).await
            }
            DownloadTarget::Archive(file) => {
                let work = reached.guest.download_to((request.source, Form::Archive), file, limits, send, deadline);
                follow(work, heard, None, progress).await
            }
            DownloadTarget::FileOrArchive(file) => {
                let what = (request.source, Form::FileOrArchive);
                let work = reached.guest.download_to(what, file, limits, send, deadline);
                follow(work, heard, None, progress).await
            }
        };
        finish(name, began, copied)
    }
}

/// How many bytes there are to be read; unknown unless it is a file.
fn left(mut file: &File) -> Option<u64> {
    let all = file.metadata().ok().filter(Metadata::is_file)?.len();
    Some(all.saturating_sub(file.stream_position().ok()?))
}

/// Passes on at most some twenty reports a second: a copy of many small files must not be slowed by its reports.
fn throttled(tell: impl Fn(Progress)) -> impl FnMut(Progress) {
    let mut last: Option<Instant> = None;
    move |now| {
        if last.is_none_or(|at| at.elapsed().as_millis() >= 50) {
            last = Some(Instant::now());
            tell(now);
        }
    }
}

async fn follow(
    work: impl Future<Output = Result<CopyTotals, GuestError>>,
    mut heard: mpsc::UnboundedReceiver<Progress>,
    total_bytes: Option<u64>,
    progress: &mut (dyn FnMut(CopyProgress) + Send),
) -> Result<CopyTotals, GuestError> {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            outcome = &mut work => return outcome,
            Some(Progress { bytes, entries, of }) = heard.recv() => {
                progress(CopyProgress { bytes, entries, total_bytes: total_bytes.or(of) });
            }
        }
    }
}

fn finish(name: &VmName, began: Instant, copied: Result<CopyTotals, GuestError>) -> Result<CopyResult> {
    let copied = copied.map_err(|e| guest_error(name, e))?;
    let unreadable = |entry: SkippedEntry| UnreadableEntry {
        path: String::from_utf8_lossy(&entry.path).into_owned(),
        reason: entry.reason,
    };
    Ok(CopyResult {
        unreadable: copied.left_out_count,
        unreadable_entries: copied.left_out.into_iter().map(unreadable).collect(),
        entries: copied.entries,
        bytes: copied.bytes,
        skipped: copied.skipped,
        path: String::from_utf8_lossy(&copied.path).into_owned(),
        duration_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
    })
}
