//! Reads an archive, entry by entry, and checks it.
//!
//! Invariant: what [`Archive`] hands on has a path of names below the root, nine permission bits, and obeys the limits; an
//! archive that breaks off is an error wherever it does, never an end.

use std::io::{self, BufReader, Read};
use std::path::Path;

use nido_guest_agent::wire::{MAX_DEPTH, check_component};

use super::head::{Head, text};
use super::pax::Records;
use super::{BLOCK, MAX_PATH, padding};
use crate::guest::error::GuestError;
use crate::guest::files::Limits;

/// The most PAX records of one entry, in bytes.
const MAX_RECORDS: u64 = 1 << 20;
/// The most zeros behind an archive, in bytes: programs fill whole records of blocks.
const MAX_END: u64 = 1 << 20;
/// How much is read at once, in bytes.
const BUFFER: usize = 64 * 1024;
/// How much of a name is shown, in bytes.
const SHOWN: usize = 200;

/// One checked entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The names below the root; none is the root itself, which is a directory.
    pub path: Vec<Vec<u8>>,
    /// What it is.
    pub kind: MemberKind,
    /// The nine permission bits.
    pub mode: u16,
    /// When it was changed, in nanoseconds since 1970.
    pub mtime_ns: i64,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemberKind {
    /// A file of so many bytes; read them from the [`Archive`].
    File(u64),
    /// A directory.
    Directory,
    /// A symlink to this.
    Symlink(Vec<u8>),
    /// A device or a pipe: nothing that is copied.
    Special,
}

/// An archive that is being read. What is read from it are the bytes of the file that came last.
pub struct Archive<R> {
    from: BufReader<R>,
    limits: Limits,
    entries: u64,
    bytes: u64,
    /// Bytes of the entry that were not read yet.
    left: u64,
    /// Bytes behind it.
    padding: u64,
}

/// What stands before an entry and belongs to it.
#[derive(Default)]
struct ExtendedHeader {
    name: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    records: Option<Records>,
}

impl<R: Read> Archive<R> {
    pub fn new(from: R, limits: Limits) -> Self {
        Self { from: BufReader::with_capacity(BUFFER, from), limits, entries: 0, bytes: 0, left: 0, padding: 0 }
    }

