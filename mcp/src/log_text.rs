//! A VM's logs as text for a reader: their last lines, bounded, without what a reader would not see.

use std::collections::VecDeque;

use nido_api::error::Result;
use nido_api::name::VmName;
use nido_api::sanitize::for_reader;
use nido_api::{LogRequest, LogSource};
use nido_core::Nido;
use serde::Serialize;

/// The most that is shown of the logs of a VM, in bytes.
pub const BYTES_MAX: usize = 32 << 10;
/// The most of it that is the supervisor's, in bytes.
const SUPERVISOR_BYTES: usize = 8 << 10;
/// What the rest of a report may take, in bytes.
const FACTS_BYTES: usize = 4 << 10;

/// The last lines of one log, at most `bytes` long.
pub async fn tail(nido: &Nido, name: &VmName, source: LogSource, lines: usize, bytes: usize) -> Result<String> {
    let mut log = nido.logs(name, LogRequest { source, tail_lines: Some(lines), follow: false })?;
    let mut kept: VecDeque<u8> = VecDeque::new();
    let mut cut = false;
    while let Some(piece) = log.next().await {
        kept.extend(piece?);
        if let Some(over) = kept.len().checked_sub(bytes).filter(|over| *over > 0) {
            kept.drain(..over);
            cut = true;
        }
    }
    let kept = Vec::from(kept);
    Ok(end_of(&for_reader(whole_lines(&kept, cut), usize::MAX).text, bytes).to_owned())
}

/// The end of a log from its first whole line; a single longer line as it is.
fn whole_lines(kept: &[u8], cut: bool) -> &[u8] {
    match kept.iter().position(|byte| *byte == b'\n') {
        Some(at) if cut && at + 1 < kept.len() => &kept[at + 1..],
        _ => kept,
    }
}

/// The last bytes of a text: bytes that are not text have become longer.
fn end_of(text: &str, bytes: usize) -> &str {
    let mut from = text.len().saturating_sub(bytes);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    &text[from..]
}

/// What is known of a VM's life, and the last lines of its supervisor and its console: `lines` of each. A guest that was forked writes
/// nothing to its console, so the console alone would be empty for most.
pub async fn report(nido: &Nido, name: &VmName, [supervisor, console]: [usize; 2]) -> Result<String> {
    let info = nido.info(name).await?;
    let mut text = format!("== VM {name} ==\n{}: created\n", info.created_at);
    if let Some(started) = info.started_at {
        let path = info.timings.map_or_else(String::new, |timings| format!(" ({})", word(&timings.path)));
        text += &format!("{started}: started{path}\n");
    }
    text += &format!("state: {}\n", info.status.word());
    if let Some(failure) = &info.failure {
        text += &format!("failed: {} ({})\n", failure.message, word(&failure.cause));
        text.extend(failure.log_tail.iter().map(|line| format!("  {line}\n")));
    }
    let mut text = crate::answer::readable_text(nido_api::sanitize::head(&text, FACTS_BYTES));
    let console_bytes = BYTES_MAX - FACTS_BYTES - SUPERVISOR_BYTES - 256;
    for (title, source, lines, bytes) in [
        ("supervisor", LogSource::Supervisor, supervisor, SUPERVISOR_BYTES),
        ("console, written by the guest", LogSource::Console, console, console_bytes),
    ] {
        let shown = tail(nido, name, source, lines, bytes).await?;
        text += &format!("== {title} ==\n{}", if shown.is_empty() { "(nothing)\n" } else { &shown });
        if !text.ends_with('\n') {
            text.push('\n');
        }
    }
    Ok(text)
}

/// A value of the core as the word that it is in JSON.
fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_truncated_log_begins_with_a_whole_line() {
        assert_eq!(whole_lines(b"nd\nlast\n", true), b"last\n");
        assert_eq!(whole_lines(b"one\ntwo\n", false), b"one\ntwo\n");
        assert_eq!(whole_lines(b"endless", true), b"endless");
        assert_eq!(whole_lines(b"endless\n", true), b"endless\n");
        assert_eq!(end_of("aé", 1), "");
        assert_eq!(end_of("aé", 2), "é");
    }
}
