//! Consecutive lines of a log: those about one VM whole, of the others the hash from which the chain continues. Pure.

use nido_api::error::{Code, Error, Result};
use nido_api::{HiddenLine, ReceiptLine, ReceiptSegment, UnlinkedLine};

use super::super::check::first;
use super::super::line::{Line, NO_CHAIN, chain_of_hash};

/// A segment that is being built from the lines of a log, from the first that is kept.
#[derive(Debug)]
pub struct SegmentBuilder {
    start: u64,
    /// The number and chain of the line before.
    before: Option<(u64, String)>,
    segment: ReceiptSegment,
    own: Vec<Line>,
}

impl SegmentBuilder {
    /// Of the lines from this number on.
    pub fn new(start: u64) -> Self {
        Self { start, before: None, segment: ReceiptSegment::default(), own: Vec::new() }
    }

    /// The next line of the log, and whether it is about the VM.
    ///
    /// # Errors
    /// `audit_broken`.
    pub fn push(&mut self, text: &[u8], is_own: impl FnOnce(&Line) -> bool) -> Result<()> {
        let line = Line::parse(text).ok_or_else(|| broken("the audit log has a line that nido did not write"))?;
        let seq = line.record.seq;
        let (before, chain) = match self.before.take() {
            Some(before) => before,
            None => {
                first(&line, None, &mut None).map_err(|why| broken(format!("line {seq} of the audit log: {why}")))?
            }
        };
        let hash = line.hash_if_linked(&chain);
        if seq != before + 1 || (hash.is_none() && !line.follows(&chain)) {
            return Err(broken(format!("line {seq} of the audit log does not follow the line before it")));
        }
        self.before = Some((seq, line.chain.clone()));
        if seq < self.start {
            return Ok(());
        }
        if self.segment.lines.is_empty() {
            (self.segment.first_seq, self.segment.previous) = (seq, chain);
        }
        self.segment.lines.push(match hash {
            _ if is_own(&line) => {
                self.own.push(line);
                ReceiptLine::Line(String::from_utf8_lossy(text).into_owned())
            }
            Some(sha256) => ReceiptLine::Hidden(HiddenLine { sha256 }),
            None => ReceiptLine::Unlinked(UnlinkedLine { chain: line.chain }),
        });
        Ok(())
    }

    /// The segment up to the last line, and the lines about the VM.
    pub fn end(self) -> (ReceiptSegment, Vec<Line>) {
        let (seq, chain) = self.before.unwrap_or_else(|| (0, NO_CHAIN.into()));
        let mut segment = self.segment;
        if segment.lines.is_empty() {
            (segment.first_seq, segment.previous) = (seq + 1, chain.clone());
        }
        segment.chain = chain;
        (segment, self.own)
    }
}

/// What a segment shows when it is verified.
#[derive(Debug, Default)]
pub struct SegmentCheck {
    /// The lines about the VM.
    pub own: Vec<Line>,
    /// How many are only known by their hash.
    pub hidden: u64,
    /// How many do not link the chain.
    pub unlinked: u64,
    /// The chain up to the line of this number, if the segment has it.
    pub at: Option<String>,
}

/// Follows the chain of a segment. `at` is the number of a line whose chain is wanted.
///
/// # Errors
/// `audit_broken`.
pub fn check(log: &str, segment: &ReceiptSegment, at: Option<u64>) -> Result<SegmentCheck> {
    let mut shown = SegmentCheck::default();
    if !is_hash(&segment.previous) || !segment.lines.iter().all(has_hash) {
        return Err(broken(format!("{log} has a hash that is not valid")));
    }
    let mut chain = segment.previous.clone();
    let mut seq = segment.first_seq;
    if at.is_some_and(|at| at.checked_add(1) == Some(seq)) {
        shown.at = Some(chain.clone());
    }
    for line in &segment.lines {
        chain = match line {
            ReceiptLine::Line(text) => {
                let line = Line::parse(text.as_bytes()).filter(|line| line.record.seq == seq && line.follows(&chain));
                let line = line.ok_or_else(|| {
                    broken(format!(
                        "line {seq} of {log} does not follow the line before it: one was altered or removed"
                    ))
                })?;
                let chain = line.chain.clone();
                shown.own.push(line);
                chain
            }
            ReceiptLine::Hidden(HiddenLine { sha256 }) => {
                shown.hidden += 1;
                chain_of_hash(&chain, sha256)
            }
            ReceiptLine::Unlinked(UnlinkedLine { chain }) => {
                shown.unlinked += 1;
                chain.clone()
            }
        };
        if at == Some(seq) {
            shown.at = Some(chain.clone());
        }
        seq = seq.checked_add(1).ok_or_else(|| broken(format!("{log} has a line without a valid number")))?;
    }
    if chain != segment.chain {
        return Err(broken(format!("the lines of {log} do not end with the chain that the receipt states")));
    }
    Ok(shown)
}

/// Whether a line that is not shown has a hash.
fn has_hash(line: &ReceiptLine) -> bool {
    match line {
        ReceiptLine::Line(_) => true,
        ReceiptLine::Hidden(HiddenLine { sha256: hash }) | ReceiptLine::Unlinked(UnlinkedLine { chain: hash }) => {
            is_hash(hash)
        }
    }
}

/// Of another length, the end of one could be the beginning of the next.
fn is_hash(text: &str) -> bool {
    text.len() == NO_CHAIN.len() && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// A receipt, or the log that it is made of, is not as nido wrote it.
pub fn broken(why: impl Into<String>) -> Error {
    Error::new(Code::AuditBroken, why.into()).hint("keep the files as they are and find out who wrote to them")
}
