//! The audit log's files as writers and killed writers leave them.

mod forged;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use nido_api::error::{Code, Error};
use nido_api::{AuditCheckpoint, AuditVerdict};
use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use super::log::{LOG, Log, moves};
use super::{AuditOutcome, Audited, Caller, FrontEnd, Repeats, denied, record_read};

struct Place {
    _directory: TempDir,
    path: PathBuf,
    log: Log,
}

impl Place {
    fn new() -> Self {
        Self::with_limits(1 << 20, 9)
    }

    fn with_limits(limit_bytes: u64, keep: u32) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state/nido");
        Self { _directory: directory, log: Log::with_limits(path.clone(), limit_bytes, keep), path }
    }

    /// Writes so many operations, two lines each.
    fn write(&self, operations: usize) {
        operate(&self.log, "cli", operations);
    }

    fn newest(&self) -> PathBuf {
        self.path.join(LOG)
    }

    fn lines(&self) -> Vec<String> {
        fs::read_to_string(self.newest()).unwrap().lines().map(str::to_owned).collect()
    }

    fn put(&self, lines: &[String]) {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        fs::write(self.newest(), text).unwrap();
    }

    fn verdict(&self) -> AuditVerdict {
        self.against(None)
    }

    fn against(&self, checkpoint: Option<&AuditCheckpoint>) -> AuditVerdict {
        self.log.check(checkpoint).unwrap().0
    }

    /// Expects that all is well, and that so many lines were ever written.
    fn expect(&self, last_seq: u64) -> AuditVerdict {
        let verdict = self.verdict();
        assert!(verdict.ok, "{:?}", verdict.trouble);
        assert_eq!(verdict.last_seq.unwrap_or(0), last_seq);
        verdict
    }
}

fn operate(log: &Log, agent: &str, operations: usize) {
    let caller = Caller { face: FrontEnd::Mcp, actor: "uid:7".into(), agent: Some(agent.into()) };
    for number in 0..operations {
        let arguments = json!({ "name": "web", "number": number });
        let begun = Audited::begin(log.clone(), &caller, "vm_exec", &arguments, "c0ffee").unwrap();
        begun.end::<()>(&Err(Error::new(Code::VmNotFound, "gone"))).unwrap();
    }
}

#[test]
fn attempt_and_outcome_are_two_lines() {
    let place = Place::new();
    place.write(1);
    let [attempt, outcome] = place.lines().try_into().unwrap();
    let arguments = r#"tool='vm_exec' params='{"name":"web","number":0}'"#;
    assert!(attempt.contains(&format!("[MCP] agent='cli' {arguments} result='pending' reason='' actor='uid:7'")));
    assert!(outcome.contains(&format!("{arguments} result='error' reason='vm_not_found' actor='uid:7' id='c0ffee'")));
    assert!(attempt.contains("stage='attempt' seq='1'") && outcome.contains("stage='outcome' seq='2'"));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&place.path), mode(&place.newest())), (0o700, 0o600));
    place.expect(2);
}

#[test]
fn an_operation_that_is_dropped_ends_as_unknown() {
    let place = Place::new();
    let caller = Caller { face: FrontEnd::Api, actor: "token:ci".into(), agent: None };
    drop(Audited::begin(place.log.clone(), &caller, "vm_delete", &json!({}), "1").unwrap());
    assert!(place.lines()[1].contains("result='unknown' reason='interrupted' actor='token:ci' id='1' stage='outcome'"));
}

#[test]
fn a_denied_operation_is_one_line() {
    let place = Place::new();
    let caller = Caller { face: FrontEnd::Mcp, actor: "uid:7".into(), agent: Some("x' tool='y".into()) };
    denied(&place.log, &caller, "vm_exec", &json!({ "token": "hunter2" }), "1", "not_in_allowlist").unwrap();
    let [line] = place.lines().try_into().unwrap();
    let told = r#"[MCP] agent='x\' tool=\'y' tool='vm_exec' params='{"token":"[redacted: 7 bytes]"}' result='denied' reason='not_in_allowlist'"#;
    assert!(line.contains(told), "{line}");
    assert!(line.contains("stage='outcome' seq='1'"), "{line}");
    place.expect(1);
}

#[test]
fn an_empty_log_is_in_order_and_makes_no_file() {
    let place = Place::new();
    assert_eq!(place.expect(0).files, 0);
    assert!(!place.path.exists());
    assert_eq!(place.log.checkpoint().unwrap_err().code(), Code::PathNotFound);
}

