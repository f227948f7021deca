//! Arguments: help, refusals, scripts for shells. No VM is needed.

use std::process::Stdio;

use crate::support::Home;

const VERBS: [&str; 33] = [
    "spawn",
    "create",
    "start",
    "stop",
    "pause",
    "resume",
    "restart",
    "delete",
    "ls",
    "info",
    "exec",
    "shell",
    "run",
    "upload",
    "download",
    "cp",
    "logs",
    "forward",
    "proxy",
    "template",
    "pool",
    "audit",
    "webhook",
    "doctor",
    "completions",
    "man",
    "events",
    "api-server",
    "mcp-server",
    "token",
    "approvals",
    "approve",
    "deny",
];

#[test]
fn every_verb_has_help_with_examples() {
    let home = Home::bare();
    for verb in VERBS {
        let help = home.nido([verb, "--help"]).run().ok();
        assert!(help.text().contains("Examples:\n  nido "), "{verb}: {}", help.text());
        assert!(help.text().contains("--json"), "{verb}");
    }
    let all = home.nido(["--help"]).run().ok();
    for verb in VERBS {
        assert!(all.text().contains(&format!("\n  {verb} ")), "{verb} is not listed");
    }
    assert!(!all.text().contains("supervise"), "the supervisor's verb is not for people");
    let version = home.nido(["--version"]).run().ok();
    assert_eq!(version.text(), concat!("nido ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn usage_errors_end_with_2_and_with_125_where_small_codes_are_the_commands() {
    let home = Home::bare();
    for (arguments, code) in [
        (&["frobnicate"][..], 2),
        (&[], 2),
        (&["spawn"], 2),
        (&["ls", "--frobnicate"], 2),
        (&["spawn", "web", "--net", "bridge"], 2),
        (&["proxy", "web", "0"], 2),
        (&["exec"], 125),
        (&["exec", "web"], 125),
        (&["--home", "ls", "exec", "web", "--frobnicate"], 125),
        (&["run", "--timeout", "never", "--", "true"], 125),
        (&["shell", "-x"], 125),
    ] {
        let nido = arguments.iter().fold(home.nido([]), |nido, argument| nido.arg(*argument));
        let ran = nido.run().exits(code);
        assert!(ran.stdout.is_empty(), "{arguments:?}");
        assert!(!ran.stderr.is_empty(), "{arguments:?}");
    }
    let near = home.nido(["spwan"]).run().exits(2);
    assert!(near.stderr.contains("'spawn'"), "{}", near.stderr);
}

#[test]
fn values_that_are_not_valid_are_refused_with_their_code_and_a_hint() {
    let home = Home::bare();
    for (arguments, code) in [
        (&["spawn", "Web"][..], "name_invalid"),
        (&["spawn", "../web"], "name_invalid"),
        (&["spawn", "a\nb"], "name_invalid"),
        (&["spawn", "web", "-T", "no/template"], "name_invalid"),
        (&["info", "web."], "name_invalid"),
        (&["spawn", "web", "--memory", "512"], "spec_invalid"),
        (&["spawn", "web", "--disk", "much"], "spec_invalid"),
        (&["spawn", "web", "--ttl", "0s"], "spec_invalid"),
        (&["spawn", "web", "--label", "x"], "spec_invalid"),
        (&["spawn", "web", "-p", "80:http"], "spec_invalid"),
        (&["spawn", "web", "--allow", "https://example.com"], "spec_invalid"),
        (&["spawn", "web", "--allow", "*.com"], "spec_invalid"),
        (&["create", "web", "--allow", "host"], "spec_invalid"),
        (&["create", "web", "--allow", "@Pip"], "spec_invalid"),
        (&["forward", "add", "web", "1:2:3"], "spec_invalid"),
        (&["cp", "a", "b"], "spec_invalid"),
        (&["ls", "--frobnicate"], "spec_invalid"),
    ] {
        let nido = arguments.iter().fold(home.nido([]), |nido, argument| nido.arg(*argument));
        let problem = nido.arg("--json").run().fails(2, code);
        assert!(problem["hint"].is_string(), "{arguments:?}: {problem}");
    }
    let people = home.nido(["spawn", "a\x1b[2Jb"]).run().exits(2);
    assert!(people.stderr.starts_with("error: '") && people.stderr.contains("\nhint: "), "{}", people.stderr);
    assert!(!people.stderr.contains('\x1b'));
    home.expect_empty();
}

#[test]
fn flags_are_accepted_before_and_after_the_verb() {
    let home = Home::bare();
    for arguments in [["--json", "ls"], ["ls", "--json"]] {
        assert_eq!(home.nido(arguments).run().ok().json(), serde_json::json!({ "vms": [] }));
    }
    let other = home.scratch("other");
    home.nido(["ls", "--home"]).arg(&other).run().ok();
    assert!(other.join("nido.db").exists());
}

#[test]
fn an_empty_list_is_a_head_or_nothing() {
    let home = Home::bare();
    assert!(home.nido(["ls"]).run().ok().text().starts_with("NAME  STATUS"));
    assert_eq!(home.nido(["ls", "-q"]).run().ok().text(), "");
}

#[test]
fn shells_get_their_completions() {
    let home = Home::bare();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = home.nido(["completions", shell]).run().ok();
        assert!(script.text().contains("nido") && script.text().contains("require-isolation"), "{shell}");
    }
    let bash = home.nido(["completions", "bash"]).run().ok();
    // It is longer than an argument may be.
    let script = home.scratch("completions.bash");
    std::fs::write(&script, bash.text()).unwrap();
    let checked = std::process::Command::new("bash").arg("-n").arg(&script).status().unwrap();
    assert!(checked.success());
}

#[test]
fn manual_pages_are_written() {
    let home = Home::bare();
    let pages = home.scratch("man/man1");
    home.nido(["man"]).arg(&pages).run().ok();
    for page in ["nido.1", "nido-spawn.1", "nido-template-build.1"] {
        assert!(std::fs::read_to_string(pages.join(page)).unwrap().contains(".TH"), "{page}");
    }
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let home = Home::bare();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_nido"));
    command.args(["completions", "bash"]).env("NIDO_HOME", home.path());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(141));
    assert_eq!(String::from_utf8_lossy(&ended.stderr), "");
}
