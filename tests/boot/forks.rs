//! VMs that resume from a bake instead of booting: when they do, that each has its own identity, and what is reported where
//! they cannot.

use std::collections::BTreeSet;
use std::fs;

use serde_json::{Value, json};

use crate::rig::{TestHome, Vm, eventually};

fn path(info: &Value) -> &str {
    info["timings"]["path"].as_str().unwrap()
}

#[test]
fn a_fresh_vm_is_forked_and_one_that_was_in_use_boots() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--disk", "4G"]);
    let info = vm.info();
    assert_eq!(path(&info), "fork");
    assert!(info["machine_reason"].as_str().unwrap().contains("forked"), "{info:#}");
    assert_eq!(vm.exec(["hostname"]).text(), "web");
    assert_eq!(vm.sh("cat /etc/hostname; getent hosts web | awk '{print $1}'").text(), "web\n127.0.1.1");
    assert_eq!(vm.sh("ip -br -4 addr show eth0 | awk '{print $3}'").text(), "10.0.2.15/24");
    // The disk that was requested, although the guest was saved with another.
    assert_eq!(vm.exec(["cat", "/sys/block/vda/size"]).text(), ((4_u64 << 30) / 512).to_string());
    eventually("the file system has grown", || {
        let kib: u64 = vm.sh("df -k --output=size / | tail -n 1").text().trim().parse().unwrap();
        (kib > 7 << 19).then_some(())
    });
    vm.sh("echo kept > /root/note").ok();
    let id = vm.exec(["cat", "/etc/machine-id"]).text();
    vm.nido("stop", &[]).ok();
    let again = vm.nido("start", &[]).json();
    assert_eq!(path(&again), "cold");
    assert!(again["machine_reason"].as_str().unwrap().contains("its disk has been in use"), "{again:#}");
    assert_eq!(vm.sh("cat /root/note /etc/machine-id").text(), format!("kept\n{id}"));
    assert_eq!(vm.exec(["cat", "/sys/block/vda/size"]).text(), ((4_u64 << 30) / 512).to_string());
}

#[test]
fn a_created_vm_is_forked_at_its_start() {
    let home = TestHome::new();
    home.nido(["create", "later", "--net", "none"]).ok();
    assert_eq!(path(&home.nido(["start", "later"]).json()), "fork");
    home.nido(["exec", "later", "--", "sh", "-c", "! ip link show eth0"]).ok();
    home.nido(["delete", "--force", "later", "--yes"]).ok();
    assert_eq!(home.nido(["run", "-q", "--fork", "--", "hostname"]).ok().text().get(..4), Some("run-"));
}

#[test]
fn a_vm_without_a_bake_boots_and_reports_why() {
    let home = TestHome::new();
    let cold = home.spawn("asked", &["--cold", "--net", "none"]);
    assert_eq!(path(&cold.info()), "cold");
    assert!(cold.info()["machine_reason"].as_str().unwrap().ends_with("booted as requested"));
    let id = cold.exec(["cat", "/etc/machine-id"]).text();
    assert_eq!(id.len(), 32, "a guest that boots has a machine id of its own: {id:?}");
    cold.delete();

    let refused = home.nido(["spawn", "more", "--memory", "640M", "--fork"]).problem(1, "template_mismatch");
    assert!(refused["detail"].as_str().unwrap().contains("640 MiB"), "{refused:#}");
    home.assert_empty();
    home.nido(["template", "bake", "sandbox", "--memory", "640M", "--net", "none"]).ok();
    let told = home.nido(["template", "info", "sandbox"]).json();
    assert!(told["bakes"].as_array().unwrap().iter().any(|bake| bake["memory_mib"] == 640), "{told:#}");
    let more = home.spawn("more", &["--memory", "640M", "--net", "none", "--fork"]);
    assert_eq!(path(&more.info()), "fork");
    // A second bake of the same machine has nothing to do, unless it is insisted on.
    let again = ["template", "bake", "sandbox", "--memory", "640M", "--net", "none"];
    assert_eq!(home.nido(again).json()["already_baked"], true);
    assert_eq!(home.nido(again).args(["--again"]).json()["already_baked"], false);
    more.exec(["true"]).ok();
    more.delete();
    assert_eq!(home.nido(["doctor", "--gc"]).run().code, 0);
}

