//! Failures: with the contract's code, one sentence, and no orphans.

use rustix::process::Signal;

use crate::support::Home;
use crate::support::run::Nido;

#[test]
fn missing_objects_are_reported() {
    let home = Home::new();
    for arguments in [["info", "web"], ["start", "web"], ["stop", "web"], ["delete", "web"], ["logs", "web"]] {
        home.nido(arguments).arg("--json").run().fails(1, "vm_not_found");
    }
    home.nido(["exec", "web", "--json", "--", "true"]).run().fails(125, "vm_not_found");
    home.nido(["spawn", "web", "--json", "-T", "nothing"]).run().fails(1, "template_not_found");
    home.nido(["template", "info", "nothing", "--json"]).run().fails(1, "template_not_found");
    home.nido(["template", "build", "nothing", "--json"]).run().fails(1, "template_not_found");
    home.nido(["create", "web"]).run().ok();
    home.nido(["template", "create", "mine", "--from", "web", "--json"]).run().fails(1, "vm_not_running");
    home.nido(["create", "web", "--json"]).run().fails(1, "vm_exists");
    home.nido(["spawn", "web", "--json"]).run().fails(1, "vm_exists");
    assert_eq!(home.names(), ["web"], "the VM that was there is untouched");
    home.nido(["template", "delete", "sandbox", "--json"]).run().fails(1, "template_in_use");
}

#[test]
fn without_a_usable_qemu_there_is_no_vm() {
    let home = Home::new();
    home.qemu("old-version");
    home.nido(["spawn", "web", "--json"]).run().fails(1, "qemu_too_old");
    home.qemu("not-qemu");
    home.nido(["spawn", "web", "--json"]).run().exits(1);
    std::fs::remove_file(home.qemu_path()).unwrap();
    home.nido(["spawn", "web", "--json"]).run().fails(1, "qemu_missing");
    home.expect_empty();
}

#[test]
fn isolation_that_is_required_is_not_replaced() {
    let home = Home::new();
    let spawn = ["spawn", "web", "--json", "--accel", "tcg", "--require-isolation"];
    home.nido(spawn).run().fails(1, "isolation_required");
    home.expect_empty();
}

#[test]
fn a_qemu_that_fails_at_its_start_is_quoted_escaped() {
    let home = Home::new();
    home.qemu("escape-stderr;die-at-start:the disk is made of cheese");
    let problem = home.nido(["spawn", "web", "--json"]).run().fails(1, "qemu_failed");
    assert!(problem["log_tail"].to_string().contains("made of cheese"), "{problem}");
    let told = home.nido(["spawn", "web"]).run().exits(1);
    assert!(told.stderr.contains("made of cheese") && told.stderr.contains("^["), "{}", told.stderr);
    assert!(!told.stderr.contains('\x1b'), "{:?}", told.stderr);
    home.expect_empty();
}

#[test]
fn a_guest_that_never_answers_ends_at_its_deadline() {
    let home = Home::new();
    home.qemu("no-agent;escape-console");
    let spawn = ["spawn", "web", "--json", "--accel", "tcg", "--timeout", "1s"];
    let problem = home.nido(spawn).run().fails(1, "agent_unreachable");
    assert!(problem["log_tail"].to_string().contains("Linux version"), "{problem}");
    home.expect_empty();
}

/// A home that was made to believe that KVM works, or that it does not. `None`: there is no `/dev/kvm` that opens, so nothing
/// can be believed of it.
struct KvmVerdict {
    cached: std::path::PathBuf,
    entry: serde_json::Value,
}

impl KvmVerdict {
    const WORKS: &str = r#"{"verdict": "usable", "micros": 9}"#;
    const BROKEN: &str = r#"{"verdict": "present_unusable", "reason": "the test says so"}"#;

    fn of(home: &Home) -> Option<Self> {
        home.nido(["doctor"]).run().ok();
        let cached = home.path().join("cache/kvm.json");
        let entry = serde_json::from_str(&std::fs::read_to_string(&cached).ok()?).unwrap();
        Some(Self { cached, entry })
    }