#[test]
fn the_chain_continues_across_rotated_files() {
    let place = Place::with_limits(2000, 3);
    place.write(40);
    let verdict = place.expect(place.verdict().last_seq.unwrap());
    assert_eq!(verdict.files, 4);
    let first = verdict.first_seq.unwrap();
    assert!(first > 1, "nothing was dropped");
    assert_eq!(verdict.lines, verdict.last_seq.unwrap() - first + 1);
    for path in place.log.files().unwrap() {
        assert!(fs::metadata(&path).unwrap().len() <= 2000);
        assert!(fs::read_to_string(&path).unwrap().contains("tool='audit_rotate' params='{\"previous\":\""));
    }
    // Nothing is dropped where more is kept; every file after the first costs a line.
    let place = Place::with_limits(2000, 900);
    place.write(40);
    let files = place.verdict().files;
    assert_eq!(place.expect(80 + files - 1).first_seq, Some(1));
}

#[test]
fn without_the_newest_file_the_log_continues_after_the_older_ones() {
    let place = Place::with_limits(2000, 9);
    place.write(10);
    let older = place.log.files().unwrap().len();
    fs::rename(place.newest(), place.path.join("elsewhere")).unwrap();
    let last = place.verdict().last_seq.unwrap();
    place.write(1);
    assert_eq!(place.expect(last + 3).files, older as u64);
}

#[test]
fn a_writer_killed_at_any_byte_leaves_a_log_that_can_be_checked_and_written() {
    for older in [0, 1] {
        let place = Place::with_limits(if older == 1 { 1500 } else { 1 << 20 }, 9);
        place.write(if older == 1 { 4 } else { 2 });
        let whole = fs::read(place.newest()).unwrap();
        assert_eq!(place.log.files().unwrap().len() > 1, older == 1);
        for length in 0..whole.len() {
            fs::write(place.newest(), &whole[..length]).unwrap();
            let verdict = place.verdict();
            assert!(verdict.ok, "{length}: {:?}", verdict.trouble);
            assert_eq!(verdict.half_line, !(length == 0 || whole[length - 1] == b'\n'), "{length}");
            let before = verdict.last_seq.unwrap_or(0);
            let begins = u64::from(before > 0 && !whole[..length].contains(&b'\n'));
            if length % 7 == 0 || whole[length] == b'\n' {
                place.write(1);
                assert!(!place.expect(before + 2 + begins).half_line);
            }
        }
    }
}

#[test]
fn a_rotation_killed_at_any_step_loses_no_line() {
    for steps in 0..5 {
        let place = Place::with_limits(1500, 3);
        place.write(20);
        let last = place.verdict().last_seq.unwrap();
        assert_eq!(place.log.files().unwrap().len(), 4);
        let (gone, moves) = moves(&[1, 2, 3], 3);
        let file = |number: u32| if number == 0 { place.newest() } else { place.path.join(format!("{LOG}.{number}")) };
        if steps > 0 {
            fs::remove_file(file(gone.unwrap())).unwrap();
        }
        for (from, to) in moves.into_iter().take(usize::saturating_sub(steps, 1)) {
            fs::rename(file(from), file(to)).unwrap();
        }
        assert_eq!(place.expect(last).last_seq, Some(last), "{steps}");
        place.write(5);
        let verdict = place.verdict();
        assert!(verdict.ok && verdict.last_seq.unwrap() >= last + 10, "{steps}: {verdict:?}");
    }
}

#[test]
fn an_unwritable_log_is_reported() {
    let place = Place::new();
    place.write(1);
    let refused = |place: &Place| {
        let caller = Caller::command_line();
        let error = Audited::begin(place.log.clone(), &caller, "vm_exec", &json!({}), "1").unwrap_err();
        assert_eq!(error.code(), Code::AuditFailed);
        assert!(error.hint_for(FrontEnd::Cli).is_some());
    };
    fs::set_permissions(&place.path, fs::Permissions::from_mode(0o777)).unwrap();
    refused(&place);
    fs::set_permissions(&place.path, fs::Permissions::from_mode(0o700)).unwrap();
    // If the last line is not a valid one, there is no chain to continue.
    let lines = place.lines();
    place.put(&["what is this".into()]);
    refused(&place);
    assert_eq!(place.lines(), ["what is this"]);
    place.put(&lines);
    place.write(1);
    place.expect(4);
    fs::remove_dir_all(&place.path).unwrap();
    fs::write(&place.path, "").unwrap();
    refused(&place);
}

