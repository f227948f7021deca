//! The head of an entry of a tar archive: one block, of the old format, POSIX's (ustar) or GNU's. Pure.

use super::BLOCK;

/// The content of a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// The type flag; `0` also stands for the old format's zero byte.
    pub flag: u8,
    /// The name, as it stands there.
    pub name: Vec<u8>,
    /// What a link points to.
    pub target: Vec<u8>,
    /// The mode, all of it.
    pub mode: u64,
    /// How many bytes follow.
    pub size: u64,
    /// When it was changed, in seconds since 1970.
    pub mtime_s: i64,
}

/// Largest number that fits the twelve bytes of a size or time, in the format that everybody reads.
pub const OCTAL_MAX: u64 = 0o777_7777_7777;
/// Longest name and longest target that fit a head, in bytes.
pub const NAME_MAX: usize = 100;

impl Head {
    /// Reads a head; `None` is a block of zeros, the end of an archive.
    ///
    /// # Errors
    /// A description of the error.
    pub fn decode(block: &[u8; BLOCK]) -> Result<Option<Self>, String> {
        if block.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        if number(&block[148..156]) != Some(checksum(block).into()) {
            return Err("a wrong checksum: it is damaged, or not a tar archive".into());
        }
        let mut name = text(&block[..100]).to_vec();
        // GNU keeps other things where POSIX has the beginning of a long name.
        let prefix = text(&block[345..500]);
        if &block[257..263] == b"ustar\0" && !prefix.is_empty() {
            name = [prefix, b"/", &name].concat();
        }
        let unsigned = |field: &[u8], what: &str| {
            let number = number(field).and_then(|number| u64::try_from(number).ok());
            number.ok_or_else(|| format!("a {what} that is not a number, or too large"))
        };
        Ok(Some(Self {
            flag: if block[156] == 0 { b'0' } else { block[156] },
            name,
            target: text(&block[157..257]).to_vec(),
            mode: unsigned(&block[100..108], "mode")?,
            size: unsigned(&block[124..136], "size")?,
            mtime_s: number(&block[136..148]).ok_or("a time that is not a number, or too large")?,
        }))
    }

    /// Writes a head in POSIX's format. What does not fit is truncated: a PAX record must have it.
    pub fn encode(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        put(&mut block[..100], &self.name);
        octal(&mut block[100..108], self.mode);
        octal(&mut block[108..116], 0);
        octal(&mut block[116..124], 0);
        octal(&mut block[124..136], self.size.min(OCTAL_MAX));
        octal(&mut block[136..148], u64::try_from(self.mtime_s).unwrap_or(0).min(OCTAL_MAX));
        block[156] = self.flag;
        put(&mut block[157..257], &self.target);
        block[257..265].copy_from_slice(b"ustar\x0000");
        let sum = checksum(&block);
        octal(&mut block[148..155], sum.into());
        block[155] = b' ';
        block
    }
}

/// The sum of all bytes, those of the checksum counted as blanks.
fn checksum(block: &[u8; BLOCK]) -> u32 {
    let outside = block.iter().enumerate().filter(|(at, _)| !(148..156).contains(at));
    outside.map(|(_, &byte)| u32::from(byte)).sum::<u32>() + 8 * u32::from(b' ')
}

/// A text that ends at a zero byte or with its field.
pub fn text(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// A number: octal digits, or (GNU) all bits behind the first, which is set, with a sign.
fn number(field: &[u8]) -> Option<i64> {
    let (&first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        // Of the first byte the second bit is the sign; the rest follows.
        let begin = if first & 0x40 == 0 { i128::from(first & 0x3f) } else { i128::from(first) - 0x100 };
        let value = rest.iter().fold(begin, |value, &byte| (value << 8) | i128::from(byte));
        return i64::try_from(value).ok();
    }
    let digits = text(field).trim_ascii();
    if !digits.iter().all(|digit| (b'0'..=b'7').contains(digit)) {
        return None;
    }
    digits.iter().try_fold(0_i64, |value, digit| value.checked_mul(8)?.checked_add(i64::from(digit - b'0')))
}

fn put(field: &mut [u8], bytes: &[u8]) {
    let length = bytes.len().min(field.len());
    field[..length].copy_from_slice(&bytes[..length]);
}

/// Octal digits and a zero byte.
fn octal(field: &mut [u8], number: u64) {
    let digits = format!("{number:0width$o}", width = field.len() - 1);
    put(field, digits.as_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn head() -> Head {
        Head { flag: b'0', name: b"a/b".into(), target: Vec::new(), mode: 0o644, size: 7, mtime_s: 1_700_000_000 }
    }

    fn with(field: std::ops::Range<usize>, bytes: &[u8]) -> Result<Option<Head>, String> {
        let mut block = head().encode();
        block[field].copy_from_slice(bytes);
        let sum = checksum(&block);
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        Head::decode(&block)
    }

    proptest! {
        #[test]
        fn written_headers_are_parsed(
            name in proptest::collection::vec(1_u8.., 0..=100),
            target in proptest::collection::vec(1_u8.., 0..=100),
            mode in 0_u64..0o1_0000, size in 0..=OCTAL_MAX, mtime_s in 0..0o777_7777_7777_i64,
        ) {
            let head = Head { flag: b'2', name, target, mode, size, mtime_s };
            prop_assert_eq!(Head::decode(&head.encode()), Ok(Some(head)));
        }

        #[test]
        fn no_block_is_too_much_for_it(bytes in proptest::collection::vec(any::<u8>(), BLOCK)) {
            let mut block = [0; BLOCK];
            block.copy_from_slice(&bytes);
            let sum = checksum(&block);
            octal(&mut block[148..156], sum.into());
            let _ = Head::decode(&block);
        }
    }

    #[test]
    fn numbers_of_all_formats() {
        assert_eq!(with(124..136, b"        17 \0").unwrap().unwrap().size, 0o17);
        assert_eq!(with(124..136, &[0; 12]).unwrap().unwrap().size, 0);
        let mut large = [0; 12];
        (large[0], large[6]) = (0x80, 1);
        assert_eq!(with(124..136, &large).unwrap().unwrap().size, 1 << 40);
        assert_eq!(with(136..148, &[0xff; 12]).unwrap().unwrap().mtime_s, -1);
    }

    #[test]
    fn numbers_that_lie() {
        with(124..136, b"0000000008 \0").unwrap_err();
        with(124..136, b"-1         \0").unwrap_err();
        // Another reader may look at the last eight bytes only.
        with(124..136, &[0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7]).unwrap_err();
        with(124..136, &[0xff; 12]).unwrap_err();
    }

    #[test]
    fn damaged_headers_are_refused() {
        let mut block = head().encode();
        block[0] ^= 1;
        Head::decode(&block).unwrap_err();
        assert_eq!(Head::decode(&[0; BLOCK]), Ok(None));
    }
}
