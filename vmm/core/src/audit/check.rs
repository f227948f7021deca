//! Verifies the hash chain of an audit log. Pure: lines go in, a verdict comes out.
//!
//! Invariant: of lines that nido wrote, in the order in which it wrote them and from a file's first line on, nothing is
//! wrong; where one was altered, removed, inserted or moved, the first line at which that shows is named. A missing tail
//! does not show, nor a log that was replaced as a whole: checkpoints detect that.

use nido_api::{AuditCheckpoint, AuditHead, AuditTrouble, AuditVerdict, hex};
use sha2::{Digest as _, Sha256};

use super::line::{Line, LinePosition, NO_CHAIN};
use super::log::ROTATE;

/// A log that is being looked at.
#[derive(Debug)]
pub struct ChainCheck<'a> {
    against: Option<&'a AuditCheckpoint>,
    /// A line that the store knows.
    known: Option<(u64, String)>,
    /// The number and the chain of the line before.
    before: Option<(u64, String)>,
    /// The first line that is kept.
    head: Option<AuditHead>,
    /// The chain that the log has where the checkpoint speaks of.
    at_checkpoint: Option<String>,
    /// The hash of the line that the checkpoint calls the first.
    at_head: Option<String>,
    /// What the store knows is something else.
    known_differs: bool,
    verdict: AuditVerdict,
}

impl<'a> ChainCheck<'a> {
    /// Before the first line.
    pub fn new(files: usize, against: Option<&'a AuditCheckpoint>) -> Self {
        let verdict = AuditVerdict {
            ok: true,
            files: files as u64,
            lines: 0,
            first_seq: None,
            last_seq: None,
            chain: None,
            half_line: false,
            reads: None,
            events: None,
            against: None,
            trouble: None,
        };
        Self {
            against,
            known: None,
            before: None,
            head: None,
            at_checkpoint: None,
            at_head: None,
            known_differs: false,
            verdict,
        }
    }

    /// The same, where the store knows this line's number and chain.
    pub fn with_known(self, known: Option<(u64, String)>) -> Self {
        Self { known, ..self }
    }

    /// The next line, without its end, and whether it has one. `false`: something is wrong, and the rest does not matter.
    pub fn line(&mut self, place: LinePosition<'_>, text: &[u8], whole: bool) -> bool {
        if !whole && place.newest {
            self.verdict.half_line = true;
            return true;
        }
        match self.follow(text, whole) {
            Ok(line) => self.took(line, text),
            Err(message) => {
                let due = self.before.as_ref().map(|(seq, _)| seq + 1);
                let due = due.or_else(|| Line::parse(text).map(|line| line.record.seq));
                self.wrong(Some(place), due, message);
                return false;
            }
        }
        true
    }

    /// Whether this line may stand here.
    fn follow(&mut self, text: &[u8], whole: bool) -> Result<Line, String> {
        let line = Line::parse(text).filter(|_| whole).ok_or("it was altered: not a line that nido writes")?;
        let seq = line.record.seq;
        let (before, chain) = match &self.before {
            Some(before) => before.clone(),
            None => first(&line, self.against, &mut self.at_checkpoint)?,
        };
        if seq != before + 1 {
            let what = if seq > before + 1 { "lines before it were removed" } else { "it was inserted or repeated" };
            return Err(format!("it has the number {seq} instead of {}: {what}, or the order was changed", before + 1));
        }
        if !line.follows(&chain) {
            return Err("it, or the chain of the previous line, was altered: the two do not match".into());
        }
        Ok(line)
    }