#[test]
fn a_bake_of_another_qemu_is_never_loaded() {
    let home = TestHome::new();
    let manifest = home.path().join("templates/sandbox.json");
    let mut template: Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    for bake in template["bakes"].as_array_mut().unwrap() {
        bake["qemu"] = json!({ "version": "6.1.0 (another)", "sha256": "0".repeat(64) });
    }
    fs::write(&manifest, serde_json::to_vec(&template).unwrap()).unwrap();
    let refused = home.nido(["spawn", "web", "--fork"]).problem(1, "template_mismatch");
    assert!(refused["detail"].as_str().unwrap().contains("6.1.0"), "{refused:#}");
    let done = home.nido(["spawn", "web"]).ok();
    assert!(
        done.stderr.contains("booted instead of forked") && done.stderr.contains("a new one has to be baked"),
        "{}",
        done.stderr
    );
    assert_eq!(path(&home.nido(["info", "web"]).json()), "cold");
    // Baked again, it is complete.
    home.nido(["template", "bake", "sandbox"]).ok();
    home.nido(["spawn", "quick", "--fork"]).ok();
    for name in ["web", "quick"] {
        home.nido(["delete", "--force", name, "--yes"]).ok();
    }
}

/// What must be different in every clone.
fn fingerprint(vm: &Vm<'_>) -> Vec<String> {
    let script = "cat /etc/machine-id /proc/sys/kernel/random/boot_id /var/lib/nido-guest/identity /etc/hostname
        head -c 32 /dev/urandom | base64 -w 0; echo
        python3 -c 'import os, uuid; print(os.getrandom(32).hex(), uuid.uuid4())'";
    let mut facts: Vec<_> = vm.sh(script).text().lines().map(str::to_owned).collect();
    assert_eq!(facts.len(), 6, "{facts:?}");
    facts.push(format!("{:?}", fs::read(vm.dir().join("guest.cbor")).unwrap()));
    facts
}

#[test]
fn twenty_clones_share_nothing() {
    let home = TestHome::new();
    let names: Vec<&'static str> = (0..20).map(|number| &*format!("clone-{number}").leak()).collect();
    let vms: Vec<_> = names.iter().map(|name| home.spawn(name, &["--fork"])).collect();
    let mut seen = BTreeSet::new();
    for vm in &vms {
        for fact in fingerprint(vm) {
            assert!(seen.insert(fact.clone()), "two clones share {fact}");
        }
        let guest: f64 = vm.exec(["date", "+%s.%N"]).text().parse().unwrap();
        let host = jiff::Timestamp::now().as_millisecond() as f64 / 1000.0;
        // Off by the age of the bake, it would be minutes; what is left is the time the answer took.
        assert!((guest - host).abs() < 10.0, "the guest's clock says {guest}, the host's {host}");
    }
    // Each writes to a disk and a memory of its own.
    vms[0].sh("echo mine > /root/mine; echo mine > /dev/shm/mine").ok();
    vms[1].sh("! test -e /root/mine && ! test -e /dev/shm/mine").ok();
    // The token of one opens no other.
    fs::copy(vms[1].dir().join("guest.cbor"), vms[0].dir().join("guest.cbor")).unwrap();
    vms[0].exec(["true"]).problem(125, "guest_denied");
    vms.iter().for_each(Vm::delete);
    home.assert_empty();
}

#[test]
fn a_guest_with_systemd_is_forked_too() {
    let home = TestHome::new();
    let mut ids = BTreeSet::new();
    for name in ["left", "right"] {
        let vm = home.spawn(name, &["-T", "debian-12", "--fork"]);
        assert_eq!(vm.sh("hostname; cat /proc/1/comm").text(), format!("{name}\nsystemd"));
        assert!(ids.insert(vm.exec(["cat", "/etc/machine-id"]).text()), "two clones share a machine id");
        let state = vm.exec(["systemctl", "is-system-running", "--wait"]).run();
        assert_eq!(state.text(), "running", "{}", vm.exec(["systemctl", "--failed", "--no-legend", "--plain"]).text());
        // Its agent may be started again: the next session finds the new one. Within a second of the start QEMU reports only
        // that the port was opened: the restart was not noticed, and commands hung.
        vm.exec(["systemctl", "restart", "--no-block", "nido-guest-agent.service"]).run();
        eventually("the new agent", || {
            let again = vm.exec(["systemctl", "is-active", "nido-guest-agent.service"]).run();
            (again.code == 0).then_some(())
        });
        vm.nido("stop", &[]).ok();
        assert_eq!(vm.status(), "stopped");
    }
}

