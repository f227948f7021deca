//! Every tool as clients see it, against `tests/golden/mcp/*.json`, and the table in `docs/mcp.md`. `NIDO_BLESS=1 cargo test -p
//! nido-mcp golden` rewrites them; read the difference: a model will read it too.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::Value;

use super::{ALL, Hints, Tool};

const TABLE_START: &str = "<!-- tools: written by the tests of nido-mcp -->\n";
const TABLE_END: &str = "<!-- /tools -->\n";

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn update_golden() -> bool {
    std::env::var_os("NIDO_BLESS").is_some()
}

#[test]
fn golden_files_are_what_clients_see() {
    let directory = root().join("tests/golden/mcp");
    std::fs::create_dir_all(&directory).unwrap();
    let mut expected = BTreeSet::new();
    for tool in ALL {
        let now = serde_json::to_string_pretty(&tool.described()).unwrap() + "\n";
        let path = directory.join(format!("{}.json", tool.name()));
        if update_golden() {
            std::fs::write(&path, &now).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(now, golden, "{}: the tool changed; NIDO_BLESS=1 writes the golden files anew", tool.name());
        expected.insert(format!("{}.json", tool.name()));
    }
    let there = std::fs::read_dir(&directory).unwrap();
    let there: BTreeSet<_> = there.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(there, expected, "golden files without a tool");
}

fn table() -> String {
    let yes = |hint: bool| if hint { "yes" } else { "no" };
    let row = |tool: &Tool| {
        let Hints { idempotent, open_world } = tool.hints;
        let hints = [tool.op.is_read(), tool.op.is_destructive(), idempotent, open_world].map(yes).join(" | ");
        format!("| `{}` | {} | {} | {hints} |\n", tool.name(), tool.title, tool.op.scope.word())
    };
    let head =
        "| tool | | scope | reads only | destructive | idempotent | open world |\n|---|---|---|---|---|---|---|\n";
    head.to_owned() + &ALL.map(row).concat()
}

#[test]
fn golden_table_of_the_documentation() {
    let path = root().join("docs/mcp.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(TABLE_START).expect("where the table begins");
    let (_, after) = rest.split_once(TABLE_END).expect("where the table ends");
    let now = format!("{before}{TABLE_START}{}{TABLE_END}{after}", table());
    if update_golden() {
        std::fs::write(&path, &now).unwrap();
    } else {
        assert_eq!(now, text, "docs/mcp.md is stale; NIDO_BLESS=1 writes its table anew");
    }
}

/// The words of the specification for each tool.
#[test]
fn every_tool_carries_the_annotations_of_the_specification() {
    for (name, words) in [
        ("vm_ls", vec!["safe"]),
        ("vm_spawn", vec!["long_running"]),
        ("vm_create", vec!["safe"]),
        ("vm_start", vec!["safe"]),
        ("vm_stop", vec!["safe"]),
        ("vm_delete", vec!["destructive", "confirmation_required"]),
        ("vm_info", vec!["safe"]),
        ("vm_exec", vec!["potentially_dangerous"]),
        ("vm_upload", vec!["safe"]),
        ("vm_download", vec!["safe"]),
        ("template_list", vec!["safe"]),
        ("template_create", vec!["long_running"]),
        ("vm_snapshot", vec!["safe"]),
        ("vm_restore", vec!["destructive", "confirmation_required"]),
    ] {
        let tool = serde_json::to_value(super::find(name).unwrap().described()).unwrap();
        assert_eq!(tool["_meta"][super::ANNOTATIONS], serde_json::json!(words), "{name}");
    }
}

/// Arguments that need no description: their names suffice.
const PLAIN_FIELDS: [&str; 15] = [
    "name",
    "labels",
    "snapshot",
    "job_id",
    "env",
    "directory",
    "net",
    "stdin",
    "content",
    "content_base64",
    "status",
    "source",
    "unpublish",
    "deny",
    "timeout_seconds",
];

/// What every tool owes its readers.
#[test]
fn every_tool_is_described_completely() {
    for tool in ALL {
        let seen = serde_json::to_value(tool.described()).unwrap();
        let name = tool.name();
        assert!(tool.about.len() > 50 && tool.about.ends_with('.'), "{name}: the description says too little");
        for hint in ["readOnlyHint", "destructiveHint", "idempotentHint", "openWorldHint"] {
            assert!(seen["annotations"][hint].is_boolean(), "{name}: {hint}");
        }
        let takes = &seen["inputSchema"];
        assert_eq!(takes["type"], "object", "{name}");
        for word in ["oneOf", "anyOf", "allOf"] {
            assert!(takes.get(word).is_none(), "{name}: models are not given {word} at the root");
        }
        for (field, schema) in takes["properties"].as_object().unwrap() {
            let said = schema["description"].as_str().unwrap_or_default();
            // vm_create takes the arguments of vm_spawn.
            let is_clear = PLAIN_FIELDS.contains(&field.as_str())
                || name == "vm_create"
                || (name, field.as_str()) == ("vm_network", "allow");
            assert!(is_clear || said.len() > 4, "{name}: {field} is not described");
            assert!(schema.get("type").is_some_and(Value::is_string), "{name}: {field} has no single type");
            for unit in ["seconds", "bytes", "mib"] {
                let spelled = match unit {
                    "mib" => "MiB",
                    other => other,
                };
                let has_unit =
                    !field.ends_with(&format!("_{unit}")) || said.to_lowercase().contains(&spelled.to_lowercase());
                assert!(is_clear || has_unit, "{name}: the unit of {field}");
            }
        }
        assert_eq!(seen["outputSchema"]["type"], "object", "{name}");
        assert!(tool.op.is_read() == (tool.op.scope == nido_api::Scope::Read), "{name}: scope and hints differ");
    }
}

#[test]
fn the_tools_are_those_of_the_registry() {
    let tools: BTreeSet<_> = ALL.iter().map(|tool| tool.name()).collect();
    let registry = nido_api::operation::ALL.iter().filter_map(|operation| operation.tool);
    assert_eq!(tools, registry.collect());
}
