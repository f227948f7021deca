//! PAX records: what does not fit the head of an entry stands before it, as text. Pure.

/// The content of a list of records for the next entry. Records that are of no use here (owners, attributes) are left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Records {
    /// Instead of the head's name.
    pub path: Option<Vec<u8>>,
    /// Instead of the head's target.
    pub target: Option<Vec<u8>>,
    /// Instead of the head's size.
    pub size: Option<u64>,
    /// Instead of the head's time, in nanoseconds since 1970.
    pub mtime_ns: Option<i64>,
}

impl Records {
    /// Reads records: `LENGTH KEY=VALUE\n`, the length in decimal and of all of it.
    ///
    /// # Errors
    /// A description of the error.
    pub fn decode(mut bytes: &[u8]) -> Result<Self, String> {
        let mut records = Self::default();
        while !bytes.is_empty() {
            let record = first(bytes).ok_or("an invalid PAX record")?;
            let body = &record[record.iter().position(|&byte| byte == b' ').map_or(0, |at| at + 1)..record.len() - 1];
            let at = body.iter().position(|&byte| byte == b'=').ok_or("a PAX record without a value")?;
            records.take(&body[..at], &body[at + 1..])?;
            bytes = &bytes[record.len()..];
        }
        Ok(records)
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), String> {
        let number = || std::str::from_utf8(value).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
        let twice = match key {
            b"path" => self.path.replace(value.to_vec()).is_some(),
            b"linkpath" => self.target.replace(value.to_vec()).is_some(),
            b"size" => {
                let size = number().and_then(|text| text.parse().ok()).ok_or("a PAX size that is not a number")?;
                self.size.replace(size).is_some()
            }
            b"mtime" => {
                let time = std::str::from_utf8(value).ok().and_then(nanoseconds).ok_or("an invalid PAX time")?;
                self.mtime_ns.replace(time).is_some()
            }
            // What programs call a file with holes: what follows is not its bytes, or not at their place.
            b"SUN.holesdata" | b"SCHILY.realsize" => return Err("a sparse file".into()),
            _ if key.starts_with(b"GNU.sparse.") => return Err("a sparse file".into()),
            _ => false,
        };
        if twice { Err("the same PAX record twice".into()) } else { Ok(()) }
    }

    /// Writes records.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let texts = [("path", &self.path), ("linkpath", &self.target)];
        for (key, value) in texts.into_iter().filter_map(|(key, value)| Some((key, value.as_ref()?))) {
            record(&mut bytes, key, value);
        }
        if let Some(size) = self.size {
            record(&mut bytes, "size", size.to_string().as_bytes());
        }
        if let Some(time) = self.mtime_ns {
            let (sign, time) = (if time < 0 { "-" } else { "" }, time.unsigned_abs());
            let text = format!("{sign}{}.{:09}", time / 1_000_000_000, time % 1_000_000_000);
            record(&mut bytes, "mtime", text.as_bytes());
        }
        bytes
    }
}

/// The first record, its line end included.
fn first(bytes: &[u8]) -> Option<&[u8]> {
    let blank = bytes.iter().take(20).position(|&byte| byte == b' ')?;
    let digits = std::str::from_utf8(&bytes[..blank]).ok()?;
    if digits.starts_with('0') || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let record = bytes.get(..digits.parse().ok()?)?;
    (record.len() > blank + 1 && record.ends_with(b"\n")).then_some(record)
}

/// The length counts its own digits.
fn record(bytes: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = 1 + key.len() + 1 + value.len() + 1;
    let mut length = rest;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    bytes.extend_from_slice(format!("{length} {key}=").as_bytes());
    bytes.extend_from_slice(value);
    bytes.push(b'\n');
}

/// `-1.5` in nanoseconds; what is finer is truncated.
fn nanoseconds(text: &str) -> Option<i64> {
    let (negative, text) = text.strip_prefix('-').map_or((false, text), |text| (true, text));
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) {
        return None;
    }
    let fraction: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let time = whole.parse::<i64>().ok()?.checked_mul(1_000_000_000)?.checked_add(fraction.parse().ok()?)?;
    Some(if negative { -time } else { time })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn written_headers_are_parsed(
            path in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..200)),
            target in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..200)),
            size in proptest::option::of(any::<u64>()),
            mtime_ns in proptest::option::of((i64::MIN + 1)..),
        ) {
            let records = Records { path, target, size, mtime_ns };
            prop_assert_eq!(Records::decode(&records.encode()), Ok(records));
        }

        #[test]
        fn no_bytes_are_too_much_for_it(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Records::decode(&bytes);
        }
    }

    #[test]
    fn records_as_other_programs_write_them() {
        let records = Records::decode(b"30 mtime=1700000000.123456789\n12 path=a\nb\n19 SCHILY.xattr.x=\n").unwrap();
        assert_eq!((records.mtime_ns, records.path), (Some(1_700_000_000_123_456_789), Some(b"a\nb".to_vec())));
        assert_eq!(nanoseconds("-1.5"), Some(-1_500_000_000));
    }

    #[test]
    fn records_that_lie_are_refused() {
        let wrong: [&[u8]; 12] = [
            b"x",
            b"0 \n",
            b"99 path=a\n",
            b"9 path=ab",
            b"010 path=a\n",
            b"5 ab\n",
            b"11 size=-1\n",
            b"10 size=\n\n\n",
            b"9 path=a\n9 path=b\n",
            b"22 GNU.sparse.major=1\n",
            b"24 SUN.holesdata= 0 512\n",
            b"21 SCHILY.realsize=9\n",
        ];
        for records in wrong {
            assert!(Records::decode(records).is_err(), "{}", records.escape_ascii());
        }
    }
}
