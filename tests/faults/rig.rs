//! A home with VMs that must stay as they are, and the failpoints of its processes.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nido_images::hash_file;
use serde_json::Value;

use crate::support::{Home, Nido, processes, publish_whole};

/// How often it is checked whether the processes of a home have recovered. Each check runs commands, which take CPU time from them.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// How long the processes of a home may take until they have recovered.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(40);

/// The VMs that no operation touches.
pub const BYSTANDERS: [&str; 3] = ["halted", "paused", "running"];

/// Where a process is killed: the `count`-th time that it is at a failpoint.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Step {
    pub role: String,
    pub name: String,
    pub count: u32,
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}:{}", self.role, self.name, self.count)
    }
}

/// What must be the same before and after.
#[derive(Debug, PartialEq)]
struct Bystander {
    info: Value,
    /// Hashes of the disk and the snapshots.
    data: BTreeMap<PathBuf, String>,
    processes: Vec<i32>,
}

pub struct Rig {
    pub home: Home,
    failpoints: PathBuf,
    bystanders: Vec<Bystander>,
    serial: u32,
}

impl Rig {
    pub fn new() -> Self {
        let home = Home::new();
        home.qemu("migrates");
        let failpoints = home.scratch("failpoints");
        fs::create_dir(&failpoints).unwrap();
        let mut rig = Self { home, failpoints, bystanders: Vec::new(), serial: 0 };
        let port = free_port();
        for line in [
            "spawn halted --accel tcg",
            "stop halted",
            "snapshot create halted before",
            "spawn paused --accel tcg",
            "pause paused",
            &format!("spawn running --accel tcg -p {port}:80 --label a=b"),
            "snapshot create running before",
        ] {
            // Without failpoints: their supervisors stay.
            line.split(' ').fold(rig.home.nido([]), Nido::arg).run().ok();
        }
        rig.bystanders = BYSTANDERS.map(|name| rig.bystander(name)).into();
        rig
    }

