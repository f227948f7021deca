//! Copying files between host and guest.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Host to guest.
#[derive(Debug)]
pub struct UploadRequest {
    /// What to copy.
    pub source: UploadSource,
    /// Where to, in the guest. An existing directory takes the copy under the source's name.
    pub destination: Vec<u8>,
    /// Who shall own the copy in the guest. If absent, a file that exists keeps its owner, and what is new is root's.
    pub user: Option<String>,
    /// Make missing parent directories.
    pub parents: bool,
    /// Keep owners, by number, and modes, also of files that exist.
    pub preserve: bool,
    /// A file that exists takes the mode of [`UploadSource::Stream`]; without this it keeps its own.
    pub set_mode: bool,
}

/// What an upload reads.
#[derive(Debug)]
pub enum UploadSource {
    /// A file or directory of the host.
    Path(PathBuf),
    /// The bytes of one file: a pipe, a socket, an open file.
    Stream {
        /// Where they come from.
        file: File,
        /// Its permission bits in the guest, if it is new there.
        mode: u16,
    },
    /// An open directory of the host, read through it and nothing else: what is in it goes into the destination, which is made if
    /// it is not there. Symlinks in it are copied as they are.
    Directory {
        /// It.
        fd: OwnedFd,
        /// Whether names that begin with a dot are copied, too.
        hidden: bool,
    },
    /// A tar archive: a pipe, a socket, an open file. It is unpacked into the destination, which is made if it is not there;
    /// owners are left out, modes masked to the nine permission bits, devices and pipes skipped.
    Archive(File),
}

/// Guest to host.
#[derive(Debug)]
pub struct DownloadRequest {
    /// What to copy, in the guest.
    pub source: Vec<u8>,
    /// Where to.
    pub destination: DownloadTarget,
    /// Replace what exists.
    pub overwrite: bool,
    /// Keep owners, by number and where this user may give files away, and modes past the umask.
    pub preserve: bool,
    /// Give up when there are more bytes of files than this; 64 GiB if absent.
    pub max_bytes: Option<u64>,
}

/// Where a download goes.
#[derive(Debug)]
pub enum DownloadTarget {
    /// A path of the host. An existing directory takes the copy under the source's name.
    Path(PathBuf),
    /// A pipe, a socket, an open file; the source must be a file.
    Stream(File),
    /// The same for a directory, or a file: a tar archive, its entries called `./PATH`.
    Archive(File),
    /// The bytes of a file, or a tar archive of a directory.
    FileOrArchive(File),
}

/// How far a copy has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CopyProgress {
    /// Bytes of files so far.
    pub bytes: u64,
    /// Entries so far.
    pub entries: u64,
    /// Bytes in all, if known beforehand.
    pub total_bytes: Option<u64>,
}

/// An entry that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct UnreadableEntry {
    /// Its path on the source side. Lossy if it is not UTF-8.
    pub path: String,
    /// The error of the operating system.
    pub reason: String,
}

/// Result of a copy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct CopyResult {
    /// Files, directories and symlinks.
    pub entries: u64,
    /// Bytes of files.
    pub bytes: u64,
    /// Number of skipped sockets, devices and pipes.
    pub skipped: u64,
    /// Number of entries that could not be read, and are missing from the copy.
    #[serde(default)]
    pub unreadable: u64,
    /// The first hundred of these entries.
    #[serde(default)]
    pub unreadable_entries: Vec<UnreadableEntry>,
    /// Path of the copy. Lossy if it is not UTF-8.
    pub path: String,
    /// Duration.
    pub duration_ms: u64,
}