    /// Counts one thing that the archive makes the guest do.
    pub fn count(&mut self) -> Result<(), GuestError> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(GuestError::ArchiveTooLarge { what: "entries", limit: self.limits.entries });
        }
        Ok(())
    }

    /// Counts bytes that have to be read.
    fn count_bytes(&mut self, bytes: u64) -> Result<(), GuestError> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > self.limits.bytes {
            return Err(GuestError::ArchiveTooLarge { what: "bytes", limit: self.limits.bytes });
        }
        Ok(())
    }

    /// The next entry; none at the end.
    pub fn next(&mut self) -> Result<Option<Member>, GuestError> {
        let mut before = ExtendedHeader::default();
        loop {
            let skipped = io::copy(&mut (&mut self.from).take(self.left + self.padding), &mut io::sink());
            if skipped.map_err(|e| self.failed(e))? < self.left + self.padding {
                return Err(self.bad("it is truncated"));
            }
            (self.left, self.padding) = (0, 0);
            let mut block = [0; BLOCK];
            self.fill(&mut block)?;
            let Some(head) = Head::decode(&block).map_err(|what| self.bad(&what))? else {
                return self.end(&before).map(|()| None);
            };
            if !self.is_about_the_next(&head, &mut before)? {
                self.count()?;
                return self.member(head, before).map(Some);
            }
        }
    }

    /// Takes in an entry that only describes the next one. Those before one entry count as part of it, as there is one of each
    /// kind; those that are about all could be any number.
    fn is_about_the_next(&mut self, head: &Head, before: &mut ExtendedHeader) -> Result<bool, GuestError> {
        let twice = match head.flag {
            b'L' => before.name.replace(self.name(head.size)?).is_some(),
            b'K' => before.target.replace(self.name(head.size)?).is_some(),
            b'x' => before.records.replace(self.records(head.size)?).is_some(),
            b'g' => {
                self.count()?;
                let Records { path, target, size, .. } = self.records(head.size)?;
                if path.is_some() || target.is_some() || size.is_some() {
                    return Err(self.bad("it gives all entries one name or size"));
                }
                false
            }
            _ => return Ok(false),
        };
        if twice { Err(self.bad("an entry that is described twice")) } else { Ok(true) }
    }

    fn member(&mut self, head: Head, before: ExtendedHeader) -> Result<Member, GuestError> {
        let records = before.records.unwrap_or_default();
        if (records.path.is_some() && before.name.is_some()) || (records.target.is_some() && before.target.is_some()) {
            return Err(self.bad("an entry that is described twice"));
        }
        let name = records.path.or(before.name).unwrap_or(head.name);
        let target = records.target.or(before.target).unwrap_or(head.target);
        let size = records.size.unwrap_or(head.size);
        let refused = |what: &str| {
            let name = name[..name.len().min(SHOWN)].escape_ascii();
            GuestError::BadArchive(format!("entry {} ('{name}'): {what}", self.entries))
        };
        let path = components(&name).map_err(refused)?;
        let is_directory = head.flag == b'5' || (head.flag == b'0' && size == 0 && name.ends_with(b"/"));
        let kind = match head.flag {
            _ if is_directory => MemberKind::Directory,
            b'0' | b'7' if !name.ends_with(b"/") => MemberKind::File(size),
            b'2' if target.is_empty() || target.len() > MAX_PATH || target.contains(&0) => {
                return Err(refused("a symlink with an impossible target"));
            }
            b'2' => MemberKind::Symlink(target),
            b'3' | b'4' | b'6' => MemberKind::Special,
            b'1' => return Err(refused("a hard link, which cannot be copied")),
            b'S' => return Err(refused("a sparse file, which cannot be copied")),
            flag => return Err(refused(&format!("of the unknown type '{}'", flag.escape_ascii()))),
        };
        if path.is_empty() && kind != MemberKind::Directory {
            return Err(refused("it has no name"));
        }
        if let MemberKind::File(_) = kind {
            self.count_bytes(size)?;
            (self.left, self.padding) = (size, padding(size));
        } else if size != 0 {
            return Err(refused("content of an entry that is not a file"));
        }
        let mtime_ns = records.mtime_ns.unwrap_or_else(|| head.mtime_s.saturating_mul(1_000_000_000));
        let mode = u16::try_from(head.mode & 0o777).unwrap_or(0);
        Ok(Member { path, kind, mode, mtime_ns })
    }

    /// Checks that only zeros follow the first block of zeros.
    fn end(&mut self, before: &ExtendedHeader) -> Result<(), GuestError> {
        if before.name.is_some() || before.target.is_some() || before.records.is_some() {
            return Err(self.bad("an extended header without an entry after it"));
        }
        let mut seen = 0;
        let mut bytes = [0; 8 * BLOCK];
        loop {
            let length = match self.from.read(&mut bytes) {
                Ok(0) => return Ok(()),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.failed(error)),
            };
            seen += length as u64;
            if seen > MAX_END || bytes[..length].iter().any(|&byte| byte != 0) {
                return Err(self.bad("data after its end"));
            }
        }
    }

    fn name(&mut self, size: u64) -> Result<Vec<u8>, GuestError> {
        let name = self.small(size, MAX_PATH as u64 + 1)?;
        Ok(text(&name).to_vec())
    }

    fn records(&mut self, size: u64) -> Result<Records, GuestError> {
        let bytes = self.small(size, MAX_RECORDS)?;
        Records::decode(&bytes).map_err(|what| self.bad(&what))
    }

    /// Reads the bytes of an entry that describes another.
    fn small(&mut self, size: u64, limit: u64) -> Result<Vec<u8>, GuestError> {
        let length = usize::try_from(size).ok().filter(|_| size <= limit);
        let length = length.ok_or_else(|| self.bad("a description that is too long"))?;
        self.count_bytes(size)?;
        let mut bytes = vec![0; length];
        self.fill(&mut bytes)?;
        self.padding = padding(size);
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), GuestError> {
        self.from.read_exact(bytes).map_err(|e| self.failed(e))
    }

    /// Something is wrong with the archive, around the last entry.
    fn bad(&self, what: &str) -> GuestError {
        GuestError::BadArchive(format!("around entry {}: {what}", self.entries))
    }

    /// It could not be read; its early end is its own fault.
    pub fn failed(&self, error: io::Error) -> GuestError {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return self.bad("it is truncated");
        }
        GuestError::host(Path::new("the archive"), error)
    }
}

impl<R: Read> Read for Archive<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let length = (&mut self.from).take(self.left).read(bytes)?;
        if length == 0 && self.left > 0 && !bytes.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= length as u64;
        Ok(length)
    }
}

/// The names of a path below the root. What other programs make harmless by leaving it out is refused: what is left might
/// not be what was meant.
fn components(name: &[u8]) -> Result<Vec<Vec<u8>>, &'static str> {
    if name.starts_with(b"/") {
        return Err("an absolute path");
    }
    if name.is_empty() || name.len() > MAX_PATH {
        return Err("no name, or a name that is too long");
    }
    let names = name.split(|&byte| byte == b'/').filter(|name| !name.is_empty() && *name != b".");
    let names: Vec<_> = names.map(<[u8]>::to_vec).collect();
    if names.iter().any(|name| name == b"..") {
        return Err("a path with '..' in it");
    }
    if names.len() > MAX_DEPTH || names.iter().any(|name| check_component(name).is_err()) {
        return Err("nested too deep, or an invalid name");
    }
    Ok(names)
}

#[cfg(test)]
mod tests;
