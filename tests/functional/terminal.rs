//! nido on a terminal: what is shown, what is passed on, and that the terminal is whole afterwards.

use rustix::process::Signal;

use crate::support::Home;

fn vm() -> Home {
    let home = Home::new();
    home.spawn("web");
    home
}

#[test]
fn guest_output_is_escaped_on_a_terminal_by_default() {
    let home = vm();
    let nasty = "printf '\\033]0;owned\\007\\033[2J\\033[31mred\\n'";
    let mut terminal = home.nido(["exec", "web", "--", "sh", "-c", nasty]).on_terminal();
    terminal.shows("^[]0;owned^G^[[2J\x1b[31mred");
    let (code, seen) = terminal.ends();
    assert_eq!(code, 0);
    assert!(seen.ends_with("\x1b[0m"), "{seen:?}");
    let mut raw = home.nido(["exec", "web", "--raw", "--", "sh", "-c", nasty]).on_terminal();
    raw.shows("\x1b]0;owned\x07\x1b[2J");
    assert_eq!(raw.ends().0, 0);
}

#[test]
fn a_shell_has_a_terminal_of_our_size_that_follows_ours() {
    let home = vm();
    let mut terminal = home.nido(["exec", "-it", "web", "--", "sh"]).on_terminal();
    terminal.types("PS1=; stty size; tty; echo \"<$TERM>\"\n");
    terminal.shows("40 120\r\n");
    terminal.shows("<xterm>");
    assert!(terminal.is_raw());
    terminal.resizes(33, 99);
    terminal.types("until [ \"$(stty size)\" = '33 99' ]; do sleep 0.05; done; echo res\"\"ized\n");
    terminal.shows("resized");
    // Ctrl-C is a key like others: it interrupts what runs in there, not nido.
    terminal.types("sh -c 'trap \"echo inter\"\"rupted; exit\" INT; echo rea\"\"dy; while :; do sleep 0.05; done'\n");
    terminal.shows("ready\r\n");
    terminal.types("\x03");
    terminal.shows("interrupted");
    terminal.types("exit 5\n");
    assert_eq!(terminal.ends().0, 5);
}

#[test]
fn the_terminal_is_given_back_when_nido_is_ended() {
    let home = vm();
    for signal in [Signal::TERM, Signal::HUP] {
        let mut terminal =
            home.nido(["exec", "-it", "web", "--", "sh", "-c", "echo rea\"\"dy; sleep 1000"]).on_terminal();
        terminal.shows("ready");
        assert!(terminal.is_raw());
        terminal.signal(signal);
        assert_eq!(terminal.ends().0, 128 + signal.as_raw());
    }
}

#[test]
fn without_a_terminal_none_is_pretended() {
    let home = vm();
    home.nido(["exec", "-it", "web", "--json", "--", "sh"]).run().fails(125, "spec_invalid");
    let ran = home.nido(["exec", "-it", "web", "--", "sh"]).run().exits(125);
    assert!(ran.stderr.contains("standard input"), "{}", ran.stderr);
    home.nido(["shell", "web"]).run().exits(125);
}

#[test]
fn progress_is_drawn_and_gone_afterwards() {
    let home = Home::new();
    let mut terminal = home.nido(["spawn", "web", "--accel", "tcg"]).on_terminal();
    terminal.shows("web is ready after ");
    let (code, seen) = terminal.ends();
    assert_eq!(code, 0);
    let shown = seen.split("\r\n").last().unwrap_or_default();
    assert!(shown.is_empty(), "{seen:?}");
}

#[test]
fn on_a_terminal_delete_prompts_first() {
    let home = Home::new();
    home.nido(["create", "web"]).run().ok();
    let mut terminal = home.nido(["delete", "web"]).on_terminal();
    terminal.shows("delete web and all data in it? [y/N] ");
    terminal.types("n\n");
    assert_eq!(terminal.ends().0, 1);
    assert_eq!(home.names(), ["web"]);
    let mut terminal = home.nido(["delete", "web"]).on_terminal();
    terminal.shows("[y/N] ");
    terminal.types("y\n");
    assert_eq!(terminal.ends().0, 0);
    home.nido(["create", "web"]).run().ok();
    assert_eq!(home.nido(["delete", "web", "--yes"]).on_terminal().ends().0, 0);
    home.expect_empty();
}

#[test]
fn an_error_is_coloured_unless_that_is_unwanted() {
    let home = Home::new();
    let (_, seen) = home.nido(["info", "web"]).on_terminal().ends();
    assert!(seen.contains("\x1b[1;31merror:\x1b[0m "), "{seen:?}");
    for nido in [home.nido(["info", "web", "--no-color"]), home.nido(["info", "web"]).env("NO_COLOR", "1")] {
        let (_, seen) = nido.on_terminal().ends();
        assert!(seen.contains("error: ") && !seen.contains('\x1b'), "{seen:?}");
    }
}
