//! The warm pool: what a claimed clone is, which command gets it, and that a process killed meanwhile loses and leaks nothing.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;

use rustix::process::Signal;
use serde_json::Value;

use crate::rig::{Process, TestHome, Vm, eventually};

/// The only pool there is.
fn pool(home: &TestHome) -> Value {
    home.nido(["pool", "ls"]).json()["pools"][0].clone()
}

fn set(home: &TestHome, wanted: u32) {
    home.nido(["pool", "set", "sandbox", &wanted.to_string(), "--net", "none"]).ok();
}

/// Waits until so many clones wait, and no filler runs any more.
fn full(home: &TestHome, wanted: u32) {
    eventually("a full pool", || {
        let now = pool(home);
        (now["ready"] == wanted && now["filling"] == 0).then_some(())
    });
}

fn filled(home: &TestHome, wanted: u32) {
    set(home, wanted);
    full(home, wanted);
}

fn path(info: &Value) -> &str {
    info["timings"]["path"].as_str().unwrap()
}

fn processes(home: &TestHome, word: &str) -> Vec<Process> {
    home.processes().into_iter().filter(|process| process.arguments.iter().any(|a| a == word)).collect()
}

fn qemus(home: &TestHome) -> BTreeSet<i32> {
    home.processes().iter().filter(|process| process.is_qemu()).map(|process| process.pid).collect()
}

/// The name under which a clone waits, as its QEMU got it.
fn name_of_a_clone(home: &TestHome) -> String {
    let arguments = home.qemu().unwrap().arguments.join(" ");
    let at = arguments.find("pool-").unwrap();
    arguments[at..].chars().take("pool-".len() + 6).collect()
}

fn assert_clock(vm: &Vm<'_>) {
    let guest: f64 = vm.exec(["date", "+%s.%N"]).text().parse().unwrap();
    let host = jiff::Timestamp::now().as_millisecond() as f64 / 1000.0;
    assert!((guest - host).abs() < 10.0, "the guest's clock says {guest}, the host's {host}");
}

#[test]
fn a_claimed_clone_is_a_vm_like_any_other() {
    let home = TestHome::new();
    filled(&home, 1);
    let waiting = name_of_a_clone(&home);
    assert_eq!(home.names(), [""; 0], "clones are nobody's VMs");
    home.nido(["exec", &waiting, "--", "true"]).problem(125, "vm_not_found");
    home.nido(["info", &waiting]).problem(1, "vm_not_found");
    home.nido(["stop", &waiting]).problem(1, "vm_not_found");

    let vm = home.spawn("web", &["--net", "none", "--disk", "4G", "--label", "a=b", "-p", "80", "--ttl", "1h"]);
    let info = vm.info();
    assert_eq!((path(&info), info["status"].as_str()), ("pool", Some("running")), "{info:#}");
    assert!(info["machine_reason"].as_str().unwrap().ends_with("taken from the pool"), "{info:#}");
    assert_eq!((&info["labels"]["a"], &info["ephemeral"]), (&"b".into(), &false.into()));
    assert!(info["expires_at"].is_string() && info["forwards"][0]["host_port"].as_u64().unwrap() > 0, "{info:#}");
    assert_eq!(vm.sh("hostname; cat /etc/hostname; getent hosts web | awk '{print $1}'").text(), "web\nweb\n127.0.1.1");
    assert_eq!(vm.exec(["cat", "/sys/block/vda/size"]).text(), ((4_u64 << 30) / 512).to_string());
    assert_eq!(vm.exec(["cat", "/etc/machine-id"]).text().len(), 32);
    assert_clock(&vm);

    full(&home, 1);
    home.nido(["spawn", "web", "--net", "none"]).problem(1, "vm_exists");
    assert_eq!(pool(&home)["ready"], 1, "a name that is taken costs no clone");
    // It outlives a stop, as it was spawned.
    vm.sh("echo kept > /root/note; sync").ok();
    vm.nido("stop", &[]).ok();
    vm.nido("start", &[]).ok();
    assert_eq!(vm.sh("cat /root/note; hostname").text(), "kept\nweb");
    assert_eq!(
        home.nido(["run", "-q", "--net", "none", "--fork", "--", "hostname"]).ok().text().get(..4),
        Some("run-")
    );
    vm.delete();
    set(&home, 0);
    home.assert_empty();
}

#[test]
fn without_a_matching_clone_a_vm_is_created() {
    let home = TestHome::new();
    let refused = home.nido(["pool", "set", "sandbox", "1", "--memory", "640M"]).problem(1, "template_mismatch");
    assert!(refused["hint"].as_str().unwrap().ends_with("nido template bake sandbox --memory 640M"), "{refused:#}");
    home.nido(["pool", "set", "nothing", "1"]).problem(1, "template_not_found");
    filled(&home, 1);
    let refused = home.nido(["template", "delete", "sandbox"]).problem(1, "template_in_use");
    assert!(refused["hint"].as_str().unwrap().ends_with("nido pool set sandbox 0 --net none"), "{refused:#}");
    let forked = home.spawn("forked", &[]);
    assert_eq!(path(&forked.info()), "fork", "a clone without a network is none for a VM with one");
    let cold = home.spawn("cold", &["--net", "none", "--cold"]);
    assert_eq!(path(&cold.info()), "cold");
    assert_eq!(pool(&home)["ready"], 1);
    set(&home, 0);
    forked.delete();
    cold.delete();
    home.assert_empty();
}

