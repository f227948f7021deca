//! The audit log of the real `nido`: what is in it, who finds what was done to it, and what happens without it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use nido_api::FrontEnd;
use nido_core::audit::line::Record;
use nido_core::audit::log::Log;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Home, Nido, until};

fn log(home: &Home) -> PathBuf {
    home.path().join("audit/mcp-audit.log")
}

fn lines(home: &Home) -> Vec<String> {
    fs::read_to_string(log(home)).unwrap().lines().map(str::to_owned).collect()
}

fn put(home: &Home, lines: &[String]) {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    fs::write(log(home), text).unwrap();
}

fn show<const N: usize>(home: &Home, filters: [&str; N]) -> Vec<Value> {
    let mut nido = home.nido(["audit", "show", "--json"]);
    for filter in filters {
        nido = nido.arg(filter);
    }
    nido.run().ok().json()["records"].as_array().unwrap().clone()
}

fn verify(home: &Home) -> Value {
    home.nido(["audit", "verify", "--json"]).run().ok().json()
}

/// The tool, stage, result and reason of a line.
fn what(record: &Value) -> [&str; 4] {
    ["tool", "stage", "result", "reason"].map(|key| record[key].as_str().unwrap_or_default())
}

/// A home with a log of so many operations, none of which needs a VM.
fn with_operations(count: usize) -> Home {
    let home = Home::new();
    for number in 0..count {
        home.nido(["delete", &format!("gone-{number}"), "--json"]).run().fails(1, "vm_not_found");
    }
    home
}

#[test]
fn a_command_leaves_its_attempt_and_its_exit_code_but_no_secret() {
    let home = Home::new();
    home.spawn("web");
    assert!(!log(&home).exists(), "a spawn destroys nothing and runs nothing in a guest that is there");
    let command =
        ["exec", "web", "-e", "API=s3cr3t-env", "-i", "--", "sh", "-c", "cat >/dev/null; exit 3", "--", "--token"];
    home.nido(command).arg("s3cr3t-arg").input("s3cr3t-stdin").run().exits(3);
    let records = show(&home, []);
    let [attempt, outcome] = &records[..] else { panic!("{records:?}") };
    assert_eq!(what(attempt), ["vm_exec", "attempt", "pending", ""]);
    assert_eq!(what(outcome), ["vm_exec", "outcome", "success", "exit_code:3"]);
    assert_eq!((&attempt["id"], &attempt["params"]), (&outcome["id"], &outcome["params"]));
    let uid = rustix::process::getuid().as_raw();
    assert_eq!((&attempt["face"], &attempt["actor"]), (&json!("cli"), &json!(format!("uid:{uid}"))));
    assert_eq!((&attempt["params"]["name"], &attempt["params"]["env"]), (&json!("web"), &json!(["API"])));
    let text = fs::read_to_string(log(&home)).unwrap();
    assert!(text.contains("exit 3") && !text.contains("s3cr3t"), "{text}");
    assert!(lines(&home)[0].contains("[CLI] agent='' tool='vm_exec' params='{\"name\":\"web\","));
    let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(log(&home)), mode(home.path().join("audit"))), (0o600, 0o700));

    home.nido(["exec", "web", "--", "no-such-command"]).run().exits(127);
    home.nido(["exec", "web", "--timeout", "100ms", "--", "sleep", "60"]).run().exits(124);
    let ends: Vec<_> = show(&home, ["--tail", "3"]).iter().map(|record| what(record).map(str::to_owned)).collect();
    assert_eq!(ends[0], ["vm_exec", "outcome", "error", "command_not_found"]);
    assert_eq!(ends[2], ["vm_exec", "outcome", "success", "timed_out"]);
    assert_eq!(verify(&home)["lines"], 6);
}

