//! Writes what a guest sends as an archive that GNU tar, BSD's and others read: POSIX's format, with PAX records where a head
//! has no room.
//!
//! A header states a file's length before its bytes, and the guest's files may change meanwhile: one that fits a
//! frame is written as long as it is, a longer one as long as its header states.
//!
//! Invariant: an archive that ends is whole. A file that became shorter breaks it off; nothing is filled with zeros that a guest
//! only claimed to have. And unpacking it writes nothing elsewhere: its entries come directory by directory, none below
//! what is no directory, none where a symlink was before.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::io::{BufWriter, Write};
use std::path::Path;

use nido_guest_agent::wire::{Failed, Fault, MAX_RAW};

use super::head::{Head, NAME_MAX, OCTAL_MAX};
use super::pax::Records;
use super::{BLOCK, padding};
use crate::guest::error::GuestError;
use crate::guest::files::receive::{Item, ItemKind, Receiver};
use crate::guest::files::{CopyTotals, Progress};

/// How much is written at once, in bytes.
const BUFFER: usize = 64 * 1024;
/// The name before the records of an entry, which is never shown.
const RECORDS: &[u8] = b"./PaxHeaders/x";

impl<F: FnMut(Progress)> Receiver<F> {
    /// Copies a tree to a writer as an archive. Its entries are called `./PATH`; a file alone is called `name`.
    pub fn archive_to(mut self, writer: impl Write, name: Option<&[u8]>) -> Result<CopyTotals, GuestError> {
        let first = self.item()?;
        self.archive_from(first, writer, name)
    }

    /// The same where the first entry has been read.
    pub fn archive_from(
        mut self,
        first: Option<Item>,
        writer: impl Write,
        name: Option<&[u8]>,
    ) -> Result<CopyTotals, GuestError> {
        let mut writer = BufWriter::with_capacity(BUFFER, writer);
        let packed = self.pack_all(first, &mut writer, name);
        // After a failure nothing more is written: where it was early, there is not one byte yet.
        drop(writer.into_parts());
        packed.map(|()| self.copied(Vec::new()))
    }

    fn pack_all(
        &mut self,
        first: Option<Item>,
        writer: &mut impl Write,
        name: Option<&[u8]>,
    ) -> Result<(), GuestError> {
        let mut order = PackCommand::default();
        let mut next = first;
        while let Some(item) = next {
            order.check(&item)?;
            let path = match (&item.path[..], &item.kind) {
                (b"", ItemKind::File(_)) => [b"./", name.unwrap_or(b"file")].concat(),
                (path, _) => [b"./", path].concat(),
            };
            self.pack(&item, path, writer)?;
            next = self.item()?;
        }
        writer.write_all(&[0; 2 * BLOCK]).and_then(|()| writer.flush()).map_err(failed)
    }

    fn pack(&mut self, item: &Item, mut path: Vec<u8>, writer: &mut impl Write) -> Result<(), GuestError> {
        if let ItemKind::Link(_) = item.kind {
            return Err(GuestError::breach("a hard link, which was not requested"));
        }
        let ItemKind::File(announced) = item.kind else {
            let target = if let ItemKind::Symlink(target) = &item.kind { target.as_slice() } else { b"" };
            if item.kind == ItemKind::Directory && !path.ends_with(b"/") {
                path.push(b'/');
            }
            let flag = if item.kind == ItemKind::Directory { b'5' } else { b'2' };
            writer.write_all(&heads(item, flag, &path, target, 0)).map_err(failed)?;
            return self.body(false, |_| Ok(()));
        };
        // Held back until it is known that there is more than one frame of it.
        let (mut held, mut told) = (Vec::new(), None);
        let mut written = 0;
        self.body_to(|mut bytes| {
            if told.is_none() && held.len() + bytes.len() <= MAX_RAW {
                held.extend_from_slice(bytes);
                return Ok(());
            }
            if announced == 0 {
                let message = "the length of a file is unknown before its end (as in /proc): copy it alone".into();
                return Err(GuestError::Guest(Failed { fault: Fault::Other, message }));
            }
            let size = *told.get_or_insert(announced.max(held.len() as u64));
            if written == 0 {
                writer.write_all(&heads(item, b'0', &path, b"", size)).map_err(failed)?;
                writer.write_all(&held).map_err(failed)?;
                written = held.len() as u64;
                held = Vec::new();
            }
            // What was added since it was opened is left out.
            let room = usize::try_from(size - written).unwrap_or(usize::MAX);
            bytes = &bytes[..bytes.len().min(room)];
            written += bytes.len() as u64;
            writer.write_all(bytes).map_err(failed)
        })?;
        let Some(size) = told else {
            written = held.len() as u64;
            writer.write_all(&heads(item, b'0', &path, b"", written)).map_err(failed)?;
            writer.write_all(&held).map_err(failed)?;
            return fill(writer, written);
        };
        if written < size {
            let message = "a file became shorter while it was copied".into();
            return Err(GuestError::Guest(Failed { fault: Fault::Other, message }));
        }
        fill(writer, size)
    }
}

/// What has come so far, as far as it matters to the program that unpacks it. A program that is not careful would write through a symlink
/// that it has just made.
#[derive(Default)]
struct PackCommand {
    /// The directory that the last entry is, or is in.
    inside: Vec<u8>,
    /// Where symlinks are: of each eight bytes, as the number of entries has a limit, under a key that the guest cannot know.
    links: HashSet<u64>,
    key: RandomState,
}