    fn write(&self, verdict: &str) -> String {
        let mut entry = self.entry.clone();
        entry["value"] = serde_json::from_str(verdict).unwrap();
        std::fs::write(&self.cached, entry.to_string()).unwrap();
        entry.to_string()
    }

    /// What is cached now: a verdict of the experiment's, or none while it is undecided.
    fn read(&self) -> Option<String> {
        std::fs::read_to_string(&self.cached).ok()
    }
}

/// A guest that did not answer under KVM was started again under TCG, and so was every later VM of the home.
#[test]
fn a_vm_that_fails_under_kvm_has_failed_and_lowers_no_isolation() {
    let home = Home::new();
    home.qemu("kvm-is-broken");
    let Some(kvm) = KvmVerdict::of(&home) else {
        eprintln!("SKIPPED: this host's /dev/kvm does not open, so nothing can be believed of it");
        return;
    };
    let forged = kvm.write(KvmVerdict::WORKS);
    for more in ["--accel=auto", "--ephemeral", "--accel=kvm"] {
        kvm.write(KvmVerdict::WORKS);
        home.nido(["spawn", "web", more, "--timeout", "2s", "--json"]).run().fails(1, "agent_unreachable");
        home.expect_empty();
        // Only the experiment decides, and it ran again: the host's own verdict stands there, or none if it was busy.
        let cached = kvm.read();
        assert_ne!(cached.as_deref(), Some(forged.as_str()));
        let entry = cached.map(|text| serde_json::from_str::<serde_json::Value>(&text).unwrap());
        let verdict = entry.map_or_else(String::new, |entry| entry["value"].to_string());
        assert!(!verdict.contains("web") && !verdict.contains("boot"), "a guest has written a verdict: {verdict}");
    }
    // The same without a waiting command.
    kvm.write(KvmVerdict::WORKS);
    home.nido(["spawn", "later", "--timeout", "2s", "--no-wait"]).run().ok();
    let info = home.await_info("later", |info| info["status"] == "failed");
    assert_eq!(
        (info["failure"]["cause"].as_str(), info["accel"].as_str()),
        (Some("guest_timeout"), Some("kvm")),
        "{info}"
    );
}

/// A VM that had run under KVM was emulated at its next start if KVM was found wanting meanwhile.
#[test]
fn a_vm_that_ran_with_isolation_starts_without_it_only_on_request() {
    let home = Home::new();
    let Some(kvm) = KvmVerdict::of(&home) else {
        eprintln!("SKIPPED: this host's /dev/kvm does not open, so nothing can be believed of it");
        return;
    };
    kvm.write(KvmVerdict::WORKS);
    home.nido(["spawn", "web"]).run().ok();
    assert_eq!(home.info("web")["isolation"], "hardware");
    kvm.write(KvmVerdict::BROKEN);
    home.nido(["restart", "web", "--json"]).run().fails(1, "isolation_required");
    home.nido(["start", "web", "--json"]).run().fails(1, "isolation_required");
    home.nido(["start", "web", "--cold", "--json"]).run().fails(1, "isolation_required");
    assert_eq!(home.info("web")["status"], "stopped");
    let started = home.nido(["start", "web", "--accel", "tcg"]).run().ok();
    assert!(started.stderr.contains("no hardware isolation"), "{}", started.stderr);
    assert_eq!(home.info("web")["isolation"], "emulation");
    // It was given up; and it comes back where it can be had.
    home.nido(["restart", "web"]).run().ok();
    kvm.write(KvmVerdict::WORKS);
    home.nido(["restart", "web"]).run().ok();
    let info = home.info("web");
    assert_eq!(info["isolation"], "hardware", "{info}");
    // A VM that never had any starts as before.
    kvm.write(KvmVerdict::BROKEN);
    home.nido(["spawn", "db"]).run().ok();
    home.nido(["restart", "db"]).run().ok();
}

