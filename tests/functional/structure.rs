//! The layout of the code: which crate may depend on which, modules without cycles, and documents that name files which exist.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nido_api::error::Hint;

/// What each crate may depend on, of this workspace.
const ARROWS: [(&str, &[&str]); 14] = [
    ("nido-api", &[]),
    ("nido-confine", &["nido-api"]),
    ("nido-files", &["nido-api"]),
    ("nido-fuzz", &[]),
    ("nido-guest-agent", &[]),
    ("nido-images", &["nido-api", "nido-confine", "nido-files", "nido-guest-agent"]),
    ("nido-engine", &["nido-api", "nido-confine", "nido-files", "nido-guest-agent", "nido-images"]),
    ("nido-net", &["nido-api"]),
    ("nido-store", &["nido-api", "nido-files", "nido-images"]),
    (
        "nido-supervisor",
        &["nido-api", "nido-engine", "nido-files", "nido-guest-agent", "nido-images", "nido-net", "nido-store"],
    ),
    (
        "nido-core",
        &["nido-api", "nido-engine", "nido-files", "nido-guest-agent", "nido-images", "nido-store", "nido-supervisor"],
    ),
    ("nido-mcp", &["nido-api", "nido-core", "nido-files"]),
    ("nido-server", &["nido-api", "nido-core", "nido-files", "nido-mcp"]),
    ("nido", &["nido-api", "nido-core", "nido-engine", "nido-files", "nido-mcp", "nido-server"]),
];
/// Which crates alone may depend on a library: what it stands for is known in one place.
const OWNERS: [(&str, &[&str]); 11] = [
    ("axum", &["nido-server"]),
    ("clap", &["nido"]),
    ("getrandom", &["nido-files", "nido-guest-agent"]),
    ("hyper", &["nido-net", "nido-server"]),
    ("kvm-ioctls", &["nido-engine"]),
    ("qapi", &["nido-engine", "nido-supervisor"]),
    ("reqwest", &["nido-core"]),
    ("rmcp", &["nido-mcp"]),
    ("rusqlite", &["nido-store"]),
    ("smoltcp", &["nido-net"]),
    ("yamux", &["nido-engine", "nido-guest-agent"]),
];
/// Calls that only nido-files may make, as they stand in the source.
const FILE_CALLS: [&str; 7] =
    ["fs::rename", "renameat", ".persist(", "flock(", "F_OFD_", ".try_lock()", ".lock_shared()"];
/// Files that make one of [`FILE_CALLS`] nevertheless, and why.
const FILE_CALLERS: [(&str, &str); 7] = [
    ("images/src/build/slim.rs", "moves a file within a scratch directory"),
    ("images/src/build/stages.rs", "moves a file within a scratch directory"),
    ("vmm/core/src/audit/log.rs", "rotates logs, each to a name that is free"),
    ("vmm/core/src/host_paths/writing.rs", "renames relative to a directory that it has checked"),
    ("vmm/engine/src/guest/files/merge.rs", "renames relative to a directory that it has checked"),
    ("vmm/engine/src/snapshot.rs", "moves a directory aside before it removes it"),
    ("vmm/supervisor/src/context/erase.rs", "moves a directory aside before it removes it"),
];
/// Calls that block the supervisor's thread for as long as a disk, a large file or another program takes, as they stand in the source.
const BLOCKING_CALLS: [&str; 34] = [
    ".begin_disk(",
    ".copy_disk(",
    ".erase(",
    ".keep()",
    ".publish(",
    ".qemu()?",
    ".shape(",
    ".sync()",
    "Preparation::run(",
    "Tails::read(",
    "block_on(",
    "facts::gather(",
    "fs::copy(",
    "fs::read(",
    "fs::read_to_string(",
    "hash_file(",
    "io::copy(",
    "log_tail(&",
    "panic_lines(",
    "preparation.run(",
    "probe_again(",
    "qemu::find(",
    "qemu::probe(",
    "read_to_end(",
    "refresh_record(",
    "remove_dir_all(",
    "remove_tree(",
    "remove_unfinished(",
    "rotate_logs(",
    "spawn_blocking(",
    "sync_all(",
    "take_blocking(",
    "thread::sleep(",
    "write_record(",
];
/// How the supervisor runs a job: what stands in the brackets is run by another thread.
const JOB_CALLS: [&str; 4] = ["jobs.start(", "jobs::run(", "jobs::run_within(", "self.job("];
/// Files of the supervisor whose functions are called in jobs, by commands, or before the event loop begins.
const BLOCKING_FILES: [&str; 7] = [
    "vmm/supervisor/src/context/",
    "vmm/supervisor/src/control_group.rs",
    "vmm/supervisor/src/jobs/",
    "vmm/supervisor/src/name_pins.rs",
    "vmm/supervisor/src/traffic.rs",
    "vmm/supervisor/src/unwritten.rs",
    "vmm/supervisor/src/vm_record.rs",
];
/// Files that make one of [`BLOCKING_CALLS`] all the same, and why.
const BLOCKING_CALLERS: [(&str, &str, &str); 1] =
    [("vmm/supervisor/src/bake.rs", "fs::read_to_string(", "reads a few bytes of /proc")];
