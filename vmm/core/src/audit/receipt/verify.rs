//! Verifies a receipt, without the home that wrote it. Pure, but for [`read`].

use std::io::{ErrorKind, Read as _};
use std::path::Path;

use nido_api::error::{Code, Error, Hint, Result};
use nido_api::{AuditCheckpoint, AuditReceipt, ReceiptVerdict, hex};
use ring::signature::{ED25519, UnparsedPublicKey};
use sha2::{Digest as _, Sha256};

use super::super::checkpoint::check_signature;
use super::segment::{SegmentCheck, broken, check};
use super::{facts, is_event_of, render, shortened_arguments, statement};

/// The longest receipt that is read, in bytes.
const MAX_BYTES: u64 = 1 << 30;

/// Reads a receipt.
///
/// # Errors
/// `path_not_found`, `limit_exceeded`, `internal`.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let shown = path.display();
    let failed = |e: std::io::Error| match e.kind() {
        ErrorKind::NotFound => Error::new(Code::PathNotFound, format!("there is no file {shown}")),
        _ => Error::io(format!("cannot read {shown}"), e),
    };
    let mut text = Vec::new();
    std::fs::File::open(path).map_err(failed)?.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(Error::new(Code::LimitExceeded, format!("{shown} is longer than a receipt may be, 1 GiB")));
    }
    Ok(text)
}

/// Verifies a receipt: its bytes, key, signature, the chains of its lines, and that its facts are those of its lines. With a key, it must
/// be signed with that one; with a checkpoint, its log of writes must contain the line that was signed.
///
/// # Errors
/// `audit_broken`, with the first thing that is wrong; `spec_invalid` if it is no receipt.
pub fn verify(text: &[u8], key: Option<&str>, against: Option<&AuditCheckpoint>) -> Result<ReceiptVerdict> {
    against.map(check_signature).transpose()?;
    let receipt = parse(text)?;
    check_key(&receipt, key)?;
    let acts = check("acts", &receipt.acts, against.map(|checkpoint| checkpoint.seq))?;
    let events = check("events", &receipt.events, None)?;
    let unknown_rules = check_facts(&receipt, &events, &acts)?;
    if let Some(checkpoint) = against {
        check_checkpoint(&receipt, &acts, checkpoint)?;
    }
    let unlinked = acts.unlinked + events.unlinked;
    Ok(ReceiptVerdict {
        not_proven: not_proven(&receipt, key.is_some(), against.is_some(), unlinked, unknown_rules),
        time: receipt.time,
        public_key: receipt.public_key,
        trusted_key: key.is_some(),
        lines: (acts.own.len() + events.own.len()) as u64,
        hidden: acts.hidden + events.hidden,
        unlinked,
        checkpoint: against.map(|checkpoint| checkpoint.seq),
        secrets: receipt.secrets,
        vm: receipt.vm,
    })
}

/// A receipt whose bytes are those that nido writes.
fn parse(text: &[u8]) -> Result<AuditReceipt> {
    let receipt: AuditReceipt = serde_json::from_slice(text).map_err(|e| {
        Error::new(Code::SpecInvalid, format!("the file is not a receipt: {e}"))
            .hint(Hint::host("create one with nido audit receipt"))
    })?;
    if receipt.kind != AuditReceipt::KIND || receipt.format != AuditReceipt::FORMAT {
        return Err(broken("this nido does not support the receipt's format"));
    }
    // Another program may read other values from another spelling.
    if render(&receipt)?.as_bytes() != text {
        return Err(broken("the receipt is not spelled as nido writes it: it was altered"));
    }
    Ok(receipt)
}

fn check_key(receipt: &AuditReceipt, key: Option<&str>) -> Result<()> {
    if key.is_some_and(|key| !key.eq_ignore_ascii_case(&receipt.public_key)) {
        return Err(broken(format!("the receipt was signed with another key, {}", receipt.public_key)));
    }
    let (public, signature) = (hex::decode(&receipt.public_key), hex::decode(&receipt.signature));
    let verified = UnparsedPublicKey::new(&ED25519, public).verify(statement(receipt)?.as_bytes(), &signature);
    verified.map_err(|_| broken("the receipt's signature is wrong: it was altered"))
}

/// Compares the facts with the lines. Returns the line from which on the rules are not known.
fn check_facts(receipt: &AuditReceipt, events: &SegmentCheck, acts: &SegmentCheck) -> Result<Option<u64>> {
    if let Some(line) = events.own.iter().find(|line| !is_event_of(line, &receipt.vm.id)) {
        return Err(broken(format!("line {} of events is about another VM", line.record.seq)));
    }
    for (sha256, whole) in &receipt.arguments {
        let is_named = acts.own.iter().any(|line| shortened_arguments(line).as_ref() == Some(sha256));
        if !is_named || hex::encode(&Sha256::digest(whole.as_bytes())) != *sha256 {
            return Err(broken("arguments of a change of rules are not those whose hash a line states"));
        }
    }
    let stated = facts(&receipt.vm.id, &receipt.vm.name, &events.own, &acts.own, &receipt.arguments);
    if stated.starts != receipt.starts {
        return Err(broken("the starts, or digests of their images, differ from what the lines state"));
    }
    if stated.vm != receipt.vm {
        return Err(broken("the VM, its template or a digest differs from what the lines state"));
    }
    if stated.network != receipt.network {
        return Err(broken("the network rules differ from what the lines state"));
    }
    if stated.secrets != receipt.secrets {
        return Err(broken("the uses of secrets differ from what the lines state"));
    }
    Ok(stated.unknown_rules)
}

fn check_checkpoint(receipt: &AuditReceipt, acts: &SegmentCheck, checkpoint: &AuditCheckpoint) -> Result<()> {
    let seq = checkpoint.seq;
    match &acts.at {
        Some(chain) if *chain == checkpoint.chain => Ok(()),
        Some(_) => Err(broken(format!("line {seq} is not the one that was signed: the log was replaced"))),
        None => {
            let last = receipt.acts.first_seq.saturating_add(receipt.acts.lines.len() as u64).saturating_sub(1);
            let first = receipt.acts.first_seq;
            Err(broken(format!("the checkpoint is about line {seq}, the receipt about lines {first} to {last}")))
        }
    }
}

/// What nobody can tell from the receipt.
fn not_proven(
    receipt: &AuditReceipt,
    trusted: bool,
    against: bool,
    unlinked: u64,
    unknown_rules: Option<u64>,
) -> Vec<String> {
    let mut sentences = Vec::new();
    if !trusted {
        sentences.push("who signed it: pass the key that you wrote down with --key".to_owned());
    }
    if !against {
        sentences.push("that the log was not rewritten before: compare with a checkpoint, --against".to_owned());
    }
    if unlinked > 0 {
        sentences.push(format!("the chain across {unlinked} lines that an earlier version of nido wrote"));
    }
    if let Some(seq) = unknown_rules {
        sentences.push(format!("the network rules from line {seq} on: what it changed was not kept"));
    }
    if receipt.vm.created_at.is_none() {
        sentences.push("what happened before the first line: the VM's creation is not kept".to_owned());
    }
    sentences.push("that no line known only by its hash is about this VM: ask for the line, and compare".to_owned());
    sentences
}