#[test]
fn writes_and_commands_are_recorded() {
    let home = Home::new();
    home.spawn("web");
    let file = home.scratch("file");
    fs::write(&file, "s3cr3t content").unwrap();
    let (file, copy) = (file.to_str().unwrap(), home.scratch("copy"));
    home.nido(["upload", "web", file]).arg(home.scratch("guest")).run().ok();
    home.nido(["download", "web"]).arg(home.scratch("guest")).arg(&copy).run().ok();
    home.nido(["cp", file]).arg(format!("web:{}", home.scratch("guest-2").display())).run().ok();
    home.nido(["stop", "web"]).run().ok();
    home.nido(["snapshot", "create", "web", "one"]).run().ok();
    home.nido(["snapshot", "restore", "web", "one"]).run().ok();
    home.nido(["snapshot", "delete", "web", "one"]).run().ok();
    home.nido(["delete", "web", "--force", "--yes"]).run().ok();
    home.nido(["fork", "web", "web-2", "--json"]).run().fails(1, "vm_not_found");
    home.nido(["template", "delete", "nothing", "--json"]).run().fails(1, "template_not_found");
    home.nido(["run", "--accel", "tcg", "--", "true"]).run().ok();
    let outcomes: Vec<_> = show(&home, []).into_iter().filter(|record| record["stage"] == "outcome").collect();
    let told: Vec<_> = outcomes.iter().map(what).map(|[tool, _, result, reason]| [tool, result, reason]).collect();
    assert_eq!(
        told,
        [
            ["vm_upload", "success", ""],
            ["vm_download", "success", ""],
            ["vm_upload", "success", ""],
            ["vm_stop", "success", ""],
            ["vm_restore", "success", ""],
            ["vm_snapshot_delete", "success", ""],
            ["vm_delete", "success", ""],
            ["vm_fork", "error", "vm_not_found"],
            ["template_delete", "error", "template_not_found"],
            ["vm_run", "success", "exit_code:0"],
        ]
    );
    assert!(!fs::read_to_string(log(&home)).unwrap().contains("s3cr3t"));
    assert_eq!(verify(&home)["ok"], true);

    for (filters, count) in [
        (["--tool", "vm_upload"], 4),
        (["--result", "error"], 2),
        (["--vm", "web-2"], 2),
        (["--actor", "uid:4242424"], 0),
        (["--since", "1h"], 20),
        (["--since", "2100-01-01T00:00:00Z"], 0),
        (["--tail", "5"], 5),
    ] {
        assert_eq!(show(&home, filters).len(), count, "{filters:?}");
    }
    let table = home.nido(["audit", "show", "--tail", "1"]).run().ok();
    assert!(table.text().starts_with("SEQ  TIME ") && table.text().contains("vm_run"), "{}", table.text());
}

#[test]
fn an_interrupted_command_and_a_killed_nido_are_distinguished() {
    let home = Home::new();
    home.spawn("web");
    let exec =
        home.nido(["exec", "web", "--", "sh", "-c", "trap 'exit 9' INT; echo ready; while :; do sleep 0.05; done"]);
    let exec = exec.start();
    assert_eq!(exec.line(), "ready");
    exec.signal(Signal::INT);
    exec.wait().exits(9);
    let exec = home.nido(["exec", "web", "--", "sh", "-c", "echo ready; sleep 60"]).start();
    assert_eq!(exec.line(), "ready");
    exec.signal(Signal::KILL);
    let _ = exec.wait();
    let records = show(&home, []);
    let told: Vec<_> = records.iter().map(what).map(|[_, stage, _, reason]| [stage, reason]).collect();
    assert_eq!(told, [["attempt", ""], ["outcome", "exit_code:9"], ["attempt", ""]]);
}