/// Files that define the names of what is in a home and in a VM's directory.
const LAYOUTS: [&str; 2] = ["vmm/files/src/layout.rs", "vmm/engine/src/home.rs"];
/// The most lines that a file has before its tests, comments included.
const FILE_LINES_MAX: usize = 400;
/// Longer files, and why.
const LONG_FILES: [(&str, &str); 1] = [("vmm/engine/src/guest/files/send.rs", "one walk of a tree")];
/// The most lines that a function has, with its signature, without comments and empty lines.
const FUNCTION_LINES_MAX: usize = 60;
/// Longer functions: a `match` or a `select!` with a few lines for each case, or one sequence of steps.
const LONG_FUNCTIONS: [&str; 5] = [
    "cli/server/src/routes/socket.rs::exchange_frames",
    "cli/src/session.rs::streamed",
    "mcp/src/answer.rs::next_step",
    "vmm/core/src/nido/lifecycle.rs::launch_from",
    "vmm/supervisor/src/state.rs::prepare",
];
/// The operations whose path through the code `docs/architecture.md` describes.
const WALKS: [&str; 6] = ["spawn", "exec", "fork", "an HTTP request", "an MCP call", "a crash"];
/// Documents that name files of the code.
const DOCUMENTS: [&str; 4] = ["CONTRIBUTING.md", "docs/architecture.md", "docs/specification.md", "docs/state.md"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn parsed(path: &Path) -> toml::Table {
    fs::read_to_string(path).unwrap().parse().unwrap()
}

/// The dependencies of each member of the workspace, those of its tests left out.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let workspace = parsed(&root().join("Cargo.toml"));
    let members = workspace["workspace"]["members"].as_array().unwrap();
    members
        .iter()
        .map(|member| {
            let manifest = parsed(&root().join(member.as_str().unwrap()).join("Cargo.toml"));
            let names = |key: &str| {
                let table = manifest.get(key).and_then(toml::Value::as_table);
                table.into_iter().flatten().map(|(name, _)| name.clone()).collect::<Vec<_>>()
            };
            let all = names("dependencies").into_iter().chain(names("build-dependencies"));
            (manifest["package"]["name"].as_str().unwrap().to_owned(), all.collect())
        })
        .collect()
}

#[test]
fn crates_depend_only_on_those_below_them() {
    let dependencies = dependencies();
    assert_eq!(dependencies.len(), ARROWS.len(), "each crate has a line in ARROWS");
    for (name, allowed) in ARROWS {
        for found in dependencies[name].iter().filter(|found| dependencies.contains_key(*found)) {
            assert!(allowed.contains(&found.as_str()), "{name} depends on {found}");
        }
        for arrow in allowed {
            assert!(dependencies[name].contains(*arrow), "{name} no longer depends on {arrow}: remove it from ARROWS");
        }
    }
}

