//! An escaped QEMU: a program in QEMU's place that attempts what an attacker would, with and without confinement.
//!
//! The program is this test itself, started with [`PLAYER`]: it prints a line for each attempt into QEMU's log. Each test shows
//! first that the attempts succeed without confinement, so that it can fail.
#![allow(unsafe_code, missing_docs, clippy::unwrap_used)]

mod attempts;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nido_engine::confine::{Confinement, Layer, Needs, own_user, plan};
use nido_engine::host::confinement::probe;
use nido_engine::host::{ConfinementSupport, OwnUser};
use nido_engine::qemu::{Launch, QemuExit, QemuProcess};
use nido_files::lock::HeldLock;

use attempts::{ABSTRACT_SOCKET, PLAYER};

/// What the host has that a QEMU must not reach, and a directory of a VM.
struct Host {
    dir: tempfile::TempDir,
    _tcp: TcpListener,
    _sockets: Vec<UnixListener>,
}

impl Host {
    fn new(number: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["vm/qemu", "vm/snapshots/one", "other-vm", "blobs", "home"] {
            fs::create_dir_all(path(name)).unwrap();
        }
        let of_supervisor = ["vm/vm.json", "vm/supervisor.log", "vm/snapshots/one/disk.qcow2"];
        let files =
            ["other-vm/disk.qcow2", "home/secret", "home/of-group", "vm/disk.qcow2", "blobs/root", "blobs/memory"];
        for file in files.into_iter().chain(of_supervisor) {
            fs::write(path(file), "content").unwrap();
            fs::set_permissions(path(file), fs::Permissions::from_mode(0o600)).unwrap();
        }
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let name = format!("{ABSTRACT_SOCKET}{number}{}", std::process::id());
        let address = <std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(&name);
        let sockets = vec![
            UnixListener::bind(path("home/socket")).unwrap(),
            UnixListener::bind(path("vm/qemu/channel.sock")).unwrap(),
            UnixListener::bind(path("vm/control.sock")).unwrap(),
            UnixListener::bind_addr(&address.unwrap()).unwrap(),
        ];
        let facts =
            format!("{}\n{}\n{}\n{name}\n", dir.path().display(), tcp.local_addr().unwrap(), std::process::id());
        fs::write(path("vm/facts"), facts).unwrap();
        Self { dir, _tcp: tcp, _sockets: sockets }
    }

    fn vm(&self) -> PathBuf {
        self.dir.path().join("vm")
    }

    fn needs(&self) -> Needs {
        Needs {
            program: std::env::current_exe().unwrap(),
            directory: self.vm(),
            own: vec![self.vm().join("qemu")],
            change: vec![self.vm().join("disk.qcow2")],
            read: vec![self.dir.path().join("blobs/root"), self.vm().join("facts")],
            write: vec![self.dir.path().join("blobs/memory")],
            ..Needs::default()
        }
    }

    /// What became of each attempt: `done`, or the system's reason.
    async fn play(&self, layers: Option<&[Layer]>) -> BTreeMap<String, String> {
        self.play_as(layers, None).await
    }

    /// The same in a program with a user of its own.
    async fn play_as(&self, layers: Option<&[Layer]>, user: Option<u32>) -> BTreeMap<String, String> {
        // A process that another test forks at this moment has a copy of the last one until it executes its program.
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        let lock = HeldLock::take(&self.vm().join("vm.lock"), deadline).await.unwrap().unwrap();
        let log_path = self.vm().join("qemu.log");
        let _ = fs::remove_file(&log_path);
        let log = OpenOptions::new().append(true).create(true).open(&log_path).unwrap();
        let confinement =
            layers.map(|layers| Confinement::prepare_as(plan::plan(&self.needs()), layers, user).unwrap());
        let process = QemuProcess::spawn(Launch {
            program: &std::env::current_exe().unwrap(),
            args: &["--ignored", "--exact", "--nocapture", PLAYER].map(Into::into),
            vm_dir: &self.vm(),
            log,
            lock: lock.file(),
            confinement,
            file_bytes: None,
            group: None,
        });
        let exit = tokio::time::timeout(Duration::from_secs(60), process.unwrap().wait()).await.unwrap().unwrap();
        let log = fs::read_to_string(log_path).unwrap();
        assert_eq!(exit, QemuExit::Code(0), "{log}");
        let lines = log.lines().filter_map(|line| line.strip_prefix("attempt ")?.split_once(": "));
        let found: BTreeMap<_, _> = lines.map(|(name, result)| (name.to_owned(), result.to_owned())).collect();
        assert!(found.len() > 15, "{log}");
        found
    }
}

fn support() -> ConfinementSupport {
    probe(tempfile::tempdir().unwrap().path())
}

