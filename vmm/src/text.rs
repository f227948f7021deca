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

/// The longest head of `text` that has at most `limit` bytes and cuts no character.
#[must_use]
pub fn head(text: &str, limit: usize) -> &str {
    let end = (0..=limit.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_cuts_no_character() {
        assert_eq!((head("aé", 2), head("aé", 3), head("", 5)), ("a", "aé", ""));
    }
}
