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
struct Before {
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

    /// The next entry; none at the end.
    pub fn next(&mut self) -> Result<Option<Member>, GuestError> {
        let mut before = Before::default();
        loop {
            let skipped = io::copy(&mut (&mut self.from).take(self.left + self.padding), &mut io::sink());
            if skipped.map_err(|e| self.failed(e))? < self.left + self.padding {
                return Err(self.bad("it breaks off"));
            }
            (self.left, self.padding) = (0, 0);
            let mut block = [0; BLOCK];
            self.fill(&mut block)?;
            let Some(head) = Head::decode(&block).map_err(|what| self.bad(&what))? else {
                return self.end(&before).map(|()| None);
            };
            self.count()?;
            if !self.is_about_the_next(&head, &mut before)? {
                return self.member(head, before).map(Some);
            }
        }
    }

    /// Takes in an entry that only describes the next one.
    fn is_about_the_next(&mut self, head: &Head, before: &mut Before) -> Result<bool, GuestError> {
        let twice = match head.flag {
            b'L' => before.name.replace(self.name(head.size)?).is_some(),
            b'K' => before.target.replace(self.name(head.size)?).is_some(),
            b'x' => before.records.replace(self.records(head.size)?).is_some(),
            b'g' => {
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

    fn member(&mut self, head: Head, before: Before) -> Result<Member, GuestError> {
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
            self.bytes = self.bytes.saturating_add(size);
            if self.bytes > self.limits.bytes {
                return Err(GuestError::ArchiveTooLarge { what: "bytes", limit: self.limits.bytes });
            }
            (self.left, self.padding) = (size, padding(size));
        } else if size != 0 {
            return Err(refused("bytes of something that is no file"));
        }
        let mtime_ns = records.mtime_ns.unwrap_or_else(|| head.mtime_s.saturating_mul(1_000_000_000));
        let mode = u16::try_from(head.mode & 0o777).unwrap_or(0);
        Ok(Member { path, kind, mode, mtime_ns })
    }

    /// Looks at what stands behind the first block of zeros: nothing but more of them.
    fn end(&mut self, before: &Before) -> Result<(), GuestError> {
        if before.name.is_some() || before.target.is_some() || before.records.is_some() {
            return Err(self.bad("a description with no entry behind it"));
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
                return Err(self.bad("something stands behind its end"));
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
            return self.bad("it breaks off");
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
        return Err("no name, or one that is too long");
    }
    let names = name.split(|&byte| byte == b'/').filter(|name| !name.is_empty() && *name != b".");
    let names: Vec<_> = names.map(<[u8]>::to_vec).collect();
    if names.iter().any(|name| name == b"..") {
        return Err("a path with '..' in it");
    }
    if names.len() > MAX_DEPTH || names.iter().any(|name| check_component(name).is_err()) {
        return Err("nested too deep, or a name that is none");
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { entries: 100, bytes: 10_000 };

    fn head(flag: u8, name: &str, size: u64) -> Head {
        Head { flag, name: name.into(), target: Vec::new(), mode: 0o4755, size, mtime_s: 5 }
    }

    fn entry(flag: u8, name: &str, bytes: &[u8]) -> Vec<u8> {
        let size = bytes.len() as u64;
        let mut all = [&head(flag, name, size).encode()[..], bytes].concat();
        all.resize(all.len() + usize::try_from(padding(size)).unwrap(), 0);
        all
    }

    fn archive(entries: &[Vec<u8>]) -> Vec<u8> {
        [entries.concat(), vec![0; 2 * BLOCK]].concat()
    }

    /// Everything that is in it, files with their bytes.
    fn read(bytes: &[u8]) -> Result<Vec<(String, MemberKind, Vec<u8>)>, String> {
        let mut archive = Archive::new(bytes, LIMITS);
        let mut all = Vec::new();
        while let Some(member) = archive.next().map_err(|e| e.to_string())? {
            assert_eq!(member.mode & !0o777, 0);
            let mut bytes = Vec::new();
            archive.read_to_end(&mut bytes).map_err(|e| archive.failed(e).to_string())?;
            all.push((String::from_utf8(member.path.join(&b'/')).unwrap(), member.kind, bytes));
        }
        Ok(all)
    }

    #[track_caller]
    fn refused(bytes: &[u8], why: &str) {
        let error = read(bytes).unwrap_err();
        assert!(error.contains(why), "{error}");
    }

    #[test]
    fn an_archive_is_read() {
        let all = read(&archive(&[
            entry(b'5', "./", b""),
            entry(b'5', "a/", b""),
            entry(b'0', "./a//b", &[7; 513]),
            entry(b'g', "pax_global_header", b"12 comment=\n"),
            entry(b'6', "pipe", b""),
            entry(b'x', "x", b"15 path=long/x\n10 size=3\n"),
        ]));
        assert!(all.unwrap_err().contains("a description with no entry"));
        let mut last = entry(b'0', "short", b"");
        last.extend_from_slice(&[b"abc", &[0; 509][..]].concat());
        let all = read(&archive(&[
            entry(b'0', "./a//b", &[7; 513]),
            entry(b'L', "", b"q/r\0"),
            entry(b'0', "short", b"r"),
            entry(b'x', "x", b"15 path=long/x\n10 size=3\n"),
            last,
        ]));
        let all = all.unwrap();
        assert_eq!(all[0], ("a/b".into(), MemberKind::File(513), vec![7; 513]));
        assert_eq!(all[1], ("q/r".into(), MemberKind::File(1), b"r".into()));
        // Not what the head says: what the record says.
        assert_eq!(all[2], ("long/x".into(), MemberKind::File(3), b"abc".into()));
        assert_eq!(read(&archive(&[])), Ok(Vec::new()));
    }

    #[test]
    fn nothing_leaves_the_directory() {
        for name in ["/etc/passwd", "../x", "a/../../x", "a/..", "..", "//x"] {
            refused(&archive(&[entry(b'0', name, b"")]), "entry 1");
            let record = format!(" path={name}\n");
            let record = format!("{}{record}", record.len() + if record.len() > 97 { 3 } else { 2 });
            refused(&archive(&[entry(b'x', "x", record.as_bytes()), entry(b'0', "x", b"")]), "entry");
        }
        refused(&archive(&[entry(b'0', ".", b"x")]), "it has no name");
        refused(&archive(&[entry(b'0', &"a/".repeat(40), b"x")]), "of the unknown type");
        refused(&archive(&[entry(b'L', "", &b"a/".repeat(300)), entry(b'0', "x", b"")]), "nested too deep");
        refused(&archive(&[entry(b'L', "", &[b'n'; 256]), entry(b'0', "x", b"")]), "a name that is none");
    }

    #[test]
    fn what_the_protocol_cannot_carry_is_refused_and_devices_are_no_files() {
        refused(&archive(&[entry(b'1', "x", b"")]), "a hard link");
        refused(&archive(&[entry(b'S', "x", b"")]), "a sparse file");
        refused(&archive(&[entry(b'V', "x", b"")]), "unknown type");
        refused(&archive(&[entry(b'2', "x", b"")]), "impossible target");
        refused(&archive(&[entry(b'5', "x", b"bytes")]), "bytes of something that is no file");
        refused(&archive(&[entry(b'3', "x", b"bytes")]), "bytes of something that is no file");
        for device in [b'3', b'4', b'6'] {
            assert_eq!(read(&archive(&[entry(device, "x", b"")])).unwrap()[0].1, MemberKind::Special);
        }
    }

    #[test]
    fn what_two_readers_could_understand_differently_is_refused() {
        let pax = |records: &[u8]| entry(b'x', "x", records);
        let file = || entry(b'0', "x", b"");
        refused(&archive(&[pax(b"9 path=a\n"), pax(b"9 path=b\n"), file()]), "described twice");
        refused(&archive(&[pax(b"9 path=a\n"), entry(b'L', "", b"b"), file()]), "described twice");
        refused(&archive(&[entry(b'g', "x", b"9 path=a\n"), file()]), "one name or size");
        refused(&archive(&[pax(b"9 path=a\n")]), "no entry behind it");
        refused(&archive(&[pax(b"22 GNU.sparse.major=1\n"), file()]), "a sparse file");
        refused(&[archive(&[file()]), archive(&[file()])].concat(), "behind its end");
        refused(&[archive(&[file()]), vec![0; 2 << 20]].concat(), "behind its end");
    }

    #[test]
    fn claims_are_not_believed_and_quotas_hold() {
        // Nothing of that length is made room for.
        refused(&head(b'0', "x", 1 << 30).encode(), "more bytes than the limit of 10000");
        for flag in [b'L', b'K', b'x', b'g'] {
            refused(&head(flag, "x", 0o777_7777_7777).encode(), "too long");
        }
        let parts: Vec<_> = (0..3).map(|n| entry(b'0', &format!("{n}"), &[0; 4000])).collect();
        refused(&archive(&parts), "more bytes than");
        refused(&archive(&vec![entry(b'5', "x", b""); 101]), "more entries than the limit of 100");
        refused(&archive(&vec![entry(b'g', "x", b""); 101]), "more entries than the limit of 100");
        let record = entry(b'x', "x", b"29 size=18446744073709551615\n");
        refused(&archive(&[record, entry(b'0', "x", b"")]), "more bytes than");
    }

    #[test]
    fn an_archive_that_breaks_off_is_none() {
        let whole = archive(&[entry(b'0', "x", &[1; 600]), entry(b'L', "", b"name\0"), entry(b'0', "y", b"yy")]);
        assert_eq!(read(&whole).unwrap().len(), 2);
        // Behind the first block of zeros everything has been said.
        for length in (0..=whole.len() - 2 * BLOCK).step_by(64) {
            refused(&whole[..length], "it breaks off");
        }
        refused(b"", "it breaks off");
        refused(&[1; 2000], "no tar archive");
    }

    #[test]
    fn what_gnu_tar_writes_is_read_in_every_format() {
        let here = tempfile::tempdir().unwrap();
        let deep = "d".repeat(120);
        std::fs::create_dir_all(here.path().join(&deep)).unwrap();
        std::fs::write(here.path().join(&deep).join("file"), [9; 700]).unwrap();
        std::fs::write(here.path().join("new\nline"), "x").unwrap();
        std::os::unix::fs::symlink("t".repeat(130), here.path().join("link")).unwrap();
        for format in ["gnu", "oldgnu", "pax", "posix"] {
            let mut tar = std::process::Command::new("tar");
            let made = tar.args(["-c", "--format", format, "-C"]).arg(here.path()).arg(".").output().unwrap();
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
            let mut all = read(&made.stdout).unwrap();
            all.sort_by(|a, b| a.0.cmp(&b.0));
            let kinds: Vec<_> = all.iter().map(|(name, kind, _)| (name.as_str(), kind.clone())).collect();
            let (dir, file) = (deep.clone(), format!("{deep}/file"));
            let expected = [
                ("", MemberKind::Directory),
                (&*dir, MemberKind::Directory),
                (&*file, MemberKind::File(700)),
                ("link", MemberKind::Symlink("t".repeat(130).into())),
                ("new\nline", MemberKind::File(1)),
            ];
            assert_eq!(kinds, expected, "{format}");
        }
    }
}
