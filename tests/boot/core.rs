//! The core of the suite: spawn, exec, copy, forward, stop, start, delete; as the user who runs the suite and, if that is
//! root, as an ordinary user too.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;

use crate::rig::{TestHome, UserAccount, eventually};

#[test]
fn as_the_caller() {
    walk(&TestHome::new(), "sandbox");
}

#[test]
fn as_the_caller_with_systemd() {
    walk(&TestHome::new(), "debian-12");
}

#[test]
fn as_an_ordinary_user() {
    if rustix::process::geteuid().is_root() {
        walk(&TestHome::of(UserAccount::Nobody), "sandbox");
    } else {
        // The other test is that user's run already.
        println!("the suite itself runs as an ordinary user: `as_the_caller` is this test");
    }
}

/// What a supervisor made could not be entered by an ordinary user: snapshots, forks and templates of running VMs failed.
#[test]
fn an_ordinary_user_saves_restores_and_forks_a_running_vm() {
    let who = if rustix::process::geteuid().is_root() { UserAccount::Nobody } else { UserAccount::Caller };
    let home = TestHome::of(who);
    let vm = home.spawn("web", &[]);
    // As an earlier version left it.
    let snapshots = home.path().join("vms").join(vm.nido("info", &[]).json()["id"].as_str().unwrap()).join("snapshots");
    vm.sh("echo kept > /root/note; sync").ok();
    home.nido(["snapshot", "create", "web", "first"]).ok();
    assert_eq!(fs::metadata(&snapshots).unwrap().permissions().mode() & 0o777, 0o700);
    fs::set_permissions(&snapshots, fs::Permissions::from_mode(0o600)).unwrap();
    home.nido(["snapshot", "create", "web", "second"]).ok();
    vm.sh("rm /root/note").ok();
    home.nido(["snapshot", "restore", "web", "first"]).ok();
    assert_eq!(vm.exec(["cat", "/root/note"]).text(), "kept");
    home.nido(["fork", "web", "copy"]).ok();
    assert_eq!(home.nido(["exec", "copy", "--", "cat", "/root/note"]).text(), "kept");
    home.nido(["template", "create", "mine", "--from", "web"]).ok();
    home.nido(["delete", "web", "copy", "--force"]).ok();
    home.assert_empty();
}

fn walk(home: &TestHome, template: &str) {
    let vm = home.spawn("web", &["--template", template, "--label", "role=core"]);
    assert_eq!(vm.exec(["hostname"]).text(), "web");
    let ids = vm.exec(["id", "-u"]).text();
    assert_eq!(ids, "0", "a command runs as root unless told otherwise");
    vm.sh("exit 42").run().expect(42);

    // Both ways, file and directory.
    let here = home.user_dir();
    let tree = here.join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(tree.join("sub/a file"), "hello\n").unwrap();
    vm.nido("upload", &[tree.to_str().unwrap(), "/srv/"]).ok();
    assert_eq!(vm.exec(["cat", "/srv/tree/sub/a file"]).text(), "hello");
    vm.nido("download", &["/srv/tree", here.join("back").to_str().unwrap()]).ok();
    assert_eq!(fs::read_to_string(here.join("back/sub/a file")).unwrap(), "hello\n");

    // A port.
    vm.sh("cd /srv/tree && nohup python3 -m http.server 8000 --bind 127.0.0.1 >/dev/null 2>&1 &").ok();
    let forward = home.nido(["forward", "add", "web", "8000"]).json();
    let port = u16::try_from(forward["host_port"].as_u64().unwrap()).unwrap();
    let page = eventually("the page", || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
        stream.write_all(b"GET /sub/a%20file HTTP/1.0\r\n\r\n").ok()?;
        let mut page = String::new();
        stream.read_to_string(&mut page).ok()?;
        (!page.is_empty()).then_some(page)
    });
    assert!(page.ends_with("\r\n\r\nhello\n"), "{page:?}");

    // As people see it.
    let list = home.nido(["ls"]).text();
    let row: Vec<_> = list.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row[..3], ["web", "running", template], "{list}");
    let facts = vm.nido("info", &[]).text();
    for fact in ["status:", "isolation:", "agent:", "label:", "forward:", "role=core"] {
        assert!(facts.contains(fact), "{fact} in {facts}");
    }
    assert!(vm.nido("logs", &["--source", "supervisor"]).text().contains("starting QEMU"));
    vm.nido("logs", &["--source", "qemu"]).ok();

    // What was written is there after a stop in order.
    vm.sh("echo kept > /root/note").ok();
    vm.nido("stop", &[]).ok();
    assert_eq!(vm.status(), "stopped");
    vm.exec(["true"]).problem(125, "vm_not_running");
    vm.nido("start", &[]).ok();
    assert_eq!(vm.exec(["cat", "/root/note"]).text(), "kept");
    home.nido(["delete", "web"]).problem(1, "vm_busy");
    home.nido(["delete", "web", "--force", "--yes"]).ok();
    home.assert_empty();
}
