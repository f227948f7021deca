//! Receipts of the real `nido`: written, verified by nido and by another program, tampered with.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::Home;

/// A second implementation, from the documentation of the format.
const SCRIPT: &str = include_str!("verify_receipt.py");

/// Which requests and events the script finds in a receipt.
fn judged(receipt: &Path, key: &str) -> Result<Vec<String>, String> {
    let ran = Command::new("python3").args(["-c", SCRIPT]).arg(receipt).arg(key).output().unwrap();
    let text = String::from_utf8(ran.stdout).unwrap();
    if ran.status.success() {
        return Ok(text.lines().map(str::to_owned).collect());
    }
    Err(String::from_utf8(ran.stderr).unwrap())
}

fn verify(home: &Home, receipt: &Path, key: &str) -> crate::support::run::FinishedRun {
    home.nido(["audit", "verify-receipt", "--json", "--key", key]).arg(receipt).run()
}

#[test]
fn a_receipt_of_a_deleted_vm_is_valid_for_another_program() {
    let home = Home::new();
    home.spawn("web");
    home.spawn("db");
    home.nido(["exec", "web", "--", "true"]).run().ok();
    home.nido(["exec", "db", "--", "echo", "of another VM"]).run().ok();
    let file = home.scratch("file");
    fs::write(&file, "content").unwrap();
    home.nido(["upload", "web"]).arg(&file).arg(home.scratch("guest")).run().ok();
    home.nido(["delete", "web", "--force", "--yes"]).run().ok();
    let (receipt, key) =
        (home.scratch("receipt.json"), home.nido(["audit", "key"]).run().ok().text().trim().to_owned());
    let told = home.nido(["audit", "receipt", "web", "--json", "-o"]).arg(&receipt).run().ok().json();
    assert_eq!((&told["vm_name"], &told["public_key"]), (&json!("web"), &json!(key)));
    home.nido(["audit", "receipt", "web", "--json", "-o"]).arg(&receipt).run().fails(1, "path_exists");
    let [acts, events] = judged(&receipt, &key).unwrap().try_into().unwrap();
    assert_eq!(acts, "vm_exec vm_upload vm_delete");
    assert_eq!(events, "vm.created vm.started vm.stopped vm.deleted");
    let verdict = verify(&home, &receipt, &key).ok().json();
    assert_eq!((&verdict["lines"], &verdict["trusted_key"]), (&json!(10), &json!(true)));
    let text = fs::read_to_string(&receipt).unwrap();
    assert!(!text.contains("of another VM"), "{text}");
    let printed = home.nido(["audit", "receipt"]).arg(told["vm_id"].as_str().unwrap()).run().ok();
    assert_eq!(printed.json()["vm"], serde_json::from_str::<Value>(&text).unwrap()["vm"]);

    // Where there is no home, and after each change.
    let nowhere = Home::new();
    verify(&nowhere, &receipt, &key).ok();
    assert!(!nowhere.path().join("nido.db").exists(), "a home was made to verify a receipt");
    verify(&nowhere, &receipt, &"0".repeat(64)).fails(1, "audit_broken");
    for (from, to) in
        [("vm_upload", "vm_uplaod"), ("\"name\": \"web\"", "\"name\": \"wob\""), ("\"root\": \"", "\"root\": \"0")]
    {
        let changed = text.replacen(from, to, 1);
        assert_ne!(changed, text, "{from}");
        fs::write(&receipt, changed).unwrap();
        verify(&nowhere, &receipt, &key).fails(1, "audit_broken");
        judged(&receipt, &key).unwrap_err();
    }
}

#[test]
fn a_vm_without_lines_has_no_receipt() {
    let home = Home::new();
    home.nido(["audit", "receipt", "web", "--json"]).run().fails(1, "vm_not_found");
    home.nido(["audit", "verify-receipt", "nothing", "--json"]).run().fails(1, "path_not_found");
    let file = home.scratch("receipt.json");
    fs::write(&file, "{}").unwrap();
    home.nido(["audit", "verify-receipt", "--json"]).arg(&file).run().fails(2, "spec_invalid");
}
