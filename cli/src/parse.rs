//! Sizes, durations and pairs as people write them; and back. Pure.
//!
//! Invariant: what is read is exact. A value that would have to be rounded or cut is refused.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use jiff::{SignedDuration, Timestamp};
use nido_api::error::{Code, Error, Hint};
use nido_api::{AllowEntry, NetLimitKey};
use nido_server::sanitize;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

fn wrong(text: &str, what: &str, hint: &str) -> Error {
    let head: String = text.chars().take(80).collect();
    Error::new(Code::SpecInvalid, format!("'{}' is not {what}", sanitize::line(&head))).hint(Hint::command_line(hint))
}

/// A size in bytes: `512M`, `4GiB`, `1.5G` in powers of 1024; `500MB` in powers of 1000.
pub fn size(text: &str) -> Result<u64, Error> {
    let fail = || wrong(text, "a size", "write a number with K, M, G or T, for example 512M or 4G");
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).ok_or_else(fail)?;
    let (number, unit) = text.split_at(end);
    let factor = match unit.to_ascii_uppercase().as_str() {
        "B" => 1,
        "K" | "KIB" => KIB,
        "M" | "MIB" => MIB,
        "G" | "GIB" => GIB,
        "T" | "TIB" => TIB,
        "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return Err(fail()),
    };
    decimal(number, factor).filter(|bytes| *bytes > 0).ok_or_else(fail)
}

/// `number × factor`, if it is a whole number that fits.
fn decimal(number: &str, factor: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || whole.len() > 20 || fraction.len() > 9 || number.ends_with('.') {
        return None;
    }
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let product = digits.checked_mul(u128::from(factor))?;
    if product % scale == 0 { u64::try_from(product / scale).ok() } else { None }
}

/// A time limit, as it may have been written.
pub fn show_ms(ms: u64) -> String {
    match ms {
        ms if ms % 1000 != 0 => format!("{ms}ms"),
        ms if ms % 60_000 != 0 => format!("{}s", ms / 1000),
        ms => format!("{}m", ms / 60_000),
    }
}

/// An amount of memory in MiB.
pub fn memory_mib(text: &str) -> Result<u32, Error> {
    let bytes = size(text)?;
    if bytes % MIB == 0 { u32::try_from(bytes / MIB).ok() } else { None }
        .ok_or_else(|| wrong(text, "a whole number of MiB", "for example 512M or 2G"))
}

/// A duration in milliseconds: `500ms`, `30s`, `10m`, `1h30m`, `7d`; a bare number counts seconds.
pub fn duration_ms(text: &str) -> Result<u64, Error> {
    let fail = || wrong(text, "a duration", "for example 500ms, 30s, 10m or 1h30m");
    let (mut rest, mut sum, mut last) = (text, 0u64, u64::MAX);
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let letters = rest[digits..].bytes().take_while(u8::is_ascii_alphabetic).count();
        let (number, unit) = (&rest[..digits], &rest[digits..digits + letters]);
        let factor = match unit {
            "ms" => 1,
            "s" => 1000,
            "" if rest.len() == digits && last == u64::MAX => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(fail()),
        };
        // Units run from the largest to the smallest, each at most once.
        if factor >= last {
            return Err(fail());
        }
        last = factor;
        let number: u64 = number.parse().map_err(|_| fail())?;
        sum = number.checked_mul(factor).and_then(|ms| sum.checked_add(ms)).ok_or_else(fail)?;
        rest = &rest[digits + letters..];
    }
    if sum == 0 { Err(fail()) } else { Ok(sum) }
}

/// A moment: as it stands in answers (`2026-01-04T15:00:00Z`), or so long before `now` (`2h`).
pub fn moment(text: &str, now: Timestamp) -> Result<Timestamp, Error> {
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    let ago = duration_ms(text).ok().and_then(|ms| i64::try_from(ms).ok()).map(SignedDuration::from_millis);
    ago.and_then(|ago| now.checked_sub(ago).ok())
        .ok_or_else(|| wrong(text, "a time", "for example 2026-01-04T15:00:00Z, or 2h for the last two hours"))
}

/// A label, `KEY=VALUE`.
pub fn label(text: &str) -> Result<(String, String), Error> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(wrong(text, "a label", "write KEY=VALUE, for example role=web")),
    }
}

/// A limit of a VM's network: `KEY=VALUE`.
pub fn net_limit(text: &str) -> Result<(NetLimitKey, u64), Error> {
    let keys = || NetLimitKey::ALL.map(NetLimitKey::word).join(", ");
    let fail = || wrong(text, "a limit of the network", &format!("write KEY=VALUE, with one of {}", keys()));
    let (key, value) = text.split_once('=').ok_or_else(fail)?;
    let key = NetLimitKey::ALL.into_iter().find(|known| known.word() == key).ok_or_else(fail)?;
    if key.is_bytes() {
        return Ok((key, size(value)?));
    }
    let number = value.parse().map_err(|_| wrong(text, "a limit of the network", "write a number, for example 64"))?;
    Ok((key, number))
}

/// An entry of a list of rules that bound others; `None` for the word `none`.
pub fn allowed(word: &str) -> Result<Option<AllowEntry>, Error> {
    if word == "none" { Ok(None) } else { word.parse().map(Some) }
}

/// A variable for the guest: `KEY=VALUE`, or `KEY` for the value it has here (`own` reads that).
pub fn variable(text: OsString, own: impl Fn(&OsString) -> Option<OsString>) -> Result<Vec<u8>, Error> {
    let shown = text.to_string_lossy().into_owned();
    let fail = |what| wrong(&shown, what, "write KEY=VALUE, or KEY to pass on its value from here");
    match text.as_bytes().iter().position(|b| *b == b'=') {
        Some(0) => Err(fail("a variable")),
        Some(_) => Ok(text.into_vec()),
        None if text.is_empty() => Err(fail("a variable")),
        None => {
            let value = own(&text).ok_or_else(|| fail("a variable that is set here"))?;
            Ok([text.as_bytes(), b"=", value.as_bytes()].concat())
        }
    }
}

