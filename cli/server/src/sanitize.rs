//! Text from a guest, from QEMU or from a file, made safe to show on a terminal. Pure.
//!
//! Controls become visible (`^[`, `\x9b`, `\u{202e}`), bytes that are not UTF-8 become `\xNN`. Of a stream, line ends,
//! tabs and plain colours (`ESC [ … m`) pass.
//!
//! Invariant: whatever goes in and however it is cut into pieces, what comes out is UTF-8 that cannot move the cursor
//! off its line, change the terminal's state beyond colours, hide text or reorder it.

use std::fmt::Write as _;

pub use nido_api::sanitize::is_harmful;

/// Longest colour sequence that passes, in bytes.
const MAX_COLOUR: usize = 48;

fn push_visible(c: char, out: &mut String) {
    // Writing to a String cannot fail.
    let _ = match c {
        '\n' => write!(out, "\\n"),
        '\t' => write!(out, "\\t"),
        '\r' => write!(out, "\\r"),
        '\0'..='\x1f' => write!(out, "^{}", char::from(c as u8 ^ 0x40)),
        '\x7f' => write!(out, "^?"),
        '\u{80}'..='\u{9f}' => write!(out, "\\x{:02x}", c as u32),
        _ => write!(out, "\\u{{{:x}}}", c as u32),
    };
}

fn shown(c: char) -> String {
    let mut text = String::new();
    if is_harmful(c) {
        push_visible(c, &mut text);
    } else {
        text.push(c);
    }
    text
}

/// One line of text, every control visible, line ends too.
pub fn line(text: &str) -> String {
    // Most text is this, and lists have thousands of cells.
    if text.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        return text.to_owned();
    }
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_harmful(c) { push_visible(c, &mut out) } else { out.push(c) }
    }
    out
}

/// A stream of bytes made safe piece by piece.
#[derive(Debug, Default)]
pub struct Sanitizer {
    /// The begun character or colour sequence at the end of the last piece.
    pending: Vec<u8>,
    /// A colour is on.
    coloured: bool,
}

impl Sanitizer {
    /// Makes the next piece safe.
    pub fn push(&mut self, piece: &[u8]) -> Vec<u8> {
        let joined;
        let bytes = if self.pending.is_empty() {
            piece
        } else {
            let mut whole = std::mem::take(&mut self.pending);
            whole.extend_from_slice(piece);
            joined = whole;
            joined.as_slice()
        };
        let mut out = Vec::with_capacity(bytes.len() + 16);
        let done = self.scan(bytes, &mut out);
        self.pending = bytes[done..].to_vec();
        out
    }

    /// Ends the stream: what was begun is shown as it is, a colour left on is switched off.
    pub fn finish(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut rest = std::mem::take(&mut self.pending);
        while !rest.is_empty() {
            escape_first(&rest, &mut out);
            rest.remove(0);
            let done = self.scan(&rest, &mut out);
            rest.drain(..done);
        }
        if std::mem::take(&mut self.coloured) {
            out.extend_from_slice(b"\x1b[0m");
        }
        out
    }

    /// Writes what is complete, and returns its length.
    fn scan(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            let plain = rest.iter().take_while(|b| matches!(b, b' '..=b'~' | b'\n' | b'\t' | b'\r')).count();
            out.extend_from_slice(&rest[..plain]);
            at += plain;
            let rest = &rest[plain..];
            at += match rest.first() {
                None => 0,
                Some(0x1b) => match colour(rest) {
                    Colour::Whole(length) => {
                        self.coloured = !matches!(&rest[2..length - 1], b"" | b"0");
                        out.extend_from_slice(&rest[..length]);
                        length
                    }
                    Colour::Incomplete => return at,
                    Colour::Other => escape_first(rest, out),
                },
                Some(0x80..) => match character(rest) {
                    Character::Whole(c) => {
                        out.extend_from_slice(shown(c).as_bytes());
                        c.len_utf8()
                    }
                    Character::Incomplete => return at,
                    Character::Wrong => escape_first(rest, out),
                },
                Some(_) => escape_first(rest, out),
            };
        }
        at
    }
}

fn escape_first(bytes: &[u8], out: &mut Vec<u8>) -> usize {
    let mut shown = String::new();
    match bytes.first() {
        Some(byte @ 0x80..) => {
            let _ = write!(shown, "\\x{byte:02x}");
        }
        Some(byte) => push_visible(char::from(*byte), &mut shown),
        None => return 0,
    }
    out.extend_from_slice(shown.as_bytes());
    1
}

enum Character {
    Whole(char),
    Incomplete,
    Wrong,
}

fn character(bytes: &[u8]) -> Character {
    let head = &bytes[..bytes.len().min(4)];
    let valid = match std::str::from_utf8(head) {
        Ok(text) => text,
        Err(error) if error.valid_up_to() > 0 => std::str::from_utf8(&head[..error.valid_up_to()]).unwrap_or_default(),
        Err(error) if error.error_len().is_none() => return Character::Incomplete,
        Err(_) => return Character::Wrong,
    };
    valid.chars().next().map_or(Character::Wrong, Character::Whole)
}

enum Colour {
    Whole(usize),
    Incomplete,
    Other,
}