#[test]
fn an_unwritable_outcome_is_reported_and_changes_nothing() {
    let home = Home::new();
    home.spawn("web");
    let mut exec = home.nido(["exec", "web", "-i", "--", "sh", "-c", "echo ready; cat >/dev/null; exit 3"]).start();
    assert_eq!(exec.line(), "ready");
    let (audit, aside) = (home.path().join("audit"), home.scratch("audit"));
    fs::rename(&audit, &aside).unwrap();
    fs::write(&audit, "no directory").unwrap();
    drop(exec.stdin.take());
    let ended = exec.wait().exits(3);
    assert!(ended.stderr.contains("warning: the audit log cannot be written"), "{}", ended.stderr);
    fs::remove_file(&audit).unwrap();
    fs::rename(&aside, &audit).unwrap();
    let records = show(&home, []);
    assert_eq!(records.iter().map(what).collect::<Vec<_>>(), [["vm_exec", "attempt", "pending", ""]]);
}

#[test]
fn manipulations_of_the_log_are_found_and_named() {
    let home = with_operations(3);
    let good = lines(&home);
    assert_eq!((good.len(), verify(&home)["last_seq"].clone()), (6, json!(6)));
    let broken = |change: &dyn Fn(&mut Vec<String>), line: u64| {
        let mut changed = good.clone();
        change(&mut changed);
        put(&home, &changed);
        let ran = home.nido(["audit", "verify", "--json"]).run();
        assert_eq!(ran.json()["ok"], false);
        assert_eq!(ran.json()["trouble"]["file"], "mcp-audit.log");
        assert_eq!(ran.json()["trouble"]["line"], line);
        let problem = ran.fails(1, "audit_broken");
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.starts_with(&format!("mcp-audit.log, line {line} (number {line}): ")), "{detail}");
        let told = home.nido(["audit", "verify"]).run().exits(1);
        assert_eq!(told.text(), "");
        assert!(told.stderr.contains(&format!("line {line}")), "{}", told.stderr);
    };
    broken(&|lines| lines[2] = lines[2].replace("gone-1", "gone-7"), 3);
    broken(&|lines| drop(lines.remove(3)), 4);
    broken(&|lines| lines.insert(2, lines[1].clone()), 3);
    broken(&|lines| lines.swap(1, 4), 2);
    broken(&|lines| lines[4].push('x'), 5);
    put(&home, &good);
    assert_eq!(verify(&home)["ok"], true);
}

#[test]
fn a_checkpoint_finds_a_truncated_and_a_rewritten_log() {
    let home = with_operations(2);
    let kept = home.scratch("checkpoint.json");
    let made = home.nido(["audit", "checkpoint", "--json", "-o"]).arg(&kept).run().ok().json();
    assert_eq!((&made["seq"], &made["format"]), (&json!(4), &json!(1)));
    home.nido(["audit", "checkpoint", "--json", "-o"]).arg(&kept).run().fails(1, "path_exists");
    let printed = home.nido(["audit", "checkpoint"]).run().ok();
    assert_eq!(printed.json()["chain"], made["chain"]);
    assert!(printed.stderr.contains(made["public_key"].as_str().unwrap()), "{}", printed.stderr);
    home.nido(["delete", "gone", "--json"]).run().fails(1, "vm_not_found");
    let against = || home.nido(["audit", "verify", "--json", "--against"]).arg(&kept).run();
    let good = against().ok();
    assert_eq!((&good.json()["ok"], &good.json()["against"]["own_key"]), (&json!(true), &json!(true)));
    assert!(good.stderr.contains("compare it with the one you wrote down"), "{}", good.stderr);

    let all = lines(&home);
    put(&home, &all[..3]);
    // A chain cannot show that its end is missing; the store can.
    let problem = home.nido(["audit", "verify", "--json"]).run().fails(1, "audit_broken");
    assert!(problem["detail"].as_str().unwrap().contains("it was truncated"), "{problem}");
    let problem = against().fails(1, "audit_broken");
    assert!(problem["detail"].as_str().unwrap().contains("it was truncated"), "{problem}");

    // Rewritten by the owner, with another key.
    fs::remove_dir_all(home.path().join("audit")).unwrap();
    for name in ["a", "b", "c", "d"] {
        home.nido(["delete", name, "--json"]).run().fails(1, "vm_not_found");
    }
    home.nido(["audit", "checkpoint"]).run().ok();
    assert_eq!(verify(&home)["ok"], true);
    let anew = against();
    assert_eq!(anew.json()["against"]["own_key"], false);
    let problem = anew.fails(1, "audit_broken");
    assert!(problem["detail"].as_str().unwrap().contains("the log was replaced"), "{problem}");

    let altered = fs::read_to_string(&kept).unwrap().replace("\"seq\": 4", "\"seq\": 3");
    fs::write(&kept, altered).unwrap();
    let problem = against().fails(1, "audit_broken");
    assert!(problem["detail"].as_str().unwrap().contains("signature"), "{problem}");
    fs::write(&kept, "{}").unwrap();
    against().fails(2, "spec_invalid");
}

