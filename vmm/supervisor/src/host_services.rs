//! What the supervisor arranges with the host when QEMU runs: a guardian, and a systemd scope or a control group of its own.

use std::time::Duration;

use nido_api::{LimitHit, LimitKind};
use nido_engine::home::CONTROL_GROUP;
use nido_engine::host::ControlGroup;
use nido_engine::host::facts::is_in_memory;
use nido_engine::host::limits;
use nido_engine::host::scope;
use nido_engine::qemu::QemuExit;
use nido_store::Transition;

use super::control_group::{self, LimitedGroup};
use super::jobs;
use super::state::{Report, Supervisor};

/// The job that removes the VM's control group, and how long it may take.
const GROUP_JOB: &str = "removing the VM's control group";
const GROUP_TIMEOUT: Duration = Duration::from_secs(5);

/// What a hit of the limit of processes means.
const THREADS_REFUSED: &str =
    "QEMU or the supervisor could not start a thread: the VM has as many on the host as it may have";

impl Supervisor {
    /// Starts the guardian if none runs, unless this VM is about to end. While there is a supervisor, a guardian that was killed
    /// is replaced.
    pub(super) fn ensure_guardian(&self) {
        if !self.lifecycle.is_ending() {
            self.context.ensure_guardian();
        }
    }

    /// QEMU runs: takes note of the control group that it is in. Where there is systemd, QEMU and this supervisor leave the unit of
    /// the process that started them.
    pub(super) fn join_group(&mut self, qemu: Option<i32>) {
        let Some(qemu) = qemu else { return };
        let id = self.row.id.clone();
        if let Some(group) = u32::try_from(qemu).ok().and_then(|pid| ControlGroup::of_process(pid, &id)) {
            return self.on_group(group);
        }
        let Some(bus) = scope::bus() else {
            if self.dir.file(CONTROL_GROUP).exists() {
                tracing::warn!("the VM has no limits on the host: its QEMU could not join its control group");
            }
            return;
        };
        let own = std::process::id();
        let (name, pids) = (self.row.spec.name.to_string(), [i32::try_from(own).unwrap_or_default(), qemu]);
        let in_memory = is_in_memory(self.dir.path());
        let (planned, reports) = (limits::plan(&self.machine, in_memory), self.reports.0.clone());
        tokio::spawn(async move {
            match scope::adopt(bus, &id, &name, &pids, &planned).await {
                Ok(()) => {
                    tracing::info!("the VM has its own systemd scope");
                    if let Some(group) = ControlGroup::of_process(own, &id) {
                        let _ = reports.send(Report::Group(Box::new(group))).await;
                    }
                }
                Err(why) => tracing::warn!("the VM stays in the unit that it was started in: {why}"),
            }
        });
    }

    /// Records what the kernel limits. What happened in the group before is no event for this supervisor.
    pub(super) fn on_group(&mut self, group: ControlGroup) {
        let (found, seen) = (group.in_force(), group.events());
        tracing::info!("the VM's control group is {}: {}", group.path().display(), found.describe());
        self.group = Some(LimitedGroup { group, seen });
        if found != self.machine.host_limits {
            self.machine.host_limits = found;
            self.write(Transition::MachineChanged(self.machine.clone()));
        }
    }

    /// Records whether QEMU could not start threads since the last time.
    pub(super) fn check_group(&mut self) {
        let Some(limited) = self.group.as_mut() else { return };
        let (now, limit) = (limited.group.events(), limited.group.in_force().processes);
        let refused = now.process_refusals.saturating_sub(limited.seen.process_refusals);
        limited.seen.process_refusals = now.process_refusals;
        if refused > 0 {
            self.on_limit_hit(LimitHit::new(LimitKind::Processes, limit, THREADS_REFUSED).with("refused", refused));
        }
    }

    /// QEMU has ended: finds out whether the kernel killed it because the VM's memory on the host was used up, or it could not start
    /// a thread.
    pub(super) fn note_host_limits(&mut self, exit: QemuExit) {
        self.check_group();
        let was_killed = matches!(exit, QemuExit::Signal(9) | QemuExit::Unknown);
        let Some(limited) = self.group.as_ref().filter(|_| was_killed) else { return };
        let group = &limited.group;
        let (kills, limit) = (group.events().oom_kills, group.in_force().memory_bytes);
        if kills <= limited.seen.oom_kills {
            return;
        }
        let hit = LimitHit::new(LimitKind::Memory, limit, "QEMU was killed: the VM's memory on the host was used up");
        let hit = hit.with("oom_kill", kills);
        let hit = group.memory_peak().map_or(hit.clone(), |peak| hit.with("peak_bytes", peak));
        self.lifecycle.evidence().memory_limit = limit;
        self.on_limit_hit(hit);
    }

    /// QEMU has ended: removes the control group that nido made for it. Before the end is recorded, so a supervisor that is killed
    /// meanwhile leaves a VM whose end another process records, and removes the group.
    pub(super) async fn leave_group(&mut self) {
        self.group = None;
        let (dir, id) = (self.dir.clone(), self.row.id.clone());
        let removal = move || {
            control_group::remove(dir.path(), &id);
            Ok(())
        };
        if let Err(error) = jobs::run_within(GROUP_JOB, GROUP_TIMEOUT, removal).await {
            tracing::warn!("{error}");
        }
    }
}
