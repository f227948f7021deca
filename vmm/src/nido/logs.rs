//! Reading a VM's logs, whole or as they grow.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use super::Nido;
use crate::api::{LogRequest, LogSource};
use crate::error::{Error, Result};
use crate::home::{CONSOLE_LOG, QEMU_LOG, SUPERVISOR_LOCK, SUPERVISOR_LOG};
use crate::lock::is_held;
use crate::name::VmName;

/// Bytes given at once.
const PIECE: usize = 64 * 1024;
/// How often a followed log is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

impl Nido {
    /// Reads a log: its rotated part, then the rest, then what comes while the VM is looked after.
    ///
    /// # Errors
    /// `vm_not_found`.
    pub fn logs(&self, name: &VmName, request: LogRequest) -> Result<LogStream> {
        let row = self.store().vm_by_name(name)?;
        let dir = self.vm_dir(&row.id);
        let file = match request.source {
            LogSource::Console => CONSOLE_LOG,
            LogSource::Qemu => QEMU_LOG,
            LogSource::Supervisor => SUPERVISOR_LOG,
        };
        let (path, alive) = (dir.file(file), dir.file(SUPERVISOR_LOCK));
        let mut past = Vec::new();
        for old in [dir.file(&format!("{file}.1")), path.clone()] {
            match std::fs::read(&old) {
                Ok(bytes) => past.push(bytes),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(Error::io("cannot read the log", e)),
            }
        }
        let position = past.last().filter(|_| path.exists()).map_or(0, |last| last.len() as u64);
        let mut past = past.concat();
        if let Some(lines) = request.tail_lines {
            past = tail(&past, lines).to_vec();
        }
        let follow = request.follow.then_some(Follow { path, alive, position, inode: 0 });
        Ok(LogStream { past: VecDeque::from(past), follow })
    }
}

/// The last `lines` lines of `text`.
fn tail(text: &[u8], lines: usize) -> &[u8] {
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let start = body
        .iter()
        .enumerate()
        .rev()
        .filter(|&(_, &b)| b == b'\n')
        .nth(lines.saturating_sub(1))
        .map_or(0, |(at, _)| at + 1);
    if lines == 0 { &[] } else { &text[start..] }
}

/// A log being read.
#[derive(Debug)]
pub struct LogStream {
    past: VecDeque<u8>,
    follow: Option<Follow>,
}

#[derive(Debug)]
struct Follow {
    path: PathBuf,
    alive: PathBuf,
    position: u64,
    inode: u64,
}

impl LogStream {
    /// The next piece, as the guest wrote it: hostile bytes. `None` at the end.
    pub async fn next(&mut self) -> Option<Result<Vec<u8>>> {
        if !self.past.is_empty() {
            let count = self.past.len().min(PIECE);
            return Some(Ok(self.past.drain(..count).collect()));
        }
        let follow = self.follow.as_mut()?;
        loop {
            // Looked at before the reading, so that the last words are not missed.
            let over = !is_held(&follow.alive);
            match follow.read() {
                Ok(piece) if !piece.is_empty() => return Some(Ok(piece)),
                Ok(_) if over => return None,
                Ok(_) => tokio::time::sleep(LOOK_EVERY).await,
                // The VM is gone, its log with it.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound && over => return None,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => tokio::time::sleep(LOOK_EVERY).await,
                Err(e) => return Some(Err(Error::io("cannot read the log", e))),
            }
        }
    }
}

impl Follow {
    fn read(&mut self) -> std::io::Result<Vec<u8>> {
        let mut file = File::open(&self.path)?;
        let meta = file.metadata()?;
        // Cut short by rotation, or another file under the name: it begins anew.
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
    use super::tail;

    #[test]
    fn the_last_lines_are_taken() {
        let text = b"a\nb\nc\n";
        assert_eq!(tail(text, 0), b"");
        assert_eq!(tail(text, 1), b"c\n");
        assert_eq!(tail(text, 2), b"b\nc\n");
        assert_eq!(tail(text, 9), text);
        assert_eq!(tail(b"no end", 1), b"no end");
        assert_eq!(tail(b"", 3), b"");
    }
}
