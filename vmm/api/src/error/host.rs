//! What a failed system call of the host means to the user: a stable code and a hint.
//!
//! Pure. Invariant: `internal` (exit code 70, HTTP 500) is a defect of nido. What permissions, mounts, limits, addresses or
//! broken hardware cause never gets that code.

use std::io::Error as IoError;

use super::{Code, Hint};

/// Why the host's operating system refused something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostRefusal {
    /// `EACCES`, `EPERM`.
    Permission,
    /// `EROFS`.
    ReadOnly,
    /// `EADDRINUSE`.
    AddressInUse,
    /// `ENOSPC`, `EDQUOT`.
    DiskFull,
    /// `EMFILE`, `ENFILE`: open files.
    OpenFiles,
    /// `ENOMEM`, and `EAGAIN` of a program that cannot be started.
    Resources,
    /// `ENOENT`.
    NotFound,
    /// `EEXIST`.
    Exists,
    /// `ENOTDIR`, `EISDIR`, `ELOOP`, `ENAMETOOLONG`, and a socket's path that is too long.
    Path,
    /// Every other error that a system call reports.
    Other,
    /// No error of the system, or one that only a defect explains.
    Defect,
}

/// What the call was about: the hint depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// Something in nido's home, or a path that was given to a command.
    Home,
    /// The host's side of a copy.
    Copy,
}

impl HostRefusal {
    /// Reads the error number.
    pub fn of(error: &IoError) -> Self {
        let Some(number) = error.raw_os_error() else { return Self::of_kind(error) };
        match number {
            libc::EACCES | libc::EPERM => Self::Permission,
            libc::EROFS => Self::ReadOnly,
            libc::EADDRINUSE => Self::AddressInUse,
            libc::ENOSPC | libc::EDQUOT => Self::DiskFull,
            libc::EMFILE | libc::ENFILE => Self::OpenFiles,
            libc::ENOMEM | libc::EAGAIN => Self::Resources,
            libc::ENOENT => Self::NotFound,
            libc::EEXIST | libc::ENOTEMPTY => Self::Exists,
            libc::ENOTDIR | libc::EISDIR | libc::ELOOP | libc::ENAMETOOLONG => Self::Path,
            libc::EBADF | libc::EFAULT | libc::ENOTSOCK | libc::ENOSYS | libc::ESPIPE | libc::EINVAL => Self::Defect,
            _ => Self::Other,
        }
    }

    /// Errors that the standard library makes itself carry no number.
    fn of_kind(error: &IoError) -> Self {
        use std::io::ErrorKind;
        match error.kind() {
            ErrorKind::PermissionDenied => Self::Permission,
            ErrorKind::ReadOnlyFilesystem => Self::ReadOnly,
            ErrorKind::AddrInUse => Self::AddressInUse,
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::DiskFull,
            ErrorKind::NotFound => Self::NotFound,
            ErrorKind::AlreadyExists | ErrorKind::DirectoryNotEmpty => Self::Exists,
            ErrorKind::OutOfMemory => Self::Resources,
            // Of a socket's path: longer than 107 bytes. Of a path: a NUL byte.
            ErrorKind::IsADirectory | ErrorKind::NotADirectory | ErrorKind::InvalidInput => Self::Path,
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::TimedOut | ErrorKind::UnexpectedEof => {
                Self::Other
            }
            _ => Self::Defect,
        }
    }