/// Attempts that a running QEMU makes itself.
const NEEDED: [&str; 8] = [
    "read its disk",
    "read a template",
    "write its disk",
    "truncate its disk",
    "make a socket in its directory",
    "connect to a socket in its directory",
    "write a memory image that an older qemu opens",
    "signal itself",
];
/// What every user may do on most hosts, and root alone.
const POSSIBLE: [&str; 17] = [
    "read the secret of the user",
    "read the disk of another vm",
    "write a template",
    "list the home",
    "connect to 127.0.0.1",
    "connect to a socket of the user",
    "connect to an abstract socket",
    "signal the supervisor",
    "run a program of the home",
    "make a link in its directory",
    "connect to the supervisor",
    "read the record of the vm",
    "write the record of the vm",
    "write the log of the supervisor",
    "write a snapshot",
    "make a file of the vm",
    "replace its disk",
];
const FOR_ROOT: [&str; 4] = ["read /etc/shadow", "mount", "open a raw socket", "make a device"];

fn assert_all(found: &BTreeMap<String, String>, names: &[&str], are_done: bool) {
    for name in names {
        let result = found.get(*name).unwrap_or_else(|| panic!("no attempt '{name}': {found:#?}"));
        assert_eq!(result == "done", are_done, "{name}: {result}");
    }
}

#[tokio::test]
async fn an_escaped_qemu_reaches_only_what_it_needs() {
    let (host, support) = (Host::new("a"), support());
    let free = host.play(None).await;
    assert_all(&free, &POSSIBLE, true);
    assert_all(&free, &NEEDED, true);
    let layers = support.layers();
    if support.shortfall().is_some() {
        eprintln!("SKIPPED: this host confines without {:?}", support.shortfall());
        return;
    }
    let confined = host.play(Some(&layers)).await;
    assert_all(&confined, &NEEDED, true);
    for (name, result) in confined.iter().filter(|(name, _)| !NEEDED.contains(&name.as_str())) {
        assert_ne!(result, "done", "{name}");
    }
    assert_eq!(fs::read_to_string(host.dir.path().join("blobs/root")).unwrap(), "content");
}

/// Where a host has no namespaces, files and networks are out of reach all the same.
#[tokio::test]
async fn landlock_and_seccomp_hold_without_namespaces() {
    let (host, support) = (Host::new("b"), support());
    if support.landlock == 0 || !support.seccomp {
        eprintln!("SKIPPED: {:?}", support.shortfall());
        return;
    }
    let confined = host.play(Some(&[Layer::Landlock, Layer::Seccomp, Layer::NoCapabilities])).await;
    assert_all(&confined, &NEEDED, true);
    // Landlock has no say about sockets in the file system yet.
    let reachable = ["connect to a socket of the user", "connect to the supervisor", "connect to an abstract socket"];
    let is_reachable = |name: &&str| reachable.contains(name);
    assert_all(&confined, &POSSIBLE.into_iter().filter(|name| !is_reachable(name)).collect::<Vec<_>>(), false);
    assert_all(&confined, &FOR_ROOT, false);
    assert_all(&confined, &["trace the supervisor", "make namespaces", "load a bpf program"], false);
}

/// Each layer takes something away by itself.
#[tokio::test]
async fn every_layer_has_an_effect_of_its_own() {
    let (host, support) = (Host::new("c"), support());
    let denied: [(Layer, &[&str]); 3] = [
        (
            Layer::Namespaces,
            &[
                "read the secret of the user",
                "connect to 127.0.0.1",
                "connect to a socket of the user",
                "connect to the supervisor",
                "write the record of the vm",
                "write a snapshot",
                "replace its disk",
            ],
        ),
        (
            Layer::Landlock,
            &[
                "read the secret of the user",
                "write a template",
                "make a link in its directory",
                "write the record of the vm",
                "write the log of the supervisor",
                "write a snapshot",
                "replace its disk",
            ],
        ),
        (Layer::Seccomp, &["connect to 127.0.0.1", "signal the supervisor", "load a bpf program"]),
    ];
    for (layer, names) in denied {
        if support.layers().contains(&layer) {
            let found = host.play(Some(&[layer])).await;
            assert_all(&found, &NEEDED, true);
            assert_all(&found, names, false);
        }
    }
}

#[tokio::test]
async fn as_root_nothing_is_left_of_roots_rights() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let host = Host::new("d");
    assert_all(&host.play(None).await, &FOR_ROOT, true);
    let plain = host.play(Some(&[Layer::NoCapabilities])).await;
    assert_all(&plain, &["mount", "open a raw socket", "make a device"], false);
    if support().shortfall().is_none() {
        assert_all(&host.play(Some(&Layer::ALL)).await, &FOR_ROOT, false);
    }
}

