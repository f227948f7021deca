//! The output of nido: data to stdout, messages to stderr; text or JSON.
//!
//! Invariants: stdout carries the answer and nothing else. With `--json` it carries one JSON value, and every line on
//! stderr is a JSON object too. No text of a guest, of QEMU or of a file reaches a terminal without being escaped.

use nido_api::FrontEnd;
use std::io::{self, IsTerminal as _, Write as _};

use nido_api::error::Error;
use nido_server::sanitize::{is_harmful, line};
use serde::Serialize;

use crate::exit::Failure;

/// How to print, derived once from the flags and from the kind of the streams.
#[derive(Debug, Clone)]
pub struct Output {
    /// Answers and errors are JSON, and there is no talk.
    pub json: bool,
    /// No talk but warnings and errors.
    pub quiet: bool,
    /// Colours on stderr.
    pub colour: bool,
    /// Whether stdout is a terminal.
    pub stdout_is_terminal: bool,
    /// Whether stderr is a terminal.
    pub stderr_is_terminal: bool,
}

impl Output {
    /// Looks at the streams.
    pub fn new(json: bool, quiet: bool, no_color: bool) -> Self {
        let stderr_is_terminal = io::stderr().is_terminal();
        let no_color = no_color || std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        Self {
            json,
            quiet,
            colour: stderr_is_terminal && !no_color,
            stdout_is_terminal: io::stdout().is_terminal(),
            stderr_is_terminal,
        }
    }

    /// Whether progress may be printed.
    pub const fn shows_progress(&self) -> bool {
        !self.json && !self.quiet
    }

    /// Writes text, which must be safe already, to stdout.
    pub fn data(&self, text: &str) -> Result<(), Failure> {
        let mut stdout = io::stdout().lock();
        Ok(stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush())?)
    }

    /// Writes an answer: `value` with `--json`, else the text made by `human`.
    pub fn answer<T: Serialize>(&self, value: &T, human: impl FnOnce() -> String) -> Result<(), Failure> {
        let text = if self.json { json(value, self.stdout_is_terminal) + "\n" } else { human() };
        self.data(&text)
    }

    /// Prints a note on stderr.
    pub fn note(&self, text: &str) {
        if self.shows_progress() {
            print_line(&line(text));
        }
    }

    /// Says something on stderr that is a result, also where there is no talk. In JSON the answer has it.
    pub fn note_result(&self, text: &str) {
        if !self.json {
            print_line(&line(text));
        }
    }

    /// Warns on stderr.
    pub fn warn(&self, text: &str) {
        if self.json {
            print_line(&json(&serde_json::json!({ "warning": text }), false));
        } else {
            print_line(&format!("{} {}", self.paint("33", "warning:"), line(text)));
        }
    }

    /// Reports an error on stderr.
    pub fn error(&self, error: &Error) {
        if self.json {
            print_line(&json(&error.problem_for(FrontEnd::Cli), false));
            return;
        }
        let mut text = format!("{} {}", self.paint("1;31", "error:"), line(error.message()));
        for logged in error.log_lines() {
            text.push_str("\n  | ");
            text.push_str(&line(logged));
        }
        if let Some(hint) = error.hint_for(FrontEnd::Cli) {
            text.push_str(&format!("\n{} {}", self.paint("36", "hint:"), line(&hint)));
        }
        print_line(&text);
    }

    fn paint(&self, colour: &str, word: &str) -> String {
        if self.colour { format!("\x1b[{colour}m{word}\x1b[0m") } else { word.to_owned() }
    }
}

/// Prints a line on stderr. Errors are ignored: there is no other place to report them.
fn print_line(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// JSON in which every character that could harm a terminal is written as `\u….`, which means the same.
pub fn json<T: Serialize>(value: &T, pretty: bool) -> String {
    let text = if pretty { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) };
    // The answer types are plain structs with string keys: they always serialize.
    let text = text.unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"));
    if !text.chars().any(|c| c != '\n' && is_harmful(c)) {
        return text;
    }
    let mut out = String::with_capacity(text.len() + 64);
    for c in text.chars() {
        // Outside of strings there is no other control than the line end; inside, line ends are escaped already.
        if c != '\n' && is_harmful(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            out.push(c);
        }
    }
    out
}

/// Rows of cells as a table with a head, two blanks between columns. Cells are escaped.
pub fn table<const N: usize>(head: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut cells: Vec<[String; N]> = vec![head.map(str::to_owned)];
    cells.extend(rows.into_iter().map(|row| row.map(|cell| line(&cell))));
    let mut widths = [0; N];
    for row in &cells {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut out = String::with_capacity(cells.len() * (widths.iter().sum::<usize>() + 2 * N));
    for row in &cells {
        let last = row.iter().rposition(|cell| !cell.is_empty()).map_or(0, |last| last + 1);
        for (column, (cell, width)) in row.iter().zip(widths).take(last).enumerate() {
            out.push_str(cell);
            if column + 1 < last {
                let blanks = width - cell.chars().count() + 2;
                out.extend(std::iter::repeat_n(' ', blanks));
            }
        }
        out.push('\n');
    }
    out
}

/// Keys and values, one pair a line, the values in one column. Values are escaped.
pub fn pairs(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(key, _)| key.len() + 1).max().unwrap_or(0);
    pairs.iter().map(|(key, value)| format!("{:width$}  {}\n", format!("{key}:"), line(value))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [["web".to_owned(), "running".to_owned()], ["a\x1b[2Jb".to_owned(), String::new()]];
        assert_eq!(table(["NAME", "STATUS"], rows), "NAME     STATUS\nweb      running\na^[[2Jb\n");
    }

    #[test]
    fn pairs_line_up() {
        assert_eq!(pairs(&[("name", "web".into()), ("status", "a\nb".into())]), "name:    web\nstatus:  a\\nb\n");
    }

    proptest! {
        #[test]
        fn json_means_the_same_and_harms_no_terminal(text in any::<String>(), pretty in any::<bool>()) {
            let shown = json(&serde_json::json!({ "a": [text.clone(), "\u{e0001}\u{9b}"] }), pretty);
            prop_assert!(!shown.chars().any(|c| c != '\n' && is_harmful(c)));
            let back: serde_json::Value = serde_json::from_str(&shown).unwrap();
            prop_assert_eq!(back["a"][0].as_str().unwrap(), text);
        }
    }
}