/// The text literals that are given to one of these functions.
fn literals<'a>(source: &'a str, functions: &[&str]) -> Vec<&'a str> {
    let calls = functions.iter().flat_map(|function| source.split(*function).skip(1));
    let literal = |rest: &'a str| {
        let rest = rest.trim_start().trim_start_matches("format!(").trim_start();
        rest.strip_prefix('"').and_then(|text| text.split('"').next())
    };
    calls.filter_map(literal).collect()
}

#[test]
fn hints_for_every_front_end_name_no_command() {
    let mut checked = 0;
    for (path, source) in code().into_iter().filter(|(path, _)| !path.starts_with("cli/src/")) {
        for text in literals(&source, &["hint(", "Hint::note("]) {
            // The doctor's report is for the host.
            let is_command = Hint::names_command_line(text) && !path.contains("/doctor");
            assert!(!is_command, "{path}: use Hint::run, Hint::host or Hint::command_line for: {text}");
            checked += 1;
        }
    }
    assert!(checked > 50, "only {checked} hints were found");
}

#[test]
fn only_the_listed_crates_use_a_library() {
    for (name, found) in dependencies() {
        for (library, owners) in OWNERS {
            let depends = found.contains(library);
            assert_eq!(depends, owners.contains(&name.as_str()), "{name} and {library}");
        }
    }
}

/// The code of nido on the host, by path: without comments, and without tests.
fn code() -> BTreeMap<String, String> {
    let mut code = BTreeMap::new();
    let mut directories: Vec<PathBuf> =
        ["images", "mcp", "cli", "cli/server"].map(|name| root().join(name).join("src")).into();
    directories.push(root().join("vmm"));
    while let Some(directory) = directories.pop() {
        for path in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() && !["tests", "examples"].contains(&name) {
                directories.push(path);
            } else if name.ends_with(".rs") && name != "tests.rs" && !name.ends_with("golden.rs") {
                let source = fs::read_to_string(&path).unwrap();
                let source = source.split("\n#[cfg(test)]\n").next().unwrap().lines();
                let lines = source.map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>();
                code.insert(path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned(), lines.join("\n"));
            }
        }
    }
    assert!(code.len() > 200, "{}", code.len());
    code
}

#[test]
fn files_and_functions_are_short() {
    let mut long_functions = BTreeSet::new();
    let mut long_files = BTreeSet::new();
    for (path, code) in code() {
        if code.lines().count() > FILE_LINES_MAX {
            long_files.insert(path.clone());
        }
        let long = functions_over(&code, FUNCTION_LINES_MAX);
        long_functions.extend(long.iter().map(|name| format!("{path}::{name}")));
    }
    assert_eq!(long_files, LONG_FILES.map(|(path, _)| path.to_owned()).into());
    assert_eq!(long_functions, LONG_FUNCTIONS.map(str::to_owned).into());
}

/// The names of functions of more than `most` lines, in code that rustfmt has formatted.
fn functions_over(code: &str, most: usize) -> Vec<String> {
    let lines: Vec<_> = code.lines().filter(|line| !line.trim().is_empty()).collect();
    let long = |(at, line): (usize, &&str)| {
        let (before, after) = line.split_once("fn ")?;
        let is_function = before.split_whitespace().all(|word| {
            ["pub", "const", "async", "unsafe"].contains(&word) || word.starts_with("pub(") || word.ends_with(')')
        });
        let name = after.split(['(', '<']).next()?;
        let end = format!("{}}}", &line[..line.len() - line.trim_start().len()]);
        let length = lines[at..].iter().position(|line| *line == end)? + 1;
        (is_function && length > most).then(|| name.to_owned())
    };
    lines.iter().enumerate().filter_map(long).collect()
}

#[test]
fn a_long_function_is_found() {
    let long = format!(
        "impl X {{\n    pub(super) async fn long<T>(\n        a: T,\n    ) {{\n{}    }}\n    fn short() {{}}\n}}",
        "        f();\n".repeat(9)
    );
    assert_eq!(functions_over(&long, 10), ["long"]);
    assert!(functions_over(&long, 13).is_empty());
}

