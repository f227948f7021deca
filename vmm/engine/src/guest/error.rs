//! What can go wrong between nido and a guest agent, as data. `nido_api::error` turns it into codes and hints.
//!
//! Invariant: text that came from the guest is kept separate (in [`GuestError::Guest`]) and bounded; code that shows it
//! escapes it.

use std::io;
use std::path::{Path, PathBuf};

use nido_guest_agent::wire::{self, Failed, Fault, MAX_TUNNELS, MAX_WORK, WireError};

/// Longest text of a guest's that is kept, in bytes.
const MAX_GUEST_TEXT: usize = 4096;

/// Why a request to a guest failed.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// No connection could be made before the deadline.
    #[error("the guest agent cannot be reached: {0}")]
    Unreachable(String),
    /// The connection stands, but a reply did not come in time.
    #[error("the guest agent took too long {what}")]
    Timeout {
        /// What was waited for, as in "took too long to answer the greeting".
        what: &'static str,
    },
    /// Host and guest have no protocol version in common.
    #[error("the guest agent speaks protocol version {guest}, this nido speaks {host}")]
    VersionMismatch {
        /// The version this build speaks.
        host: u16,
        /// The newest version the guest speaks.
        guest: u16,
    },
    /// The guest does not accept the token.
    #[error("the guest agent rejected this VM's token")]
    TokenRefused,
    /// Too many commands and copies, or sessions of any kind, at once.
    #[error("the guest runs {MAX_WORK} commands and copies already, which is the limit")]
    Busy,
    /// Too many connections to ports of the guest at once.
    #[error("{MAX_TUNNELS} connections to ports of the guest are open already, which is the limit")]
    TunnelsBusy,
    /// The request of this side is larger than the protocol carries.
    #[error("the request is too large for the guest: {} KiB, the limit is {} KiB", length.div_ceil(1024), limit / 1024)]
    RequestTooLarge {
        /// Its length in bytes.
        length: usize,
        /// The most there may be.
        limit: usize,
    },
    /// The connection ended before the reply did.
    #[error("the connection to the guest agent ended early")]
    Gone,
    /// The guest broke the protocol.
    #[error("the guest agent violated the protocol: {0}")]
    Protocol(#[from] WireError),
    /// The guest understood and could not do it. The text is the guest's own.
    #[error("the guest could not do it: {}", nido_api::sanitize::on_one_line(&.0.message))]
    Guest(Failed),
    /// A system call on this side failed.
    #[error("{}: {source}", path.display())]
    HostIo {
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The destination on this side exists.
    #[error("{} exists", .0.display())]
    PathExists(PathBuf),
    /// The source, or the directory of the destination, does not exist on this side.
    #[error("{}: no such file or directory", .0.display())]
    PathNotFound(PathBuf),
    /// A path that cannot be used.
    #[error("{0}")]
    BadName(String),
    /// A directory where the bytes of a file were requested.
    #[error("it is a directory")]
    IsDirectory,
    /// A tar archive that cannot be unpacked.
    #[error("the archive cannot be used: {0}")]
    BadArchive(String),
    /// A tar archive with more in it than is accepted.
    #[error("the archive holds more {what} than the limit of {limit}")]
    ArchiveTooLarge {
        /// More of what.
        what: &'static str,
        /// How many are accepted.
        limit: u64,
    },
    /// The disk on this side is full.
    #[error("the disk that holds {} is full", .0.display())]
    DiskFull(PathBuf),
    /// The guest sent more than this side accepts.
    #[error("the guest sent more {what} than the limit of {limit}")]
    LimitExceeded {
        /// More of what.
        what: &'static str,
        /// How many are accepted.
        limit: u64,
    },
}

impl GuestError {
    /// A violation of the protocol, with its description.
    pub fn breach(what: impl Into<String>) -> Self {
        Self::Protocol(WireError::Malformed(what.into()))
    }

    /// Makes a frame of a message of this side. One that does not fit is this side's fault, never the guest's.
    pub fn encode(message: &wire::ToGuest) -> Result<Vec<u8>, Self> {
        wire::encode(message).map_err(|error| match error {
            WireError::TooLong { length, limit } => Self::RequestTooLarge { length, limit },
            other => Self::BadName(format!("the request cannot be sent: {other}")),
        })
    }

    /// The guest's error, its text truncated.
    pub fn failed(mut failed: Failed) -> Self {
        let cut = failed.message.floor_char_boundary(MAX_GUEST_TEXT);
        failed.message.truncate(cut);
        Self::Guest(failed)
    }

    /// A failed system call on this side; a full disk and a missing file get their own kinds.
    pub fn host(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Self::DiskFull(path),
            Some(libc::ENOENT) => Self::PathNotFound(path),
            _ => Self::HostIo { path, source },
        }
    }

    /// The stream failed or ended: to the caller that is one and the same.
    pub fn stream(source: &io::Error) -> Self {
        tracing::debug!("the guest's stream failed: {source}");
        Self::Gone
    }

    /// The guest's error, if this is one.
    #[must_use]
    pub fn fault(&self) -> Option<Fault> {
        match self {
            Self::Guest(failed) => Some(failed.fault),
            _ => None,
        }
    }

    /// Whether a new connection might do better: for waiting until a guest has started.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Timeout { .. } | Self::Busy | Self::TunnelsBusy | Self::Gone)
    }
}
