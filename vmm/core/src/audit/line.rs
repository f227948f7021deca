//! One line of the audit log: rendered, parsed, chained. Pure.
//!
//! ```text
//! 2026-01-04T15:00:12Z [MCP] agent='claude-desktop' tool='vm_exec' params='{…}' result='denied' reason='…' …
//!    … actor='uid:1000' id='…' stage='outcome' seq='42' chain='…'
//! ```
//!
//! Invariants: a record is one line, whatever is in it, without any byte below 0x20; what was rendered parses to the same
//! record, and nothing else than what is rendered parses at all.

use std::fmt::Write as _;

use jiff::Timestamp;
use nido_api::hex;
use nido_api::sanitize::is_harmful;
use sha2::{Digest as _, Sha256};

use super::FrontEnd;

/// The chain before the first line there ever was.
pub const NO_CHAIN: &str = "0000000000000000000000000000000000000000000000000000000000000000";

const CHAIN_KEY: &str = " chain='";

/// A recorded line. Values are bytes, because an altered file need not be UTF-8.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// When, to the second.
    pub time: Timestamp,
    /// Which front end received the request.
    pub face: FrontEnd,
    /// The client's own name for itself; empty if it sends none. A claim.
    pub agent: Vec<u8>,
    /// The operation, named like the MCP tool: `vm_exec`.
    pub tool: Vec<u8>,
    /// Its arguments as JSON, redacted.
    pub params: Vec<u8>,
    /// `pending` of an attempt; `success`, `error`, `denied` or `unknown` of an outcome.
    pub result: Vec<u8>,
    /// A word for the reason: an error's code, a command's exit code.
    pub reason: Vec<u8>,
    /// Who really called: `uid:1000`, `token:ci`.
    pub actor: Vec<u8>,
    /// What attempt and outcome share.
    pub id: Vec<u8>,
    /// `attempt` or `outcome`.
    pub stage: Vec<u8>,
    /// The line's number, from 1, never used twice in a log.
    pub seq: u64,
}

impl Record {
    /// The line without its chain value.
    fn body(&self) -> String {
        let mut out = format!("{:.0} [{}]", self.time, self.face.word());
        let values = [
            ("agent", &self.agent),
            ("tool", &self.tool),
            ("params", &self.params),
            ("result", &self.result),
            ("reason", &self.reason),
            ("actor", &self.actor),
            ("id", &self.id),
            ("stage", &self.stage),
        ];
        for (key, value) in values {
            out.push(' ');
            out.push_str(key);
            out.push_str("='");
            escape(value, &mut out);
            out.push('\'');
        }
        // Writing to a String cannot fail.
        let _ = write!(out, " seq='{}'", self.seq);
        out
    }

    /// The line that follows a chain, without its line end; and the chain it makes.
    #[must_use]
    pub fn render(&self, previous: &str) -> (String, String) {
        let mut line = self.body();
        let chain = chain(previous, line.as_bytes());
        line.push_str(CHAIN_KEY);
        line.push_str(&chain);
        line.push('\'');
        (line, chain)
    }
}

/// SHA-256 over the chain so far and the hash of a line without its chain value; hexadecimal.
fn chain(previous: &str, body: &[u8]) -> String {
    chain_of_hash(previous, &sha256(body))
}

/// The chain behind a line of which only the hash is known.
pub(super) fn chain_of_hash(previous: &str, body_sha256: &str) -> String {
    sha256(format!("{previous}{body_sha256}").as_bytes())
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(&Sha256::digest(bytes))
}

/// The chain as versions before receipts made it: over the line itself. The hash of such a line does not continue the chain.
fn chain_of_text(previous: &str, body: &[u8]) -> String {
    sha256(&[previous.as_bytes(), body].concat())
}

/// A line as it stands in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Its content.
    pub record: Record,
    /// The chain hash that it states.
    pub chain: String,
}

impl Line {
    /// Reads a line, given without its line end. `None`: nido wrote no such line.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        let (body, chain) = split(text)?;
        let record = Reader(body).record()?;
        // Only one spelling is nido's.
        (record.body().as_bytes() == body).then(|| Self { record, chain: chain.to_owned() })
    }

    /// Whether the line has the chain hash that it states, when it follows `previous`.
    #[must_use]
    pub fn follows(&self, previous: &str) -> bool {
        self.hash_if_linked(previous).is_some() || chain_of_text(previous, self.record.body().as_bytes()) == self.chain
    }

    /// The hash of the line without its chain value, if the chain continues from it.
    pub(super) fn hash_if_linked(&self, previous: &str) -> Option<String> {
        let hash = sha256(self.record.body().as_bytes());
        (chain_of_hash(previous, &hash) == self.chain).then_some(hash)
    }
}