#[test]
fn only_nido_files_locks_and_replaces_files() {
    let code = code();
    for (path, text) in code.iter().filter(|(path, _)| !path.starts_with("vmm/files/")) {
        let call = FILE_CALLS.into_iter().find(|call| text.contains(call));
        let is_excepted = FILE_CALLERS.iter().any(|(caller, _)| caller == path);
        assert!(call.is_none() || is_excepted, "{path} calls {call:?}: use nido-files");
        assert!(call.is_some() || !is_excepted, "{path} makes no such call: remove it from FILE_CALLERS");
    }
    for (caller, _) in FILE_CALLERS {
        assert!(code.contains_key(caller), "there is no {caller}: remove it from FILE_CALLERS");
    }
}

/// The first of [`BLOCKING_CALLS`] that code makes outside of a job.
fn blocking_call(code: &str) -> Option<&'static str> {
    let mut rest = code;
    let mut outside = String::new();
    while let Some(start) = JOB_CALLS.iter().filter_map(|call| Some(rest.find(call)? + call.len())).min() {
        outside += &rest[..start];
        rest = &rest[start..];
        let mut depth = 1;
        let end = rest.find(|c| {
            depth += i32::from(c == '(') - i32::from(c == ')');
            depth == 0
        });
        rest = &rest[end.unwrap_or(rest.len())..];
    }
    outside += rest;
    BLOCKING_CALLS.into_iter().find(|call| outside.contains(call))
}

#[test]
fn the_supervisor_blocks_in_jobs_only() {
    let code = code();
    let is_scanned = |path: &str| {
        path.starts_with("vmm/supervisor/src/") && !BLOCKING_FILES.iter().any(|blocking| path.starts_with(blocking))
    };
    let scanned: Vec<_> = code.iter().filter(|(path, _)| is_scanned(path)).collect();
    assert!(scanned.len() > 25, "{scanned:?}");
    for (path, text) in scanned {
        let mut text = text.clone();
        for (_, call, _) in BLOCKING_CALLERS.iter().filter(|(caller, ..)| caller == path) {
            assert!(text.contains(call), "{path} no longer calls {call}: remove it from BLOCKING_CALLERS");
            text = text.replace(call, "");
        }
        let call = blocking_call(&text);
        assert!(call.is_none(), "{path} calls {call:?} on the thread of the event loop: use a job");
    }
}

#[test]
fn a_blocking_call_is_found_unless_a_job_makes_it() {
    let job = "let tail = jobs::run_within(WHAT, limit(), move || Ok(log_tail(&dir, &[LOG]))).await;\n";
    assert_eq!(blocking_call(job), None);
    assert_eq!(blocking_call(&job.repeat(2)), None);
    let direct = format!("{job}self.context.erase(&id);\n{job}");
    assert_eq!(blocking_call(&direct), Some(".erase("));
    assert_eq!(blocking_call("tokio::task::spawn_blocking(move || hash_file(&path))"), Some("hash_file("));
    assert_eq!(blocking_call("self.jobs.start(WHAT, rotate_logs)"), None);
    assert_eq!(blocking_call("rotate_logs()"), Some("rotate_logs("));
}

#[test]
fn each_name_of_a_home_is_written_once() {
    let code = code();
    let mut names = Vec::new();
    for layout in LAYOUTS {
        let constants =
            code[layout].lines().filter_map(|line| line.strip_prefix("pub const ")?.split_once(": &str = "));
        names.extend(constants.map(|(_, value)| (value.trim_end_matches(';').to_owned(), layout)));
    }
    assert!(names.len() > 30, "{names:?}");
    for (name, layout) in names {
        // A word without a dot may be a verb or a column elsewhere.
        let words =
            if name.contains('.') { vec![name] } else { vec![format!("join({name})"), format!("file({name})")] };
        for (path, text) in code.iter().filter(|(path, _)| *path != layout) {
            let found = words.iter().find(|word| text.contains(*word));
            assert!(found.is_none(), "{path} has {found:?}: it is defined in {layout}");
        }
    }
}

