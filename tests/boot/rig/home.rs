//! A home for one test, with the templates in it, and the check that nothing is left when the test is over.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::panicking;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::call::Call;
use super::process::{Process, processes_in};
use super::wait::eventually;

/// `nobody` and `nogroup`.
const NOBODY_UID: u32 = 65534;
/// How long what was killed may take to be gone.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(30);

/// The user that runs `nido`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserAccount {
    /// The user who runs the suite.
    Caller,
    /// An ordinary user; only root can become one.
    Nobody,
}

/// A home of its own for one test.
pub struct TestHome {
    base: TempDir,
    who: UserAccount,
    nido: PathBuf,
}

/// A VM of a test's home.
#[derive(Clone, Copy)]
pub struct Vm<'home> {
    pub home: &'home TestHome,
    pub name: &'static str,
}

fn source() -> PathBuf {
    std::env::var_os("NIDO_TEST_HOME").map(PathBuf::from).expect(
        "NIDO_TEST_HOME must name a home in which 'nido template build sandbox' and 'nido template build debian-12' \
         have been run; scripts/test does all of that",
    )
}

fn nido_under_test() -> PathBuf {
    std::env::var_os("NIDO_BIN").map_or_else(|| env!("CARGO_BIN_EXE_nido").into(), PathBuf::from)
}

impl TestHome {
    pub fn new() -> Self {
        Self::of(UserAccount::Caller)
    }

    /// Links the templates into a fresh home. Another user's lies where that user can reach it.
    pub fn of(who: UserAccount) -> Self {
        let source = source();
        let place = match who {
            UserAccount::Caller => source.parent().expect("a home below some directory").to_owned(),
            UserAccount::Nobody => std::env::temp_dir(),
        };
        let base = tempfile::Builder::new().prefix("nido-boot-").tempdir_in(place).unwrap();
        let home = base.path().join("home");
        for directory in ["", "templates", "blobs", "blobs/sha256", "cache"] {
            fs::DirBuilder::new().mode(0o700).create(home.join(directory)).unwrap();
        }
        fs::create_dir(base.path().join("user")).unwrap();
        for (directory, put) in [("blobs/sha256", link as fn(&Path, &Path)), ("templates", copy), ("cache", copy)] {
            // A home in which no VM was ever made has no facts about the host yet.
            let Ok(entries) = fs::read_dir(source.join(directory)) else {
                assert_eq!(directory, "cache", "{} has no templates", source.display());
                continue;
            };
            // Compiled kernels are kept in a directory there: they are for builds.
            for entry in entries.flatten().filter(|entry| entry.path().is_file()) {
                put(&entry.path(), &home.join(directory).join(entry.file_name()));
            }
        }
        let mut nido = nido_under_test();
        if who == UserAccount::Nobody {
            let reachable = base.path().join("nido");
            place_program(&nido, &reachable);
            nido = reachable;
            fs::set_permissions(base.path(), fs::Permissions::from_mode(0o755)).unwrap();
            give_away(&home);
            give_away(&base.path().join("user"));
        }
        Self { base, who, nido }
    }

    /// The directory that `NIDO_HOME` names.
    pub fn path(&self) -> PathBuf {
        self.base.path().join("home")
    }

    /// A directory for files of the test's own, writable for the user that runs `nido`.
    pub fn user_dir(&self) -> PathBuf {
        self.base.path().join("user")
    }