#[test]
fn an_empty_log_is_in_order() {
    let home = Home::new();
    assert_eq!(verify(&home)["lines"], 0);
    assert_eq!(home.nido(["audit", "verify"]).run().ok().text(), "the log is empty\n");
    assert_eq!(show(&home, []), Vec::<Value>::new());
    home.nido(["audit", "checkpoint", "--json"]).run().fails(1, "path_not_found");
    assert!(!home.path().join("audit").exists());
}

#[test]
fn twenty_at_once_write_whole_lines() {
    let home = Home::new();
    let running: Vec<_> =
        (0..20).map(|n| home.nido(["delete", &format!("a-{n}"), &format!("b-{n}")]).start()).collect();
    for nido in running {
        nido.wait().exits(1);
    }
    assert_eq!(lines(&home).len(), 80);
    let verdict = verify(&home);
    assert_eq!((&verdict["lines"], &verdict["half_line"]), (&json!(80), &json!(false)));
    let records = show(&home, []);
    for n in 0..20 {
        for name in [format!("a-{n}"), format!("b-{n}")] {
            let of_it: Vec<_> =
                records.iter().filter(|record| record["params"]["name"] == name.as_str()).map(what).collect();
            let stages: Vec<_> = of_it.iter().map(|[_, stage, ..]| *stage).collect();
            assert_eq!(stages, ["attempt", "outcome"], "{name}");
        }
    }
}

#[test]
fn writers_killed_at_any_moment_leave_a_log_that_hangs_together() {
    let home = Home::new();
    let names: Vec<_> = (0..100).map(|n| format!("gone-{n}")).collect();
    let begin = || names.iter().fold(home.nido(["delete"]), Nido::arg).start();
    let mut wanted = 1;
    for round in 0..12 {
        // Killed as soon as the log has grown by this much: anywhere between two lines, or within one.
        let mut writer = begin();
        writer.until("the log's growth", || {
            fs::metadata(log(&home)).ok().filter(|meta| meta.len() >= wanted).map(|_| ())
        });
        writer.signal(Signal::KILL);
        let _ = writer.wait();
        let verdict = verify(&home);
        assert_eq!(verdict["ok"], true, "{round}: {verdict}");
        wanted = fs::metadata(log(&home)).unwrap().len() + 37 * round + 1;
    }
    // A half line, as a kill within the write leaves it.
    let mut text = fs::read(log(&home)).unwrap();
    let last = verify(&home)["last_seq"].as_u64().unwrap();
    text.extend_from_slice(b"2026-01-04T15:00:12Z [CLI] agent='' tool='vm_del");
    fs::write(log(&home), text).unwrap();
    assert_eq!(verify(&home)["half_line"], true);
    home.nido(["delete", "gone"]).run().exits(1);
    let verdict = verify(&home);
    assert_eq!((&verdict["last_seq"], &verdict["half_line"]), (&json!(last + 2), &json!(false)));
}