#[test]
fn a_silent_monitor_ends_at_a_deadline() {
    let home = Home::new();
    for words in ["no-greeting", "garbage-qmp", "never-listens"] {
        home.qemu(words);
        let ran = home.nido(["spawn", "web", "--json", "--timeout", "2s"]).run().exits(1);
        assert!(ran.problem()["code"].is_string(), "{words}");
        home.expect_empty();
    }
}

#[test]
fn a_vm_whose_monitor_went_silent_can_be_deleted() {
    let home = Home::new();
    home.qemu("hang-qmp");
    drop(home.nido(["spawn", "web", "--timeout", "2s"]).run());
    for name in home.names() {
        home.nido(["delete", &name, "--force", "--yes"]).run().ok();
    }
    home.expect_empty();
}

#[test]
fn unknown_events_are_ignored() {
    let home = Home::new();
    home.qemu("unknown-event");
    home.spawn("web");
    home.nido(["pause", "web"]).run().ok();
    home.nido(["resume", "web"]).run().ok();
    home.nido(["stop", "web"]).run().ok();
}

#[test]
fn a_failed_vm_reports_why() {
    let home = Home::new();
    for (words, cause, status) in [
        ("panic-after-ms:400", "guest_panic", "failed"),
        ("exit-signal:9@400", "qemu_signal", "failed"),
        ("die-after-ms:400", "qemu_error", "failed"),
        ("shutdown-after-ms:400", "", "stopped"),
    ] {
        home.qemu(words);
        home.nido(["spawn", "web", "--no-wait", "--accel", "tcg"]).run().ok();
        let info = home.await_info("web", |info| ["failed", "stopped"].contains(&info["status"].as_str().unwrap()));
        assert_eq!(info["status"], status, "{words}: {info}");
        assert_eq!(info["failure"]["cause"].as_str().unwrap_or_default(), cause, "{words}: {info}");
        home.nido(["delete", "web"]).run().ok();
    }
}

#[test]
fn an_interrupted_spawn_leaves_nothing() {
    for signal in [Signal::INT, Signal::TERM] {
        let home = Home::new();
        home.qemu("no-agent");
        let mut spawn = home.nido(["spawn", "web", "--accel", "tcg"]).start();
        spawn.until("the VM's row", || (home.names() == ["web"]).then_some(()));
        spawn.signal(signal);
        let ran = spawn.wait().exits(128 + signal.as_raw());
        assert!(ran.stderr.contains("interrupted; removing web"), "{}", ran.stderr);
        home.expect_empty();
    }
}

#[test]
fn an_interrupted_spawn_does_not_touch_a_vm_that_was_there() {
    let home = Home::new();
    home.nido(["create", "web"]).run().ok();
    // Whether the signal comes before or after the refusal, the VM stays.
    let spawn = home.nido(["spawn", "web"]).start();
    spawn.signal(Signal::TERM);
    drop(spawn.wait());
    assert_eq!(home.names(), ["web"]);
}

#[test]
fn a_killed_spawn_leaves_nothing_that_cannot_be_deleted() {
    let home = Home::new();
    home.qemu("no-agent");
    let mut spawn = home.nido(["spawn", "web", "--accel", "tcg"]).start();
    spawn.until("the VM's row", || (home.names() == ["web"]).then_some(()));
    spawn.signal(Signal::KILL);
    home.nido(["delete", "web", "--force", "--yes"]).run().ok();
    home.expect_empty();
}

#[test]
fn a_template_that_lost_a_part_is_not_booted() {
    let home = Home::new();
    home.nido(["create", "old"]).run().ok();
    for blob in std::fs::read_dir(home.path().join("blobs/sha256")).unwrap().flatten() {
        if std::fs::read(blob.path()).unwrap() == b"vmlinux" {
            std::fs::remove_file(blob.path()).unwrap();
        }
    }
    home.nido(["spawn", "web", "--json"]).run().fails(1, "template_mismatch");
    let problem = home.nido(["start", "old", "--json"]).run().exits(1).problem();
    assert!(problem["detail"].is_string() && problem["code"] != "internal", "{problem}");
    home.nido(["delete", "old"]).run().ok();
    home.expect_empty();
}