/// A line without its chain value, and that value.
fn split(text: &[u8]) -> Option<(&[u8], &str)> {
    let length = CHAIN_KEY.len() + NO_CHAIN.len() + 1;
    let (body, tail) = text.split_at(text.len().checked_sub(length)?);
    let digits = tail.strip_prefix(CHAIN_KEY.as_bytes())?.strip_suffix(b"'")?;
    let digits = std::str::from_utf8(digits).ok()?;
    digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')).then_some((body, digits))
}

fn escape(value: &[u8], out: &mut String) {
    for chunk in value.utf8_chunks() {
        for c in chunk.valid().chars() {
            // Writing to a String cannot fail.
            let _ = match c {
                '\\' => write!(out, "\\\\"),
                '\'' => write!(out, "\\'"),
                '\n' => write!(out, "\\n"),
                '\t' => write!(out, "\\t"),
                c if is_harmful(c) => write!(out, "\\u{{{:x}}}", c as u32),
                c => out.write_char(c),
            };
        }
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
}

/// What is left to be read of a line.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn record(mut self) -> Option<Record> {
        let time = self.until(b' ')?.parse().ok()?;
        self.expect(b"[")?;
        let face = FrontEnd::of_word(&self.until(b']')?)?;
        let record = Record {
            time,
            face,
            agent: self.value("agent")?,
            tool: self.value("tool")?,
            params: self.value("params")?,
            result: self.value("result")?,
            reason: self.value("reason")?,
            actor: self.value("actor")?,
            id: self.value("id")?,
            stage: self.value("stage")?,
            seq: String::from_utf8(self.value("seq")?).ok()?.parse().ok()?,
        };
        self.0.is_empty().then_some(record)
    }

    fn expect(&mut self, text: &[u8]) -> Option<()> {
        self.0 = self.0.strip_prefix(text)?;
        Some(())
    }

    fn until(&mut self, end: u8) -> Option<String> {
        let at = self.0.iter().position(|b| *b == end)?;
        let text = std::str::from_utf8(&self.0[..at]).ok()?.to_owned();
        self.0 = &self.0[at + 1..];
        Some(text)
    }

    /// ` key='…'`
    fn value(&mut self, key: &str) -> Option<Vec<u8>> {
        self.expect(b" ")?;
        self.expect(key.as_bytes())?;
        self.expect(b"='")?;
        let mut value = Vec::new();
        loop {
            let (&first, rest) = self.0.split_first()?;
            self.0 = rest;
            match first {
                b'\'' => return Some(value),
                b'\\' => self.escaped(&mut value)?,
                byte => value.push(byte),
            }
        }
    }

    fn escaped(&mut self, value: &mut Vec<u8>) -> Option<()> {
        let (&kind, rest) = self.0.split_first()?;
        self.0 = rest;
        match kind {
            b'\\' | b'\'' => value.push(kind),
            b'n' => value.push(b'\n'),
            b't' => value.push(b'\t'),
            b'x' => {
                let (digits, rest) = self.0.split_at_checked(2)?;
                value.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
                self.0 = rest;
            }
            b'u' => {
                self.expect(b"{")?;
                let c = char::from_u32(u32::from_str_radix(&self.until(b'}')?, 16).ok()?)?;
                value.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            }
            _ => return None,
        }
        Some(())
    }
}

