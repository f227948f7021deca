//! As root, QEMU has a user of its own, and everything that a VM can do works with it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;

use crate::rig::{Process, TestHome, Vm, eventually};

/// The ids of which a VM's user is one.
const RANGE: std::ops::Range<u32> = 0x7000_0000..0x7FFD_0000;

/// The user id of a process, if it is that of one VM in every respect.
fn own_user(process: &Process) -> u32 {
    let status = |name| process.status(name).unwrap();
    let ids: BTreeSet<u32> = [status("Uid"), status("Gid")]
        .iter()
        .flat_map(|ids| ids.split_whitespace().map(|id| id.parse().unwrap()).collect::<Vec<_>>())
        .collect();
    assert_eq!(ids.len(), 1, "{ids:?}");
    assert_eq!(status("Groups").trim(), "");
    assert!(["CapEff", "CapPrm", "CapBnd"].iter().all(|set| status(set).trim().chars().all(|digit| digit == '0')));
    let id = *ids.first().unwrap();
    assert!(RANGE.contains(&id), "{id}");
    id
}

fn check(vm: &Vm<'_>) -> u32 {
    assert_eq!(vm.exec(["cat", "/proc/sys/kernel/ostype"]).text().trim(), "Linux");
    let layers = vm.info()["confinement"].to_string();
    assert!(layers.contains("own-user") && layers.contains("namespaces"), "{layers}");
    own_user(&vm.qemu())
}

#[test]
fn as_root_every_vm_has_a_qemu_with_a_user_of_its_own() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let home = TestHome::new();
    let web = home.spawn("web", &["--net", "nat"]);
    let other = home.spawn("other", &["--net", "restricted"]);
    let ids = [check(&web), check(&other)];
    assert_ne!(ids[0], ids[1]);

    web.exec(["sh", "-c", "echo kept > /root/file && sync"]).ok();
    home.nido(["snapshot", "create", "web", "first"]).ok();
    web.exec(["rm", "/root/file"]).ok();
    home.nido(["snapshot", "restore", "web", "first"]).ok();
    assert_eq!((web.exec(["cat", "/root/file"]).text(), check(&web)), ("kept".to_owned(), ids[0]));
    home.nido(["fork", "web", "copy"]).ok();
    let copy = Vm { home: &home, name: "copy" };
    assert_eq!(copy.exec(["cat", "/root/file"]).text(), "kept");
    assert!(!ids.contains(&check(&copy)));

    // The next supervisor binds sockets that this QEMU connects to.
    let qemu = web.qemu().pid;
    web.kill_supervisor();
    assert_eq!(check(&web), ids[0]);
    assert_eq!(web.qemu().pid, qemu);
    home.nido(["snapshot", "create", "web", "second"]).ok();
    home.nido(["template", "create", "mine", "--from", "web"]).ok();
    let mine = home.spawn("mine", &["--template", "mine"]);
    assert_eq!(mine.exec(["cat", "/root/file"]).text(), "kept");

    web.nido("restart", &[]).ok();
    assert_eq!((web.exec(["cat", "/root/file"]).text(), check(&web)), ("kept".to_owned(), ids[0]));
    // Files stay root's: programs of root without capabilities use them.
    for name in ["disk.qcow2", "console.log", "qemu"] {
        let meta = fs::symlink_metadata(web.dir().join(name)).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (0, ids[0]), "{name}");
    }
    for name in ["web", "other", "copy", "mine"] {
        home.nido(["delete", name, "--force"]).ok();
    }
    home.nido(["template", "delete", "mine"]).ok();
    home.assert_empty();
}

#[test]
fn as_root_a_claimed_clone_has_a_user_of_its_own() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let home = TestHome::new();
    home.nido(["pool", "set", "sandbox", "1"]).ok();
    let is_full = || (home.nido(["pool", "ls"]).json()["pools"][0]["ready"] == 1).then_some(());
    eventually("a full pool", is_full);
    let vm = home.spawn("web", &[]);
    check(&vm);
    vm.nido("restart", &[]).ok();
    check(&vm);
    home.nido(["pool", "set", "sandbox", "0"]).ok();
    vm.nido("delete", &["--force"]).ok();
}