impl PackCommand {
    fn check(&mut self, item: &Item) -> Result<(), GuestError> {
        let parent = item.path.iter().rposition(|&byte| byte == b'/').map_or(&b""[..], |at| &item.path[..at]);
        let below = self.inside.strip_prefix(parent);
        if !below.is_some_and(|rest| parent.is_empty() || rest.is_empty() || rest.starts_with(b"/")) {
            return Err(GuestError::breach("a file whose directory was not sent"));
        }
        let place = self.key.hash_one(&item.path);
        if self.links.contains(&place) {
            return Err(GuestError::breach("the same name twice in a directory"));
        }
        if let ItemKind::Symlink(_) = item.kind {
            self.links.insert(place);
        }
        self.inside = if item.kind == ItemKind::Directory { item.path.clone() } else { parent.to_vec() };
        Ok(())
    }
}

/// Fills the last block.
fn fill(writer: &mut impl Write, size: u64) -> Result<(), GuestError> {
    let zeros = [0; BLOCK];
    let length = usize::try_from(padding(size)).unwrap_or(0);
    writer.write_all(&zeros[..length]).map_err(failed)
}

fn failed(error: std::io::Error) -> GuestError {
    GuestError::host(Path::new("the output"), error)
}

/// The head of an entry, behind the records of what has no room in it.
fn heads(item: &Item, flag: u8, path: &[u8], target: &[u8], size: u64) -> Vec<u8> {
    let mtime_s = item.mtime_ns.div_euclid(1_000_000_000);
    let records = Records {
        path: (path.len() > NAME_MAX).then(|| path.to_vec()),
        target: (target.len() > NAME_MAX).then(|| target.to_vec()),
        size: (size > OCTAL_MAX).then_some(size),
        mtime_ns: (!u64::try_from(mtime_s).is_ok_and(|time| time <= OCTAL_MAX)).then_some(item.mtime_ns),
    };
    let cut = |text: &[u8]| text[..text.len().min(NAME_MAX)].to_vec();
    let head = Head { flag, name: cut(path), target: cut(target), mode: item.mode.into(), size, mtime_s };
    let records = records.encode();
    if records.is_empty() {
        return head.encode().to_vec();
    }
    let length = records.len() as u64;
    let before = Head { flag: b'x', name: RECORDS.to_vec(), target: Vec::new(), mode: 0o644, size: length, mtime_s };
    let zeros = vec![0; usize::try_from(padding(length)).unwrap_or(0)];
    [&before.encode()[..], &records, &zeros, &head.encode()].concat()
}

#[cfg(test)]
mod tests {
    use super::super::{Archive, Member, MemberKind};
    use super::*;
    use crate::guest::files::Limits;

    fn item(path: &str, kind: ItemKind) -> Item {
        Item { path: path.into(), kind, mode: 0o755, mtime_ns: 0, owner: None, stored: None }
    }

    /// Whether a tree of these is safe to unpack: `a/` is a directory, `a@` a symlink.
    fn is_harmless(tree: &str) -> bool {
        let mut order = PackCommand::default();
        tree.split(' ').all(|word| {
            let kind = match word.as_bytes().last() {
                Some(b'/') => ItemKind::Directory,
                Some(b'@') => ItemKind::Symlink(b"/etc".into()),
                _ => ItemKind::File(1),
            };
            order.check(&item(word.trim_end_matches(['/', '@', '.']), kind)).is_ok()
        })
    }

    // A guest could send a symlink and a file below it, or in its place, and have who unpacks it write anywhere.
    #[test]
    fn unpacking_an_archive_writes_nothing_elsewhere() {
        for tree in ["./ a/ a/b a/c/ a/c/d a/e f/ f/g@ f/h", "./ a@ b@ ab/ ab/c", "./ a/ a/a/ a/a/a@ a/b/ a/b/a"] {
            assert!(is_harmless(tree), "{tree}");
        }
        for tree in ["./ a@ a/passwd", "./ a@ a", "./ a@ a/ a/passwd", "./ a/ a/b@ a/b/c", "./ a/ b a/c", "./ a/ ab/c"]
        {
            assert!(!is_harmless(tree), "{tree}");
        }
        for tree in ["./ a/ a@ a/passwd", "./ a/ b/ a@ a/passwd", "./ a/b", "./ a@ a@"] {
            assert!(!is_harmless(tree), "{tree}");
        }
    }

    #[test]
    fn long_values_are_in_a_pax_record() {
        let mut item = item("", ItemKind::File(0));
        (item.mode, item.mtime_ns) = (0o640, -1_500_000_000);
        let (long, target) = ([b'a'; 101], [b'b'; 4000]);
        let bytes = [heads(&item, b'2', &long, &target, 0), vec![0; 2 * BLOCK]].concat();
        let mut archive = Archive::new(&bytes[..], Limits::default());
        let read = archive.next().unwrap().unwrap();
        let kind = MemberKind::Symlink(target.to_vec());
        assert_eq!(read, Member { path: vec![long.to_vec()], kind, mode: 0o640, mtime_ns: -1_500_000_000 });
        assert_eq!(archive.next().unwrap(), None);
        let huge = heads(&item, b'0', b"x", b"", OCTAL_MAX + 1);
        let limits = Limits { bytes: 2 * OCTAL_MAX, ..Limits::default() };
        let read = Archive::new(&huge[..], limits).next().unwrap().unwrap();
        assert_eq!(read.kind, MemberKind::File(OCTAL_MAX + 1));
    }
}
