//! Failures of the parts as failures of the API: which code each has, and what to do about it.

use nido_guest_agent::wire::Fault;
use nido_images::ImageError;

use crate::error::{Code, Error};
use crate::guest::GuestError;
use crate::host::QemuProbeError;
use crate::machine::Refusal;

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        let (code, hint) = match &refusal {
            Refusal::KvmUnavailable { .. } => {
                (Code::KvmUnavailable, "nido doctor says more; --accel auto falls back to emulation, with a warning")
            }
            Refusal::NestingOff { remedy, .. } => (Code::NestedUnavailable, remedy.as_str()),
            Refusal::IsolationRequired { .. } => (Code::IsolationRequired, "nido doctor says what KVM lacks"),
            Refusal::SpecInvalid { .. } => (Code::SpecInvalid, "nido doctor shows what the host has"),
            Refusal::QemuTooOld { .. } => {
                (Code::QemuTooOld, "install a newer qemu-system-x86, or name one with --qemu")
            }
            Refusal::QemuLacks { .. } => {
                (Code::QemuTooOld, "install Debian's qemu-system-x86, or name another with --qemu")
            }
        };
        Self::new(code, refusal.to_string()).hint(hint)
    }
}

impl From<QemuProbeError> for Error {
    fn from(error: QemuProbeError) -> Self {
        let (code, hint) = match &error {
            QemuProbeError::Missing { .. } => {
                (Code::QemuMissing, "apt-get install qemu-system-x86, or name one with --qemu")
            }
            _ => (Code::QemuFailed, "check the program with its --version, or name another with --qemu"),
        };
        let tail = match &error {
            QemuProbeError::NotQemu { stderr_tail, .. } => stderr_tail.lines().map(str::to_owned).collect(),
            _ => Vec::new(),
        };
        Self::new(code, error.to_string()).hint(hint).log_tail(tail).because(error)
    }
}

impl From<ImageError> for Error {
    fn from(error: ImageError) -> Self {
        let code = match &error {
            ImageError::MissingTool { .. } => Code::ToolMissing,
            ImageError::Unprivileged { .. } => Code::Denied,
            ImageError::RecipeNotFound { .. } | ImageError::TemplateNotFound { .. } => Code::TemplateNotFound,
            ImageError::NameInvalid { .. } => Code::NameInvalid,
            ImageError::TemplateExists { .. } => Code::TemplateExists,
            ImageError::ArchiveRefused { .. } => Code::ArchiveInvalid,
            ImageError::AgentProtocol { .. } => Code::AgentVersion,
            ImageError::NotExportable { .. } => Code::LimitExceeded,
            ImageError::PathExists { .. } => Code::PathExists,
            ImageError::PathInvalid { .. } => Code::PathInvalid,
            ImageError::TemplateChanged { .. } => Code::VmBusy,
            ImageError::ManifestInvalid { .. } | ImageError::Damaged { .. } | ImageError::ImageRefused { .. } => {
                Code::TemplateMismatch
            }
            ImageError::DiskFull { .. } => Code::DiskFull,
            ImageError::Interrupted => Code::Interrupted,
            ImageError::Io { .. } => Code::Internal,
            _ => Code::TemplateBuildFailed,
        };
        let tail = match &error {
            ImageError::Command { tail, .. } => tail.clone(),
            _ => Vec::new(),
        };
        let wrapped = Self::new(code, error.to_string()).log_tail(tail);
        let wrapped = match error.hint() {
            Some(hint) => wrapped.hint(hint),
            None => wrapped,
        };
        wrapped.because(error)
    }
}

impl Error {
    /// A failure between nido and the agent of the VM called `vm`.
    #[must_use]
    pub fn from_guest(vm: &str, error: GuestError) -> Self {
        let (code, hint) = match &error {
            GuestError::Unreachable(_) | GuestError::Timeout { .. } | GuestError::Gone => {
                (Code::AgentUnreachable, format!("nido info {vm} shows its state, nido logs {vm} its console"))
            }
            GuestError::VersionMismatch { .. } => {
                (Code::AgentVersion, "build the template again with this nido, and make the VM anew".into())
            }
            GuestError::TokenRefused => (Code::Denied, format!("restart it: nido restart {vm}")),
            GuestError::Busy | GuestError::LimitExceeded { .. } => {
                (Code::LimitExceeded, "end some of what runs in it".into())
            }
            GuestError::Protocol(_) => {
                (Code::AgentUnreachable, "its guest may have been tampered with; do not trust it".into())
            }
            GuestError::Guest(failed) => return Self::from_fault(failed.fault, &failed.message),
            GuestError::HostIo { .. } => return Self::new(Code::Internal, error.to_string()).because(error),
            GuestError::PathExists(_) => (Code::PathExists, "--force replaces it".into()),
            GuestError::PathNotFound(_) => (Code::PathNotFound, "check the path on this side".into()),
            GuestError::BadName(_) => (Code::PathInvalid, "check the path".into()),
            GuestError::BadArchive(_) => (
                Code::SpecInvalid,
                "files, directories and symlinks, with names below the directory: tar -C DIR --hard-dereference -c ."
                    .into(),
            ),
            GuestError::ArchiveTooLarge { .. } => (Code::LimitExceeded, "send it in parts".into()),
            GuestError::DiskFull(_) => (Code::DiskFull, "free some space; nothing was left half-written".into()),
        };
        Self::new(code, error.to_string()).hint(hint).because(error)
    }

    /// What a guest says went wrong. Its words are shown escaped.
    fn from_fault(fault: Fault, message: &str) -> Self {
        let text: String = message.chars().flat_map(char::escape_debug).collect();
        let (code, hint) = match fault {
            Fault::CommandNotFound => (Code::CommandNotFound, Some("is it installed in the guest?")),
            Fault::CannotRun => (Code::CommandCannotRun, Some("is it a program, and executable for that user?")),
            Fault::NoUser => (Code::UserNotFound, Some("the guest's /etc/passwd has the users it knows")),
            Fault::NoDirectory => (Code::DirectoryNotFound, Some("make it first, or leave --workdir out")),
            Fault::NotFound => (Code::PathNotFound, Some("check the path in the guest")),
            Fault::Denied => (Code::Denied, Some("try another user with --user")),
            Fault::DiskFull => (
                Code::DiskFull,
                Some("the guest's disk is full: free some space in it, or spawn it with a larger --disk"),
            ),
            Fault::WrongType => (Code::PathInvalid, Some("one side is a directory, the other is not")),
            Fault::Busy => (Code::VmBusy, Some("end what is in the way in the guest, then try again")),
            Fault::Unreachable => (Code::PortClosed, Some("does anything listen on that port in the guest?")),
            Fault::Invalid => (Code::SpecInvalid, None),
            Fault::Other => (Code::GuestFailed, None),
        };
        let error = Self::new(code, text);
        match hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}