#[test]
fn two_hundred_forks_in_a_row() {
    let home = TestHome::new();
    for _ in 0..200 {
        let vm = home.spawn("again", &["--fork", "--ephemeral"]);
        assert_eq!(vm.exec(["cat", "/proc/sys/kernel/hostname"]).text(), "again");
        vm.delete();
    }
}

#[test]
fn a_supervisor_killed_while_it_forks_is_replaced() {
    let home = TestHome::new();
    for _ in 0..10 {
        let (spawning, _keys) = home.nido(["spawn", "web", "--fork", "--net", "none"]).start();
        let qemu = eventually("QEMU", || home.qemu());
        let is_supervisor = |process: &crate::rig::Process| process.arguments.iter().any(|word| word == "supervise");
        if let Some(supervisor) = home.processes().into_iter().find(is_supervisor) {
            supervisor.kill();
        }
        let done = spawning.wait();
        if done.code == 0 {
            // Another supervisor has completed it: the identity was reset, or it would not accept its token.
            assert_eq!(home.nido(["exec", "web", "--", "hostname"]).text(), "web");
            home.nido(["delete", "--force", "web", "--yes"]).ok();
        }
        eventually("QEMU's end", || (!qemu.is_alive()).then_some(()));
        home.assert_empty();
    }
}

#[test]
fn a_template_whose_bake_is_in_use_keeps_its_parts() {
    let home = TestHome::new();
    let vm = home.spawn("user", &["--net", "none", "--fork"]);
    let refused = home.nido(["template", "delete", "sandbox"]).problem(1, "template_in_use");
    assert!(refused["detail"].as_str().unwrap().contains("user"));
    // Its bake is replaced, and the one it runs on stays until the VM is deleted.
    home.nido(["template", "bake", "sandbox", "--net", "none", "--again"]).ok();
    vm.sh("find / -xdev -type f -size -64k -print0 | head -z -n 2000 | xargs -0 cat > /dev/null").ok();
    vm.nido("restart", &[]).ok();
    assert_eq!(vm.exec(["hostname"]).text(), "user");
}

#[test]
fn a_running_vm_is_copied_and_runs_on() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["-p", "0:80", "--label", "a=b"]);
    vm.sh("echo data > /root/note; echo memory > /dev/shm/note").ok();
    vm.start_counting();
    let own = fingerprint(&vm);
    let forked = home.nido(["fork", "web", "one", "two", "three"]).json();
    assert!(forked["paused_ms"].as_u64().unwrap() > 0);
    assert_eq!(forked["copies"].as_array().unwrap().len(), 3);
    let mut seen: BTreeSet<String> = fingerprint(&vm).into_iter().collect();
    for name in ["one", "two", "three"] {
        let info = home.nido(["info", name]).json();
        assert_eq!((path(&info), &info["labels"]["a"]), ("fork", &"b".into()));
        assert!(info["forwards"].as_array().unwrap().is_empty());
        let sh = |script: &str| home.nido(["exec", name, "--", "sh", "-c", script]).text();
        assert_eq!(sh("cat /root/note /dev/shm/note /proc/sys/kernel/hostname"), format!("data\nmemory\n{name}"));
        // The process continues in the copy.
        let copy = Vm { home: &home, name };
        copy.await_count();
        for fact in fingerprint(&copy) {
            assert!(seen.insert(fact.clone()), "two machines share {fact}");
        }
        sh("echo mine > /root/note");
    }
    // The original has kept its identity, its processes and its disk.
    assert_eq!(fingerprint(&vm)[0], own[0]);
    assert_eq!(
        vm.sh("cat /root/note; cat /proc/sys/kernel/hostname; dmesg | grep -ci 'ext4.*error'").run().stdout,
        b"data\nweb\n0\n"
    );
    assert!(home.nido(["snapshot", "ls", "web"]).json()["snapshots"].as_array().unwrap().is_empty());
    // A copy of a copy, which also boots from its own disk.
    home.nido(["fork", "two", "four"]).ok();
    assert_eq!(home.nido(["exec", "four", "--", "cat", "/root/note"]).text(), "mine");
    home.nido(["restart", "four"]).ok();
    assert_eq!(home.nido(["exec", "four", "--", "cat", "/root/note", "/etc/hostname"]).text(), "mine\nfour");
    // All or none.
    home.nido(["fork", "web", "five", "one"]).problem(1, "vm_exists");
    home.nido(["fork", "web", "five", "five"]).problem(2, "spec_invalid");
    home.nido(["stop", "four"]).ok();
    home.nido(["fork", "four", "five"]).problem(1, "vm_not_running");
    assert_eq!(home.names().len(), 5);
    for name in ["one", "two", "three", "four"] {
        home.nido(["delete", "--force", name, "--yes"]).ok();
    }
}

