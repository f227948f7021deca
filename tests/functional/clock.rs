//! The wall clock of the host is set while VMs run.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;

use nido_files::lock::is_held;
use rustix::process::{Signal, kill_process};

use crate::support::run::{FinishedRun, Nido, RunningNido};
use crate::support::{Home, processes, until};

/// Adds the seconds that a file holds to the wall clock of each process that loads it.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *time) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int outcome = real(id, time);
    const char *path = getenv("WALL_CLOCK_OFFSET");
    FILE *file = id == CLOCK_REALTIME && path ? fopen(path, "re") : NULL;
    long seconds = 0;
    if (file) {
        if (fscanf(file, "%ld", &seconds) == 1) time->tv_sec += seconds;
        fclose(file);
    }
    return outcome;
}
"#;

/// The wall clock of the processes that are started with it.
struct WallClock {
    shim: PathBuf,
    offset: PathBuf,
}

impl WallClock {
    fn new(home: &Home) -> Self {
        let (source, shim) = (home.scratch("clock.c"), home.scratch("clock.so"));
        fs::write(&source, SHIM).unwrap();
        let built =
            Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&shim, &source]).arg("-ldl").output().unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        Self { shim, offset: home.scratch("offset") }
    }

    fn set(&self, seconds: i64) {
        let new = self.offset.with_extension("new");
        fs::write(&new, seconds.to_string()).unwrap();
        fs::rename(&new, &self.offset).unwrap();
    }

    fn of<'a>(&self, nido: Nido<'a>) -> Nido<'a> {
        nido.env("LD_PRELOAD", &self.shim).env("WALL_CLOCK_OFFSET", &self.offset)
    }
}

/// Replaces the VM's supervisor by one with this wall clock. Those that commands start have an environment of their own.
fn supervise(home: &Home, clock: &WallClock, name: &str) -> RunningNido {
    let id = home.info(name)["id"].as_str().unwrap().to_owned();
    until("a supervisor with another wall clock", || {
        let of_vm = format!(" supervise {id}");
        for (pid, _) in processes::of(&home.path()).into_iter().filter(|(_, line)| line.contains(&of_vm)) {
            processes::kill_if_alive(pid);
        }
        let supervisor = clock.of(home.nido(["supervise", &id])).start();
        // The guardian may have been first.
        let listens = catch_unwind(AssertUnwindSafe(|| supervisor.line())).is_ok_and(|line| line == "listening");
        listens.then_some(supervisor)
    })
}

#[test]
fn a_wall_clock_that_is_put_forward_ends_a_time_to_live() {
    let home = Home::new();
    let clock = WallClock::new(&home);
    home.nido(["spawn", "web", "--accel", "tcg", "--ttl", "1h"]).run().ok();
    home.spawn("other");
    let supervisors = ["web", "other"].map(|name| supervise(&home, &clock, name));
    clock.set(2 * 3600);
    let info = home.await_info("web", |info| info["status"] == "stopped");
    assert_eq!(info["status_cause"], "ttl", "{info}");
    assert_eq!(home.info("other")["status"], "running");
    supervisors.iter().for_each(RunningNido::kill);
}

// The end of a time to live was read from the wall clock alone.
#[test]
fn a_wall_clock_that_is_put_back_does_not_extend_a_time_to_live() {
    let home = Home::new();
    let clock = WallClock::new(&home);
    home.nido(["spawn", "web", "--accel", "tcg", "--ttl", "12s"]).run().ok();
    let supervisor = supervise(&home, &clock, "web");
    clock.set(-2 * 3600);
    let info = home.await_info("web", |info| info["status"] == "stopped");
    assert_eq!(info["status_cause"], "ttl", "{info}");
    supervisor.kill();
}

// The guardian read it from the wall clock alone, too.
#[test]
fn a_wall_clock_that_is_put_back_does_not_keep_a_vm_whose_supervisor_hangs() {
    let home = Home::new();
    let clock = WallClock::new(&home);
    let spawned = |ran: FinishedRun| home.path().join("vms").join(ran.ok().json()["id"].as_str().unwrap());
    let other = spawned(home.nido(["spawn", "other", "--accel", "tcg", "--json"]).run());
    let web = spawned(home.nido(["spawn", "web", "--accel", "tcg", "--ttl", "8s", "--json"]).run());
    let one = |word: &str| {
        let mut all = processes::of(&home.path()).into_iter().filter(|(_, line)| line.contains(word));
        all.next().unwrap().0
    };
    let supervisor = |of: &Path| one(&format!(" supervise {}", of.file_name().unwrap().display()));
    let before = until("the guardian", || is_held(&home.path().join("guardian.lock")).then(|| one(" watch")));
    // Nothing else starts a guardian: no command is run, and no supervisor runs.
    let hangs = supervisor(&web);
    kill_process(hangs, Signal::STOP).unwrap();
    kill_process(before, Signal::STOP).unwrap();
    processes::kill(supervisor(&other));
    processes::kill(before);
    let guardian = clock.of(home.nido(["watch"])).start();
    // It has read the store.
    let log = || fs::read_to_string(other.join("supervisor.log")).unwrap_or_default();
    until("another supervisor", || log().contains("taking over the QEMU").then_some(()));
    assert!(is_held(&web.join("vm.lock")));
    clock.set(-2 * 3600);
    until("the end of its QEMU", || (!is_held(&web.join("vm.lock"))).then_some(()));
    assert!(is_held(&other.join("vm.lock")));
    processes::kill(hangs);
    guardian.kill();
}
