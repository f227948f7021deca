//! The supervisor: one process per running VM, this same program. It starts QEMU, or takes over one that lost its
//! supervisor; carries sessions to the agent; keeps the limits; records how it all ended.
//!
//! ```text
//!   command --control.sock--> control_server.rs --calls--+
//!   client  --agent.sock----> guest::Channel ------------+--> the loop in event_loop.rs
//!   QEMU    --qmp.sock------> events --------------------+      | events        ^
//!           --exit (pidfd)---> --------------------------+      v               | actions
//!                                                             lifecycle/ (pure)-+--> actions.rs --> store, QMP, agent
//! ```
//!
//! Invariants: it can be killed at any instant: QEMU keeps running, holding `vm.lock`, and the next command starts another
//! supervisor, which finds everything it needs in the store and in the VM's directory. It holds `supervisor.lock` from
//! before its first line to its end, and what it writes into the store last is how the VM ended. SIGKILL ends the supervisor alone;
//! SIGTERM has it stop the VM in order (`terminate.rs`).

mod actions;
mod agent_watch;
mod bake;
mod clock;
mod commands;
pub mod context;
pub mod control;
mod control_group;
mod control_server;
mod disk_quota;
mod event_loop;
mod exit_cause;
mod forwards;
mod handlers;
mod host_clocks;
mod host_services;
mod jobs;
mod launch;
mod lifecycle;
mod limit_hits;
mod limits;
mod loaded_guest;
mod name_pins;
mod network;
mod network_status;
mod old_connections;
mod pause;
mod pool;
mod power_off;
mod process_limit;
mod process_refusals;
mod qemu_files;
mod qemu_sockets;
mod qmp;
mod readiness;
mod recorded_limits;
mod role;
mod snapshot;
mod start_report;
mod startup;
mod state;
mod terminate;
mod traffic;
mod trust;
mod unwritten;
pub mod vm_record;

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use nido_api::Failure;
use nido_api::error::{Code, Error, Hint, Result};
use nido_api::name::VmName;
use nido_api::operation as op;
use nido_api::state::{FailureCause, VmState};
use nido_engine::home::{SUPERVISOR_LOCK, VM_LOCK, VmDir};
use nido_engine::host::daemon::raise_open_files;
use nido_files::lock::{HeldLock, is_held};
use rustix::fs::Mode;

use crate::context::Context;
pub use crate::unwritten::lagging;

/// What the warning of a VM begins with for which no supervisor stays. A supervisor that works removes it.
pub const SUPERVISOR_FAILS: &str =
    "every supervisor that is started for it ends at once, so nothing enforces its limits but its time to live";

/// What a supervisor is started with.
#[derive(Debug, Clone)]
pub struct SuperviseRequest {
    /// The VM's id.
    pub id: String,
    /// How long ago the user asked for the start, in milliseconds; for the timings.
    pub asked_ms_ago: f64,
    /// How long the guest may take to become ready; a default by accelerator if absent.
    pub ready_within_ms: Option<u64>,
}

/// Supervises one VM and returns when it has stopped; at once if it does not run, or has a supervisor.
///
/// # Errors
/// Any failure to supervise. The VM's row states how the VM ended.
pub async fn supervise(context: Arc<Context>, request: SuperviseRequest, asked_at: Option<Instant>) -> Result<()> {
    let dir = context.vm_dir(&request.id);
    let Some(lock) = own_lock(&dir)? else { return Ok(()) };
    let Some(row) = context.store().vm_by_id(&request.id)? else { return Ok(()) };
    if let Some(why) = &row.unreadable {
        return Err(Error::new(Code::StoreDamaged, format!("the VM's row in the store cannot be read: {why}")));
    }
    let attach = is_held(&dir.file(VM_LOCK));
    if !attach && row.state != VmState::Starting {
        return Ok(());
    }
    nido_files::failpoint!("supervise.begun");
    prepare_process(&dir)?;
    let asked_at = asked_at.unwrap_or_else(Instant::now);
    let supervisor = state::Supervisor::prepare(context, row, lock, attach, asked_at, request.ready_within_ms)?;
    // The supervisor is part of it, and too large for a stack frame.
    Box::pin(supervisor.run(attach, announce)).await
}