    /// A call of `nido` in this home, in [`Self::user_dir`].
    pub fn nido(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Call {
        let mut command = Command::new(&self.nido);
        command.args(arguments).current_dir(self.user_dir()).env_clear();
        command.env("NIDO_HOME", self.path()).env("HOME", self.user_dir()).env("TERM", "xterm");
        for kept in ["PATH", "NIDO_QEMU"] {
            if let Some(value) = std::env::var_os(kept) {
                command.env(kept, value);
            }
        }
        Call::new(command, (self.who == UserAccount::Nobody).then_some(NOBODY_UID))
    }

    /// Spawns a VM and waits until it is ready.
    #[track_caller]
    pub fn spawn(&self, name: &'static str, flags: &[&str]) -> Vm<'_> {
        self.nido(["spawn", name]).args(flags).ok();
        Vm { home: self, name }
    }

    /// The names of all VMs.
    pub fn names(&self) -> Vec<String> {
        self.nido(["ls", "-q"]).text().lines().map(str::to_owned).collect()
    }

    /// The names of files and directories in `vms/`.
    pub fn vm_dirs(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path().join("vms")) else { return Vec::new() };
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }

    /// Every process that belongs to this home.
    pub fn processes(&self) -> Vec<Process> {
        processes_in(self.base.path())
    }

    /// The first QEMU that is found.
    pub fn qemu(&self) -> Option<Process> {
        self.processes().into_iter().find(Process::is_qemu)
    }

    /// Fails unless the home is as if nothing had ever been spawned in it.
    #[track_caller]
    pub fn assert_empty(&self) {
        assert_eq!(self.names(), [""; 0], "VMs that are left");
        let files = |dir: &String| {
            let entries = fs::read_dir(self.path().join("vms").join(dir)).into_iter().flatten().flatten();
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
        };
        let left: Vec<_> = self.vm_dirs().into_iter().map(|dir| (files(&dir), dir)).collect();
        assert!(left.is_empty(), "directories of VMs that are left: {left:?}");
        let left = self.wait_for_no_process();
        assert!(left.is_empty(), "processes that are left: {left:#?}");
    }

    /// With `NIDO_TEST_KVM`: fails if a VM of this home ran without KVM because KVM was found wanting.
    #[track_caller]
    fn assert_kvm_was_used(&self) {
        if std::env::var_os("NIDO_TEST_KVM").is_some() {
            let verdict = fs::read_to_string(self.path().join("cache/kvm.json")).expect("a verdict about KVM");
            assert!(verdict.contains(r#""usable""#), "{verdict}");
        }
    }

    fn wait_for_no_process(&self) -> Vec<Process> {
        let deadline = Instant::now() + CLEANUP_TIMEOUT;
        loop {
            let left = self.processes();
            if left.is_empty() || Instant::now() > deadline {
                return left;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The report of a test that failed.
    fn report(&self) {
        let dirs = fs::read_dir(self.path().join("vms")).map(|entries| entries.flatten().collect::<Vec<_>>());
        for dir in dirs.unwrap_or_default() {
            for log in ["supervisor.log", "qemu.log", "console.log"] {
                let text = fs::read(dir.path().join(log)).unwrap_or_default();
                let text = String::from_utf8_lossy(&text[text.len().saturating_sub(3000)..]).escape_debug().to_string();
                eprintln!("--- {log} of {:?}\n{}", dir.file_name(), text.replace("\\n", "\n"));
            }
        }
    }
}

impl Drop for TestHome {
    fn drop(&mut self) {
        if panicking() {
            self.report();
            self.processes().iter().for_each(Process::kill);
            self.wait_for_no_process();
            return;
        }
        let names = self.names();
        self.assert_kvm_was_used();
        if !names.is_empty() {
            self.nido(["delete", "--force", "--yes"]).args(names).ok();
        }
        self.assert_empty();
    }
}

impl Vm<'_> {
    /// A call of the verb for this VM: `nido VERB NAME ARGUMENTS…`.
    pub fn nido(&self, verb: &str, arguments: &[&str]) -> Call {
        self.home.nido([verb, self.name]).args(arguments)
    }

    /// A command in the guest.
    pub fn exec(&self, command: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Call {
        self.home.nido(["exec", self.name, "--"]).args(command)
    }

    /// A shell script in the guest.
    pub fn sh(&self, script: &str) -> Call {
        self.exec(["sh", "-c", script])
    }

    /// Starts a process in the guest that counts in memory, five times a second. It starts no others, which would keep an
    /// emulated processor busy.
    pub fn start_counting(&self) {
        let script = "exec 3<> <(:); while :; do echo $((++n)) > /dev/shm/count; read -rt 0.2 -u 3; done";
        self.sh(&format!("nohup bash -c '{script}' > /dev/null 2>&1 &")).ok();
        eventually("the counter", || (self.count() > 3).then_some(()));
    }

    /// How far it has come.
    pub fn count(&self) -> u64 {
        self.sh("cat /dev/shm/count 2> /dev/null || echo 0").text().trim().parse().unwrap_or(0)
    }

    /// Waits until it has gone on.
    pub fn await_count(&self) {
        let then = self.count();
        eventually("more", || (self.count() > then).then_some(()));
    }

    pub fn info(&self) -> Value {
        self.home.nido(["info", self.name]).json()
    }

    pub fn status(&self) -> String {
        self.info()["status"].as_str().unwrap().to_owned()
    }

    /// Its directory.
    pub fn dir(&self) -> PathBuf {
        self.home.path().join("vms").join(self.info()["id"].as_str().unwrap())
    }

    #[track_caller]
    fn process(&self, what: &str, is_it: impl FnMut(&Process) -> bool) -> Process {
        let found: Vec<_> = processes_in(&self.dir()).into_iter().filter(is_it).collect();
        match &found[..] {
            [one] => one.clone(),
            _ => panic!("one {what} of {}: {found:#?}", self.name),
        }
    }

    #[track_caller]
    pub fn qemu(&self) -> Process {
        self.process("QEMU", Process::is_qemu)
    }

    #[track_caller]
    pub fn supervisor(&self) -> Process {
        self.process("supervisor", |process| process.arguments.iter().any(|argument| argument == "supervise"))
    }

    /// Kills the supervisor and waits until it is gone.
    #[track_caller]
    pub fn kill_supervisor(&self) {
        self.supervisor().kill();
    }

    pub fn delete(&self) {
        self.nido("delete", &["--force", "--yes"]).ok();
    }
}

/// Links where that is possible: a part never changes.
fn link(from: &Path, to: &Path) {
    match fs::hard_link(from, to) {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => copy(from, to),
        linked => linked.unwrap_or_else(|error| panic!("linking {} to {}: {error}", from.display(), to.display())),
    }
}

fn copy(from: &Path, to: &Path) {
    fs::copy(from, to).unwrap_or_else(|error| panic!("copying {} to {}: {error}", from.display(), to.display()));
}

fn place_program(from: &Path, to: &Path) {
    copy(from, to);
    fs::set_permissions(to, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Hands a tree to `nobody`; parts, which are linked, stay whose they are. But memory images are private: they are copied.
fn give_away(path: &Path) {
    if path.is_dir() {
        fs::read_dir(path).unwrap().flatten().for_each(|entry| give_away(&entry.path()));
    } else if path.parent().is_some_and(|parent| parent.ends_with("sha256")) {
        if path.metadata().unwrap().permissions().mode() & 0o044 != 0 {
            return;
        }
        let own = path.with_extension("own");
        let copied = Command::new("cp").arg("--sparse=always").args([path, &own]).status().unwrap();
        assert!(copied.success());
        fs::set_permissions(&own, fs::Permissions::from_mode(0o600)).unwrap();
        fs::rename(&own, path).unwrap();
    }
    chown(path, Some(NOBODY_UID), Some(NOBODY_UID)).unwrap();
}
