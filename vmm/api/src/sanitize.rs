//! Text: what more than one part has to know about characters. Pure.

/// Whether a character must not be shown, or stand in a line of a log, as it is: controls, and what hides or reorders
/// text. Line end, tab and carriage return count as harmful here.
#[must_use]
pub fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{180e}' | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{feff}' | '\u{ffa0}'
            | '\u{fff9}'..='\u{fffb}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
}

/// Text of unknown origin on one line: what is harmful is escaped, quotes and letters stay as they are.
#[must_use]
pub fn on_one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' => line.push_str("\\\\"),
            c if is_harmful(c) => line.extend(c.escape_debug()),
            c => line.push(c),
        }
    }
    line
}

/// The longest head of `text` that has at most `limit` bytes and cuts no character.
#[must_use]
pub fn head(text: &str, limit: usize) -> &str {
    let end = (0..=limit.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    &text[..end]
}

/// How much of a guest's text is shown by default, in bytes.
pub const SHOWN_LIMIT: usize = 32 << 10;
/// Room for the line that stands for what was left out.
const MARKER_MAX: usize = 64;
/// The longest title, link or the like that a terminal would swallow. Longer sequences are text.
const STRING_MAX: usize = 4096;

/// A guest's text as a reader may see it who obeys no escape sequences but might obey words: a model, a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SanitizedText {
    /// Lines that end with `\n`, tabs, and characters that are what they look like.
    pub text: String,
    /// The middle was left out; a line in its place states how much.
    pub truncated: bool,
    /// Something that would not have been seen was taken out, or bytes that are no text were replaced.
    pub altered: bool,
}

/// Makes text of a guest fit to be read: without escape sequences, without characters that hide or reorder ([`is_harmful`]),
/// bytes that are not UTF-8 as `\u{fffd}`, line ends of any kind as `\n`, and at most `limit` bytes: of more, head and tail.
///
/// What it returns it would not change again.
#[must_use]
pub fn for_reader(bytes: &[u8], limit: usize) -> SanitizedText {
    let raw = String::from_utf8_lossy(bytes);
    let mut altered = matches!(raw, std::borrow::Cow::Owned(_));
    let mut text = String::with_capacity(raw.len());
    let mut rest = &*raw;
    while let Some(c) = rest.chars().next() {
        let sequence = escape_sequence(rest);
        let length = if sequence > 0 { sequence } else { c.len_utf8() };
        match c {
            _ if sequence > 0 => altered = true,
            '\r' if rest[1..].starts_with('\n') => {}
            '\n' | '\r' => text.push('\n'),
            '\t' => text.push('\t'),
            c if is_harmful(c) => altered = true,
            c => text.push(c),
        }
        rest = &rest[length..];
    }
    let truncated = text.len() > limit;
    SanitizedText { text: if truncated { head_and_tail(&text, limit) } else { text }, truncated, altered }
}

