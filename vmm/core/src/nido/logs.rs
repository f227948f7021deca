//! Reading a VM's logs, whole or as they grow.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nido_api::error::{Error, Result};
use nido_api::{LogRequest, LogSource, VmRef};
use nido_engine::home::{CONSOLE_LOG, QEMU_LOG, SUPERVISOR_LOCK, SUPERVISOR_LOG};
use nido_files::lock::is_held;

use super::Nido;

/// Bytes given at once.
const PIECE: usize = 64 * 1024;
/// How often a followed log is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

impl Nido {
    /// Reads a log: its rotated part, then the rest, then what comes while the VM is looked after.
    ///
    /// # Errors
    /// `vm_not_found`.
    pub fn logs<'a>(&self, vm: impl Into<VmRef<'a>>, request: LogRequest) -> Result<LogStream> {
        let row = self.resolve_to_show(vm.into())?;
        let dir = self.vm_dir(&row.id);
        let file = match request.source {
            LogSource::Console => CONSOLE_LOG,
            LogSource::Qemu => QEMU_LOG,
            LogSource::Supervisor => SUPERVISOR_LOG,
        };
        let (path, alive) = (dir.file(file), dir.file(SUPERVISOR_LOCK));
        let broken = |e| Error::io("cannot read the log", e);
        let mut past = VecDeque::new();
        let mut position = 0;
        for old in [dir.file(&format!("{file}.1")), path.clone()] {
            position = 0;
            match Part::open(&old) {
                Ok(part) => {
                    position = part.end;
                    past.push_back(part);
                }
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(broken(e)),
            }
        }
        if let Some(lines) = request.tail_lines {
            tail(&mut past, lines).map_err(broken)?;
        }
        let follow = request.follow.then_some(LogFollower { path, alive, position, inode: 0 });
        Ok(LogStream { past, follow })
    }
}

impl Nido {
    /// How much this VM's console and supervisor have written, in bytes: it differs when there is something new to read.
    ///
    /// # Errors
    /// `vm_not_found`.
    pub fn logs_written<'a>(&self, vm: impl Into<VmRef<'a>>) -> Result<u64> {
        let row = self.resolve_to_show(vm.into())?;
        let dir = self.vm_dir(&row.id);
        let files = [CONSOLE_LOG, SUPERVISOR_LOG].map(|file| [dir.file(file), dir.file(&format!("{file}.1"))]);
        let written =
            files.as_flattened().iter().filter_map(|path| std::fs::metadata(path).ok()).map(|meta| meta.len());
        Ok(written.sum())
    }
}

/// What is still to be read of a file.
#[derive(Debug)]
struct Part {
    file: File,
    at: u64,
    end: u64,
}

impl Part {
    fn open(path: &Path) -> std::io::Result<Self> {
        let file = File::open(path)?;
        let end = file.metadata()?.len();
        Ok(Self { file, at: 0, end })
    }

    /// The next piece; empty at the end, and where the file was truncated meanwhile.
    fn read(&mut self) -> std::io::Result<Vec<u8>> {
        let room = usize::try_from(self.end - self.at).unwrap_or(PIECE).min(PIECE);
        let mut piece = vec![0; room];
        let count = self.file.read_at(&mut piece, self.at)?;
        piece.truncate(count);
        self.at += count as u64;
        Ok(piece)
    }
}

/// Leaves the last `lines` lines. Read from the end, a piece at a time: a log is long, and its end is short.
fn tail(parts: &mut VecDeque<Part>, lines: usize) -> std::io::Result<()> {
    let (mut left, mut is_last_byte) = (lines, true);
    for at in (0..parts.len()).rev() {
        let part = &mut parts[at];
        let mut end = part.end;
        while end > 0 && left > 0 {
            let begin = end.saturating_sub(PIECE as u64);
            let mut piece = vec![0; usize::try_from(end - begin).unwrap_or(PIECE)];
            let count = part.file.read_at(&mut piece, begin)?;
            for (offset, _) in piece[..count].iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n') {
                let place = begin + offset as u64 + 1;
                // The end of the last line begins none.
                if std::mem::take(&mut is_last_byte) && place == part.end {
                    continue;
                }
                left -= 1;
                if left == 0 {
                    part.at = place;
                    break;
                }
            }
            is_last_byte = false;
            end = begin;
        }
        if left == 0 {
            if lines == 0 {
                part.at = part.end;
            }
            parts.drain(..at);
            return Ok(());
        }
    }
    Ok(())
}