#[test]
fn eight_at_once_get_eight_vms() {
    let home = TestHome::new();
    filled(&home, 4);
    let names: Vec<&'static str> = (0..8).map(|number| &*format!("clone-{number}").leak()).collect();
    let spawning: Vec<_> = names.iter().map(|name| home.nido(["spawn", name, "--net", "none"]).start()).collect();
    for (one, keys) in spawning {
        one.wait().expect(0);
        drop(keys);
    }
    let mut seen = BTreeSet::new();
    let mut from_pool = 0;
    for name in &names {
        let vm = Vm { home: &home, name };
        from_pool += usize::from(path(&vm.info()) == "pool");
        let facts = vm.sh(
            "cat /etc/machine-id /var/lib/nido-guest/identity; head -c 32 /dev/urandom | base64 -w 0; echo; hostname",
        );
        let facts = facts.text();
        assert_eq!(facts.lines().last(), Some(*name));
        let token = format!("{:?}", fs::read(vm.dir().join("guest.cbor")).unwrap());
        for fact in facts.lines().map(str::to_owned).chain([token]) {
            assert!(seen.insert(fact.clone()), "two VMs share {fact}");
        }
        assert_clock(&vm);
    }
    assert!(from_pool >= 4, "{from_pool} of 4 clones were claimed");
    set(&home, 0);
    names.iter().for_each(|name| Vm { home: &home, name }.delete());
    home.assert_empty();
}

#[test]
fn a_clone_that_was_killed_is_replaced() {
    let home = TestHome::new();
    filled(&home, 2);
    let before = qemus(&home);
    processes(&home, "supervise")[0].kill();
    // Its QEMU goes with it, and another comes.
    eventually("another clone", || {
        let (now, waits) = (qemus(&home), pool(&home)["ready"] == 2);
        (waits && now.len() == 2 && now != before).then_some(())
    });
    home.qemu().unwrap().kill();
    let vm = home.spawn("web", &["--net", "none"]);
    assert_eq!(vm.exec(["hostname"]).text(), "web");
    full(&home, 2);
    // All at once, as after a restart of the host.
    processes(&home, "supervise").iter().for_each(Process::kill);
    home.processes().iter().filter(|process| process.is_qemu()).for_each(Process::kill);
    home.nido(["ls"]).ok();
    full(&home, 2);
    vm.delete();
    set(&home, 0);
    home.assert_empty();
}

#[test]
fn a_filler_that_was_killed_is_replaced() {
    let home = TestHome::new();
    for _ in 0..4 {
        set(&home, 4);
        let filler = eventually("a filler", || processes(&home, "pool-fill").pop());
        eventually("a clone", || home.qemu());
        filler.kill();
        full(&home, 4);
        assert_eq!(qemus(&home).len(), 4, "no clone is there that the pool does not know");
        set(&home, 0);
        home.assert_empty();
    }
}

/// What the guests get: a claim replaces the file of its clone.
fn tokens(home: &TestHome) -> BTreeSet<u64> {
    let file = |dir: String| home.path().join("vms").join(dir).join("guest.cbor").metadata();
    home.vm_dirs().into_iter().filter_map(|dir| file(dir).ok()).map(|meta| meta.ino()).collect()
}

#[test]
fn a_kill_during_a_claim_leaks_nothing() {
    let home = TestHome::new();
    for (claimer_dies, at_once) in
        [(true, true), (true, false), (false, true), (false, false), (true, false), (false, false)]
    {
        filled(&home, 2);
        let before = tokens(&home);
        let (spawning, _keys) = home.nido(["spawn", "web", "--net", "none"]).start();
        if !at_once {
            eventually("a claim", || (tokens(&home) != before).then_some(()));
        }
        if claimer_dies {
            spawning.signal(Signal::KILL);
            spawning.wait();
        } else {
            processes(&home, "supervise").iter().for_each(Process::kill);
            spawning.wait().expect(0);
        }
        // Either it is unclaimed, or it is a VM.
        let claimed = home.names().contains(&"web".to_owned());
        assert!(claimed || claimer_dies, "who lives on gets a VM");
        if claimed {
            assert_eq!(home.nido(["exec", "web", "--", "hostname"]).text(), "web");
            home.nido(["delete", "--force", "web", "--yes"]).ok();
        }
        full(&home, 2);
        set(&home, 0);
        home.assert_empty();
    }
}

#[test]
fn clones_of_a_bake_that_was_replaced_are_replaced() {
    let home = TestHome::new();
    filled(&home, 2);
    let before = qemus(&home);
    home.nido(["template", "bake", "sandbox", "--net", "none", "--again"]).ok();
    eventually("new clones", || {
        let now = qemus(&home);
        (now.len() == 2 && now.is_disjoint(&before)).then_some(())
    });
    full(&home, 2);
    let vm = home.spawn("web", &["--net", "none"]);
    assert_eq!((path(&vm.info()), vm.exec(["hostname"]).text().as_str()), ("pool", "web"));
    vm.delete();
    set(&home, 0);
    home.assert_empty();
}
