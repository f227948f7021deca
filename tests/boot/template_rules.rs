//! Real guests of a template whose rules bound those of its VMs.

use serde_json::json;

use crate::network::{greeting_server, reach};
use crate::rig::{TestHome, Vm};

#[test]
fn rules_of_a_template_hold_for_its_vms_forked_or_copied_and_for_templates_of_them() {
    let home = TestHome::new();
    let (open, other) = (greeting_server(b"hello\n"), greeting_server(b"never\n"));
    let (rule, outside) = (format!("host:{open}"), format!("host:{other}"));
    let maker = home.spawn("maker", &["--net", "restricted", "--allow", &outside]);
    maker.sh("touch /root/made").ok();
    let made = home.nido(["template", "create", "bound", "--from", "maker", "--allow", &rule, "--json"]).json();
    assert_eq!(made["template"]["allow"], json!([rule]));
    assert_eq!(made["template"]["bakes"].as_array().map(Vec::len), Some(2), "{made}");
    maker.delete();
    home.nido(["spawn", "web", "-T", "bound", "--net", "nat"]).problem(1, "denied");
    home.nido(["spawn", "web", "-T", "bound", "--allow", &outside]).problem(1, "denied");
    // Forked from the warm image, with the network that the template allows.
    let web = home.spawn("web", &["-T", "bound"]);
    let info = web.info();
    assert_eq!((&info["net"], &info["timings"]["path"]), (&json!("restricted"), &json!("fork")), "{info:#}");
    assert_eq!(web.exec(["ls", "/root/made"]).text(), "/root/made");
    assert_eq!(reach(&web, "10.0.2.2", open), "ECONNREFUSED");
    home.nido(["net", "allow", "web", &rule]).ok();
    assert_eq!(reach(&web, "10.0.2.2", open), "hello");
    home.nido(["fork", "web", "copy"]).ok();
    let copy = Vm { home: &home, name: "copy" };
    assert_eq!(
        (reach(&copy, "10.0.2.2", open).as_str(), reach(&copy, "10.0.2.2", other).as_str()),
        ("hello", "ECONNREFUSED")
    );
    home.nido(["net", "allow", "copy", &outside]).problem(1, "denied");
    let again = home.nido(["template", "create", "again", "--from", "copy", "--no-bake", "--json"]).json();
    assert_eq!(again["template"]["allow"], json!([rule]));
    home.nido(["create", "last", "-T", "again", "--allow", &outside]).problem(1, "denied");
}
