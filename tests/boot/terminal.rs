//! `nido` on a terminal: exec with a terminal in the guest, shell, and what an untrusted guest may do to it.

use crate::rig::{TestHome, eventually};

#[test]
fn a_command_on_a_terminal() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    let on_terminal = |command: &[&str]| home.nido(["exec", "-it", "web", "--"]).args(command).on_terminal(33, 101);

    // Size, type, both streams on one screen.
    let terminal = on_terminal(&["sh", "-c", "stty size; echo $TERM; tty; echo err >&2"]);
    let (code, screen) = terminal.wait();
    assert_eq!(code, 0);
    assert_eq!(screen.replace('\r', ""), "33 101\nxterm\n/dev/pts/0\nerr\n");

    // A new size reaches the command.
    let mut terminal = on_terminal(&[
        "bash",
        "-c",
        "trap 'stty size' WINCH; trap 'exit 130' INT; echo up; while :; do sleep 0.1; done",
    ]);
    terminal.expect("up");
    terminal.resize(20, 60);
    terminal.expect("20 60");
    assert!(!terminal.is_cooked(), "keys go to the guest as they are");
    // Ctrl-C is the guest's.
    terminal.keys("\x03");
    let (code, _) = terminal.wait();
    assert_eq!(code, 130);

    // Ctrl-D ends the input.
    let mut terminal = on_terminal(&["cat"]);
    terminal.keys("hello\r");
    terminal.expect("hello\r\nhello\r\n");
    terminal.keys("\x04");
    assert_eq!(terminal.wait().0, 0);

    // A terminal must be there.
    home.nido(["exec", "-t", "web", "--", "true"]).run().expect(125);
    home.nido(["exec", "-it", "web", "--", "true"]).run().expect(125);
    vm.nido("shell", &[]).run().expect(125);
}

#[test]
fn a_login_shell() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    let mut shell = vm.nido("shell", &["-u", "user", "-w", "/srv"]).on_terminal(24, 80);
    shell.expect("$ ");
    shell.keys("echo $0 $(whoami) $(pwd) $((6*7))\r");
    shell.expect("-bash user /srv 42\r\n");
    // Job control needs a terminal that controls the session.
    shell.keys("sleep 98769\r");
    eventually("the sleep", || vm.exec(["pgrep", "-x", "-f", "sleep 98769"]).run().code.eq(&0).then_some(()));
    shell.keys("\x1a");
    shell.expect("Stopped");
    // Only a shell that asks is sure to take what is typed. A plain exit would be refused while a job is stopped.
    shell.expect("$ ");
    shell.keys("exec sh -c 'exit 3'\r");
    let (code, _) = shell.wait();
    assert_eq!(code, 3);
}

#[test]
fn guest_text_does_not_steer_the_terminal() {
    let home = TestHome::new();
    home.spawn("web", &["--net", "none"]);
    let hostile = "printf '\\033]0;owned\\007\\033[2J\\033[31mred\\033[0m \\302\\233x \\342\\200\\256 end\\n'";
    let show = |flags: &[&str]| {
        home.nido(["exec", "web"]).args(flags).args(["--", "sh", "-c", hostile]).on_terminal(24, 80).wait().1
    };
    let safe = show(&[]);
    assert!(safe.contains("\x1b[31mred\x1b[0m"), "plain colours pass: {safe:?}");
    let rest = safe.replace("\x1b[31m", "").replace("\x1b[0m", "");
    assert!(!rest.contains(['\x1b', '\x07', '\u{9b}', '\u{202e}']), "{safe:?}");
    assert!(rest.contains("^[]0;owned^G^[[2J"), "{safe:?}");
    assert!(show(&["--raw"]).contains("\x1b[2J"), "who asks for raw bytes gets them");
}

#[test]
fn delete_prompts_on_a_terminal() {
    let home = TestHome::new();
    home.nido(["create", "web"]).ok();
    for (answer, code, left) in [("n\r", 1, true), ("\r", 1, true), ("y\r", 0, false)] {
        let mut terminal = home.nido(["delete", "web"]).on_terminal(24, 80);
        terminal.expect("[y/N]");
        terminal.keys(answer);
        assert_eq!(terminal.wait().0, code);
        assert_eq!(home.names().contains(&"web".to_owned()), left);
    }
}
