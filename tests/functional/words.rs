//! The words of user-facing text, comments and names: `scripts/words` finds none that the project replaced by another term.

use std::fs;
use std::path::Path;
use std::process::Command;

/// A text of each kind with one of the phrases, and the line that it is reported with.
const PLANTED: [(&str, &str, &str); 12] = [
    ("README.md", "# A VM\n\nThe VM\ngoes\non.\n", "README.md:4: markdown: \"goes on\""),
    ("CHANGELOG.md", "## Unreleased\n\n- It comes to life.\n\n## 1.0\n\n- It vanishes.\n", "CHANGELOG.md:3: markdown"),
    ("docs/more/page.md", "Somebody stops it.\n", "docs/more/page.md:1: markdown: \"Somebody\""),
    ("docs/openapi.json", "{\n \"description\": \"Halt it.\"\n}\n", "docs/openapi.json:2: json: \"Halt\""),
    ("cli/server/src/page/index.html", "<p>A throw-away VM</p>\n", "cli/server/src/page/index.html:1: page"),
    (
        "cli/src/commands/stop.rs",
        "// No help: it says so.\n#[derive(Debug, Args)]\npub struct Stop {\n    /// Pull the plug\n    force: bool,\n}\n",
        "cli/src/commands/stop.rs:4: help: \"Pull the plug\"",
    ),
    (
        "vmm/api/src/vm.rs",
        "#[derive(ToSchema)]\n/// A VM that\n/// is at rest.\nstruct Vm;\n",
        "vmm/api/src/vm.rs:3: schema: \"at rest\"",
    ),
    (
        "vmm/core/src/nido.rs",
        "fn f() -> Error {\n    error(\"the VM \\\n        is settled\")\n}\n#[cfg(test)]\nmod tests { const T: &str = \"it goes on\"; }\n",
        "vmm/core/src/nido.rs:3: message: \"settled\"",
    ),
    (
        "guest-agent/src/log.rs",
        "const LOG: &str = r#\"nobody reads \"it\"\"#;\n",
        "guest-agent/src/log.rs:1: message: \"nobody\"",
    ),
    ("images/src/disk.rs", "/// It is\n/// made anew.\nfn f() {}\n", "images/src/disk.rs:2: comment: \"made anew\""),
    ("tests/boot/disk.rs", "// A lock that whoever\n// has.\n", "tests/boot/disk.rs:1: comment: \"whoever\""),
    ("mcp/src/door.rs", "\nconst A: u8 = 1;\npub enum Door {}\n", "mcp/src/door.rs:3: name: \"enum Door\""),
];

fn words(arguments: &[&Path]) -> (bool, String) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("scripts/words");
    let output = Command::new(script).args(arguments).output().unwrap();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    (output.status.success(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn user_facing_text_has_the_words_of_the_project() {
    let (passed, text) = words(&[]);
    assert!(passed, "{text}");
}

#[test]
fn a_phrase_is_found_in_every_kind_of_user_facing_text() {
    for (file, text, report) in PLANTED {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        let (passed, found) = words(&[root.path()]);
        assert!(!passed && found.starts_with(report), "{file}: {found}");
        assert_eq!(found.lines().count(), 2, "{found}");
    }
}

#[test]
fn code_blocks_and_tests_are_not_user_facing_text() {
    let root = tempfile::tempdir().unwrap();
    for (file, text) in [
        ("docs/page.md", "`goes on`\n\n```sh\necho goes on\n```\n"),
        (
            "vmm/api/src/vm.rs",
            "//! It says `goes on`.\n/// What it goes\n\n/// on is told apart.\nfn f() { \"somebody\"; }\n",
        ),
        ("vmm/api/src/tests.rs", "const T: &str = \"it goes on\";\n"),
        ("images/tests/rig.rs", "const T: &str = \"it goes on, fn ask\";\n"),
    ] {
        let path = root.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    assert_eq!(words(&[root.path()]), (true, String::new()));
}