#[test]
fn writers_at_once_interleave_whole_lines() {
    let place = Place::with_limits(8000, 900);
    std::thread::scope(|scope| {
        for writer in 0..8 {
            let log = place.log.clone();
            scope.spawn(move || operate(&log, &format!("writer-{writer}"), 10));
        }
    });
    let verdict = place.verdict();
    assert_eq!(place.expect(160 + verdict.files - 1).first_seq, Some(1));
}

proptest! {
    #[test]
    fn the_order_of_the_files_survives_every_rotation(older in prop::collection::btree_set(1u32..8, 0..8), keep in 1u32..8, cut in 0usize..9) {
        let older: Vec<u32> = older.into_iter().filter(|number| *number <= keep).collect();
        // Each file holds the number it had; a smaller number is a newer file.
        let mut files: std::collections::BTreeMap<u32, u32> = older.iter().chain([&0]).map(|n| (*n, *n)).collect();
        let (gone, moves) = moves(&older, keep);
        if let Some(gone) = gone {
            prop_assert_eq!(files.remove(&gone), Some(keep));
        }
        let count = files.len();
        for (from, to) in moves.iter().take(cut) {
            let file = files.remove(from);
            prop_assert!(file.is_some() && files.insert(*to, file.unwrap()).is_none());
        }
        prop_assert_eq!(files.len(), count);
        prop_assert!(files.values().is_sorted());
        if cut >= moves.len() {
            prop_assert!(!files.contains_key(&0) && files.keys().all(|number| *number <= keep));
        }
    }
}

/// What an operation costs: `cargo test -p nido-core --lib -- --ignored --nocapture cost`.
#[test]
#[ignore = "a measurement"]
fn cost() {
    let directory = tempfile::tempdir_in(std::env::current_dir().unwrap()).unwrap();
    let log = Log::at(directory.path().join("audit"));
    let mut times: Vec<_> = (0..500)
        .map(|_| {
            let began = std::time::Instant::now();
            operate(&log, "cost", 1);
            began.elapsed()
        })
        .collect();
    times.sort();
    println!("attempt and outcome: median {:?}, 99% {:?}, worst {:?}", times[250], times[495], times[499]);
}

// Reads went into the same files as what was done: a token that may only read pushed every line about an act out of them in a minute.
#[test]
fn reads_have_their_own_chain_and_rotation() {
    let place = Place::with_limits(4000, 9);
    let repeats = Repeats::new(Log::reads(place.path.clone()));
    let caller = Caller { face: FrontEnd::Api, actor: "token:ci#1".into(), agent: None };
    place.write(2);
    for round in 0..200 {
        let ending = if round % 2 == 0 { (AuditOutcome::Success, "") } else { (AuditOutcome::Error, "vm_not_found") };
        let arguments = json!({ "name": format!("web-{round}") });
        record_read(&repeats, &caller, "vm_info", &arguments, "0123456789abcdef", ending).unwrap();
    }
    place.expect(4);
    assert!(place.lines().iter().all(|line| !line.contains("tool='vm_info'")));
    let verdict = repeats.log().check(None).unwrap().0;
    assert!(verdict.ok && verdict.last_seq == Some(200), "{verdict:?}");
    // A failed write is reported.
    fs::remove_dir_all(&place.path).unwrap();
    fs::write(&place.path, "").unwrap();
    let refused = record_read(&repeats, &caller, "vm_ls", &json!({}), "0123456789abcdef", (AuditOutcome::Success, ""));
    assert_eq!(refused.unwrap_err().code(), Code::AuditFailed);
}

// Of arguments that were padded a hash was left, and nothing that it could be compared with.
#[test]
fn oversized_arguments_are_stored_in_a_separate_file() {
    let place = Place::new();
    let caller = Caller::command_line();
    let arguments =
        json!({ "name": "web", "command": format!("# {}\nrm -rf /srv", "A".repeat(5000)), "token": "hunter2" });
    denied(&place.log, &caller, "vm_exec", &arguments, "1", "not_in_allowlist").unwrap();
    let [line] = place.lines().try_into().unwrap();
    let sha256 = line.split("\"sha256\":\"").nth(1).unwrap().split('"').next().unwrap().to_owned();
    assert!(line.contains("rm -rf /srv"), "{line}");
    let whole = fs::read_to_string(place.path.join(format!("params/{sha256}.json"))).unwrap();
    assert!(whole.contains(&"A".repeat(5000)) && !whole.contains("hunter2"));
    place.expect(1);
}
