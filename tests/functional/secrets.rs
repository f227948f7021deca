//! Stored secrets: set, refreshed by their commands, listed. What guests get of them is in the boot tests.

use serde_json::{Value, json};

use crate::support::Home;

/// The secrets that are listed, by name.
fn listed(home: &Home) -> Vec<Value> {
    home.nido(["secret", "list", "--json"]).run().ok().json()["secrets"].as_array().unwrap().clone()
}

fn of(home: &Home, name: &str) -> Value {
    listed(home).into_iter().find(|secret| secret["name"] == name).unwrap()
}

#[test]
fn a_secret_is_refreshed_by_its_command_and_keeps_its_value_if_that_fails() {
    let home = Home::new();
    let (source, other) = (home.scratch("source"), home.scratch("other"));
    std::fs::write(&source, "first").unwrap();
    std::fs::write(&other, "other").unwrap();
    home.nido(["secret", "set", "key", "--command", "cat"]).arg(&source).run().ok();
    home.nido(["secret", "set", "second", "--command", "cat"]).arg(&other).run().ok();
    home.nido(["secret", "set", "plain", "--file"]).arg(&source).run().ok();
    assert_eq!((&of(&home, "key")["refreshable"], &of(&home, "plain")["refreshable"]), (&json!(true), &json!(false)));
    home.nido(["secret", "refresh", "plain", "--json"]).run().fails(2, "spec_invalid");
    home.nido(["secret", "refresh", "missing", "--json"]).run().fails(1, "secret_not_found");

    let stored = of(&home, "key");
    // It is not old enough.
    let refreshed = home.nido(["secret", "refresh", "key", "--older", "1h", "--json"]).run().ok().json();
    assert_eq!((refreshed, of(&home, "key")), (json!({"secrets": []}), stored.clone()));
    let refreshed = home.nido(["secret", "refresh", "key", "--json"]).run().ok().json();
    assert_eq!(refreshed["name"], "key");
    let newer = of(&home, "key");
    assert_ne!(newer["updated_at"], stored["updated_at"]);

    // A command that prints no value, fails, or does not end: the value stays, and others are refreshed.
    let before = of(&home, "second");
    std::fs::write(&source, "two\nlines").unwrap();
    let failed = home.nido(["secret", "refresh", "--all"]).run().exits(2);
    assert!(failed.stderr.contains("key keeps its value"), "{failed:?}");
    assert_eq!(of(&home, "key"), newer);
    assert_ne!(of(&home, "second"), before);
    std::fs::remove_file(&source).unwrap();
    home.nido(["secret", "refresh", "key", "--json"]).run().fails(2, "spec_invalid");
    assert_eq!(of(&home, "key"), newer);
    home.nido([
        "secret",
        "set",
        "slow",
        "--command",
        "sh",
        "-c",
        "test -e ready && exec sleep 600; touch ready; echo v",
    ])
    .in_directory(home.path())
    .run()
    .ok();
    let slow = home.nido(["secret", "refresh", "slow", "--timeout", "1s", "--json"]).in_directory(home.path()).run();
    let problem = slow.fails(2, "spec_invalid");
    assert!(problem["detail"].as_str().unwrap().contains("did not end within 1 s"), "{problem}");

    let show = ["audit", "show", "--tool", "secret_refresh", "--json"];
    let records = home.nido(show).run().ok().json()["records"].as_array().unwrap().clone();
    let results: Vec<_> = records.iter().filter(|one| one["stage"] == "outcome").map(|one| &one["result"]).collect();
    assert!(results.contains(&&json!("success")) && results.contains(&&json!("error")), "{results:?}");
    // Set again, it has no command any more.
    home.nido(["secret", "set", "key", "--file"]).arg(&other).run().ok();
    home.nido(["secret", "refresh", "key", "--json"]).run().fails(2, "spec_invalid");
}
