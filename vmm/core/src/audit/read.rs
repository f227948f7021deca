//! The audit log's files, read: the oldest first, as they were at one moment.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _};

use nido_api::error::{Error, Result};
use nido_api::{AuditCheckpoint, AuditHead, AuditVerdict};

use super::check::ChainCheck;
use super::log::Log;
use crate::audit::line::LinePosition;

/// The files of a log, open, and how long they were.
#[derive(Debug)]
pub struct Files(Vec<(String, File, u64)>);

impl Log {
    /// Opens all there is. Writers do not wait for readers: files only grow, and a rename changes no open file.
    ///
    /// # Errors
    /// A file cannot be opened. A missing file is no error.
    pub fn open_all(&self) -> io::Result<Files> {
        if !self.directory().try_exists()? {
            return Ok(Files(Vec::new()));
        }
        self.locked(|| {
            let opened = self.files()?.into_iter().map(|path| {
                let file = File::open(&path)?;
                let length = file.metadata()?.len();
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                Ok((name, file, length))
            });
            Ok(Files(opened.collect::<io::Result<_>>()?))
        })
    }

    /// Whether the hash chain is intact, and matches a checkpoint; and the first line that is kept.
    ///
    /// # Errors
    /// `internal` if the files cannot be read.
    pub fn check(&self, against: Option<&AuditCheckpoint>) -> Result<(AuditVerdict, Option<AuditHead>)> {
        self.check_known(against, None)
    }

    /// The same, where the store knows the number and the chain of a line.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn check_known(
        &self,
        against: Option<&AuditCheckpoint>,
        known: Option<(u64, String)>,
    ) -> Result<(AuditVerdict, Option<AuditHead>)> {
        let files = self.open_all().map_err(unreadable)?;
        let mut check = ChainCheck::new(files.count(), against).with_known(known);
        files.each(|place, text, whole| check.line(place, text, whole)).map_err(unreadable)?;
        Ok(check.end())
    }
}

/// The log is there but cannot be read.
pub(crate) fn unreadable(error: io::Error) -> Error {
    Error::io("cannot read the audit log", error)
}

impl Files {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Shows every line, without its end, and whether it has one, until that is enough.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn each(self, mut seen: impl FnMut(LinePosition<'_>, &[u8], bool) -> bool) -> io::Result<()> {
        let count = self.0.len();
        for (number, (name, file, length)) in self.0.into_iter().enumerate() {
            let mut reader = BufReader::new(file.take(length));
            let mut text = Vec::new();
            for line in 1.. {
                text.clear();
                if reader.read_until(b'\n', &mut text)? == 0 {
                    break;
                }
                let place = LinePosition { file: &name, line, newest: number + 1 == count };
                let whole = text.pop_if(|last| *last == b'\n').is_some();
                if !seen(place, &text, whole) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}
