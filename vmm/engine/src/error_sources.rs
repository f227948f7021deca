//! Failures of the parts as failures of the API: which code each has, and what to do about it.

use nido_api::error::host::{HostRefusal, Subject};
use nido_api::error::{Code, Error, Hint};
use nido_api::operation as op;
use nido_guest_agent::wire::Fault;

use crate::guest::GuestError;
use crate::host::QemuProbeError;
use crate::machine::Refusal;

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        let check_kvm = || Hint::host("check KVM with nido doctor");
        let (code, hints) = match &refusal {
            Refusal::KvmUnavailable { .. } => (
                Code::KvmUnavailable,
                vec![
                    check_kvm(),
                    Hint::command_line("use --accel auto, which falls back to emulation, with a warning"),
                ],
            ),
            Refusal::NestingOff { remedy, .. } => (Code::NestedUnavailable, vec![Hint::host(remedy)]),
            Refusal::KvmUndecided { .. } => (
                Code::KvmUnavailable,
                vec![
                    Hint::note("try again when the host is less busy"),
                    Hint::command_line("run it with --accel tcg, without KVM, slowly and without isolation"),
                ],
            ),
            Refusal::IsolationLost { .. } => (
                Code::IsolationRequired,
                vec![check_kvm(), Hint::command_line("start it without isolation: nido start NAME --accel tcg")],
            ),
            Refusal::IsolationRequired { .. } => (Code::IsolationRequired, vec![check_kvm()]),
            Refusal::ConfinementRequired { .. } => {
                (Code::ConfinementRequired, vec![Hint::host("see what this host allows with nido doctor")])
            }
            Refusal::SpecInvalid { .. } => (Code::SpecInvalid, vec![Hint::host("check the host with nido doctor")]),
            Refusal::QemuTooOld { .. } => {
                (Code::QemuTooOld, vec![Hint::host("install a newer qemu-system-x86, or name one with --qemu")])
            }
            Refusal::QemuLacks { .. } => {
                (Code::QemuTooOld, vec![Hint::host("install Debian's qemu-system-x86, or name another with --qemu")])
            }
        };
        hints.into_iter().fold(Self::new(code, refusal.to_string()), Self::or_hint)
    }
}

impl From<QemuProbeError> for Error {
    fn from(error: QemuProbeError) -> Self {
        let (code, hint) = match &error {
            QemuProbeError::Missing { .. } => {
                (Code::QemuMissing, "install it: apt-get install qemu-system-x86, or name one with --qemu")
            }
            _ => (Code::QemuFailed, "check the program with its --version, or name another with --qemu"),
        };
        let tail = match &error {
            QemuProbeError::NotQemu { stderr_tail, .. } => stderr_tail.lines().map(str::to_owned).collect(),
            _ => Vec::new(),
        };
        Self::new(code, error.to_string()).hint(Hint::host(hint)).log_tail(tail).because(error)
    }
}

/// A failure between nido and the agent of the VM called `vm`.
#[must_use]
pub fn guest_error(vm: &str, error: GuestError) -> Error {
    let (code, hint) = match &error {
        GuestError::Unreachable(_) | GuestError::Timeout { .. } | GuestError::Gone => {
            return Error::new(Code::AgentUnreachable, error.to_string())
                .hint(Hint::run_on(op::VM_INFO, vm).to("see its state"))
                .or_hint(Hint::run_on(op::VM_LOGS, vm).to("see its console"))
                .because(error);
        }
        GuestError::VersionMismatch { .. } => (
            Code::AgentVersion,
            Hint::run_on(op::VM_RESTART, vm).cold().to("boot it with this nido's own agent, with its disk"),
        ),
        GuestError::TokenRefused => (Code::GuestDenied, Hint::run_on(op::VM_RESTART, vm).to("restart it")),
        GuestError::Busy => (Code::LimitExceeded, "wait until one of them has ended, then try again".into()),
        GuestError::TunnelsBusy => (Code::LimitExceeded, "close some of them, then try again".into()),
        GuestError::RequestTooLarge { .. } => (
            Code::LimitExceeded,
            "arguments and environment count together: pass large data as standard input, or copy it into a file"
                .into(),
        ),
        GuestError::LimitExceeded { .. } => (Code::LimitExceeded, "end some of its processes".into()),
        GuestError::Protocol(_) => {
            (Code::AgentUnreachable, "its guest may have been tampered with; do not trust it".into())
        }
        GuestError::Guest(failed) => return fault_error(failed.fault, &failed.message),
        GuestError::HostIo { source, .. } => {
            let refusal = HostRefusal::of(source);
            let plain = Error::new(refusal.code(), error.to_string());
            return refusal.hint(Subject::Copy).into_iter().fold(plain, Error::or_hint).because(error);
        }
        GuestError::PathExists(_) => (Code::PathExists, Hint::command_line("replace it with --force")),
        GuestError::PathNotFound(_) => (Code::PathNotFound, "check the path on the host".into()),
        GuestError::BadName(_) => (Code::PathInvalid, "check the path".into()),
        GuestError::IsDirectory => {
            (Code::PathInvalid, "request a tar archive of it (over HTTP: Accept: application/x-tar)".into())
        }
        GuestError::BadArchive(_) => (
            Code::SpecInvalid,
            "pack files, directories and symlinks only, with names below the directory: no hard links, no sparse files"
                .into(),
        ),
        GuestError::ArchiveTooLarge { .. } => (Code::LimitExceeded, "send it in parts".into()),
        GuestError::DiskFull(_) => (Code::DiskFull, "free some space; no incomplete file remains".into()),
    };
    Error::new(code, error.to_string()).hint(hint).because(error)
}

/// A guest's error. Its text is shown escaped.
fn fault_error(fault: Fault, message: &str) -> Error {
    let text = nido_api::sanitize::on_one_line(message);
    let (code, hint) = match fault {
        Fault::CommandNotFound => (Code::CommandNotFound, Some("is it installed in the guest?")),
        Fault::CannotRun => (Code::CommandCannotRun, Some("is it a program, and executable for that user?")),
        Fault::NoUser => (
            Code::UserNotFound,
            Some(
                "a name must be in the guest's /etc/passwd or /etc/group; numbers need not: UID, UID:GID, USER:GROUP, :GID",
            ),
        ),
        Fault::NoDirectory => (Code::DirectoryNotFound, Some("create it first, or omit the working directory")),
        Fault::NotFound => (Code::GuestNotFound, Some("check the path in the guest")),
        Fault::Denied => (Code::GuestDenied, Some("the guest's own permissions decide this: use another user")),
        Fault::DiskFull => (
            Code::DiskFull,
            Some(
                "free some space there in the guest; if it is the guest's disk, a VM can be spawned with a larger one",
            ),
        ),
        Fault::WrongType => (
            Code::PathInvalid,
            Some("only files and directories are copied, and neither replaces the other, nor a device, pipe or socket"),
        ),
        Fault::Busy => (Code::GuestBusy, Some("remove the conflicting file in the guest, then try again")),
        Fault::Unreachable => (Code::PortClosed, Some("does anything listen on that port in the guest?")),
        Fault::Invalid => (Code::GuestInvalid, None),
        Fault::Other => (Code::GuestFailed, None),
    };
    hint.into_iter().fold(Error::new(code, text), Error::or_hint)
}