/// Writes lines that are long, so that the store's files are small beside the log.
fn fill(home: &Home) {
    let audit = Log::at(home.path().join("audit"));
    let word = |text: &str| text.as_bytes().to_vec();
    for _ in 0..100 {
        let record = Record {
            time: jiff::Timestamp::UNIX_EPOCH,
            face: FrontEnd::Api,
            agent: Vec::new(),
            tool: word("vm_exec"),
            params: vec![b'x'; 4000],
            result: word("success"),
            reason: Vec::new(),
            actor: word("token:ci"),
            id: word("1"),
            stage: word("outcome"),
            seq: 0,
        };
        audit.append(record).unwrap();
    }
}

#[test]
fn a_line_that_only_fits_in_part_is_taken_back() {
    let home = Home::new();
    fill(&home);
    let length = fs::metadata(log(&home)).unwrap().len();
    // Without the signal a write ends where the limit is, as on a full disk.
    let limited = |bytes: u64| {
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "trap '' XFSZ; exec prlimit --fsize=\"$0\" \"$@\"", &bytes.to_string()]);
        command.args([env!("CARGO_BIN_EXE_nido"), "delete", "gone", "--json"]).env("NIDO_HOME", home.path());
        let ran = command.output().unwrap();
        let problem: Value = serde_json::from_slice(&ran.stderr).unwrap();
        problem["code"].as_str().unwrap().to_owned()
    };
    for room in [0, 1, 100, 250] {
        assert_eq!(limited(length + room), "audit_failed");
        assert_eq!(fs::metadata(log(&home)).unwrap().len(), length, "{room}");
    }
    let verdict = verify(&home);
    assert_eq!((&verdict["lines"], &verdict["half_line"]), (&json!(100), &json!(false)));
    assert_eq!(limited(length + 10_000), "vm_not_found");
    assert_eq!(verify(&home)["lines"], 102);
}

#[test]
fn without_its_line_nothing_is_done() {
    let home = Home::new();
    home.spawn("web");
    let flag = home.scratch("flag");
    let audit = home.path().join("audit");
    fs::write(&audit, "no directory").unwrap();
    let touch = format!("touch '{}'", flag.display());
    let problem = home.nido(["exec", "web", "--json", "--", "sh", "-c", &touch]).run().fails(125, "audit_failed");
    assert!(problem["hint"].is_string(), "{problem}");
    home.nido(["delete", "web", "--force", "--json", "--yes"]).run().fails(1, "audit_failed");
    home.nido(["stop", "web", "--json"]).run().fails(1, "audit_failed");
    home.nido(["upload", "web", "/etc/hostname", "--json"]).arg(&flag).run().fails(1, "audit_failed");
    assert!(!flag.exists(), "it was done all the same");
    assert_eq!(home.info("web")["status"], "running");
    fs::remove_file(&audit).unwrap();
    home.nido(["exec", "web", "--", "sh", "-c", &touch]).run().ok();
    until("what the command did", || flag.exists().then_some(()));
    assert_eq!(verify(&home)["lines"], 2);
}

// `verify` reported "the log is empty", and that all was well.
#[test]
fn a_log_that_was_emptied_or_removed_is_noticed() {
    let home = with_operations(2);
    let emptied = || {
        let problem = home.nido(["audit", "verify", "--json"]).run().fails(1, "audit_broken");
        assert!(
            problem["detail"].as_str().unwrap().contains("the log is empty, but 3 lines were written"),
            "{problem}"
        );
    };
    fs::write(log(&home), "").unwrap();
    emptied();
    fs::remove_dir_all(home.path().join("audit")).unwrap();
    emptied();
}

// Where the log was depended on the environment of each process: one home had two logs.
#[test]
fn a_home_has_one_log_in_any_environment() {
    let home = with_operations(1);
    let state = home.scratch("state");
    home.nido(["delete", "gone", "--json"])
        .env("XDG_DATA_HOME", home.path().parent().unwrap().as_os_str())
        .env("XDG_STATE_HOME", state.as_os_str())
        .run()
        .fails(1, "vm_not_found");
    assert_eq!((lines(&home).len(), state.exists()), (4, false));
    assert_eq!(fs::read_to_string(home.path().join("audit-place")).unwrap(), "audit");
}
