//! Every failpoint in the source is reached by an operation, so none is unused; and no normal build contains one.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::check::await_recovery;
use crate::kills::steps;
use crate::operations::{ACCESS, BASIC, COPIES, POOLS, TEMPLATES};
use crate::rig::Rig;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The names of failpoints in the source; only of those after whose name `ending` comes.
pub fn failpoints(ending: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for directory in ["vmm", "images/src", "cli", "mcp/src"] {
        in_source(&root().join(directory), ending, &mut found);
    }
    found
}

fn in_source(directory: &Path, ending: &str, found: &mut BTreeSet<String>) {
    for path in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            in_source(&path, ending, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") && !path.ends_with("failpoint.rs") {
            let source = fs::read_to_string(&path).unwrap();
            let places = source.split("failpoint!(\"").skip(1).map(|place| place.split_once('"').unwrap());
            let wanted = places.filter(|(_, rest)| rest.starts_with(ending));
            found.extend(wanted.map(|(name, _)| name.to_owned()));
        }
    }
}

#[test]
fn every_failpoint_is_reached_by_an_operation() {
    let named = failpoints("");
    let rig = Rig::new();
    let mut reached = BTreeSet::new();
    for operation in BASIC.iter().chain(&COPIES).chain(&TEMPLATES).chain(&POOLS).chain(&ACCESS) {
        reached.extend(steps(&rig, operation).into_iter().map(|step| step.name));
        await_recovery(&rig);
    }
    let dead: Vec<_> = named.difference(&reached).collect();
    assert!(dead.is_empty(), "no operation of tests/faults/operations.rs reaches these failpoints: {dead:?}");
    println!("{} failpoints, each reached", named.len());
}

#[test]
fn no_normal_build_contains_a_failpoint() {
    let mut manifests = Vec::new();
    for crate_of in ["vmm/api", "vmm/files", "vmm/engine", "vmm/store", "vmm/supervisor", "vmm/core", "images", "mcp"] {
        manifests.push(root().join(crate_of).join("Cargo.toml"));
    }
    manifests.extend(["cli/Cargo.toml", "cli/server/Cargo.toml", "Cargo.toml"].map(|path| root().join(path)));
    for manifest in manifests {
        let text = fs::read_to_string(&manifest).unwrap();
        let table: toml::Table = text.parse().unwrap();
        let features = table.get("features").and_then(toml::Value::as_table);
        assert!(features.is_none_or(|features| !features.contains_key("default")), "{}", manifest.display());
        // Only the feature of the fakes enables them.
        let lines: Vec<_> = text.lines().filter(|line| line.contains("failpoints")).collect();
        let allowed = |line: &&str| line.starts_with("failpoints = []") || line.starts_with("test-fakes = [");
        assert!(lines.iter().all(allowed), "{}: {lines:?}", manifest.display());
    }
    // And a build with optimizations that enables it nevertheless does not compile.
    let source = fs::read_to_string(root().join("vmm/files/src/failpoint.rs")).unwrap();
    assert!(source.contains("compile_error!("));
}