// A guest that was saved while it ran panicked in one copy: QEMU had missed that it had changed a page.
#[test]
fn a_busy_vm_is_copied_again_and_again_with_all_of_its_memory() {
    let home = TestHome::new();
    let vm = home.spawn("web", &[]);
    let work = "while :; do dd if=/dev/urandom of=churn bs=1M count=8; sha256sum churn > churn.sum; done";
    let prepare = format!(
        "cd /dev/shm; dd if=/dev/urandom of=data bs=1M count=32 2> /dev/null; sha256sum data > data.sum; \
         setsid sh -c '{work}' > /dev/null 2>&1 < /dev/null &"
    );
    vm.sh(&prepare).ok();
    for _ in 0..5 {
        home.nido(["fork", "web", "copy"]).ok();
        let check = "cd /dev/shm && sha256sum -c data.sum && pidof dd sha256sum sh && \
                     ! dmesg | grep -E 'Kernel panic|BUG:|Oops|segfault|general protection'";
        home.nido(["exec", "copy", "--", "sh", "-c", check]).ok();
        home.nido(["delete", "--force", "--yes", "copy"]).ok();
    }
}

// What a process asked of /dev/urandom first was the same in all copies: they ran before they were renewed.
#[test]
fn copies_of_a_running_vm_never_draw_the_same_random_numbers() {
    const SAMPLES_MIN: usize = 20;
    /// Numbers that were drawn before the original was saved, and lay in the guest's console: one in the shell, some in the terminal.
    const PENDING_MAX: usize = 3;
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    vm.sh(
        "setsid sh -c 'while :; do echo drawn $(od -An -N8 -tx8 /dev/urandom) >/dev/console; done' >/dev/null 2>&1 &",
    )
    .ok();
    // Each VM's console holds what this VM has run itself, and nothing from before.
    let drawn = |name: &'static str| {
        eventually("random numbers", || {
            let console = home.nido(["logs", name, "--source", "console"]).text();
            let words = console.split_whitespace().collect::<Vec<_>>();
            let numbers = words.windows(2).filter(|pair| pair[0] == "drawn" && pair[1].len() == 16);
            let numbers: Vec<_> = numbers.map(|pair| pair[1].to_owned()).collect();
            (numbers.len() >= SAMPLES_MIN).then_some(numbers)
        })
    };
    drawn("web");
    home.nido(["fork", "web", "one", "two"]).ok();
    let mut seen: BTreeSet<String> = drawn("web").into_iter().collect();
    for name in ["one", "two"] {
        let numbers = drawn(name);
        let pending = numbers.iter().take_while(|number| seen.contains(*number)).count();
        assert!(pending <= PENDING_MAX, "the first {pending} numbers of {name} are those of another VM: {numbers:?}");
        for number in &numbers[pending..] {
            assert!(seen.insert(number.clone()), "{name} has drawn {number}, and so has another VM: {numbers:?}");
        }
    }
    for name in ["one", "two"] {
        home.nido(["delete", "--force", name, "--yes"]).ok();
    }
}

