//! start, stop, pause, resume, restart, delete: what each does, also when there is nothing to do.

use crate::rig::TestHome;

#[test]
fn pause_and_resume() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    let boot = vm.exec(["cat", "/proc/sys/kernel/random/boot_id"]).text();
    vm.sh("nohup sh -c 'while :; do date +%s%N > /tmp/tick; sleep 0.02; done' >/dev/null 2>&1 &").ok();

    vm.nido("resume", &[]).ok();
    vm.nido("pause", &[]).ok();
    assert_eq!(vm.status(), "paused");
    assert_eq!(home.nido(["ls"]).text().lines().nth(1).unwrap().split_whitespace().nth(1), Some("paused"));
    vm.nido("pause", &[]).ok();
    let problem = vm.exec(["true"]).problem(125, "vm_not_running");
    assert_eq!(problem["hint"], "nido resume web");
    vm.nido("start", &[]).problem(1, "vm_not_running");
    vm.nido("download", &["/etc/hosts", "-"]).problem(1, "vm_not_running");
    home.nido(["delete", "web"]).problem(1, "vm_busy");

    vm.nido("resume", &[]).ok();
    assert_eq!(vm.status(), "running");
    assert_eq!(vm.exec(["cat", "/proc/sys/kernel/random/boot_id"]).text(), boot, "it is the same boot");
    vm.sh("rm /tmp/tick; until test -s /tmp/tick; do sleep 0.1; done").ok();

    // A paused VM can be stopped, in order.
    vm.sh("echo kept > /root/note").ok();
    vm.nido("pause", &[]).ok();
    vm.nido("stop", &[]).ok();
    assert_eq!(vm.status(), "stopped");
    vm.nido("pause", &[]).problem(1, "vm_not_running");
    vm.nido("resume", &[]).problem(1, "vm_not_running");
    vm.nido("start", &[]).ok();
    assert_eq!(vm.exec(["cat", "/root/note"]).text(), "kept");
}

#[test]
fn stop_start_restart_delete() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    let boot = || vm.exec(["cat", "/proc/sys/kernel/random/boot_id"]).text();
    let first = boot();
    vm.nido("start", &[]).ok();
    assert_eq!(boot(), first, "starting what runs changes nothing");

    // Written, and synced only by the stop.
    vm.sh("echo one > /root/note").ok();
    vm.nido("restart", &[]).ok();
    assert_ne!(boot(), first);
    assert_eq!(vm.exec(["cat", "/root/note"]).text(), "one");

    // A program that ignores the wish to end does not keep the guest from going down.
    let (stubborn, _keys) = vm.sh("trap '' TERM HUP INT; echo up; while :; do sleep 1; done").start();
    stubborn.read_until("up\n");
    vm.nido("stop", &[]).ok();
    // Its end may be heard before the guest's.
    let ended = stubborn.wait();
    assert!([125, 137].contains(&ended.code), "{ended:?}");
    assert_eq!(vm.status(), "stopped");
    assert_eq!(vm.info()["failure"], serde_json::Value::Null);
    vm.nido("stop", &[]).ok();
    vm.nido("stop", &["--force"]).ok();
    let problem = vm.exec(["true"]).problem(125, "vm_not_running");
    assert_eq!(problem["hint"], "nido start web");
    vm.nido("upload", &["/etc/hosts", "/x"]).problem(1, "vm_not_running");
    vm.nido("proxy", &["80"]).problem(1, "vm_not_running");
    vm.nido("logs", &[]).ok();

    vm.nido("start", &["--no-wait"]).ok();
    // A command that needs the guest waits for it.
    assert_eq!(vm.exec(["cat", "/root/note"]).text(), "one");
    vm.nido("stop", &["--force"]).ok();
    assert_eq!(vm.status(), "stopped");
    vm.nido("restart", &[]).ok();
    assert_eq!(vm.exec(["cat", "/root/note"]).text(), "one");

    // Created, never started.
    home.nido(["create", "other"]).ok();
    assert_eq!(home.nido(["info", "other"]).json()["status"], "created");
    home.nido(["exec", "other", "--", "true"]).problem(125, "vm_not_running");
    home.nido(["stop", "other"]).ok();

    // Of several names the good ones are deleted.
    let done = home.nido(["delete", "web", "other", "missing"]).run().expect(1);
    assert!(done.stderr.contains("web") && done.stderr.contains("missing"), "{}", done.stderr);
    assert_eq!(home.names(), ["web"]);
    home.nido(["delete", "web", "--force", "--yes"]).ok();
    home.assert_empty();
}

#[test]
fn files_of_the_guest_that_cannot_be_written_do_not_keep_it_from_starting() {
    // Process 1 ended when it could not write the hosts file: the VM never started again, and it could not be repaired.
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    let lines = "10.0.0.5\\tdb # caf\\351\\n127.0.1.1\\tweb.example web2\\n";
    vm.sh(&format!("printf '{lines}' >>/etc/hosts; cp /etc/hosts /root/before")).ok();
    vm.nido("restart", &[]).ok();
    vm.sh("cmp /etc/hosts /root/before").ok();

    vm.sh("rm /etc/hosts /etc/hostname; mkdir -p /etc/hosts/x; mkfifo /etc/hostname; rm -rf /tmp; touch /tmp").ok();
    vm.nido("restart", &[]).ok();
    assert_eq!(vm.sh("hostname").text(), "web");
    let warnings = home.nido(["info", "web"]).json()["warnings"].to_string();
    assert!(warnings.contains("/etc/hosts: not a regular file") && warnings.contains("/tmp"), "{warnings}");

    vm.sh("rm -r /etc/hosts /tmp; echo '10.0.0.5 db' >/etc/hosts; chattr +i /etc/hosts").ok();
    vm.nido("restart", &[]).ok();
    home.nido(["fork", "web", "copy"]).ok();
    let copy = |script: &str| home.nido(["exec", "copy", "--", "sh", "-c", script]).text();
    assert_eq!(copy("hostname; cat /etc/hosts"), "copy\n10.0.0.5 db");
    assert!(home.nido(["info", "copy"]).json()["warnings"].to_string().contains("/etc/hosts"));
    home.nido(["delete", "--force", "copy"]).ok();
}