#[test]
fn a_full_disk_is_reported_and_survived() {
    let home = Home::new();
    home.nido(["create", "old"]).run().ok();
    let small = home.scratch("small");
    std::fs::create_dir(&small).unwrap();
    // A tiny file system of its own, that only this script and what it starts can see.
    let script = "set -e
        mount -t tmpfs -o size=2m,mode=700 none \"$1\"
        cp -r \"$2\"/. \"$1\"
        cat /dev/zero > \"$1/filler\" 2> /dev/null || true
        \"$3\" --home \"$1\" create web --json || echo \"exit $?\"
        # What gives space back works all the same: something was kept for it.
        \"$3\" --home \"$1\" delete old --yes
        rm \"$1/filler\"
        \"$3\" --home \"$1\" create web
        \"$3\" --home \"$1\" ls -q";
    let mut command = std::process::Command::new("unshare");
    command.args(["--map-root-user", "--mount", "sh", "-c", script, "sh"]);
    command.arg(&small).arg(home.path()).arg(env!("CARGO_BIN_EXE_nido")).env("NIDO_QEMU", home.qemu_path());
    let ran = command.output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(stderr.contains("\"code\":\"disk_full\""), "{stdout}{stderr}");
    assert_eq!(stdout, "exit 1\nold\nweb\nweb\n", "{stderr}");
}

#[test]
fn the_doctor_reports_what_is_missing() {
    let home = Home::new();
    let well = home.nido(["doctor", "--json"]).run();
    assert!(well.json()["checks"].as_array().unwrap().len() > 3);
    std::fs::remove_file(home.qemu_path()).unwrap();
    let ill = home.nido(["doctor", "--json"]).run().exits(1);
    assert_eq!(ill.json()["ok"], false);
    let told = home.nido(["doctor"]).run().exits(1);
    assert!(told.text().contains("failed   ") && told.text().contains("hint: "), "{}", told.text());
}

/// The doctor and a start report the same about a QEMU.
#[test]
fn the_doctor_reports_which_vms_a_qemu_can_start() {
    let machine = |home: &Home, code: i32| {
        let report = home.nido(["doctor", "--json"]).run().exits(code).json();
        let checks = report["checks"].as_array().unwrap();
        checks.iter().find(|check| check["name"] == "machine").unwrap().clone()
    };
    let all = ["", "lacks:microvm"];
    let some = [("lacks:dgram", "--net none"), ("lacks:microvm;lacks:q35", "--machine pc")];
    let none = ["lacks:sandbox", "lacks:microvm;lacks:q35;lacks:pc"];
    for words in all {
        let home = Home::new();
        home.qemu(words);
        assert_eq!(machine(&home, 0)["status"], "ok", "{words}");
        home.nido(["create", "web"]).run().ok();
    }
    for (words, flags) in some {
        let home = Home::new();
        home.qemu(words);
        let check = machine(&home, 0);
        assert_eq!(check["status"], "warning", "{words}: {check}");
        assert!(check["detail"].as_str().unwrap().contains(flags), "{check}");
        home.nido(["create", "web", "--json"]).run().fails(1, "qemu_too_old");
        flags.split(' ').fold(home.nido(["create", "web"]), Nido::arg).run().ok();
    }
    for words in none {
        let home = Home::new();
        home.qemu(words);
        let check = machine(&home, 1);
        assert_eq!(check["status"], "failed", "{words}: {check}");
        assert!(check["hint"].is_string(), "{check}");
        home.nido(["create", "web", "--net", "none", "--machine", "pc", "--json"]).run().fails(1, "qemu_too_old");
    }
}
