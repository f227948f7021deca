//! Logs: shown harmlessly, followed to the end.

use crate::support::Home;

#[test]
fn guest_output_is_shown_escaped() {
    let home = Home::new();
    home.qemu("escape-console");
    home.spawn("web");
    let shown = home.nido(["logs", "web"]).run().ok();
    assert!(shown.text().contains("Linux version"), "{}", shown.text());
    assert!(shown.text().contains("^[]0;owned^G^[[2J\x1b[31mred\x1b[0m"), "{:?}", shown.text());
    let raw = home.nido(["logs", "web", "--raw"]).run().ok();
    assert!(raw.text().contains("\x1b]0;owned\x07\x1b[2J"), "{:?}", raw.text());
    let last = home.nido(["logs", "web", "--tail", "1", "--json"]).run().ok();
    assert_eq!(last.json()["line"], "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x1b[0m");
    home.nido(["logs", "web", "--source", "qemu"]).run().ok();
    home.nido(["logs", "web", "--source", "supervisor"]).run().ok();
}

#[test]
fn a_followed_log_ends_with_the_vm() {
    let home = Home::new();
    home.spawn("web");
    let follow = home.nido(["logs", "web", "-f"]).start();
    assert!(follow.line().contains("Linux version"));
    home.nido(["stop", "web"]).run().ok();
    follow.wait().ok();
}
