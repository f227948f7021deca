//! Random ids, names and bytes, from the system's random numbers.

use std::ops::RangeInclusive;

use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;

/// Bytes that cannot be guessed.
///
/// # Errors
/// `internal` if the system has no random numbers.
pub fn bytes<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| Error::new(Code::Internal, format!("no random numbers: {e}")))?;
    Ok(bytes)
}

/// An id: 16 hex digits.
///
/// # Errors
/// As [`bytes`].
pub fn id() -> Result<String> {
    Ok(nido_api::hex::encode(&bytes::<8>()?))
}

/// The name of a VM that is named by nido: `PREFIX-` and six letters.
///
/// # Errors
/// As [`bytes`]; `name_invalid` for a prefix that no name may begin with.
pub fn vm_name(prefix: &str) -> Result<VmName> {
    let mut number = u64::from_le_bytes(bytes()?);
    let mut name = format!("{prefix}-");
    for _ in 0..6 {
        name.push(char::from(b'a' + u8::try_from(number % 26).unwrap_or(0)));
        number /= 26;
    }
    name.parse()
}

/// A number of a range, each as likely. Meant for ranges of most numbers: others are drawn again.
///
/// # Errors
/// As [`bytes`].
pub fn number_in(range: &RangeInclusive<u32>) -> Result<u32> {
    loop {
        let number = u32::from_le_bytes(bytes()?);
        if range.contains(&number) {
            return Ok(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_ids_differ() {
        assert_ne!(vm_name("run").unwrap(), vm_name("run").unwrap());
        assert_ne!(id().unwrap(), id().unwrap());
        assert!(vm_name("run").unwrap().as_str().strip_prefix("run-").is_some_and(|letters| letters.len() == 6));
        assert_eq!(id().unwrap().len(), 16);
        let range = 3..=u32::MAX - 1;
        assert!(range.contains(&number_in(&range).unwrap()));
    }
}