/// Finds `ESC [ digits and semicolons m` at the start of `bytes`.
fn colour(bytes: &[u8]) -> Colour {
    for (at, byte) in bytes.iter().enumerate().take(MAX_COLOUR) {
        match (at, byte) {
            (0, _) | (1, b'[') | (2.., b'0'..=b'9' | b';') => {}
            (2.., b'm') if hides_nothing(&bytes[2..at]) => return Colour::Whole(at + 1),
            _ => return Colour::Other,
        }
    }
    if bytes.len() < MAX_COLOUR { Colour::Incomplete } else { Colour::Other }
}

/// Whether the parameters of a colour sequence leave text visible: no "conceal" (8), unless it is part of a colour.
fn hides_nothing(parameters: &[u8]) -> bool {
    let mut numbers = parameters.split(|b| *b == b';').map(|n| {
        let digits = n.iter().skip_while(|b| **b == b'0');
        digits.fold(0u32, |sum, b| sum.saturating_mul(10).saturating_add(u32::from(b - b'0')))
    });
    while let Some(number) = numbers.next() {
        match number {
            8 => return false,
            38 | 48 | 58 => {
                let skip = match numbers.next() {
                    Some(5) => 1,
                    Some(2) => 3,
                    _ => return false,
                };
                if numbers.by_ref().take(skip).count() < skip {
                    return false;
                }
            }
            _ => {}
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn whole(bytes: &[u8]) -> String {
        let mut sanitizer = Sanitizer::default();
        let mut out = sanitizer.push(bytes);
        out.extend(sanitizer.finish());
        String::from_utf8(out).unwrap()
    }

    /// Takes out the colour sequences, which are the only ones that may be left.
    fn without_colours(text: &str) -> String {
        let mut out = String::new();
        let mut rest = text;
        while let Some(at) = rest.find("\x1b[") {
            out.push_str(&rest[..at]);
            let tail = &rest[at + 2..];
            let end = tail.find(|c: char| !(c.is_ascii_digit() || c == ';')).unwrap();
            assert_eq!(tail.as_bytes()[end], b'm', "{text:?}");
            rest = &tail[end + 1..];
        }
        out + rest
    }

    #[test]
    fn plain_text_and_colours_pass() {
        for text in [
            "a b\tc\r\n",
            "größe 日本 🦀",
            "\x1b[1;31mred\x1b[0m",
            "\x1b[38;5;8mgrey\x1b[m",
            "\x1b[48;2;8;8;8mx\x1b[0m",
        ] {
            assert_eq!(whole(text.as_bytes()), text);
        }
    }

    #[test]
    fn harmful_characters_are_shown_escaped() {
        for (bytes, shown) in [
            (&b"\x1b]0;title\x07"[..], "^[]0;title^G"),
            (b"\x1b[2Jgone", "^[[2Jgone"),
            (b"\x1b[8mhidden", "^[[8mhidden"),
            (b"\x1b[0;08mhidden", "^[[0;08mhidden"),
            (b"\x1b[38;8mhidden", "^[[38;8mhidden"),
            (b"\x00\x7f\x08", "^@^?^H"),
            (b"\xff\xc2", "\\xff\\xc2"),
            (b"\x9b2J", "\\x9b2J"),
            ("\u{9b}2J".as_bytes(), "\\x9b2J"),
            ("a\u{202e}b\u{200b}".as_bytes(), "a\\u{202e}b\\u{200b}"),
            (b"end\x1b", "end^["),
            (b"end\x1b[1", "end^[[1"),
        ] {
            assert_eq!(whole(bytes), shown, "{bytes:?}");
        }
    }

    #[test]
    fn a_colour_left_on_is_switched_off() {
        assert_eq!(whole(b"\x1b[31mred"), "\x1b[31mred\x1b[0m");
    }

    #[test]
    fn one_line_stays_one_line() {
        assert_eq!(line("a\nb\r\tc\x1b[31m"), "a\\nb\\r\\tc^[[31m");
    }

    fn nasty() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            any::<u8>().prop_map(|b| vec![b]),
            any::<char>().prop_map(|c| c.to_string().into_bytes()),
            "\u{1b}\\[[0-9;]{0,20}[mJ]?".prop_map(String::into_bytes),
            Just("\u{202e}".as_bytes().to_vec()),
        ];
        proptest::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn output_has_no_harmful_characters(bytes in nasty()) {
            let text = without_colours(&whole(&bytes));
            prop_assert!(text.chars().all(|c| matches!(c, '\n' | '\t' | '\r') || !is_harmful(c)), "{text:?}");
        }

        #[test]
        fn the_pieces_do_not_matter(bytes in nasty(), cuts in proptest::collection::vec(1usize..8, 0..60)) {
            let mut sanitizer = Sanitizer::default();
            let (mut out, mut rest) = (Vec::new(), bytes.as_slice());
            for cut in cuts {
                let (head, tail) = rest.split_at(cut.min(rest.len()));
                out.extend(sanitizer.push(head));
                rest = tail;
            }
            out.extend(sanitizer.push(rest));
            out.extend(sanitizer.finish());
            prop_assert_eq!(String::from_utf8(out).unwrap(), whole(&bytes));
        }

        #[test]
        fn harmless_text_is_not_touched(text in "[ -~äß日\n\t]{0,80}") {
            prop_assert_eq!(whole(text.as_bytes()), text);
        }

        #[test]
        fn a_line_has_no_harmful_character(text in any::<String>()) {
            prop_assert!(!line(&text).chars().any(is_harmful));
        }
    }
}
