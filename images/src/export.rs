//! Writes a template into one archive (`archive.rs` has its form). Synchronous; bounded memory.
//! Invariant: what is written is whole: every part is compared with its hash first, and the parts cannot be removed while
//! they are read, because all of them are open before the first byte is written.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::archive::{BLOCK, Frame, Head, MAX_EXTENT_BYTES, WINDOW_LOG, is_zero};
use crate::digest::{next_data, unhex};
use crate::error::ImageError;
use crate::import::judge;
use crate::manifest::Manifest;
use crate::store::Store;
use crate::transfer::{TransferPart, TransferProgress, TransferWatch, pieces};

/// What the caller may choose.
#[derive(Debug, Clone, Copy)]
pub struct ExportOptions {
    /// Take the bakes along: they start VMs fast on hosts with the same QEMU, and are large.
    pub memory: bool,
    /// How hard to compress, 1 to 19.
    pub level: i32,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self { memory: true, level: 3 }
    }
}

/// What an export came to.
#[derive(Debug, Clone)]
pub struct ExportOutcome {
    /// The manifest inside the archive.
    pub manifest: Manifest,
    /// Length of the archive in bytes.
    pub archive_bytes: u64,
    /// Bytes of the parts that are no holes.
    pub data_bytes: u64,
}

/// Exports the template `name` of `home` to `target`, which is named in errors.
///
/// # Errors
/// Those of [`Store::open`] and [`Store::check`], [`ImageError::Damaged`] for a part that does not match its hash,
/// [`ImageError::NotExportable`], [`ImageError::Interrupted`], [`ImageError::DiskFull`], [`ImageError::Io`].
pub fn export(
    home: &Path,
    name: &str,
    options: ExportOptions,
    (target, shown): (&mut dyn Write, &Path),
    watch: &mut TransferWatch<'_>,
) -> Result<ExportOutcome, ImageError> {
    watch.check()?;
    let (manifest, open) = open(&Store::new(home), name, options.memory)?;
    let total_bytes = open.iter().map(|(piece, ..)| piece.part.bytes).sum();
    let mut counted = CountingWriter { target, bytes: 0 };
    let encoder = zstd::Encoder::new(&mut counted, options.level.clamp(1, 19)).and_then(|mut encoder| {
        encoder.include_checksum(true)?;
        encoder.window_log(WINDOW_LOG)?;
        Ok(encoder)
    });
    let encoder = encoder.map_err(|error| watch.failed("write", shown, error))?;
    let total = open.len();
    let mut writer = Writer { encoder, shown, watch, index: 0, total, bytes: 0, total_bytes, data_bytes: 0 };
    let json = manifest.to_json();
    writer.put(&Head::of(&json).encode())?;
    writer.put(&json)?;
    for (piece, path, file) in &open {
        writer.part(name, piece, path, file)?;
    }
    writer.put(&Frame::End.encode())?;
    let Writer { encoder, data_bytes, .. } = writer;
    let finished = encoder.finish().and_then(Write::flush);
    finished.map_err(|error| watch.failed("write", shown, error))?;
    Ok(ExportOutcome { manifest, archive_bytes: counted.bytes, data_bytes })
}

/// A part, where it lies, and its open file.
type OpenPart = (TransferPart, PathBuf, File);

/// Opens every part of a template under a lock, so that none can be removed.
fn open(store: &Store, name: &str, memory: bool) -> Result<(Manifest, Vec<OpenPart>), ImageError> {
    store.open(name)?;
    let lock = store.lock()?;
    // Again under the lock: it may have been rebuilt in between.
    let mut manifest = store.open(name)?;
    store.check(&manifest)?;
    if !memory {
        manifest.bakes.clear();
    }
    judge::manifest(&manifest).map_err(|reason| ImageError::NotExportable { name: name.to_owned(), reason })?;
    let opened = pieces(&manifest).into_iter().map(|piece| {
        let path = store.blob_path(&piece.part);
        let file = File::open(&path).map_err(|error| ImageError::io("open", &path, error))?;
        Ok((piece, path, file))
    });
    let opened = opened.collect::<Result<_, ImageError>>()?;
    drop(lock);
    Ok((manifest, opened))
}

