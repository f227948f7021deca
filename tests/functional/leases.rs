//! VMs of a session: they are deleted with it, whether it ends in order or is killed, without any command.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Stdio};

use nido_api::error::Code;
use nido_api::{AccelChoice, LeaseId, StartRequest, VmSpec};
use nido_core::{Nido, OpenOptions};
use rustix::process::Pid;
use serde_json::json;

use crate::support::{Home, processes, until};

/// The instructions for the process that holds a session.
const HOME: &str = "NIDO_TEST_LEASE_HOME";
const QEMU: &str = "NIDO_TEST_LEASE_QEMU";

fn with_server<T>(home: std::path::PathBuf, qemu: std::path::PathBuf, work: impl AsyncFnOnce(&Nido) -> T) -> T {
    let supervisor = Some(env!("CARGO_BIN_EXE_nido").into());
    let options = OpenOptions { home: Some(home), qemu: Some(qemu), supervisor, ..OpenOptions::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { work(&Nido::open(options).await.unwrap()).await })
}

fn grant() -> nido_api::Grant {
    nido_api::Grant::unlimited(&nido_api::Caller::command_line())
}

fn spec(name: &str, lease: Option<&LeaseId>) -> VmSpec {
    VmSpec { accel: AccelChoice::Tcg, lease: lease.cloned(), ..VmSpec::named(name.parse().unwrap()) }
}

async fn spawn(nido: &Nido, name: &str, lease: Option<&LeaseId>) -> String {
    nido.spawn(spec(name, lease), StartRequest::default(), &grant(), &mut |_| ()).await.unwrap().id
}

/// Another process with a session and a VM `web` of it.
struct Holder {
    child: Child,
    vm: String,
}

impl Holder {
    fn start(home: &Home) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "leases::holder", "--ignored", "--nocapture"]);
        command.env(HOME, home.path()).env(QEMU, home.qemu_path());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let said = lines.map(Result::unwrap).find_map(|line| Some(line.split_once("holds ")?.1.to_owned()));
        Self { child, vm: said.expect("it made no VM") }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "the other process of the tests here"]
fn holder() {
    let [home, qemu] = [HOME, QEMU].map(|key| std::env::var_os(key).unwrap().into());
    with_server(home, qemu, async |nido| {
        let lease = nido.lease_open().unwrap();
        println!("holds {}", spawn(nido, "web", Some(lease.id())).await);
        let _ = std::io::stdin().read(&mut [0]);
    });
}

fn supervisors(home: &Home) -> Vec<Pid> {
    let all = processes::of(&home.path()).into_iter();
    all.filter(|(_, line)| line.contains(" supervise ")).map(|(pid, _)| pid).collect()
}

/// Waits for the end of a VM's files, without calling nido: that would reconcile it.
pub fn await_gone(home: &Home, id: &str) {
    let directory = home.path().join("vms").join(id);
    until("the end of the VM", || (!directory.exists()).then_some(()));
}

pub fn events(home: &Home, vm: &str) -> Vec<serde_json::Value> {
    home.nido(["events", "--json", "--vm", vm]).run().ok().json()["events"].as_array().unwrap().clone()
}

#[test]
fn a_session_that_ends_takes_its_vms_with_it() {
    let home = Home::new();
    with_server(home.path(), home.qemu_path(), async |nido| {
        let (lease, other) = (nido.lease_open().unwrap(), nido.lease_open().unwrap());
        spawn(nido, "web", Some(lease.id())).await;
        let made = nido.create(spec("cold", Some(lease.id())), &grant()).await.unwrap();
        assert!(made.ephemeral);
        nido.create(spec("theirs", Some(other.id())), &grant()).await.unwrap();
        nido.create(spec("mine", None), &grant()).await.unwrap();
        assert_eq!(home.names(), ["web", "cold", "theirs", "mine"], "settling leaves them alone");
        let id = lease.id().clone();
        nido.lease_end(lease).await.unwrap();
        assert_eq!(home.names(), ["theirs", "mine"]);
        let late = nido.create(spec("late", Some(&id)), &grant()).await.unwrap_err();
        assert_eq!(late.code(), Code::Interrupted);
        drop(other);
        assert_eq!(home.names(), ["mine"], "one at rest goes with the next command");
    });
    assert_eq!(std::fs::read_dir(home.path().join("present")).unwrap().count(), 0);
}

#[test]
fn supervisors_see_by_themselves_that_a_session_was_killed() {
    let home = Home::new();
    let mut holder = Holder::start(&home);
    assert_eq!(home.info("web")["status"], "running");
    holder.kill();
    await_gone(&home, &holder.vm);
    let events = events(&home, "web");
    let kinds: Vec<_> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["vm.created", "vm.started", "vm.expired", "vm.stopped", "vm.deleted"]);
    assert_eq!(events[2]["details"]["limit"], json!("session"));
    home.expect_empty();
}

#[test]
fn a_paused_vm_goes_too() {
    let home = Home::new();
    let mut holder = Holder::start(&home);
    home.nido(["pause", "web"]).run().ok();
    holder.kill();
    await_gone(&home, &holder.vm);
    home.expect_empty();
}

#[test]
fn where_the_supervisor_was_killed_as_well_the_next_command_sees_to_it() {
    let home = Home::new();
    let mut holder = Holder::start(&home);
    let supervisor = supervisors(&home);
    assert_eq!(supervisor.len(), 1);
    processes::kill(supervisor[0]);
    holder.kill();
    assert!(home.path().join("vms").join(&holder.vm).exists());
    home.nido(["ls"]).run().ok();
    await_gone(&home, &holder.vm);
    home.expect_empty();
}

#[test]
fn a_session_survives_its_supervisor() {
    let home = Home::new();
    let holder = Holder::start(&home);
    processes::kill(supervisors(&home)[0]);
    // Another one took it over, and has looked.
    home.await_info("web", |vm| vm["status"] == "running" && supervisors(&home).len() == 1);
    assert_eq!(home.nido(["exec", "web", "--", "true"]).run().ok().text(), "");
    drop(holder);
    until("the end of the VM", || home.names().is_empty().then_some(()));
}