    /// The stable code.
    pub const fn code(self) -> Code {
        match self {
            Self::Permission => Code::PermissionDenied,
            Self::ReadOnly => Code::ReadOnly,
            Self::AddressInUse => Code::AddressInUse,
            Self::DiskFull => Code::DiskFull,
            Self::OpenFiles | Self::Resources => Code::LimitExceeded,
            Self::NotFound => Code::PathNotFound,
            Self::Exists => Code::PathExists,
            Self::Path => Code::PathUnusable,
            Self::Other => Code::HostFailed,
            Self::Defect => Code::Internal,
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(self, subject: Subject) -> Option<Hint> {
        Some(match (self, subject) {
            (Self::Permission, Subject::Home) => Hint::host(
                "check the owner and mode of it and of the directories above it, or choose another home with --home or NIDO_HOME",
            ),
            (Self::Permission, Subject::Copy) => Hint::host(
                "check the owner and mode of it and of the directories above it, or run nido as a user who may use it",
            ),
            (Self::ReadOnly, Subject::Home) => Hint::host(
                "remount its file system, which is read-only, or choose another home with --home or NIDO_HOME",
            ),
            (Self::ReadOnly, Subject::Copy) => {
                Hint::note("its file system is mounted read-only: remount it, or copy elsewhere")
            }
            (Self::AddressInUse, _) => {
                Hint::note("choose another port or socket, or end the process that uses this one")
            }
            (Self::DiskFull, Subject::Home) => Hint::home_full(),
            (Self::DiskFull, Subject::Copy) => Hint::note("free some space; no incomplete file remains"),
            (Self::OpenFiles, _) => {
                Hint::host("raise the limit of open files (ulimit -n), or close what is not needed")
            }
            (Self::Resources, _) => Hint::host("free some memory, or raise the limits of this user (ulimit -a)"),
            (Self::NotFound, _) => Hint::note("check the path"),
            (Self::Exists, _) => Hint::note("choose another name, or remove what is there"),
            (Self::Path, Subject::Home) => Hint::host(
                "check each component of the path and its length, or choose another home with --home or NIDO_HOME",
            ),
            (Self::Path, Subject::Copy) => {
                Hint::note("check each component of the path, and whether it is a directory")
            }
            (Self::Other, _) => Hint::host("look in dmesg, which may report more about the device or file system"),
            (Self::Defect, _) => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FrontEnd;
    use crate::error::{Error, Kind};

    fn of(number: i32) -> Error {
        Error::io("cannot use x", IoError::from_raw_os_error(number))
    }

    // A file without permission, a read-only mount and a used address were called a defect of nido (exit code 70).
    #[test]
    fn refusals_of_the_host_are_not_internal_errors_and_have_hints() {
        for (number, code) in [
            (libc::EACCES, Code::PermissionDenied),
            (libc::EPERM, Code::PermissionDenied),
            (libc::EROFS, Code::ReadOnly),
            (libc::EADDRINUSE, Code::AddressInUse),
            (libc::ENOSPC, Code::DiskFull),
            (libc::EDQUOT, Code::DiskFull),
            (libc::EMFILE, Code::LimitExceeded),
            (libc::ENFILE, Code::LimitExceeded),
            (libc::ENOTDIR, Code::PathUnusable),
            (libc::EISDIR, Code::PathUnusable),
            (libc::ELOOP, Code::PathUnusable),
            (libc::ENAMETOOLONG, Code::PathUnusable),
            (libc::EEXIST, Code::PathExists),
            (libc::ENOENT, Code::PathNotFound),
            (libc::EIO, Code::HostFailed),
            (libc::EBUSY, Code::HostFailed),
            (libc::ETXTBSY, Code::HostFailed),
            (libc::EXDEV, Code::HostFailed),
        ] {
            let error = of(number);
            assert_eq!(error.code(), code, "{number}");
            assert!(!matches!(error.kind(), Kind::Internal | Kind::Invalid), "{number}");
            assert!(error.hint_for(FrontEnd::Cli).is_some(), "{number}");
        }
        assert_eq!(of(libc::EBADF).code(), Code::Internal);
    }

    #[test]
    fn errors_of_the_standard_library_are_read_as_well() {
        let error = Error::io("cannot listen", IoError::new(std::io::ErrorKind::InvalidInput, "path too long"));
        assert_eq!(error.code(), Code::PathUnusable);
    }
}
