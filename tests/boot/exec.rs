//! Commands in a guest: what they are given, what comes back, how they end.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;

use crate::rig::{TestHome, Vm, eventually};

/// Pids of processes in the guest with this argument; the looking itself left out.
fn pids_with(vm: &Vm<'_>, argument: &str) -> String {
    vm.exec(["pgrep", "-x", "-f", argument]).run().text()
}

#[test]
fn arguments_environment_place_and_user() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);

    // Arguments arrive byte for byte, and no shell sees them.
    let odd: [&[u8]; 10] = [
        b"a b",
        b"",
        b"-x",
        b"--",
        "\u{e9}\u{1f600}".as_bytes(),
        b"\xff\xfe",
        b"new\nline",
        b"$HOME `id` 'q' \"q\"",
        b"*",
        b"\x1b[2J",
    ];
    let print = [&b"sh"[..], b"-c", b"for a; do printf '%s\\0' \"$a\"; done", b"sh"];
    let words = print.iter().chain(&odd).map(|word| OsStr::from_bytes(word));
    let expected: Vec<u8> = odd.iter().flat_map(|word| word.iter().chain(&[0])).copied().collect();
    assert_eq!(vm.exec(words).ok().stdout, expected);

    let with = |flags: &[&str], command: &[&str]| home.nido(["exec", "web"]).args(flags).args(["--"]).args(command);
    let print = &["sh", "-c", "printf '%s|' \"$A\" \"$B\" \"${C-unset}\" \"${D-unset}\""];
    let env = with(&["-e", "A=1", "-e", "B=x y=z", "-e", "C=", "-e", "FROM_HERE"], print);
    assert_eq!(env.env("FROM_HERE", "v").text(), "1|x y=z||unset|");
    assert_eq!(with(&["-e", "FROM_HERE"], &["printenv", "FROM_HERE"]).env("FROM_HERE", "v w").text(), "v w");
    with(&["-e", "=x"], &["true"]).problem(125, "spec_invalid");
    assert_eq!(vm.exec(["printenv", "NIDO_HOME"]).run().code, 1, "this side's environment stays on this side");

    assert_eq!(vm.exec(["pwd"]).text(), "/root");
    assert_eq!(with(&["-w", "/usr/share"], &["pwd"]).text(), "/usr/share");
    with(&["-w", "/no/such"], &["pwd"]).problem(126, "directory_not_found");
    with(&["-w", "/etc/passwd"], &["pwd"]).problem(126, "directory_not_found");

    vm.exec(["usermod", "-aG", "audio", "user"]).ok();
    for user in ["user", "1000"] {
        let seen = with(&["-u", user], &["sh", "-c", "id -un; id -u; id -g; id -Gn; pwd; echo $HOME $USER"]).text();
        assert_eq!(seen, "user\n1000\n1000\nuser audio\n/home/user\n/home/user user");
    }
    assert_eq!(with(&["-u", "user"], &["cat", "/etc/shadow"]).run().code, 1, "an ordinary user reads no secrets");
    with(&["-u", "nobody-of-that-name"], &["true"]).problem(126, "user_not_found");

    let both = vm.sh("echo out; echo err >&2").ok();
    assert_eq!((both.stdout.as_slice(), both.stderr.as_str()), (&b"out\n"[..], "err\n"));
    assert_eq!(vm.exec(["cat"]).stdin("not passed on").ok().stdout, b"", "without -i there is no input");

    vm.exec(["no-such-command"]).problem(127, "command_not_found");
    vm.exec(["/no/such/command"]).problem(127, "command_not_found");
    vm.exec(["/etc/passwd"]).problem(126, "command_cannot_run");
    vm.exec(["/etc"]).problem(126, "command_cannot_run");
    vm.sh("printf '#!/no/interpreter\\n' > /tmp/x && chmod +x /tmp/x").ok();
    vm.exec(["/tmp/x"]).problem(126, "command_cannot_run");
    vm.exec([""]).run().expect(125);
}

#[test]
fn every_exit_code_and_signal_is_returned() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    for code in 0..=255 {
        vm.sh(&format!("exit {code}")).run().expect(code);
    }
    for (signal, number) in [("HUP", 1), ("INT", 2), ("ABRT", 6), ("KILL", 9), ("SEGV", 11), ("TERM", 15)] {
        vm.sh(&format!("kill -{signal} $$")).run().expect(128 + number);
    }
    let told = vm.home.nido(["exec", "web", "--json", "--", "sh", "-c", "kill -9 $$"]).run().expect(137).json();
    assert_eq!((&told["exit_code"], &told["signal"]), (&serde_json::Value::Null, &9.into()));
}

