//! The logs of a VM: their last lines for errors, and their size.
//!
//! QEMU and the guest append as long as they run, with or without a supervisor; so a log that has grown too long is copied
//! and cut where it stands.
//!
//! Invariant: a log takes at most about twice [`LOG_BYTES_MAX`] on disk while a supervisor lives.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use crate::home::VmDir;

/// A log longer than this is rotated, in bytes.
pub const LOG_BYTES_MAX: u64 = 4 << 20;
/// How many lines go into an error.
const TAIL_LINES: usize = 20;
/// How many lines before a panic go with it.
const LINES_BEFORE_PANIC: usize = 5;
/// How much of a log is looked at for them, in bytes.
const TAIL_BYTES: u64 = 16 * 1024;
/// Longest line in an error, in characters.
const TAIL_LINE_CHARS: usize = 300;

/// The last lines of the first of `names` that has any. They may contain anything; code that shows them escapes them.
#[must_use]
pub fn log_tail(dir: &VmDir, names: &[&str]) -> Vec<String> {
    names
        .iter()
        .map(|name| tail_of(&dir.file(name)).unwrap_or_default())
        .find(|lines| !lines.is_empty())
        .unwrap_or_default()
}

/// The lines with which the kernel's last panic began, if the end of the console `name` has one. What follows them, a
/// trace of its stack, can be much longer than a tail.
#[must_use]
pub fn panic_lines(dir: &VmDir, name: &str) -> Option<Vec<String>> {
    let lines = last_lines(&dir.file(name)).ok()?;
    let at = lines.iter().rposition(|line| line.contains("Kernel panic - not syncing"))?;
    let from = at.saturating_sub(LINES_BEFORE_PANIC);
    Some(lines[from..].iter().take(TAIL_LINES).cloned().collect())
}

fn tail_of(path: &Path) -> std::io::Result<Vec<String>> {
    let mut lines = last_lines(path)?;
    let from = lines.len().saturating_sub(TAIL_LINES);
    Ok(lines.split_off(from))
}

fn last_lines(path: &Path) -> std::io::Result<Vec<String>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines = text.lines().map(str::trim_end).filter(|line| !line.is_empty());
    Ok(lines.map(|line| line.chars().take(TAIL_LINE_CHARS).collect()).collect())
}

/// Rotates the log at `path` if it is too long: `NAME` becomes `NAME.1` by copying, for its writers keep their descriptor.
///
/// # Errors
/// The copy cannot be written; the log is cut nevertheless, so it does not fill the disk.
pub fn rotate(path: &Path) -> std::io::Result<()> {
    let too_long = std::fs::metadata(path).is_ok_and(|meta| meta.len() > LOG_BYTES_MAX);
    if !too_long {
        return Ok(());
    }
    let mut old = path.as_os_str().to_owned();
    old.push(".1");
    let mut source = File::open(path)?;
    // Of a log that has grown far too long, the end is what matters.
    let length = source.metadata()?.len();
    source.seek(SeekFrom::Start(length.saturating_sub(LOG_BYTES_MAX)))?;
    let copied = File::create(&old).and_then(|mut copy| std::io::copy(&mut source, &mut copy));
    OpenOptions::new().write(true).open(path)?.set_len(0)?;
    copied.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::home::Home;

    #[test]
    fn tails_are_bounded_and_lossy() {
        let home = tempfile::tempdir().unwrap();
        let home = Home::open(&home.path().join("h")).unwrap();
        let dir = home.vm("1");
        dir.make().unwrap();
        let mut text: Vec<u8> = (0..5000).flat_map(|n| format!("line {n}\r\n\n").into_bytes()).collect();
        text.extend(b"\xff\x1b[31m");
        text.extend([b'x'; 1000]);
        std::fs::write(dir.file("a.log"), text).unwrap();
        let tail = log_tail(&dir, &["missing.log", "a.log"]);
        assert_eq!(tail.len(), TAIL_LINES);
        assert_eq!(tail[TAIL_LINES - 2], "line 4999");
        assert_eq!(tail[TAIL_LINES - 1].chars().count(), TAIL_LINE_CHARS);
    }

    #[test]
    fn a_panic_is_found_behind_its_trace() {
        let home = tempfile::tempdir().unwrap();
        let home = Home::open(&home.path().join("h")).unwrap();
        let dir = home.vm("1");
        dir.make().unwrap();
        let trace: String = (0..60).map(|n| format!("[ 5.0] frame_{n}+0x1/0x2\r\n")).collect();
        std::fs::write(dir.file("a.log"), format!("before\n[ 5.0] Kernel panic - not syncing: why\n{trace}")).unwrap();
        let lines = panic_lines(&dir, "a.log").unwrap();
        assert_eq!(lines[..2], ["before", "[ 5.0] Kernel panic - not syncing: why"]);
        assert_eq!(lines.len(), TAIL_LINES);
        std::fs::write(dir.file("a.log"), trace).unwrap();
        assert_eq!(panic_lines(&dir, "a.log"), None);
    }

    #[test]
    fn a_long_log_is_rotated_in_place_while_it_is_written() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut writer = OpenOptions::new().append(true).create(true).open(&path).unwrap();
        writer.write_all(b"short").unwrap();
        rotate(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"short");
        writer.write_all(&vec![b'y'; usize::try_from(LOG_BYTES_MAX).unwrap()]).unwrap();
        rotate(&path).unwrap();
        writer.write_all(b"after").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"after");
        assert_eq!(std::fs::metadata(dir.path().join("console.log.1")).unwrap().len(), LOG_BYTES_MAX);
    }
}
