//! Templates travel: exported to one file or stream, imported from one.
//!
//! Invariant: dropping the future stops the work, even if the other end of a pipe neither
//! reads nor writes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nido_api::error::{Code, Error, Hint, Result};
use nido_api::name::TemplateName;
use nido_api::{ExportRequest, ExportResult, ExportTarget, ImportRequest, ImportResult, ImportSource, TransferStep};
use nido_images::{ExportOptions, ExportOutcome, ImportOptions, TransferProgress, TransferWatch};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::mpsc;

use super::Nido;
use super::templates::{CancelOnDrop, describe};

/// How often work that waits for a pipe checks whether it is cancelled.
const POLL_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// Reports come at most this often.
const REPORT_INTERVAL: Duration = Duration::from_millis(50);
/// A pipe that is ready takes so many bytes without blocking.
const PIPE_BYTES: usize = 4096;
/// How hard an archive may be compressed.
const LEVELS: std::ops::RangeInclusive<i32> = 1..=19;

impl Nido {
    /// Writes a template into one archive. Dropping the future stops it; a file that was half written is gone then.
    ///
    /// # Errors
    /// `template_not_found`, `template_mismatch` if it is damaged, `path_exists`, `path_invalid`, `spec_invalid`,
    /// `disk_full`.
    pub async fn template_export(
        &self,
        name: &TemplateName,
        request: ExportRequest,
        progress: &mut (dyn FnMut(TransferStep) + Send),
    ) -> Result<ExportResult> {
        if !LEVELS.contains(&request.level) {
            return Err(Error::new(Code::SpecInvalid, format!("{} is not a compression level", request.level))
                .hint("use 1 (fast) to 19 (small); 3 if absent"));
        }
        let began = Instant::now();
        let path = match &request.target {
            ExportTarget::Path(path) => Some(path.to_string_lossy().into_owned()),
            ExportTarget::Stream(_) => None,
        };
        let (home, template) = (self.home().root().to_owned(), name.to_string());
        let work = move |mut watch: TransferWatch<'_>| export(&home, &template, request, &mut watch);
        let done = watched(work, progress).await?;
        Ok(ExportResult {
            template: name.clone(),
            path,
            archive_bytes: done.archive_bytes,
            data_bytes: done.data_bytes,
            bakes: u32::try_from(done.manifest.bakes.len()).unwrap_or(u32::MAX),
            duration_ms: millis(began),
        })
    }

    /// Takes in a template from an archive. Nothing in the archive is trusted; after an error all templates are as they were.
    /// Dropping the future stops it.
    ///
    /// # Errors
    /// `archive_invalid`, `template_exists`, `agent_version`, `path_not_found`, `disk_full`.
    pub async fn template_import(
        &self,
        request: ImportRequest,
        progress: &mut (dyn FnMut(TransferStep) + Send),
    ) -> Result<ImportResult> {
        let began = Instant::now();
        let home = self.home().root().to_owned();
        let options = ImportOptions {
            name: request.name.map(|name| name.to_string()),
            force: request.force,
            without_memory: !request.memory,
        };
        let source = request.source;
        self.remove_orphaned_builds().await;
        let outcome = watched(move |mut watch| import(&home, source, &options, &mut watch), progress).await;
        nido_files::failpoint!("import.published");
        // What was replaced, and what a failure in the last step did not remove.
        self.drop_unowned_parts().await;
        let outcome = outcome?;
        if !outcome.already_present {
            self.refresh_pools();
        }
        let template = describe(&outcome.manifest, &self.template_users()?)?;
        self.store().announce_template(&template.name, &template.created_at.to_string())?;
        Ok(ImportResult {
            template,
            already_present: outcome.already_present,
            warnings: outcome.notes.iter().map(ToString::to_string).collect(),
            duration_ms: millis(began),
        })
    }
}

fn export(home: &Path, name: &str, request: ExportRequest, watch: &mut TransferWatch<'_>) -> Result<ExportOutcome> {
    let options = ExportOptions { memory: request.memory, level: request.level };
    let done = match request.target {
        ExportTarget::Path(path) => nido_images::write_file_whole(&path, request.overwrite, |file| {
            nido_images::export(home, name, options, (file, &path), watch)
        }),
        ExportTarget::Stream(stream) => {
            let mut stream = Stream::new(stream, watch.cancel);
            nido_images::export(home, name, options, (&mut stream, Path::new("the stream")), watch)
        }
    };
    Ok(done?)
}

fn import(
    home: &Path,
    source: ImportSource,
    options: &ImportOptions,
    watch: &mut TransferWatch<'_>,
) -> Result<nido_images::ImportOutcome> {
    let file = match source {
        ImportSource::Path(path) => open(&path)?,
        ImportSource::Stream(stream) => stream,
    };
    Ok(nido_images::import(home, &mut Stream::new(file, watch.cancel), options, watch)?)
}