#[test]
fn a_timeout_ends_the_whole_group() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    let script = "trap '' TERM INT HUP; sleep 98765 & (sleep 98765 & wait) & echo up; wait";
    let done = home.nido(["exec", "web", "--timeout", "2s", "--", "sh", "-c", script]).run().expect(124);
    assert_eq!(done.stdout, b"up\n");
    eventually("the end of the group", || pids_with(&vm, "sleep 98765").is_empty().then_some(()));
    let told = home.nido(["exec", "web", "--json", "--timeout", "300ms", "--", "sleep", "98765"]).run().expect(124);
    assert_eq!(told.json()["timed_out"], true);
    // Time enough changes nothing.
    home.nido(["exec", "web", "--timeout", "10m", "--", "sh", "-c", "exit 5"]).run().expect(5);
}

#[test]
fn streams_are_complete_and_not_buffered() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);

    const OUTPUT: usize = 50 << 20;
    let out = vm.sh(&format!("yes 0123456789abcde | head -c {OUTPUT}")).ok().stdout;
    assert_eq!(out.len(), OUTPUT);
    assert!(out.chunks(16).all(|line| line == &b"0123456789abcde\n"[..line.len()]), "50 MiB arrive as they were");

    let interactive = |command: &[&str]| home.nido(["exec", "-i", "web", "--"]).args(command);
    let input: Vec<u8> = (0..20u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    assert_eq!(interactive(&["wc", "-c"]).stdin(input.clone()).text(), input.len().to_string());
    assert!(interactive(&["cat"]).stdin(input.clone()).ok().stdout == input, "20 MiB through the guest and back");

    // As it comes, not at the end.
    let (running, mut keys) = interactive(&["cat"]).start();
    for line in ["one\n", "two\n"] {
        keys.write_all(line.as_bytes()).unwrap();
        running.read_until(line);
    }
    drop(keys);
    running.wait().expect(0);

    // A command that does not want its input does not hold anything up.
    interactive(&["true"]).stdin(input.clone()).ok();
    interactive(&["head", "-c", "3"]).stdin(input).ok();

    // What a background process holds open does not keep the command from ending.
    vm.sh("sleep 98766 & echo done").ok();
    vm.exec(["pkill", "-x", "-f", "sleep 98766"]).ok();
}

#[test]
fn a_blocked_command_does_not_block_others() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    // One without output, one whose output is not read, one whose input is not read.
    let (_silent, _silent_keys) = vm.exec(["sleep", "98767"]).start();
    let (unread, _unread_keys) = vm.exec(["yes"]).start();
    unread.read_until("y\ny\n");
    let (_deaf, mut deaf_keys) = home.nido(["exec", "-i", "web", "--", "sleep", "98767"]).start();
    let feed = std::thread::spawn(move || deaf_keys.write_all(&vec![0; 8 << 20]));
    std::thread::scope(|scope| {
        for number in 0..20 {
            let vm = &vm;
            scope.spawn(move || {
                let script = format!("seq 1 2000 | tail -n 1; echo {number}; exit {number}");
                let done = vm.sh(&script).run().expect(number);
                assert_eq!(done.text(), format!("2000\n{number}"));
            });
        }
    });
    for stuck in [_silent, unread, _deaf] {
        stuck.signal(rustix::process::Signal::KILL);
        stuck.wait().expect(137);
    }
    assert!(feed.join().unwrap().is_err());
    // When their callers have ended, the commands end, too.
    for command in ["sleep 98767", "yes"] {
        eventually("the end of what was stuck", || pids_with(&vm, command).is_empty().then_some(()));
    }
}

#[test]
fn the_end_of_a_command_by_force_reaches_all_that_it_started_and_no_other_end_does() {
    // setsid, timeout and daemons that made themselves orphans outlived "kill the command and its children"; and what a
    // command left in the background was killed by its first line of output.
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    vm.sh("(while :; do echo tick; echo tock >&2; sleep 0.05; done) & echo $! >/root/ticker").ok();
    let script = "setsid sh -c 'exec sleep 7001' & timeout 9000 sleep 7002 & (setsid sh -c 'sleep 7003 & :' &); \
                  until test $(pgrep -fc '^sleep 700[123]$') = 3; do sleep 0.1; done; touch /root/all; wait; sleep 9000";
    home.nido(["exec", "web", "--timeout", "15s", "--", "sh", "-c", script]).run().expect(124);
    vm.sh("test -e /root/all && ! pgrep -f '^sleep 700[123]$'").ok();
    vm.sh("kill -0 $(cat /root/ticker)").ok();
    // Its control group goes when it is empty; commands that are over leave none.
    vm.sh("kill $(cat /root/ticker)").ok();
    vm.exec(["true"]).ok();
    let groups = || vm.sh("ls -d /sys/fs/cgroup/nido/*/ | wc -l").text();
    eventually("the end of the empty control groups", || (groups() == "1").then_some(()));
}
