//! Copying files into a guest and out of it.
//!
//! Where a copy lands is decided as `cp -r` does: an existing directory gets it under the source's name, anything else
//! is the destination itself. On this side a copy is complete or not there at all: it grows in a fresh directory next
//! to its destination and is renamed at the end.
//!
//! Invariant: what is missing or in the way on this side is reported before anything is sent, and the memory of a copy
//! does not depend on its size.

mod destination;
mod download;
mod fresh;
mod merge;
mod receive;
mod send;
mod tar;
mod wire;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use nido_guest_agent::wire::{Get, Put, ToGuest, check_component, feature};
use tokio::time::Instant;

use self::destination::Destination;
use self::receive::Receiver;
use self::wire::Wire;
use super::client::Guest;
use super::error::GuestError;
use super::frames::FrameBuffer;
use super::session::{Greeting, greet};
use super::transport;

/// How far a copy has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Files, directories and symlinks, the one under way included.
    pub entries: u64,
    /// Bytes of files.
    pub bytes: u64,
    /// Bytes in all, where it is one file and the guest has reported its length. A claim.
    pub of: Option<u64>,
}

/// What was copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyTotals {
    /// Files, directories and symlinks.
    pub entries: u64,
    /// Bytes of files.
    pub bytes: u64,
    /// Skipped entries: sockets, devices, pipes, and entries that were removed meanwhile.
    pub skipped: u64,
    /// How many entries could not be read and are missing from the copy.
    pub left_out_count: u64,
    /// The first of them. Text of the guest's for a download: escape it.
    pub left_out: Vec<SkippedEntry>,
    /// Where the copy is: a path of the guest's for an upload (as it reported it, if it did), of this side for a
    /// download. Any bytes.
    pub path: Vec<u8>,
}

/// An entry that could not be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkippedEntry {
    /// Its path. Any bytes.
    pub path: Vec<u8>,
    /// Why.
    pub reason: String,
}

/// What to accept from a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Files, directories and symlinks.
    pub entries: u64,
    /// Bytes of files.
    pub bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { entries: 1_000_000, bytes: 64 << 30 }
    }
}

/// What to copy into a guest.
pub enum Source {
    /// A file or directory. A symlink given here is followed, those inside are copied as they are.
    Path(PathBuf),
    /// What is in an open directory. Symlinks in it are copied as they are.
    Directory {
        /// It.
        fd: OwnedFd,
        /// Whether names that begin with a dot are copied, too.
        hidden: bool,
    },
    /// The bytes of one file, of unknown length.
    Reader {
        /// Where they come from.
        reader: Box<dyn Read + Send>,
        /// Its permission bits.
        mode: u16,
        /// How many bytes there are, if that is known.
        bytes: Option<u64>,
    },
    /// A tar archive, unpacked on the way: the destination is the directory that gets what is in it.
    Archive(Box<dyn Read + Send>),
}

/// A copy into a guest.
pub struct Upload {
    /// What.
    pub source: Source,
    /// Where to in the guest: absolute, or relative to the user's home. Any bytes.
    pub destination: Vec<u8>,
    /// Its owner; root if absent.
    pub user: Option<String>,
    /// Make missing parent directories.
    pub parents: bool,
    /// Keep owners, by number, and modes: also of files that exist.
    pub preserve: bool,
    /// A file that exists takes the mode of [`Source::Reader`] instead of keeping its own.
    pub set_mode: bool,
}

/// A copy out of a guest.
#[derive(Debug, Clone)]
pub struct Download {
    /// What, in the guest: absolute, or relative to root's home. Any bytes.
    pub source: Vec<u8>,
    /// Where to on this side.
    pub destination: PathBuf,
    /// Replace a file that exists; merge into a directory that exists.
    pub overwrite: bool,
    /// Keep owners, by number and where this user may give files away, and modes past the umask.
    pub preserve: bool,
    /// What to accept.
    pub limits: Limits,
}

/// How what is copied out of a guest is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The bytes of one file.
    File,
    /// A tar archive of a tree; a file alone is an archive of one entry.
    Archive,
    /// The bytes of a file, or a tar archive of a directory: as it turns out.
    FileOrArchive,
}

impl Guest {
    /// Copies into the guest. `deadline` is for the start; the copy itself may take as long as it moves.
    ///
    /// # Errors
    /// [`GuestError::PathNotFound`], [`GuestError::HostIo`] for the source; [`GuestError::Guest`] with the guest's
    /// reason (disk full, not found, denied, wrong type); those of [`Guest::session`].
    pub async fn upload(
        &self,
        upload: Upload,
        progress: impl FnMut(Progress) + Send + 'static,
        deadline: Instant,
    ) -> Result<CopyTotals, GuestError> {
        let Upload { source, destination, user, parents, preserve, set_mode } = upload;
        let source = match source {
            Source::Reader { reader, mode, bytes } => send::OpenSource::from_reader(reader, mode, bytes),
            Source::Archive(reader) => send::OpenSource::from_archive(reader),
            Source::Directory { fd, hidden } => send::OpenSource::from_directory(fd, hidden)?,
            Source::Path(path) => in_background(move || send::OpenSource::from_path(path)).await?,
        };
        let name = source.name.clone().map(Into::into);
        let set_mode = Some(set_mode);
        let put = Put { path: destination.clone().into(), name, user, parents, set_mode };
        let work = move |wire, features| send::send(wire, source, send::UploadOptions { features, preserve }, progress);
        let mut copied = self.copy(&ToGuest::Put(put), deadline, work).await?;
        if copied.path.is_empty() {
            copied.path = destination;
        }
        Ok(copied)
    }

