use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use super::*;

/// Nouns of what belongs to the caller alone: its end destroys nothing that others know.
const OWN: [&str; 3] = ["job", "operation", "session"];

fn all_different<T: Ord>(what: &str, items: impl Iterator<Item = T>) {
    let all: Vec<_> = items.collect();
    let different: BTreeSet<_> = all.iter().collect();
    assert_eq!(different.len(), all.len(), "{what} are unique");
}

#[test]
fn ids_nouns_with_verbs_routes_and_commands_are_unique() {
    all_different("ids", ALL.iter().map(|op| op.id));
    all_different("nouns with verbs", ALL.iter().map(|op| (op.noun, op.verb)));
    all_different("commands", ALL.iter().filter_map(|op| op.command));
    all_different("routes", ALL.iter().filter_map(|op| op.route).map(|route| (route.method.word(), route.path)));
    all_different("operation ids", ALL.iter().filter_map(|op| op.route).map(|route| route.operation_id));
    for op in ALL {
        assert!(op.id.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{}", op.id);
        assert!(op.about.ends_with('.'), "{}: {}", op.id, op.about);
        assert_eq!(find(op.id), Some(*op));
    }
}

#[test]
fn destructive_operations_need_confirmation() {
    for op in ALL {
        let asks = !op.confirmed.is_empty();
        assert!(!op.is_destructive() || asks || OWN.contains(&op.noun), "{} destroys and never asks", op.id);
        assert!(!op.is_read() || !asks, "{} changes nothing and asks", op.id);
    }
}

#[test]
fn reads_are_no_jobs_and_need_no_more_than_to_read() {
    for op in ALL.iter().filter(|op| op.is_read()) {
        assert!(!op.long_running && !op.frees_space && !op.has_output, "{}", op.id);
        assert!(op.scope != Scope::Run, "{}", op.id);
    }
    for op in ALL.iter().filter(|op| !op.is_read()) {
        assert!(op.scope > Scope::Read, "{}: a token that may only read could change something", op.id);
    }
}

#[test]
fn a_tool_named_by_several_operations_is_an_operation_itself() {
    for tool in ALL.iter().filter_map(|op| op.tool) {
        assert_eq!(find(tool).and_then(|op| op.tool), Some(tool));
    }
}

#[test]
fn an_operation_is_called_in_the_language_of_each_front_end() {
    let of =
        |op: &Operation| [FrontEnd::Cli, FrontEnd::Api, FrontEnd::Mcp].map(|face| op.call(face).unwrap_or_default());
    assert_eq!(of(VM_LS), ["nido ls", "GET /v1/vms", "vm_ls"]);
    assert_eq!(of(VM_SNAPSHOT), ["nido snapshot create", "POST /v1/vms/{name}/snapshots", "vm_snapshot"]);
    assert_eq!(of(VM_SHELL), ["nido shell", "", ""]);
}

/// `docs/reference/operations.md`.
fn reference() -> String {
    let mut text = String::from(HEAD);
    let mut noun = "";
    for op in ALL {
        if op.noun != noun {
            noun = op.noun;
            let _ = write!(text, "\n## {noun}\n\n{COLUMNS}");
        }
        let code = |text: String| if text.is_empty() { "–".to_owned() } else { format!("`{text}`") };
        let face = |face| code(op.call(face).unwrap_or_default());
        let when = op.confirmed.iter().map(|when| when.about()).collect::<Vec<_>>().join(", ");
        let job = if op.long_running { "yes" } else { "no" };
        let effect = format!("{:?}", op.effect).to_lowercase();
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | {} | {} | {effect} | {} | {job} | {} |",
            op.id,
            op.about,
            face(FrontEnd::Cli),
            face(FrontEnd::Api),
            face(FrontEnd::Mcp),
            op.scope.word(),
            if when.is_empty() { "–" } else { &when },
        );
    }
    text
}

const HEAD: &str = "\
# Operations

This page lists the operations of nido and their names on each front end: the command line, the REST
API and the MCP server. It is written by a test of `nido-api` from the registry
(`vmm/api/src/operation/table.rs`); `NIDO_BLESS=1 cargo test -p nido-api reference` updates it.

- *id*: the name in the audit log and in policies, and the `tool` of a job.
- *effect*: `read` changes nothing; `destroy` may destroy or replace something.
- *scope*: what a token needs. The command line needs none.
- *job*: the REST API offers it as a job (`Prefer: respond-async`). A call of an MCP tool that is not
  a read becomes a job if it takes longer than its client waits.
- *confirmation*: which calls a person confirms on a front end that asks, unless a policy specifies
  otherwise.
";
const COLUMNS: &str = "\
| id | | command | route | tool | effect | scope | job | confirmation |
|---|---|---|---|---|---|---|---|---|
";

#[test]
fn reference_of_operations_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference/operations.md");
    let now = reference();
    if std::env::var_os("NIDO_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &now).unwrap();
    }
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(now, text, "docs/reference/operations.md is stale; NIDO_BLESS=1 updates it");
}