/// The lock that came as standard input, or else taken here. `None`: another supervisor has it.
fn own_lock(dir: &VmDir) -> Result<Option<HeldLock>> {
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;
    let path = dir.file(SUPERVISOR_LOCK);
    let broken = |e| Error::io("cannot lock the VM", e);
    let inherited = File::from(std::io::stdin().as_fd().try_clone_to_owned().map_err(broken)?);
    let same = match (inherited.metadata(), std::fs::metadata(&path)) {
        (Ok(ours), Ok(named)) => (ours.dev(), ours.ino()) == (named.dev(), named.ino()),
        _ => false,
    };
    if same {
        return Ok(Some(HeldLock::inherited(inherited)));
    }
    HeldLock::try_take(&path).map_err(broken)
}

/// Makes this process fit to stay: it works in the VM's directory, and what it creates is private.
fn prepare_process(dir: &VmDir) -> Result<()> {
    rustix::process::umask(Mode::from_bits_truncate(0o077));
    raise_open_files();
    std::env::set_current_dir(dir.path()).map_err(|e| Error::io("cannot enter the VM's directory", e))
}

/// The line that a supervisor writes to its standard output when it listens.
pub const LISTENING: &str = "listening\n";

/// Notifies the command that started this supervisor that it listens, and closes the pipe.
fn announce() {
    let mut out = std::io::stdout();
    let _ = out.write_all(LISTENING.as_bytes()).and_then(|()| out.flush());
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
    }
}

/// The error with the cause of a VM's failure.
pub fn failure_error(name: &VmName, failure: &Failure) -> Error {
    let code = match failure.cause {
        FailureCause::GuestTimeout | FailureCause::AgentRefused => Code::AgentUnreachable,
        FailureCause::AgentVersion => Code::AgentVersion,
        FailureCause::GuestPanic | FailureCause::RenewalFailed => Code::GuestFailed,
        FailureCause::DiskFull => Code::DiskFull,
        FailureCause::OutOfMemory => Code::LimitExceeded,
        FailureCause::KvmInternalError => Code::KvmUnavailable,
        FailureCause::QemuSignal | FailureCause::QemuError | FailureCause::HostRestart => Code::QemuFailed,
        FailureCause::FilesLost => Code::VmNotRunning,
    };
    let error = Error::new(code, format!("VM '{name}' failed: {}", failure.message)).log_tail(failure.log_tail.clone());
    let start = || Hint::run_on(op::VM_START, name);
    let console = || Hint::run_on(op::VM_LOGS, name).to("see its console");
    match failure.cause {
        FailureCause::GuestTimeout => error.hint("see the end of its console above, and allow a longer timeout"),
        FailureCause::GuestPanic => error.hint(console()),
        FailureCause::AgentVersion => error.hint(start().cold().to("boot it with this nido's guest agent")),
        FailureCause::AgentRefused => error.hint(start().cold().to("boot it again")).or_hint(console()),
        FailureCause::RenewalFailed => error.hint(start().cold().to("boot it instead of forking it")),
        FailureCause::KvmInternalError => error
            .hint(Hint::host("check KVM with nido doctor"))
            .or_hint(Hint::command_line("run the VM with --accel tcg, without KVM, slowly and without isolation")),
        FailureCause::OutOfMemory => error.hint("reduce its memory, or stop other VMs"),
        FailureCause::DiskFull => error.hint(Hint::home_full()),
        FailureCause::FilesLost => error.hint(Hint::run_on(op::VM_DELETE, name).to("it cannot be started again")),
        _ => error.hint(start().to("start it again")).or_hint(Hint::host("check the host with nido doctor")),
    }
}