/// A log being read.
#[derive(Debug)]
pub struct LogStream {
    past: VecDeque<Part>,
    follow: Option<LogFollower>,
}

#[derive(Debug)]
struct LogFollower {
    path: PathBuf,
    alive: PathBuf,
    position: u64,
    inode: u64,
}

impl LogStream {
    /// The next piece, as the guest wrote it: hostile bytes. `None` at the end.
    pub async fn next(&mut self) -> Option<Result<Vec<u8>>> {
        while let Some(part) = self.past.front_mut() {
            match part.read() {
                Ok(piece) if piece.is_empty() => drop(self.past.pop_front()),
                Ok(piece) => return Some(Ok(piece)),
                Err(e) => return Some(Err(Error::io("cannot read the log", e))),
            }
        }
        let follow = self.follow.as_mut()?;
        loop {
            // Looked at before the reading, so that the last words are not missed.
            let over = !is_held(&follow.alive);
            match follow.read() {
                Ok(piece) if !piece.is_empty() => return Some(Ok(piece)),
                Ok(_) if over => return None,
                Ok(_) => tokio::time::sleep(POLL_INTERVAL).await,
                // The VM is gone, its log with it.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound && over => return None,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => tokio::time::sleep(POLL_INTERVAL).await,
                Err(e) => return Some(Err(Error::io("cannot read the log", e))),
            }
        }
    }
}

impl LogFollower {
    fn read(&mut self) -> std::io::Result<Vec<u8>> {
        let mut file = File::open(&self.path)?;
        let meta = file.metadata()?;
        // Truncated by rotation, or another file under the name: read it from its beginning.
        if meta.len() < self.position || (self.inode != 0 && meta.ino() != self.inode) {
            self.position = 0;
        }
        self.inode = meta.ino();
        file.seek(SeekFrom::Start(self.position))?;
        let mut piece = Vec::new();
        file.take(PIECE as u64).read_to_end(&mut piece)?;
        self.position += piece.len() as u64;
        Ok(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The last lines of a log in two files.
    fn last(texts: [&[u8]; 2], lines: usize) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let mut parts = VecDeque::new();
        for (name, text) in ["old", "new"].into_iter().zip(texts) {
            std::fs::write(dir.path().join(name), text).unwrap();
            parts.push_back(Part::open(&dir.path().join(name)).unwrap());
        }
        tail(&mut parts, lines).unwrap();
        let mut all = Vec::new();
        for part in &mut parts {
            loop {
                let piece = part.read().unwrap();
                if piece.is_empty() {
                    break;
                }
                all.extend(piece);
            }
        }
        all
    }

    #[test]
    fn the_last_lines_are_taken() {
        for texts in [[&b""[..], b"a\nb\nc\n"], [b"a\n", b"b\nc\n"], [b"a\nb", b"\nc\n"], [b"a\nb\nc\n", b""]] {
            assert_eq!(last(texts, 0), b"");
            assert_eq!(last(texts, 1), b"c\n", "{texts:?}");
            assert_eq!(last(texts, 2), b"b\nc\n", "{texts:?}");
            assert_eq!(last(texts, 9), b"a\nb\nc\n", "{texts:?}");
        }
        assert_eq!(last([b"", b"no end"], 1), b"no end");
        assert_eq!(last([b"", b""], 3), b"");
        // Longer than what is read at once.
        let long = [vec![b'x'; 2 * PIECE], b"\nlast\n".to_vec()].concat();
        assert_eq!(last([b"first\n", &long], 1), b"last\n");
        assert_eq!(last([b"first\n", &long], 2), long);
    }
}
