//! Locks on open files and directories that several processes may share: flock(2).
//!
//! These are for work on something (templates, the store of parts, a build), not for liveness: [`crate::lock`] is for that, because
//! an OFD lock can be tested without being taken. The two kinds do not exclude each other, and processes of earlier versions hold
//! flock(2) locks on the same files, so a file keeps its kind.
//!
//! Invariant: the kernel releases a lock with the last descriptor of the open file, whatever ends the process.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::lock::Pauses;

/// Who else may hold the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Others that share it.
    Shared,
    /// No process.
    Exclusive,
}

/// Tries to lock an open file or directory; whether that succeeded. The lock lasts as long as the open file.
///
/// # Errors
/// The file system has no locks.
pub fn try_lock(file: impl AsFd, mode: Mode) -> io::Result<bool> {
    let operation = match mode {
        Mode::Shared => FlockOperation::NonBlockingLockShared,
        Mode::Exclusive => FlockOperation::NonBlockingLockExclusive,
    };
    match rustix::fs::flock(file, operation) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// A file or directory that is locked.
#[derive(Debug)]
pub struct Flock(File);

impl Flock {
    /// Tries to lock `file`. `None`: another process holds it.
    ///
    /// # Errors
    /// As [`try_lock`].
    pub fn try_take(file: File, mode: Mode) -> io::Result<Option<Self>> {
        Ok(try_lock(&file, mode)?.then_some(Self(file)))
    }

    /// Locks `file`, waiting until `deadline`. `None`: another process still holds it then.
    ///
    /// # Errors
    /// As [`try_lock`].
    pub async fn take(file: File, mode: Mode, deadline: Instant) -> io::Result<Option<Self>> {
        let mut pauses = Pauses::new(PAUSE_MIN, PAUSE_MAX);
        loop {
            if try_lock(&file, mode)? {
                return Ok(Some(Self(file)));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            tokio::time::sleep(pauses.next()).await;
        }
    }

    /// As [`Flock::take`], for callers without a runtime: blocks the thread. Before each pause it asks `keep_waiting`, and gives up
    /// if that is false.
    ///
    /// # Errors
    /// As [`try_lock`].
    pub fn take_blocking(
        file: File,
        mode: Mode,
        deadline: Instant,
        mut keep_waiting: impl FnMut() -> bool,
    ) -> io::Result<Option<Self>> {
        let mut pauses = Pauses::new(PAUSE_MIN, PAUSE_MAX);
        loop {
            if try_lock(&file, mode)? {
                return Ok(Some(Self(file)));
            }
            if Instant::now() >= deadline || !keep_waiting() {
                return Ok(None);
            }
            std::thread::sleep(pauses.next());
        }
    }

    /// The file, which stays locked for as long as it is open.
    #[must_use]
    pub fn into_file(self) -> File {
        self.0
    }
}

const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Instant {
        Instant::now()
    }

    #[test]
    fn a_shared_lock_excludes_an_exclusive_one_only() {
        let dir = tempfile::tempdir().unwrap();
        let open = || File::open(dir.path()).unwrap();
        let shared = Flock::try_take(open(), Mode::Shared).unwrap().unwrap();
        assert!(Flock::try_take(open(), Mode::Shared).unwrap().is_some());
        assert!(Flock::take_blocking(open(), Mode::Exclusive, now(), || true).unwrap().is_none());
        drop(shared);
        let _exclusive = Flock::try_take(open(), Mode::Exclusive).unwrap().unwrap();
        assert!(!try_lock(open(), Mode::Shared).unwrap());
    }

    /// A process of an earlier version holds the lock by `File::lock`.
    #[test]
    fn locks_of_the_standard_library_are_of_the_same_kind() {
        let dir = tempfile::tempdir().unwrap();
        let held = File::open(dir.path()).unwrap();
        held.lock().unwrap();
        assert!(!try_lock(File::open(dir.path()).unwrap(), Mode::Shared).unwrap());
        drop(held);
        assert!(try_lock(File::open(dir.path()).unwrap(), Mode::Shared).unwrap());
    }

    #[test]
    fn a_wait_ends_when_the_caller_gives_up_or_the_holder_releases_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let open = || File::open(dir.path()).unwrap();
        let mut held = Flock::try_take(open(), Mode::Exclusive).unwrap();
        let deadline = now() + Duration::from_secs(60);
        assert!(Flock::take_blocking(open(), Mode::Exclusive, deadline, || false).unwrap().is_none());
        let released = Flock::take_blocking(open(), Mode::Exclusive, deadline, || {
            held = None;
            true
        });
        assert!(released.unwrap().is_some());
    }
}