/// What root gives to the user of a VM before QEMU starts.
fn give(host: &Host, user: u32) {
    let set = |path: &str, group: Option<u32>, mode: u32| {
        let path = host.dir.path().join(path);
        std::os::unix::fs::chown(&path, None, group).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    for (path, mode) in [("vm/qemu", 0o3770), ("vm/qemu/channel.sock", 0o660), ("vm/disk.qcow2", 0o660)] {
        set(path, Some(user), mode);
    }
    for (path, mode) in [("blobs/root", 0o604), ("blobs/memory", 0o606), ("vm/facts", 0o604), ("home/of-group", 0o640)]
    {
        set(path, None, mode);
    }
}

/// With the user alone no file, process or capability of root's is in reach; with all layers nothing but what QEMU needs.
#[tokio::test]
async fn as_root_an_escaped_qemu_is_another_user() {
    let support = support();
    if support.own_user != OwnUser::Available {
        eprintln!("SKIPPED: {:?}", support.own_user);
        return;
    }
    let (host, user) = (Host::new("f"), own_user::id_of("f"));
    give(&host, user);
    let of_root = [
        "read the environment of the supervisor",
        "read a file of root that its group may read",
        "write a file of root",
    ];
    // What it does there as root, it does not have to overcome here.
    assert_all(&Host::new("free").play(None).await, &of_root, true);
    let alone = host.play_as(Some(&[Layer::Namespaces]), Some(user)).await;
    assert_all(&alone, &NEEDED, true);
    assert_all(&alone, &of_root, false);
    assert_all(&alone, &FOR_ROOT, false);
    let of_processes = ["signal the supervisor", "signal the supervisor by its pidfd", "trace the supervisor"];
    assert_all(&alone, &of_processes, false);
    let all = host.play_as(Some(&support.layers()), Some(user)).await;
    assert_all(&all, &NEEDED, true);
    for (name, result) in all.iter().filter(|(name, _)| !NEEDED.contains(&name.as_str())) {
        assert_ne!(result, "done", "{name}");
    }
    assert!(Confinement::prepare_as(plan::plan(&host.needs()), &[Layer::Seccomp], Some(user)).is_err());
}

/// Its device node has the number of the host's, and is open to it alone.
#[tokio::test]
async fn as_root_a_device_of_root_is_opened_by_its_own_user() {
    let kvm = Path::new("/dev/kvm");
    if support().own_user != OwnUser::Available || !kvm.exists() {
        eprintln!("SKIPPED: no user of its own, or no KVM");
        return;
    }
    let (host, user) = (Host::new("g"), own_user::id_of("g"));
    give(&host, user);
    fs::write(host.vm().join("facts"), "/dev/kvm").unwrap();
    let needs = Needs { program: "/bin/sh".into(), is_script: true, kvm: true, ..host.needs() };
    for layers in [&[Layer::Namespaces][..], &support().layers()] {
        let confinement = Confinement::prepare_as(plan::plan(&needs), layers, Some(user)).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        let lock = HeldLock::take(&host.vm().join("vm.lock"), deadline).await.unwrap().unwrap();
        let log = File::create(host.vm().join("qemu.log")).unwrap();
        let process = QemuProcess::spawn(Launch {
            program: &needs.program,
            args: &["-c", "exec 3<> /dev/kvm && stat -c '%a %u %t:%T' /dev/kvm && ! (: > /dev/other)"].map(Into::into),
            vm_dir: &host.vm(),
            log,
            lock: lock.file(),
            confinement: Some(confinement),
            file_bytes: None,
            group: None,
        });
        let exit = tokio::time::timeout(Duration::from_secs(60), process.unwrap().wait()).await.unwrap().unwrap();
        let said = fs::read_to_string(host.vm().join("qemu.log")).unwrap();
        assert_eq!(exit, QemuExit::Code(0), "{said}");
        let mode = kvm.metadata().unwrap().permissions().mode();
        assert!(mode & 0o006 == 0o006 || said.contains(&format!("600 {user} a:")), "{said}");
    }
}

#[tokio::test]
async fn qemu_does_not_start_without_a_promised_layer() {
    let host = Host::new("e");
    let missing = Needs { read: vec![host.dir.path().join("blobs/missing")], ..host.needs() };
    assert!(Confinement::prepare(plan::plan(&missing), &[Layer::Landlock]).is_err());
    if !support().layers().contains(&Layer::Namespaces) {
        return;
    }
    let confinement = Confinement::prepare(plan::plan(&missing), &[Layer::Namespaces]).unwrap();
    let lock = HeldLock::try_take(&host.vm().join("vm.lock")).unwrap().unwrap();
    let log = File::create(host.vm().join("qemu.log")).unwrap();
    let (program, vm_dir) = (Path::new("/bin/true"), host.vm());
    let launch = Launch {
        program,
        args: &[],
        vm_dir: &vm_dir,
        log,
        lock: lock.file(),
        confinement: Some(confinement),
        file_bytes: None,
        group: None,
    };
    let error = QemuProcess::spawn(launch).unwrap_err().to_string();
    assert!(error.contains("the root directory cannot be mounted: No such file"), "{error}");
}