fn modules(crates: &[&Path]) -> (bool, String) {
    let output = Command::new(root().join("scripts/modules")).args(crates).output().unwrap();
    (output.status.success(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn modules_use_each_other_without_a_cycle() {
    let (passed, text) = modules(&[]);
    assert!(passed, "{text}");
}

#[test]
fn every_form_of_cycle_is_found_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("src");
    fs::create_dir_all(source.join("front")).unwrap();
    let write = |name: &str, text: &str| fs::write(source.join(name), text).unwrap();
    write("lib.rs", "mod front; mod low; mod tested;");
    write("front.rs", "mod one;\npub use one::One;\nuse crate::low::{\n    Low, // a comment\n};");
    write("front/one.rs", "use super::Low;\npub struct One;");
    write("tested.rs", "#[cfg(test)]\nmod tests { use crate::front::One; }\nconst TEXT: &str = \"crate::front::One\";");
    // Inside of it and upwards is allowed; so is what only tests use.
    write("low.rs", "use crate::tested;");
    let (passed, text) = modules(&[dir.path()]);
    assert!(passed, "{text}");
    for upwards in
        ["use crate::{front::One, tested};", "fn f() { crate::front::one::g() }", "type T = super::front::One;"]
    {
        write("low.rs", upwards);
        let (passed, text) = modules(&[dir.path()]);
        assert!(!passed && text.contains("front, low"), "{upwards}: {text}");
    }
}

/// The files, and items in them, that a text names as `path/to/file.rs` or `path/to/file.rs::item`.
fn named_files(text: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    let quoted = text.split('`').skip(1).step_by(2).filter(|quoted| quoted.contains(".rs"));
    let named = quoted.map(|quoted| quoted.split_once("::").map_or((quoted, None), |(path, item)| (path, Some(item))));
    // Neither patterns nor names without their directory.
    named.filter(|(path, _)| path.contains('/') && !path.contains(['{', '*', ' ']))
}

/// Checks that the files that a text names exist, and contain the named items as whole words. Returns how many there are.
fn check_named_files(place: &str, text: &str) -> usize {
    let mut checked = 0;
    for (path, item) in named_files(text) {
        let source = fs::read_to_string(root().join(path));
        let source = source.unwrap_or_else(|_| panic!("{place} names {path}, which does not exist"));
        if let Some(item) = item.and_then(|item| item.rsplit("::").next()) {
            let mut words = source.split(|c: char| !c.is_alphanumeric() && c != '_');
            assert!(words.any(|word| word == item), "{place} names {item}, which is not in {path}");
        }
        checked += 1;
    }
    checked
}

#[test]
fn documents_name_files_and_items_that_exist() {
    let checked =
        DOCUMENTS.map(|document| check_named_files(document, &fs::read_to_string(root().join(document)).unwrap()));
    assert!(checked.iter().sum::<usize>() > 100, "{checked:?}");
}

#[test]
fn the_walks_name_files_and_items_that_exist() {
    let text = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    for walk in WALKS {
        let head = format!("\n## Walk: {walk}\n");
        let (_, rest) = text.split_once(&head).unwrap_or_else(|| panic!("docs/architecture.md has no walk '{walk}'"));
        let section = rest.split("\n## ").next().unwrap();
        let is_step = |line: &str| line.starts_with(|c: char| c.is_ascii_digit());
        let mut steps: Vec<String> = Vec::new();
        for line in section.lines() {
            match steps.last_mut() {
                _ if is_step(line) => steps.push(line.to_owned()),
                Some(step) if line.starts_with(' ') => step.push_str(line),
                _ => {}
            }
        }
        assert!(steps.len() >= 5, "{walk}: {steps:#?}");
        for step in steps {
            assert!(check_named_files(walk, &step) > 0, "{walk}: no file in the step: {step}");
        }
    }
}

#[test]
#[should_panic(expected = "which is not in vmm/api/src/state.rs")]
fn a_named_item_that_does_not_exist_is_found() {
    check_named_files("a text", "see `vmm/api/src/state.rs::admi`");
}