    /// Copies out of the guest. `deadline` is for the start; the copy itself may take as long as it moves. Dropping the
    /// future stops it and removes what it has made so far.
    ///
    /// # Errors
    /// [`GuestError::PathExists`], [`GuestError::PathNotFound`], [`GuestError::DiskFull`], [`GuestError::HostIo`] for
    /// the destination; [`GuestError::LimitExceeded`]; [`GuestError::Guest`]; those of [`Guest::session`].
    pub async fn download(
        &self,
        download: Download,
        progress: impl FnMut(Progress) + Send + 'static,
        deadline: Instant,
    ) -> Result<CopyTotals, GuestError> {
        let Download { source, destination, overwrite, preserve, limits } = download;
        let name = last_name(&source).map(<[u8]>::to_vec);
        let how = destination::DownloadOptions { overwrite, preserve };
        let destination = in_background(move || Destination::resolve(&destination, name.as_deref(), how)).await?;
        let features = feature::HOLES | feature::LINKS | feature::LEFT_OUT | if preserve { feature::OWNERS } else { 0 };
        let get = ToGuest::Get(Get { path: source.into(), features: Some(features) });
        self.copy(&get, deadline, move |wire, _| {
            let mut receiver = Receiver::new(wire, limits, progress);
            download::download(&mut receiver, &destination)
        })
        .await
    }

    /// Copies out of the guest to `writer`: one file as it is, or a tree as an archive.
    ///
    /// # Errors
    /// Those of [`Self::download`]; [`GuestError::IsDirectory`] for a directory as it is; in an archive, if a
    /// file becomes shorter while it is copied.
    pub async fn download_to(
        &self,
        (source, form): (Vec<u8>, Form),
        writer: impl Write + Send + 'static,
        limits: Limits,
        progress: impl FnMut(Progress) + Send + 'static,
        deadline: Instant,
    ) -> Result<CopyTotals, GuestError> {
        let name = last_name(&source).map(<[u8]>::to_vec);
        // A writer cannot make holes or links. A caller that gets a result next to the bytes gets the list of skipped entries; for any
        // other one an archive that is not whole is an error.
        let features = if form == Form::FileOrArchive { feature::LEFT_OUT } else { 0 };
        let get = ToGuest::Get(Get { path: source.into(), features: Some(features) });
        self.copy(&get, deadline, move |wire, _| {
            let receiver = Receiver::new(wire, limits, progress);
            match form {
                Form::File => receiver.copy_to(writer),
                Form::Archive => receiver.archive_to(writer, name.as_deref()),
                Form::FileOrArchive => receiver.file_or_archive_to(writer),
            }
        })
        .await
    }

    /// Opens a session with `request` and runs `work` on it, on a thread of its own.
    async fn copy<T: Send + 'static>(
        &self,
        request: &ToGuest,
        deadline: Instant,
        work: impl FnOnce(Wire, u32) -> Result<T, GuestError> + Send + 'static,
    ) -> Result<T, GuestError> {
        let stream = self.dial(deadline).await?;
        let mut frames = FrameBuffer::default();
        let Greeting { features, .. } = greet(&stream, &mut frames, self.token(), Some(request), deadline).await?;
        let fd = Arc::new(stream.into_fd());
        let wire = Wire::new(Arc::clone(&fd), frames);
        let _cancel = EndOnDrop(fd);
        in_background(move || work(wire, features)).await
    }
}

/// Ends the stream when the caller has disconnected, or has the result; the thread at work sees it at its next step.
struct EndOnDrop(Arc<OwnedFd>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        // Fails only if the stream has ended already.
        let _ = transport::shutdown(self.0.as_fd(), Shutdown::Both);
    }
}

async fn in_background<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, GuestError> + Send + 'static,
) -> Result<T, GuestError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        // The runtime is going down.
        Err(_) => Err(GuestError::Gone),
    })
}

/// The name that a copy of the guest's `path` gets in a directory; none if the path ends in `.` or `..` or is the root.
fn last_name(path: &[u8]) -> Option<&[u8]> {
    let end = path.iter().rposition(|&b| b != b'/')?;
    let name = path[..=end].rsplit(|&b| b == b'/').next()?;
    check_component(name).is_ok().then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_named_after_the_last_component() {
        for (path, name) in [
            ("/etc/hosts", Some("hosts")),
            ("/srv/data//", Some("data")),
            ("plain", Some("plain")),
            ("/srv/.", None),
            ("..", None),
            ("/", None),
            ("", None),
        ] {
            assert_eq!(last_name(path.as_bytes()), name.map(str::as_bytes), "{path}");
        }
    }
}
