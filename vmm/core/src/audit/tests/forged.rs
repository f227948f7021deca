//! Logs that another program wrote to: what the chain finds, what only a checkpoint finds.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use nido_api::error::Code;
use nido_api::{AuditCheckpoint, AuditVerdict};
use serde_json::json;

use super::{Place, operate};
use crate::audit::checkpoint::check_signature;
use crate::audit::log::LOG;
use crate::audit::{Audited, Caller};

/// The name and number of the line that is wrong.
fn place(verdict: &AuditVerdict) -> (Option<&str>, Option<u64>, Option<u64>) {
    assert!(!verdict.ok);
    let trouble = verdict.trouble.as_ref().unwrap();
    (trouble.file.as_deref(), trouble.line, trouble.seq)
}

#[test]
fn every_change_of_a_line_is_found_and_named() {
    let place_ = Place::new();
    place_.write(4);
    let lines = place_.lines();
    for at in 0..lines.len() {
        let seq = at as u64 + 1;
        let (here, next) = ((Some(LOG), Some(seq), Some(seq)), (Some(LOG), Some(seq + 1), Some(seq + 1)));
        let verdict = |change: &dyn Fn(&mut Vec<String>)| {
            let mut changed = lines.clone();
            change(&mut changed);
            place_.put(&changed);
            place_.verdict()
        };
        let altered = verdict(&|lines| lines[at] = lines[at].replace("web", "wob"));
        assert_eq!(place(&altered), here);
        let no_line = verdict(&|lines| lines[at] = lines[at].replace("tool=", "fool="));
        assert_eq!(place(&no_line), if at == 0 { (Some(LOG), Some(1), None) } else { here });
        let inserted = verdict(&|lines| lines.insert(at, lines[at].clone()));
        assert_eq!(place(&inserted), next);
        if at + 1 < lines.len() {
            let removed = verdict(&|lines| drop(lines.remove(at)));
            assert_eq!(place(&removed).1, Some(seq));
            let swapped = verdict(&|lines| lines.swap(at, at + 1));
            assert_eq!(place(&swapped).1, Some(seq));
            let joined = verdict(&|lines| {
                let next = lines.remove(at + 1);
                lines[at].push_str(&next);
            });
            assert_eq!(place(&joined), if at == 0 { (Some(LOG), Some(1), None) } else { here });
        }
    }
    place_.put(&lines);
    place_.expect(8);
}

#[test]
fn in_older_files_too() {
    let place_ = Place::with_limits(2000, 9);
    place_.write(12);
    let older = place_.path.join(format!("{LOG}.2"));
    let text = fs::read_to_string(&older).unwrap();
    // The first line, from whose like the chain of a log that was rotated is taken up.
    let seq: u64 = text.split("seq='").nth(1).unwrap().split('\'').next().unwrap().parse().unwrap();
    fs::write(&older, text.replacen("uid:7", "uid:8", 1)).unwrap();
    let verdict = place_.verdict();
    assert_eq!(place(&verdict), (Some("mcp-audit.log.2"), Some(1), Some(seq)));
    // A half line is only accepted at the end.
    fs::write(&older, &text[..text.len() - 1]).unwrap();
    assert_eq!(place(&place_.verdict()).0, Some("mcp-audit.log.2"));
    fs::remove_file(&older).unwrap();
    assert_eq!(place(&place_.verdict()).0, Some("mcp-audit.log.1"));
}

#[test]
fn the_first_kept_line_of_a_rotated_log_is_covered() {
    let place_ = Place::with_limits(1500, 2);
    place_.write(12);
    let oldest = place_.log.files().unwrap().remove(0);
    let text = fs::read_to_string(&oldest).unwrap();
    fs::write(&oldest, text.replacen("uid:7", "uid:8", 1)).unwrap();
    assert_eq!(place(&place_.verdict()).1, Some(1));
    let (_, rest) = text.split_once('\n').unwrap();
    fs::write(&oldest, rest).unwrap();
    assert_eq!(place(&place_.verdict()).1, Some(1));
}

#[test]
fn a_checkpoint_finds_what_the_chain_cannot() {
    let place_ = Place::new();
    place_.write(3);
    let checkpoint = place_.log.checkpoint().unwrap();
    assert_eq!((checkpoint.seq, checkpoint.head.seq), (6, 1));
    check_signature(&checkpoint).unwrap();
    let key = fs::metadata(place_.path.join("audit.key")).unwrap();
    assert_eq!(key.permissions().mode() & 0o777, 0o600);
    place_.write(2);
    assert!(place_.against(Some(&checkpoint)).ok);
    let lines = place_.lines();
    assert_eq!(place_.log.checkpoint().unwrap().public_key, checkpoint.public_key);

    // A tail that was truncated where the chain shows nothing.
    place_.put(&lines[..5]);
    place_.expect(5);
    let cut = place_.against(Some(&checkpoint));
    assert_eq!(place(&cut), (None, None, Some(6)));
    assert!(cut.trouble.unwrap().message.contains("it was truncated"));

    // A log that was rewritten with a valid chain.
    let other = Place::new();
    operate(&other.log, "forger", 9);
    fs::copy(other.newest(), place_.newest()).unwrap();
    place_.expect(18);
    let anew = place_.against(Some(&checkpoint));
    assert_eq!(place(&anew), (None, None, Some(6)));
    assert!(anew.trouble.unwrap().message.contains("the log was replaced"));
}

#[test]
fn a_checkpoint_that_was_altered_is_refused() {
    let place = Place::new();
    place.write(1);
    let good = place.log.checkpoint().unwrap();
    let other = Place::new();
    other.write(1);
    let key = other.log.checkpoint().unwrap().public_key;
    for wrong in [
        AuditCheckpoint { seq: 1, ..good.clone() },
        AuditCheckpoint { chain: "0".repeat(64), ..good.clone() },
        AuditCheckpoint { time: jiff::Timestamp::UNIX_EPOCH, ..good.clone() },
        AuditCheckpoint { public_key: key, ..good.clone() },
        AuditCheckpoint { signature: "zz".into(), ..good.clone() },
        AuditCheckpoint { format: 2, ..good },
    ] {
        assert_eq!(check_signature(&wrong).unwrap_err().code(), Code::AuditBroken, "{wrong:?}");
    }
}

#[test]
fn a_checkpoint_of_rotated_lines_is_reported() {
    let place_ = Place::with_limits(1500, 2);
    let mut checkpoints = Vec::new();
    let caller = Caller::command_line();
    for _ in 0..12 {
        let begun = Audited::begin(place_.log.clone(), &caller, "vm_exec", &json!({}), "1").unwrap();
        checkpoints.push(place_.log.checkpoint().unwrap());
        begun.end::<()>(&Ok(())).unwrap();
        checkpoints.push(place_.log.checkpoint().unwrap());
    }
    let first = place_.verdict().first_seq.unwrap();
    assert!(first > 2);
    for checkpoint in &checkpoints {
        let verdict = place_.against(Some(checkpoint));
        // The line before the first that is kept is known by the chain that the first one names.
        assert_eq!(verdict.ok, checkpoint.seq + 1 >= first, "{verdict:?}");
        if !verdict.ok {
            assert_eq!(place(&verdict), (None, None, Some(checkpoint.seq)));
            assert!(verdict.trouble.unwrap().message.contains("no longer kept"));
        }
    }
    assert!(checkpoints.iter().any(|checkpoint| checkpoint.seq + 1 == first));
}
