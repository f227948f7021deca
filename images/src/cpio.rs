//! A writer for the "newc" cpio format, the kernel's format for an initramfs. Pure: entries in, bytes out.
//! Invariant: an archive's length is a multiple of four, so archives may be concatenated.

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry<'a> {
    /// A directory.
    Directory,
    /// A regular file with this content.
    File(&'a [u8]),
    /// A character device with these numbers.
    CharacterDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
}

/// An archive being written. All entries belong to root and carry no time, so equal contents give equal bytes.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

/// The archive cannot hold a file of 4 GiB or more.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{path} is too large for an initramfs")]
pub struct TooLarge {
    /// The entry's path.
    pub path: String,
}

const END: &str = "TRAILER!!!";

impl Archive {
    /// Appends an entry. `path` is relative (no leading slash); `mode` holds permission bits only.
    ///
    /// # Errors
    /// [`TooLarge`] if the content or the path does not fit the format's 32-bit fields.
    pub fn add(&mut self, path: &str, mode: u32, entry: Entry<'_>) -> Result<(), TooLarge> {
        self.entries += 1;
        let (kind, content, device): (u32, &[u8], (u32, u32)) = match entry {
            Entry::Directory => (0o040_000, &[], (0, 0)),
            Entry::File(content) => (0o100_000, content, (0, 0)),
            Entry::CharacterDevice { major, minor } => (0o020_000, &[], (major, minor)),
        };
        self.record(path, kind | (mode & 0o7777), content, device, self.entries)
    }

    /// Ends the archive.
    ///
    /// # Errors
    /// None in practice; the trailer is an entry like others.
    pub fn finish(mut self) -> Result<Vec<u8>, TooLarge> {
        self.record(END, 0, &[], (0, 0), 0)?;
        Ok(self.bytes)
    }

    fn record(
        &mut self,
        path: &str,
        mode: u32,
        content: &[u8],
        (major, minor): (u32, u32),
        inode: u32,
    ) -> Result<(), TooLarge> {
        use std::io::Write as _;
        let too_large = |_| TooLarge { path: path.to_owned() };
        let size = u32::try_from(content.len()).map_err(too_large)?;
        let name_size = u32::try_from(path.len() + 1).map_err(too_large)?;
        let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            let _ = write!(self.bytes, "{field:08x}");
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Path, mode, content, device numbers.
    type ParsedEntry = (String, u32, Vec<u8>, (u32, u32));

    /// A reader for what the writer makes, so that tests can look inside.
    pub(crate) fn read(mut bytes: &[u8]) -> Vec<ParsedEntry> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            assert_eq!(&bytes[..6], b"070701");
            let field = |index: usize| {
                let text = std::str::from_utf8(&bytes[6 + index * 8..][..8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let device = (field(9), field(10));
            let path = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
            let start = (110 + name_size).next_multiple_of(4);
            let content = bytes[start..start + size].to_vec();
            bytes = &bytes[(start + size).next_multiple_of(4)..];
            if path != END {
                found.push((path, mode, content, device));
            }
        }
        found
    }

    proptest! {
        #[test]
        fn written_archives_can_be_read(files in proptest::collection::vec(("[a-z][a-z/]{0,20}", any::<Vec<u8>>(), 0_u32..0o1000), 0..8)) {
            let mut archive = Archive::default();
            for (path, content, mode) in &files {
                archive.add(path, *mode, Entry::File(content)).unwrap();
            }
            let bytes = archive.finish().unwrap();
            prop_assert_eq!(bytes.len() % 4, 0);
            let expected: Vec<_> =
                files.into_iter().map(|(path, content, mode)| (path, mode | 0o100_000, content, (0, 0))).collect();
            prop_assert_eq!(read(&bytes), expected);
        }
    }

    #[test]
    fn directories_and_devices_carry_their_kind() {
        let mut archive = Archive::default();
        archive.add("dev", 0o755, Entry::Directory).unwrap();
        archive.add("dev/console", 0o600, Entry::CharacterDevice { major: 5, minor: 1 }).unwrap();
        let found = read(&archive.finish().unwrap());
        assert_eq!(found[0], ("dev".to_owned(), 0o040_755, vec![], (0, 0)));
        assert_eq!(found[1], ("dev/console".to_owned(), 0o020_600, vec![], (5, 1)));
    }
}