/// The longest tail of `text` that has at most `limit` bytes and cuts no character.
fn tail(text: &str, limit: usize) -> &str {
    let from = text.len().saturating_sub(limit);
    let start = (from..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    &text[start..]
}

/// Both ends of a text that is too long, and between them how much is missing.
fn head_and_tail(text: &str, limit: usize) -> String {
    let Some(room) = limit.checked_sub(MARKER_MAX) else { return head(text, limit).to_owned() };
    let first = head(text, room / 2);
    let last = tail(text, room - first.len());
    let left_out = text.len() - first.len() - last.len();
    format!("{first}\n[... {left_out} bytes left out ...]\n{last}")
}

/// How many bytes of the start of `text` are an escape sequence (ECMA-48); 0 if there is none.
fn escape_sequence(text: &str) -> usize {
    let mut chars = text.chars();
    let (intro, rest) = match (chars.next(), chars.next()) {
        (Some('\x1b'), Some(kind @ ('[' | ']' | 'P' | 'X' | '^' | '_'))) => (kind, &text[2..]),
        (Some('\x1b'), Some(_)) => return 1 + plain_sequence(&text.as_bytes()[1..]),
        // The same in one character.
        (Some(one @ '\u{80}'..='\u{9f}'), _) => match one {
            '\u{9b}' => ('[', &text[2..]),
            '\u{90}' | '\u{98}' | '\u{9d}'..='\u{9f}' => (']', &text[2..]),
            _ => return 2,
        },
        _ => return 0,
    };
    2 + if intro == '[' { control_sequence(rest.as_bytes()) } else { control_string(rest) }
}

/// What follows `ESC` where that is neither of the longer ones.
fn plain_sequence(bytes: &[u8]) -> usize {
    let between = bytes.iter().take_while(|b| matches!(b, b' '..=b'/')).count();
    between + usize::from(matches!(bytes.get(between), Some(b'0'..=b'~')))
}

/// What follows `ESC [`: parameters, and what ends them, if it is there.
fn control_sequence(bytes: &[u8]) -> usize {
    let parameters = bytes.iter().take_while(|b| matches!(b, b'0'..=b'?')).count();
    let between = bytes[parameters..].iter().take_while(|b| matches!(b, b' '..=b'/')).count();
    let length = parameters + between;
    length + usize::from(matches!(bytes.get(length), Some(b'@'..=b'~')))
}

/// What follows `ESC ]` and its like: a title, a link. Without an end on the same line nothing of it: else one `ESC ]` would
/// swallow all that a guest prints.
fn control_string(text: &str) -> usize {
    for (at, c) in head(text, STRING_MAX).char_indices() {
        match c {
            '\x07' | '\u{9c}' => return at + c.len_utf8(),
            '\x1b' if text[at + 1..].starts_with('\\') => return at + 2,
            // Terminals differ in whether they continue or stop here. So no text has to be examined twice.
            c if c.is_control() => return 0,
            _ => {}
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_head_cuts_no_character() {
        assert_eq!((head("aé", 2), head("aé", 3), head("", 5)), ("a", "aé", ""));
    }

    fn shown(bytes: &[u8]) -> String {
        for_reader(bytes, SHOWN_LIMIT).text
    }

    #[test]
    fn escape_sequences_go_and_text_stays() {
        for (bytes, text) in [
            (&b"\x1b[1;31mred\x1b[0m"[..], "red"),
            (b"a\x1b]0;title\x07b", "ab"),
            (b"a\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\b", "alinkb"),
            (b"a\x1b(Bb\x1b7c\x1bPq\x1b\\d", "abcd"),
            ("a\u{9b}2Jb\u{9d}0;t\u{9c}c\u{85}d".as_bytes(), "abcd"),
            // Nothing but a real sequence disappears.
            (b"a\x1b]0;no end\nb", "a0;no end\nb"),
            (b"a\x1b[31", "a"),
            (b"end\x1b", "end"),
            ("\x1b\u{e9}".as_bytes(), "\u{e9}"),
            (b"one\r\ntwo\rthree\n\tfour\x08\x00\x7f", "one\ntwo\nthree\n\tfour"),
            ("s\u{200b}e\u{202e}c\u{2066}r\u{feff}e\u{e0041}t".as_bytes(), "secret"),
            (b"\xff\xfeok\xc3", "\u{fffd}\u{fffd}ok\u{fffd}"),
            ("größe 日本 🦀".as_bytes(), "größe 日本 🦀"),
        ] {
            assert_eq!(shown(bytes), text, "{bytes:?}");
        }
    }

    #[test]
    fn the_result_reports_truncation_and_changes() {
        let said = |bytes: &[u8], limit| {
            let shown = for_reader(bytes, limit);
            (shown.truncated, shown.altered)
        };
        assert_eq!(said(b"a\r\nb\rc", 10), (false, false));
        assert_eq!(said(b"\x1b[0m", 10), (false, true));
        assert_eq!(said(b"\xff", 10), (false, true));
        assert_eq!(said(&[b'x'; 200], 199), (true, false));
    }

    #[test]
    fn of_a_long_text_both_ends_are_shown_and_how_much_is_missing() {
        let long: String = (0..1000).map(|n| format!("{n:09}\n")).collect();
        let cut = for_reader(long.as_bytes(), 1064);
        assert!(cut.truncated);
        let (first, rest) = cut.text.split_once("\n[... ").unwrap();
        let (number, last) = rest.split_once(" bytes left out ...]\n").unwrap();
        assert!(long.starts_with(first) && long.ends_with(last) && !first.is_empty() && !last.is_empty());
        assert_eq!(number.parse::<usize>().unwrap(), long.len() - first.len() - last.len());
        assert_eq!(for_reader("é".repeat(9).as_bytes(), 5).text, "éé", "too little room for anything but a head");
    }

    fn nasty() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            any::<u8>().prop_map(|b| vec![b]),
            any::<char>().prop_map(|c| c.to_string().into_bytes()),
            "\u{1b}[\\[\\]P][0-9;]{0,20}[mJ\u{7}\u{1b}\\\\]?".prop_map(String::into_bytes),
            "[\u{200b}\u{202e}\u{9b}\u{9c}\u{1b}\r\n]".prop_map(String::into_bytes),
            "[a-zäß日 ]{0,30}".prop_map(String::into_bytes),
        ];
        proptest::collection::vec(piece, 0..60).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn nothing_harmful_is_shown_and_nothing_twice(bytes in nasty(), limit in 0usize..400) {
            let first = for_reader(&bytes, limit);
            prop_assert!(first.text.chars().all(|c| matches!(c, '\n' | '\t') || !is_harmful(c)), "{:?}", first.text);
            prop_assert!(first.text.len() <= limit);
            let again = for_reader(first.text.as_bytes(), limit);
            prop_assert_eq!(again, SanitizedText { text: first.text, truncated: false, altered: false });
        }

        #[test]
        fn plain_text_is_not_touched(text in "[ -~äß日\n\t]{0,80}") {
            let same = SanitizedText { text: text.clone(), truncated: false, altered: false };
            prop_assert_eq!(for_reader(text.as_bytes(), SHOWN_LIMIT), same);
        }
    }
}
