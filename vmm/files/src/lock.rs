//! Liveness locks: the kernel frees them when their last holder ends, whatever killed it.
//!
//! They are "open file description" locks: like `flock` they are inherited and end with the last holder; unlike `flock`
//! they can be looked at without being taken, so a glance never makes another process's attempt fail.
//!
//! Invariant: a lock is only believed if the file that was locked is still the one under that name, so a directory that
//! is deleted meanwhile never leaves two holders.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// A lock that is held. A process that inherits the descriptor holds it, too.
#[derive(Debug)]
pub struct HeldLock(File);

impl HeldLock {
    /// Tries to take the lock; makes the file if need be. `None`: another process holds it.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn try_take(path: &Path) -> std::io::Result<Option<Self>> {
        Self::try_open(path, true)
    }

    /// Tries to take the lock of a file that is there; never creates it.
    ///
    /// # Errors
    /// `NotFound` if there is no such file; else the file cannot be opened.
    pub fn try_take_existing(path: &Path) -> std::io::Result<Option<Self>> {
        Self::try_open(path, false)
    }

    fn try_open(path: &Path, create: bool) -> std::io::Result<Option<Self>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(create).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(path)?;
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file())) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(None),
            Err(other) => return Err(other.into()),
        }
        let (ours, named) = (file.metadata()?, std::fs::metadata(path)?);
        if (ours.dev(), ours.ino()) == (named.dev(), named.ino()) {
            Ok(Some(Self(file)))
        } else {
            Err(std::io::ErrorKind::NotFound.into())
        }
    }

    /// Takes the lock, waiting until `deadline`. `None`: another process still holds it then.
    ///
    /// # Errors
    /// As [`HeldLock::try_take`].
    pub async fn take(path: &Path, deadline: Instant) -> std::io::Result<Option<Self>> {
        let mut pauses = Pauses::new(Duration::from_millis(1), Duration::from_millis(50));
        loop {
            if let Some(held) = Self::try_take(path)? {
                return Ok(Some(held));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            tokio::time::sleep(pauses.next()).await;
        }
    }

    /// As [`HeldLock::take`], for locks that are held for moments only: blocks the thread.
    ///
    /// # Errors
    /// As [`HeldLock::try_take`]; that another file came under the name meanwhile is no error.
    pub fn take_blocking(path: &Path, deadline: Instant) -> std::io::Result<Option<Self>> {
        let mut pauses = Pauses::new(Duration::from_micros(50), Duration::from_millis(2));
        loop {
            match Self::try_take(path) {
                Ok(Some(held)) => return Ok(Some(held)),
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ if Instant::now() >= deadline => return Ok(None),
                _ => std::thread::sleep(pauses.next()),
            }
        }
    }

    /// The lock of a descriptor that was inherited locked.
    #[must_use]
    pub fn inherited(file: File) -> Self {
        Self(file)
    }

    /// The descriptor.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.0
    }
}

/// The pauses between attempts to take a lock: each is twice as long as the one before, up to a limit.
#[derive(Debug)]
pub(crate) struct Pauses {
    next: Duration,
    longest: Duration,
}

impl Pauses {
    pub(crate) fn new(shortest: Duration, longest: Duration) -> Self {
        Self { next: shortest, longest }
    }

    pub(crate) fn next(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.longest);
        pause
    }
}

/// Whether a process holds the lock. A missing or inaccessible file is not locked.
#[must_use]
pub fn is_held(path: &Path) -> bool {
    is_free(path).is_ok_and(|free| !free)
}

/// Whether no process holds the lock; fails if that cannot be checked. A missing file is not locked.
///
/// # Errors
/// The file cannot be looked at.
pub fn is_free(path: &Path) -> std::io::Result<bool> {
    let file = match File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(true),
        opened => opened?,
    };
    let mut lock = whole_file();
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(i32::from(lock.l_type) == libc::F_UNLCK)
}

#[allow(clippy::cast_possible_truncation)] // constants of one digit
fn whole_file() -> libc::flock {
    libc::flock { l_type: libc::F_WRLCK as _, l_whence: libc::SEEK_SET as _, l_start: 0, l_len: 0, l_pid: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        assert!(!is_held(&path));
        let first = HeldLock::try_take(&path).unwrap();
        assert!(first.is_some());
        assert!(is_held(&path));
        assert!(HeldLock::try_take(&path).unwrap().is_none());
        drop(first);
        assert!(!is_held(&path));
        assert!(HeldLock::try_take(&path).unwrap().is_some());
    }

    #[test]
    fn checking_a_lock_never_creates_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let missing = HeldLock::try_take_existing(&path).unwrap_err();
        assert_eq!(missing.kind(), std::io::ErrorKind::NotFound);
        assert!(!is_held(&path) && !path.exists());
        let held = HeldLock::try_take(&path).unwrap();
        assert!(held.is_some() && HeldLock::try_take_existing(&path).unwrap().is_none());
    }

    #[test]
    fn a_lock_on_a_file_that_was_replaced_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let _first = HeldLock::try_take(&path).unwrap().unwrap();
        std::fs::remove_file(&path).unwrap();
        // A new file under the name is another lock; the old holder no longer stands for the name.
        assert!(!is_held(&path));
        assert!(HeldLock::try_take(&path).unwrap().is_some());
    }
}
