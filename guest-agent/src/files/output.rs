//! A file being written. Long files go to the disk in large pieces past the page cache, which spares the guest's
//! processor the better part of the work: every page of the cache has to be found, accounted for and written back.
//!
//! Invariant: the bytes in the file are those that were given, in their order, whatever the file system makes of
//! direct writing; once it refuses, the rest is written plainly.

use std::fs::File;
use std::io::{self, Seek as _, Write as _};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// How much is written directly at once, in bytes. A multiple of every block size there is.
const PIECE: usize = 1024 * 1024;
/// Files announced as shorter than this are written plainly, in bytes.
const LONG: u64 = 4 * PIECE as u64;
/// What memory and file offset must be multiples of, in bytes.
const ALIGNMENT: usize = 4096;

/// The file and what is not in it yet.
pub struct Output {
    file: File,
    /// Room for one piece, from `start` on, and how much of that is filled; empty if the file is written plainly.
    held: Vec<u8>,
    start: usize,
    filled: usize,
}

impl Output {
    /// Wraps a file that is empty. `announced` is the length it may get.
    pub fn new(file: File, announced: u64) -> Self {
        let mut output = Self { file, held: Vec::new(), start: 0, filled: 0 };
        if announced >= LONG && output.set_direct(true).is_ok() {
            output.held = vec![0; PIECE + ALIGNMENT];
            output.start = output.held.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        }
        output
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// The file cannot take them.
    pub fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !self.held.is_empty() && !bytes.is_empty() {
            let count = bytes.len().min(PIECE - self.filled);
            let at = self.start + self.filled;
            self.held[at..at + count].copy_from_slice(&bytes[..count]);
            self.filled += count;
            bytes = &bytes[count..];
            if self.filled == PIECE {
                self.write_piece()?;
            }
        }
        self.file.write_all(bytes)
    }

    /// Leaves out so many bytes, which are zeros that take no room.
    ///
    /// # Errors
    /// The file cannot become so long.
    pub fn skip(&mut self, count: u64) -> io::Result<()> {
        if !self.held.is_empty() {
            self.go_on_plainly()?;
        }
        let count = i64::try_from(count).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        let end = self.file.seek(io::SeekFrom::Current(count))?;
        self.file.set_len(end)
    }

    /// Writes what is left and gives the file back.
    ///
    /// # Errors
    /// The file cannot take it.
    pub fn finish(mut self) -> io::Result<File> {
        if !self.held.is_empty() {
            self.go_on_plainly()?;
        }
        Ok(self.file)
    }

    fn write_piece(&mut self) -> io::Result<()> {
        let mut written = 0;
        while written < PIECE {
            match self.file.write(&self.held[self.start + written..self.start + PIECE]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // This file system wants something else, or took an odd part of the piece.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                    self.start += written;
                    self.filled -= written;
                    return self.go_on_plainly();
                }
                Err(error) => return Err(error),
            }
        }
        self.filled = 0;
        Ok(())
    }

    fn go_on_plainly(&mut self) -> io::Result<()> {
        self.set_direct(false)?;
        let rest = std::mem::take(&mut self.held);
        self.file.write_all(&rest[self.start..self.start + self.filled])
    }

    fn set_direct(&self, direct: bool) -> io::Result<()> {
        let mut flags = fcntl_getfl(&self.file)?;
        flags.set(OFlags::DIRECT, direct);
        Ok(fcntl_setfl(&self.file, flags)?)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Seek as _};

    use super::*;

    fn written(length: usize, announced: u64, step: usize) -> Vec<u8> {
        let mut output = Output::new(tempfile::tempfile().unwrap(), announced);
        let bytes: Vec<u8> = (0..length).map(|at| (at * 31 / 7) as u8).collect();
        for piece in bytes.chunks(step) {
            output.write(piece).unwrap();
        }
        let mut file = output.finish().unwrap();
        file.rewind().unwrap();
        let mut found = Vec::new();
        file.read_to_end(&mut found).unwrap();
        assert!(found == bytes, "{length} bytes announced as {announced} in steps of {step}");
        found
    }

    #[test]
    fn holes_are_zeros_at_any_offset() {
        for announced in [0, LONG] {
            let mut output = Output::new(tempfile::tempfile().unwrap(), announced);
            output.write(b"begin").unwrap();
            output.skip(100_000).unwrap();
            output.write(b"end").unwrap();
            output.skip(50).unwrap();
            let mut file = output.finish().unwrap();
            file.rewind().unwrap();
            let mut found = Vec::new();
            file.read_to_end(&mut found).unwrap();
            assert_eq!(found, [&b"begin"[..], &[0; 100_000], b"end", &[0; 50]].concat());
        }
    }

    #[test]
    fn output_does_not_depend_on_chunk_sizes_or_the_announced_length() {
        for length in [0, 1, ALIGNMENT, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 12_345] {
            for announced in [0, LONG] {
                for step in [1021, 256 * 1024, 3 * PIECE] {
                    assert_eq!(written(length, announced, step).len(), length);
                }
            }
        }
    }
}