    /// A nido in this home, whose words are separated by spaces. It and what it starts can be killed at a failpoint.
    pub fn nido(&self, line: &str) -> Nido<'_> {
        // `@/` is the directory beside the home.
        let line = line.replace("@/", &format!("{}/", self.home.scratch("").display()));
        let nido = line.split(' ').fold(self.home.nido([]), Nido::arg);
        nido.env("NIDO_FAILPOINTS", self.failpoints.as_os_str())
    }

    pub fn ok(&self, line: &str) -> Value {
        let ran = self.nido(line).arg("--json").run().ok();
        serde_json::from_slice(&ran.stdout).unwrap_or_default()
    }

    pub fn info(&self, name: &str) -> Option<Value> {
        let ran = self.nido(&format!("info {name} --json")).run();
        (ran.code() == 0).then(|| ran.json())
    }

    /// The steps of what `work` does.
    pub fn trace(&self, work: impl FnOnce()) -> Vec<Step> {
        let reached = self.failpoints.join("reached");
        fs::write(&reached, "").unwrap();
        work();
        let lines = fs::read_to_string(&reached).unwrap();
        fs::remove_file(reached).unwrap();
        let mut counts: BTreeMap<(&str, &str, &str), u32> = BTreeMap::new();
        let mut steps = Vec::new();
        for line in lines.lines() {
            let [role, pid, name] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
            let count = counts.entry((role, pid, name)).or_default();
            *count += 1;
            let step = Step { role: role.into(), name: name.into(), count: *count };
            if !steps.contains(&step) {
                steps.push(step);
            }
        }
        steps
    }

    /// From now on the first process that comes to this step does this.
    pub fn arm(&mut self, step: &Step, action: &str) {
        self.serial += 1;
        let _ = fs::remove_file(self.failpoints.join("fired"));
        // Written under another name: a process may be reading.
        let fresh = self.failpoints.join("plan.new");
        fs::write(&fresh, format!("{step}={action}\n{}", self.serial)).unwrap();
        fs::rename(fresh, self.failpoints.join("plan")).unwrap();
    }

    /// No process does any more. Returns whether one did.
    pub fn disarm(&self) -> bool {
        let _ = fs::remove_file(self.failpoints.join("plan"));
        self.failpoints.join("fired").exists()
    }

    /// Waits until `look` finds nothing to complain about.
    pub fn until_well<T>(&self, mut look: impl FnMut() -> Result<T, String>) -> T {
        let deadline = Instant::now() + RECOVERY_TIMEOUT;
        loop {
            match look() {
                Ok(found) => return found,
                Err(why) => assert!(Instant::now() < deadline, "{why}"),
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    pub fn directory(&self, name: &str) -> PathBuf {
        self.home.path().join("vms").join(self.home.info(name)["id"].as_str().unwrap())
    }

    /// Everything acknowledged about the VMs that no operation touches is as it was.
    pub fn expect_bystanders(&self) {
        for (name, before) in BYSTANDERS.iter().zip(&self.bystanders) {
            assert_eq!(self.bystander(name), *before, "{name} has changed");
        }
    }

    fn bystander(&self, name: &str) -> Bystander {
        let mut info = self.home.info(name);
        for volatile in ["uptime_ms", "idle_ms", "idle_at"] {
            info.as_object_mut().unwrap().remove(volatile);
        }
        let directory = self.directory(name);
        let snapshots = fs::read_dir(directory.join("snapshots")).into_iter().flatten().flatten();
        let files = snapshots.flat_map(|entry| fs::read_dir(entry.path()).unwrap()).map(|entry| entry.unwrap().path());
        let files = files.chain([directory.join("disk.qcow2")]).map(|path| {
            let hash = hash_file(&path).unwrap().sha256;
            (path, hash)
        });
        // The supervisor, QEMU and the agent.
        let all = processes::of(&self.home.scratch(""));
        let cwd = |pid: i32| fs::read_link(format!("/proc/{pid}/cwd")).ok();
        let pids = all.iter().map(|(pid, _)| pid.as_raw_nonzero().get());
        let processes = pids.filter(|pid| cwd(*pid).as_deref() == Some(&directory)).collect();
        Bystander { info, data: files.collect(), processes }
    }

    /// Deletes everything that an operation may have made.
    pub fn clear(&self) {
        self.ok("pool set sandbox 0 --accel tcg");
        let webhooks = self.ok("webhook ls");
        for webhook in webhooks["webhooks"].as_array().unwrap() {
            self.ok(&format!("webhook remove {}", webhook["id"].as_str().unwrap()));
        }
        let tokens = self.ok("token list");
        for token in tokens["tokens"].as_array().unwrap() {
            self.ok(&format!("token revoke {} --yes", token["id"].as_str().unwrap()));
        }
        for name in self.home.names() {
            if !BYSTANDERS.contains(&name.as_str()) {
                self.home.nido(["delete", &name, "--force", "--yes"]).run().ok();
            }
        }
    }

    /// Ends everything; for a home in which something has gone wrong, which is kept.
    pub fn abandon(self) {
        processes::end_all(&self.home.scratch(""));
        println!("kept: {}", self.home.path().display());
        std::mem::forget(self.home);
    }
}

/// Sees to it that the template `real` is not there; its archive is.
pub fn delete_template(rig: &Rig) {
    if !rig.home.scratch("real.nido").exists() {
        publish_whole(&rig.home, "real", b"packages");
        rig.ok("template export real @/real.nido");
    }
    let _ = rig.home.nido(["template", "delete", "real"]).run();
}

/// Sees to it that the template `real` is there.
pub fn import_template(rig: &Rig) {
    delete_template(rig);
    rig.home.nido(["template", "import"]).arg(rig.home.scratch("real.nido")).run().ok();
}

/// A port that is free now.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