/// Where a line stands.
#[derive(Debug, Clone, Copy)]
pub struct LinePosition<'a> {
    /// The file's name, within the log's directory.
    pub file: &'a str,
    /// Counted from 1.
    pub line: u64,
    /// Whether it is in the newest file.
    pub newest: bool,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain() -> Record {
        let bytes = |text: &str| text.as_bytes().to_vec();
        Record {
            time: "2026-01-04T15:00:12Z".parse().unwrap(),
            face: FrontEnd::Mcp,
            agent: bytes("claude-desktop"),
            tool: bytes("vm_exec"),
            params: bytes(r#"{"name":"web","command":["sh","-c","echo 'a\n'"]}"#),
            result: bytes("denied"),
            reason: bytes("not_in_allowlist"),
            actor: bytes("uid:1000"),
            id: bytes("00c0ffee"),
            stage: bytes("outcome"),
            seq: 42,
        }
    }

    #[test]
    fn a_line_is_spelled_as_promised() {
        let (line, chain) = plain().render(NO_CHAIN);
        let expected = r#"2026-01-04T15:00:12Z [MCP] agent='claude-desktop' tool='vm_exec' params='{"name":"web","command":["sh","-c","echo \'a\\n\'"]}' result='denied' reason='not_in_allowlist' actor='uid:1000' id='00c0ffee' stage='outcome' seq='42' chain='"#;
        assert_eq!(line, format!("{expected}{chain}'"));
        assert_eq!(chain.len(), 64);
    }

    #[test]
    fn unsafe_characters_of_a_line_are_escaped() {
        let record = Record { agent: b"\x00\r\n\t\x1b[2J\\'\xff\xe2\x82 \xe2\x80\xae".to_vec(), ..plain() };
        let (line, _) = record.render(NO_CHAIN);
        let shown = r"agent='\u{0}\u{d}\n\t\u{1b}[2J\\\'\xff\xe2\x82 \u{202e}'";
        assert!(line.contains(shown), "{line}");
    }

    #[test]
    fn lines_that_nido_does_not_write_are_invalid() {
        let (line, _) = plain().render(NO_CHAIN);
        for (from, to) in [
            ("seq='42'", "seq='042'"),
            ("seq='42'", "seq='+42'"),
            ("[MCP]", "[mcp]"),
            ("agent='claude", "agent='\\x63laude"),
            ("agent='claude", "agent='\\u{63}laude"),
            ("agent='claude", "agent='\\claude"),
            ("tool=", "tools="),
            (" tool='vm_exec'", ""),
            ("12Z", "12.0Z"),
            ("chain='", "chain='0"),
        ] {
            let wrong = line.replacen(from, to, 1);
            assert_ne!(wrong, line, "{from}");
            assert_eq!(Line::parse(wrong.as_bytes()), None, "{wrong}");
        }
        assert_eq!(Line::parse(b""), None);
        assert!(Line::parse(line.as_bytes()).is_some());
    }

    // Earlier versions hashed the line itself: their logs stay valid.
    #[test]
    fn lines_of_earlier_versions_stay_valid() {
        let body = plain().body();
        let line = format!("{body} chain='{}'", chain_of_text(NO_CHAIN, body.as_bytes()));
        let line = Line::parse(line.as_bytes()).unwrap();
        assert!(line.follows(NO_CHAIN) && line.hash_if_linked(NO_CHAIN).is_none());
        let (line, chain) = plain().render(NO_CHAIN);
        let line = Line::parse(line.as_bytes()).unwrap();
        assert_eq!(chain_of_hash(NO_CHAIN, &line.hash_if_linked(NO_CHAIN).unwrap()), chain);
    }

    fn value() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            any::<u8>().prop_map(|b| vec![b]),
            any::<char>().prop_map(|c| c.to_string().into_bytes()),
            prop::sample::select(vec!["'", "\\", "\n", "\t", "\\x41", "\\u{41}", "' tool='", "\u{202e}", "\u{200b}"])
                .prop_map(|s| s.as_bytes().to_vec()),
        ];
        prop::collection::vec(piece, 0..20).prop_map(|pieces| pieces.concat())
    }

    fn record() -> impl Strategy<Value = Record> {
        let face = prop::sample::select(vec![FrontEnd::Mcp, FrontEnd::Api, FrontEnd::Cli]);
        let values = prop::array::uniform8(value());
        (-62_135_596_800i64..253_402_207_200, face, values, any::<u64>()).prop_map(|(second, face, values, seq)| {
            let [agent, tool, params, result, reason, actor, id, stage] = values;
            let time = Timestamp::from_second(second).unwrap();
            Record { time, face, agent, tool, params, result, reason, actor, id, stage, seq }
        })
    }

    proptest! {
        #[test]
        fn a_rendered_line_parses_to_the_same_record(record in record(), previous in "[0-9a-f]{64}") {
            let (line, chain) = record.render(&previous);
            prop_assert!(line.bytes().all(|b| b >= 0x20 && b != 0x7f), "{line:?}");
            prop_assert!(!line.chars().any(is_harmful), "{line:?}");
            let parsed = Line::parse(line.as_bytes());
            prop_assert_eq!(parsed.as_ref().map(|line| &line.record), Some(&record));
            prop_assert_eq!(parsed.as_ref().map(|line| &line.chain), Some(&chain));
            prop_assert!(parsed.is_some_and(|line| line.follows(&previous)));
        }

        #[test]
        fn a_byte_that_was_changed_is_noticed(record in record(), at in any::<prop::sample::Index>(), to in any::<u8>()) {
            let (line, _) = record.render(NO_CHAIN);
            let mut bytes = line.into_bytes();
            let at = at.index(bytes.len());
            prop_assume!(bytes[at] != to);
            bytes[at] = to;
            prop_assert!(!Line::parse(&bytes).is_some_and(|line| line.follows(NO_CHAIN)));
        }

        #[test]
        fn no_bytes_break_the_parser(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Line::parse(&bytes);
        }
    }
}
