//! Why a request was not carried out, as reported to the host.

use nido_guest_agent::wire::Fault;

/// Longest text of a refusal, in bytes: it must fit in a frame, whatever the request named.
const MAX_REFUSAL: usize = 4096;

/// The reason why a request was not carried out.
#[derive(Debug)]
pub struct Refusal {
    /// What went wrong, for programs.
    pub fault: Fault,
    /// What went wrong, for people.
    pub message: String,
}

impl Refusal {
    /// A refusal with its sentence.
    pub fn new(fault: Fault, message: impl Into<String>) -> Self {
        let mut message = message.into();
        message.truncate(message.floor_char_boundary(MAX_REFUSAL));
        Self { fault, message }
    }

    /// A refusal because a call on `subject` failed.
    pub fn from_io(subject: &str, error: &std::io::Error) -> Self {
        Self::new(fault_of(error), format!("{subject}: {error}"))
    }
}

/// The fault that an operating system error amounts to.
pub fn fault_of(error: &std::io::Error) -> Fault {
    use std::io::ErrorKind::{
        DirectoryNotEmpty, IsADirectory, NotADirectory, NotFound, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem,
        StorageFull,
    };
    match error.kind() {
        // The path itself is wrong: a name that is too long, or symlinks in a circle.
        _ if matches!(error.raw_os_error(), Some(libc::ENAMETOOLONG | libc::ELOOP)) => Fault::Invalid,
        NotFound => Fault::NotFound,
        PermissionDenied | ReadOnlyFilesystem => Fault::Denied,
        StorageFull | QuotaExceeded => Fault::DiskFull,
        IsADirectory | NotADirectory | DirectoryNotEmpty => Fault::WrongType,
        _ => Fault::Other,
    }
}