/// A guest with host keys and something that a hook has to reset. The sandbox has no ssh server, so a few lines stand
/// in for the maker of keys.
const IDENTITY_SCRIPT: &str = r#"
    cat > /usr/bin/ssh-keygen <<'KEYGEN'
#!/bin/sh
while [ $# -gt 1 ]; do case $1 in -f) file=$2 ;; -t) kind=$2 ;; esac; shift; done
head -c 32 /dev/urandom | base64 > "$file" && echo "$kind of $(cat "$file")" > "$file.pub"
KEYGEN
    chmod 755 /usr/bin/ssh-keygen
    mkdir -p /etc/ssh /etc/nido/renew.d
    for kind in ed25519 ecdsa; do ssh-keygen -t $kind -f /etc/ssh/ssh_host_${kind}_key; done
    printf '#!/bin/sh\necho "$NIDO_NAME $NIDO_IDENTITY" > /etc/renewed\n' > /etc/nido/renew.d/10-app
    chmod 755 /etc/nido/renew.d/10-app
    echo mine > /root/note
"#;

#[test]
fn clones_of_a_template_made_from_a_vm_reset_their_identity() {
    let home = TestHome::new();
    let vm = home.spawn("maker", &["--disk", "3G"]);
    vm.sh(IDENTITY_SCRIPT).ok();
    let key = vm.exec(["cat", "/etc/ssh/ssh_host_ed25519_key"]).text();
    let made = home.nido(["template", "create", "mine", "--from", "maker"]).json();
    assert_eq!(made["template"]["bakes"].as_array().unwrap().len(), 2, "{made:#}");
    assert_eq!(made["template"]["disk_bytes"], 3_u64 << 30);
    assert_eq!((vm.status().as_str(), vm.exec(["cat", "/root/note"]).text().as_str()), ("running", "mine"));
    home.nido(["template", "create", "mine", "--from", "maker"]).problem(1, "template_exists");

    let mut seen = BTreeSet::from([key.clone()]);
    for (name, flag) in [("one", "--fork"), ("two", "--fork"), ("three", "--cold")] {
        home.nido(["spawn", name, "-T", "mine", flag]).ok();
        let sh = |script: &str| home.nido(["exec", name, "--", "sh", "-c", script]).text();
        assert_eq!(sh("cat /root/note"), "mine");
        assert!(seen.insert(sh("cat /etc/ssh/ssh_host_ed25519_key")), "a clone has the host key of another");
        assert!(seen.insert(sh("cat /etc/ssh/ssh_host_ecdsa_key")));
        assert!(sh("cat /etc/ssh/ssh_host_ecdsa_key.pub").starts_with("ecdsa of "));
        let id = home.nido(["info", name]).json()["id"].as_str().unwrap().to_owned();
        assert_eq!(sh("cat /etc/renewed"), format!("{name} {id}"));
        assert!(seen.insert(sh("cat /etc/machine-id")));
    }
    // The VM that it was made of has kept its own.
    assert_eq!(vm.exec(["cat", "/etc/ssh/ssh_host_ed25519_key"]).text(), key);
    for name in ["one", "two", "three"] {
        home.nido(["delete", "--force", name, "--yes"]).ok();
    }

    // A clone whose hook fails exists nevertheless, and has a warning.
    vm.sh(
        "printf '#!/bin/sh\necho no >&2\nexit 7\n' > /etc/nido/renew.d/20-fails; chmod 755 /etc/nido/renew.d/20-fails",
    )
    .ok();
    vm.nido("stop", &[]).ok();
    let made = home.nido(["template", "create", "broken", "--from", "maker", "--no-bake"]).json();
    assert!(made["template"]["bakes"].as_array().unwrap().is_empty());
    let warned = |name: &str| {
        let info = home.nido(["info", name]).json();
        assert!(info["warnings"].to_string().contains("20-fails"), "{info:#}");
        home.nido(["delete", "--force", name]).ok();
    };
    home.nido(["spawn", "cold", "-T", "broken"]).ok();
    warned("cold");
    vm.nido("start", &[]).ok();
    home.nido(["fork", "maker", "copy"]).ok();
    warned("copy");
    assert_eq!(home.names(), ["maker"]);
    for template in ["mine", "broken"] {
        home.nido(["template", "delete", template]).ok();
    }
}
