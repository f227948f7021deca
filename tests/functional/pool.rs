//! Pools on the command line. Their clones are made in the boot suite.

use crate::support::Home;

#[test]
fn pool_sizes_are_validated() {
    let home = Home::bare();
    for wanted in ["101", "-1", "many"] {
        let refused = home.nido(["pool", "set", "sandbox", wanted]).run().exits(2);
        assert!(!refused.stderr.is_empty(), "{wanted}");
    }
    home.nido(["pool", "set", "sandbox"]).run().exits(2);
    home.nido(["pool", "set", "sandbox", "1", "--memory", "lots"]).run().exits(2);
    let refused = home.nido(["pool", "set", "Sandbox", "1", "--json"]).run();
    assert_eq!(refused.problem()["code"], "name_invalid");
    assert_eq!(home.nido(["pool", "ls", "--json"]).run().ok().json(), serde_json::json!({ "pools": [] }));
}

#[test]
fn a_pool_needs_an_existing_template() {
    let home = Home::new();
    let refused = home.nido(["pool", "set", "nothing", "1", "--json"]).run().exits(1);
    assert_eq!(refused.problem()["code"], "template_not_found");
    let refused = home.nido(["pool", "set", "sandbox", "1", "--cpus", "1", "--net", "none", "--json"]).run().exits(1);
    let problem = refused.problem();
    assert_eq!(problem["code"], "template_mismatch");
    assert_eq!(problem["hint"], "run nido template bake sandbox --net none");
    assert_eq!(home.nido(["pool", "ls", "--json"]).run().ok().json()["pools"], serde_json::json!([]));
}

#[test]
fn ending_an_unknown_pool_succeeds() {
    let home = Home::new();
    let ended = home.nido(["pool", "set", "sandbox", "0", "--json"]).run().ok().json();
    for (field, value) in [("wanted", 0), ("ready", 0), ("filling", 0), ("cpus", 1), ("memory_mib", 512)] {
        assert_eq!(ended[field], value, "{field}");
    }
    assert_eq!((&ended["template"], &ended["net"]), (&"sandbox".into(), &"nat".into()));
    let filler = home.nido(["pool-fill"]).run().ok();
    assert!(filler.stdout.is_empty() && filler.stderr.is_empty(), "{}", filler.stderr);
}