/// Opens a file or a pipe without waiting for its other end.
fn open(path: &Path) -> Result<File> {
    let flags = rustix::fs::OFlags::NONBLOCK.bits();
    let file =
        File::options().read(true).custom_flags(flags.cast_signed()).open(path).and_then(|file| {
            if file.metadata()?.is_dir() { Err(io::ErrorKind::IsADirectory.into()) } else { Ok(file) }
        });
    file.map_err(|error| {
        let shown = path.display();
        match error.kind() {
            io::ErrorKind::NotFound => Error::new(Code::PathNotFound, format!("there is no file {shown}"))
                .hint(Hint::command_line("specify an archive of nido template export, or - for standard input")),
            io::ErrorKind::IsADirectory => Error::new(Code::PathInvalid, format!("{shown} is a directory")),
            _ => Error::io(format!("cannot open {shown}"), error),
        }
    })
}

/// Runs blocking work that reports how far it is, and asks it to stop if this future is dropped.
async fn watched<T: Send + 'static>(
    work: impl FnOnce(TransferWatch<'_>) -> Result<T> + Send + 'static,
    progress: &mut (dyn FnMut(TransferStep) + Send),
) -> Result<T> {
    let cancel = CancelOnDrop(Arc::default());
    let flag = Arc::clone(&cancel.0);
    let (steps, mut step) = mpsc::unbounded_channel();
    let work = tokio::task::spawn_blocking(move || {
        let mut tell = throttled(move |now| drop(steps.send(now)));
        work(TransferWatch { progress: &mut tell, cancel: &flag })
    });
    while let Some(now) = step.recv().await {
        progress(travel_step(&now));
    }
    work.await.map_err(|e| Error::internal(format!("the work on the template failed: {e}")))?
}

/// Passes on every new stage, and otherwise at most some twenty reports a second.
fn throttled(tell: impl Fn(TransferProgress)) -> impl FnMut(TransferProgress) {
    let mut last: Option<(Instant, usize)> = None;
    move |now| {
        if last.is_none_or(|(at, index)| index != now.index || at.elapsed() >= REPORT_INTERVAL) {
            last = Some((Instant::now(), now.index));
            tell(now);
        }
    }
}

fn travel_step(now: &TransferProgress) -> TransferStep {
    TransferStep {
        stage: now.stage.to_owned(),
        index: u32::try_from(now.index).unwrap_or(u32::MAX),
        total: u32::try_from(now.total).unwrap_or(u32::MAX),
        bytes: now.bytes,
        total_bytes: now.total_bytes,
    }
}

fn millis(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// A file, pipe or socket that is read or written without ever waiting for long.
struct Stream<'a> {
    file: File,
    cancel: &'a AtomicBool,
    /// Most bytes to write at once.
    piece: usize,
}

impl<'a> Stream<'a> {
    fn new(file: File, cancel: &'a AtomicBool) -> Self {
        let regular = file.metadata().is_ok_and(|meta| meta.is_file());
        Self { file, cancel, piece: if regular { usize::MAX } else { PIPE_BYTES } }
    }

    /// Waits until the file is ready, and fails if it is to stop first.
    fn wait(&self, wanted: PollFlags) -> io::Result<()> {
        loop {
            if self.cancel.load(Ordering::Relaxed) {
                return Err(io::Error::other("a stop was requested"));
            }
            match poll(&mut [PollFd::from_borrowed_fd(self.file.as_fd(), wanted)], Some(&POLL_INTERVAL)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Does what may turn out not to be possible just now.
    fn retry(&mut self, wanted: PollFlags, mut act: impl FnMut(&mut File) -> io::Result<usize>) -> io::Result<usize> {
        loop {
            self.wait(wanted)?;
            match act(&mut self.file) {
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                done => return done,
            }
        }
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.retry(PollFlags::IN, |file| file.read(buffer))
    }
}

impl Write for Stream<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(self.piece)];
        self.retry(PollFlags::OUT, |file| file.write(piece))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    fn pipe() -> (File, File) {
        let (reader, writer) = io::pipe().unwrap();
        (OwnedFd::from(reader).into(), OwnedFd::from(writer).into())
    }

    #[test]
    fn a_silent_pipe_does_not_delay_the_end() {
        let (reader, writer) = pipe();
        let cancel = AtomicBool::new(false);
        let mut stream = Stream::new(reader, &cancel);
        std::thread::scope(|scope| {
            let reading = scope.spawn(move || stream.read(&mut [0; 10]));
            cancel.store(true, Ordering::Relaxed);
            assert!(reading.join().unwrap().is_err());
        });
        drop(writer);
    }

    #[test]
    fn an_unread_pipe_does_not_delay_the_end() {
        let (_reader, writer) = pipe();
        let cancel = AtomicBool::new(false);
        let mut stream = Stream::new(writer, &cancel);
        std::thread::scope(|scope| {
            // More than any pipe takes.
            let writing = scope.spawn(move || stream.write_all(&vec![1; 8 << 20]));
            cancel.store(true, Ordering::Relaxed);
            assert!(writing.join().unwrap().is_err());
        });
    }

    #[test]
    fn a_copy_through_a_pipe_is_unchanged() {
        let (reader, writer) = pipe();
        let cancel = AtomicBool::new(false);
        let (mut to, mut from) = (Stream::new(writer, &cancel), Stream::new(reader, &cancel));
        let sent: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
        let got = std::thread::scope(|scope| {
            scope.spawn(|| {
                to.write_all(&sent).unwrap();
                drop(to);
            });
            let mut got = Vec::new();
            from.read_to_end(&mut got).unwrap();
            got
        });
        assert!(got == sent);
    }
}