    fn took(&mut self, line: Line, text: &[u8]) {
        let seq = line.record.seq;
        let sha256 = || hex::encode(&Sha256::digest(text));
        if let Some((_, chain)) = self.known.take_if(|(known, _)| *known == seq)
            && chain != line.chain
        {
            self.known_differs = true;
        }
        if self.against.is_some_and(|checkpoint| checkpoint.seq == seq) {
            self.at_checkpoint = Some(line.chain.clone());
        }
        if self.against.is_some_and(|checkpoint| checkpoint.head.seq == seq) {
            self.at_head = Some(sha256());
        }
        if self.head.is_none() {
            self.head = Some(AuditHead { seq, sha256: sha256() });
            self.verdict.first_seq = Some(seq);
        }
        self.verdict.lines += 1;
        self.verdict.last_seq = Some(seq);
        self.verdict.chain = Some(line.chain.clone());
        self.before = Some((seq, line.chain));
    }

    fn wrong(&mut self, place: Option<LinePosition<'_>>, seq: Option<u64>, message: String) {
        self.verdict.ok = false;
        let (file, line) = (place.map(|place| place.file.to_owned()), place.map(|place| place.line));
        self.verdict.trouble = Some(AuditTrouble { file, line, seq, message });
    }

    /// Behind the last line: the verdict, and the first line that is kept.
    pub fn end(mut self) -> (AuditVerdict, Option<AuditHead>) {
        if self.verdict.ok
            && let Some(message) = self.is_missing()
        {
            self.wrong(None, None, message);
        }
        if let (true, Some(checkpoint)) = (self.verdict.ok, self.against)
            && let Some(message) = self.differs(checkpoint)
        {
            self.wrong(None, Some(checkpoint.seq), message);
        }
        (self.verdict, self.head)
    }

    /// What the log and the store disagree about.
    fn is_missing(&self) -> Option<String> {
        if self.known_differs {
            return Some("the last line differs from the one in the store: the log was replaced".into());
        }
        let (known, _) = self.known.as_ref()?;
        let last = self.verdict.last_seq.unwrap_or(0);
        // Rotation drops lines only at the beginning.
        (*known > last).then(|| match last {
            0 => format!("the log is empty, but {known} lines were written: it was emptied or removed"),
            _ => format!("the log ends with line {last}, but line {known} was written: it was truncated"),
        })
    }

    /// What the log and a checkpoint disagree about.
    fn differs(&self, checkpoint: &AuditCheckpoint) -> Option<String> {
        let wanted = checkpoint.seq;
        let last = self.verdict.last_seq.unwrap_or(0);
        match &self.at_checkpoint {
            Some(chain) if *chain != checkpoint.chain => {
                Some(format!("line {wanted} is not the one that was signed: the log was replaced"))
            }
            Some(_) if self.at_head.as_ref().is_some_and(|hash| *hash != checkpoint.head.sha256) => {
                Some(format!("line {} is not the one that was signed: the log was replaced", checkpoint.head.seq))
            }
            Some(_) => None,
            None if last < wanted => {
                Some(format!("the log ends with line {last}, but line {wanted} was signed: it was truncated"))
            }
            None => Some(format!("line {wanted}, which was signed, is no longer kept: it cannot be verified")),
        }
    }
}

/// Which number and chain come before the first line that is kept. After a rotation that dropped files the line itself states them.
pub(super) fn first(
    line: &Line,
    against: Option<&AuditCheckpoint>,
    at_checkpoint: &mut Option<String>,
) -> Result<(u64, String), String> {
    let seq = line.record.seq;
    if seq <= 1 {
        return Ok((0, NO_CHAIN.into()));
    }
    let params: Option<serde_json::Value> = serde_json::from_slice(&line.record.params).ok();
    let previous = params.as_ref().and_then(|params| params.get("previous")?.as_str());
    let Some(previous) = previous.filter(|_| line.record.tool == ROTATE.as_bytes()) else {
        return Err(format!("it has the number {seq} but is not the first of a file: lines before it were removed"));
    };
    if against.is_some_and(|checkpoint| checkpoint.seq == seq - 1) {
        *at_checkpoint = Some(previous.to_owned());
    }
    Ok((seq - 1, previous.to_owned()))
}