/// Bytes for people: `512 MiB`, `1.5 GiB`.
pub fn show_bytes(bytes: u64) -> String {
    let (unit, name) = match bytes {
        TIB.. => (TIB, "TiB"),
        GIB.. => (GIB, "GiB"),
        MIB.. => (MIB, "MiB"),
        KIB.. => (KIB, "KiB"),
        _ => return format!("{bytes} B"),
    };
    let tenths = (u128::from(bytes) * 10 + u128::from(unit) / 2) / u128::from(unit);
    if tenths % 10 == 0 { format!("{} {name}", tenths / 10) } else { format!("{}.{} {name}", tenths / 10, tenths % 10) }
}

/// A span of time for people, in its two largest units: `3d4h`, `5m2s`, `12s`.
pub fn show_seconds(seconds: u64) -> String {
    let units = [(86_400, "d"), (3600, "h"), (60, "m"), (1, "s")];
    let first = units.iter().position(|(length, _)| seconds >= *length).unwrap_or(3);
    let mut rest = seconds;
    let mut out = String::new();
    for (length, name) in units.iter().skip(first).take(2) {
        if rest / length > 0 || out.is_empty() {
            out.push_str(&format!("{}{name}", rest / length));
        }
        rest %= length;
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("1B", 1),
            ("512M", 512 << 20),
            ("512MiB", 512 << 20),
            ("512m", 512 << 20),
            ("4G", 4 << 30),
            ("1.5G", 1536 << 20),
            ("500MB", 500_000_000),
            ("2T", 2 << 40),
        ] {
            assert_eq!(size(text).unwrap(), bytes, "{text}");
        }
        for bad in
            ["", "512", "G", ".5G", "1.G", "1..5G", "-1G", "0M", "1.0001K", "1X", "1 G", "99999999999T", "1e3M", "1GB2"]
        {
            assert_eq!(size(bad).unwrap_err().code(), Code::SpecInvalid, "{bad}");
        }
        assert_eq!(memory_mib("2G").unwrap(), 2048);
        assert!(memory_mib("512K").is_err());
    }

    #[test]
    fn durations() {
        for (text, ms) in [
            ("500ms", 500),
            ("30s", 30_000),
            ("10m", 600_000),
            ("1h30m", 5_400_000),
            ("7d", 604_800_000),
            ("60", 60_000),
        ] {
            assert_eq!(duration_ms(text).unwrap(), ms, "{text}");
        }
        for bad in
            ["", "0s", "s", "1x", "1m1h", "1s1s", "-1s", "1.5h", "1h30", "ten", "99999999999999999999s", "1 s", "1é"]
        {
            assert_eq!(duration_ms(bad).unwrap_err().code(), Code::SpecInvalid, "{bad}");
        }
    }

    #[test]
    fn moments() {
        let now: Timestamp = "2026-01-04T15:00:00Z".parse().unwrap();
        assert_eq!(moment("2026-01-04T15:00:00+01:00", now).unwrap().to_string(), "2026-01-04T14:00:00Z");
        assert_eq!(moment("1h30m", now).unwrap().to_string(), "2026-01-04T13:30:00Z");
        for bad in ["", "yesterday", "-1h", "9999999d"] {
            assert_eq!(moment(bad, now).unwrap_err().code(), Code::SpecInvalid, "{bad}");
        }
    }

    #[test]
    fn pairs() {
        assert_eq!(label("a=b=c").unwrap(), ("a".into(), "b=c".into()));
        assert!(label("=b").is_err() && label("a").is_err());
        let own = |key: &OsString| (key == "HERE").then(|| "x y".into());
        assert_eq!(variable("A=1".into(), own).unwrap(), b"A=1");
        assert_eq!(variable("A=".into(), own).unwrap(), b"A=");
        assert_eq!(variable("HERE".into(), own).unwrap(), b"HERE=x y");
        assert!(variable("GONE".into(), own).is_err() && variable("=1".into(), own).is_err());
        assert!(variable("".into(), own).is_err());
    }

    #[test]
    fn shown() {
        for (bytes, text) in
            [(0, "0 B"), (1023, "1023 B"), (512 << 20, "512 MiB"), (1536 << 20, "1.5 GiB"), (4 << 40, "4 TiB")]
        {
            assert_eq!(show_bytes(bytes), text);
        }
        for (seconds, text) in [(0, "0s"), (59, "59s"), (60, "1m"), (302, "5m2s"), (3661, "1h1m"), (90_000, "1d1h")] {
            assert_eq!(show_seconds(seconds), text);
        }
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_parsers(text in any::<String>()) {
            let _ = (size(&text), memory_mib(&text), duration_ms(&text), label(&text));
        }

        #[test]
        fn whole_sizes_are_exact(number in 1u64..1 << 20, unit in 0usize..4) {
            let text = format!("{number}{}", ["K", "M", "G", "T"][unit]);
            let bytes = u128::from(number) << (10 * (unit + 1));
            prop_assert_eq!(size(&text).ok(), u64::try_from(bytes).ok());
        }

        #[test]
        fn durations_add_up(h in 1u64..100, m in 0u64..600, s in 0u64..600) {
            prop_assert_eq!(duration_ms(&format!("{h}h{m}m{s}s")).unwrap(), (h * 3600 + m * 60 + s) * 1000);
        }
    }
}
