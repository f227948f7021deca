//! The error for a request that a VM's state does not allow.

use nido_api::error::{Code, Error, Hint};
use nido_api::operation as op;
use nido_api::state::{StateCause, VmState};
use nido_store::VmRow;

/// The error for a request that the state does not allow.
pub(super) fn denied(row: &VmRow, done: &str, why: &str) -> Error {
    let name = &row.spec.name;
    let why = row.cause.filter(|_| row.state == VmState::Paused).map_or(why, |cause| cause.paused_because());
    let code = match row.state {
        VmState::Starting | VmState::Stopping => Code::VmBusy,
        _ => Code::VmNotRunning,
    };
    let error = Error::new(code, format!("VM '{name}' cannot be {done}: {why}"));
    match row.state {
        VmState::Created | VmState::Stopped | VmState::Failed => error.hint(Hint::run_on(op::VM_START, name)),
        VmState::Paused if row.cause == Some(StateCause::DiskFull) => error
            .hint(Hint::host("free some space on the disk that holds nido's home; it then resumes automatically"))
            .or_hint(Hint::run_on(op::VM_RESUME, name)),
        VmState::Paused => error.hint(Hint::run_on(op::VM_RESUME, name)),
        VmState::Starting | VmState::Stopping | VmState::Running | VmState::Unknown => error,
    }
}