struct Writer<'a, 'watch, W: Write> {
    encoder: zstd::Encoder<'static, W>,
    shown: &'a Path,
    watch: &'a mut TransferWatch<'watch>,
    index: usize,
    total: usize,
    bytes: u64,
    total_bytes: u64,
    data_bytes: u64,
}

impl<W: Write> Writer<'_, '_, W> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.watch.check()?;
        self.encoder.write_all(bytes).map_err(|error| self.watch.failed("write", self.shown, error))
    }

    fn part(&mut self, template: &str, piece: &TransferPart, path: &Path, file: &File) -> Result<(), ImageError> {
        self.index += 1;
        let before = self.bytes;
        self.report(piece.name, before);
        let hash = self.watch.hash(file, piece.digest).map_err(|error| self.watch.failed("read", path, error))?;
        let Some(sha256) = unhex(&piece.part.sha256).filter(|_| hash == piece.part.sha256) else {
            let reason = "its content does not match its hash".to_owned();
            return Err(ImageError::Damaged { template: template.to_owned(), part: piece.name, reason });
        };
        self.put(&Frame::Part { sha256, bytes: piece.part.bytes }.encode())?;
        self.extents(piece, file, path, before)?;
        self.put(&Frame::PartEnd.encode())?;
        self.bytes = before + piece.part.bytes;
        self.report(piece.name, self.bytes);
        Ok(())
    }

    /// Writes what is no hole.
    fn extents(&mut self, piece: &TransferPart, file: &File, path: &Path, before: u64) -> Result<(), ImageError> {
        let unreadable = |error| ImageError::io("read", path, error);
        let window = u64::from(MAX_EXTENT_BYTES);
        let mut buffer = vec![0; MAX_EXTENT_BYTES as usize];
        let mut at = 0;
        // By windows, wherever the file system sees holes: so the same content makes the same archive.
        while let Some(data) = next_data(file, at).map_err(unreadable)?.filter(|data| *data < piece.part.bytes) {
            at = data - data % window;
            let wanted = usize::try_from(piece.part.bytes - at).unwrap_or(usize::MAX).min(buffer.len());
            let content = &mut buffer[..wanted];
            file.read_exact_at(content, at).map_err(unreadable)?;
            self.runs(content, at)?;
            at += wanted as u64;
            self.report(piece.name, before + at);
        }
        Ok(())
    }

    /// Writes the runs of blocks that are not all zero.
    fn runs(&mut self, content: &[u8], at: u64) -> Result<(), ImageError> {
        for (start, end) in data_runs(content) {
            let run = &content[start..end];
            let length = u32::try_from(run.len()).unwrap_or(u32::MAX);
            self.put(&Frame::Extent { offset: at + start as u64, length }.encode())?;
            self.put(run)?;
            self.data_bytes += run.len() as u64;
        }
        Ok(())
    }

    fn report(&mut self, stage: &'static str, bytes: u64) {
        let Self { index, total, total_bytes, .. } = *self;
        (self.watch.progress)(TransferProgress { stage, index, total, bytes, total_bytes });
    }
}

/// Where blocks lie that are not all zero, in bytes from the start, neighbours joined. Pure.
fn data_runs(content: &[u8]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    let mut at = 0;
    for block in content.chunks(usize::try_from(BLOCK).unwrap_or(usize::MAX)) {
        let end = at + block.len();
        match runs.last_mut() {
            _ if is_zero(block) => {}
            Some(last) if last.1 == at => last.1 = end,
            _ => runs.push((at, end)),
        }
        at = end;
    }
    runs
}

struct CountingWriter<'a> {
    target: &'a mut dyn Write,
    bytes: u64,
}

impl Write for CountingWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = self.target.write(bytes)?;
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.target.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_joined_and_zeros_left_out() {
        let block = usize::try_from(BLOCK).unwrap();
        let mut content = vec![0; 6 * block + 10];
        assert_eq!(data_runs(&content), []);
        for at in [block, 3 * block - 1, 5 * block + 7, 6 * block + 9] {
            content[at] = 1;
        }
        assert_eq!(data_runs(&content), [(block, 3 * block), (5 * block, 6 * block + 10)]);
        assert_eq!(data_runs(&[]), []);
    }
}
