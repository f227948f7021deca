//! Holding the root file system still while the guest is saved.
//!
//! ```text
//! moving --freeze--> frozen (a timer runs) --thaw, identity reset, power, or the timer--> moving (no timer)
//! ```
//!
//! Invariant: nothing stays frozen for ever. Each freeze sets a timer, and a freeze that comes too late to be
//! reported is undone.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use nido_guest_agent::wire::{FREEZE_LIMIT_MS, Fault};
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::timeout;

use crate::refusal::Refusal;
use crate::sys;

/// How long writing everything and freezing may take, and how long unfreezing.
const DEADLINE: Duration = Duration::from_secs(30);
/// Time after which a frozen file system is unfrozen.
const LIMIT: Duration = Duration::from_millis(FREEZE_LIMIT_MS);

/// The root file system, as far as it is frozen.
pub struct Freezer {
    /// Whether there is a file system that may be touched; else only the state is kept (in tests).
    is_real: bool,
    /// The timer that unfreezes it; it exists exactly while the file system is frozen by this agent.
    timer: Arc<Mutex<Option<AbortHandle>>>,
}

type Timer = OwnedMutexGuard<Option<AbortHandle>>;

impl Freezer {
    /// A file system that moves.
    pub fn new(is_real: bool) -> Self {
        Self { is_real, timer: Arc::default() }
    }

    /// Writes everything to the disk and freezes the file system; if it is frozen already, only the timer is restarted.
    ///
    /// # Errors
    /// The file system cannot be frozen, or not in time.
    pub async fn freeze(&self) -> Result<(), Refusal> {
        let mut timer = self.lock().await?;
        if self.is_real {
            let mut work = tokio::task::spawn_blocking(|| {
                sys::trim_allocator();
                freeze_root()
            });
            match timeout(DEADLINE, &mut work).await {
                Ok(frozen) => joined(frozen).map_err(|error| Refusal::from_io("the root file system", &error))?,
                Err(_late) => {
                    undo(work, timer);
                    return Err(too_late("frozen"));
                }
            }
        }
        if let Some(older) = timer.replace(thaw_later(self.timer.clone(), self.is_real)) {
            older.abort();
        }
        Ok(())
    }

    /// Unfreezes the file system; does nothing, at no cost, if this agent has not frozen it.
    ///
    /// # Errors
    /// The kernel refuses, or not in time.
    pub async fn thaw(&self) -> Result<(), Refusal> {
        let mut timer = self.lock().await?;
        let Some(frozen) = timer.take() else { return Ok(()) };
        frozen.abort();
        if !self.is_real {
            return Ok(());
        }
        match timeout(DEADLINE, tokio::task::spawn_blocking(thaw_root)).await {
            Ok(thawed) => joined(thawed).map_err(|error| Refusal::from_io("the root file system", &error)),
            Err(_late) => Err(too_late("thawed")),
        }
    }

    async fn lock(&self) -> Result<Timer, Refusal> {
        timeout(DEADLINE, self.timer.clone().lock_owned()).await.map_err(|_| too_late("reached"))
    }
}

fn too_late(what: &str) -> Refusal {
    Refusal::new(Fault::Other, format!("the root file system could not be {what} within {} s", DEADLINE.as_secs()))
}

fn joined(result: Result<io::Result<()>, tokio::task::JoinError>) -> io::Result<()> {
    result.map_err(io::Error::other)?
}

/// Waits for a freeze whose request has timed out, and unfreezes. The lock is held meanwhile.
fn undo(work: JoinHandle<io::Result<()>>, timer: Timer) {
    tokio::spawn(async move {
        if joined(work.await).is_ok()
            && let Err(error) = joined(tokio::task::spawn_blocking(thaw_root).await)
        {
            eprintln!("nido-guest-agent: the root file system stays frozen: {error}");
        }
        drop(timer);
    });
}

/// Unfreezes when the limit is over. The lock orders it with all others: its holder may abort this task.
fn thaw_later(timer: Arc<Mutex<Option<AbortHandle>>>, is_real: bool) -> AbortHandle {
    let thaw = async move {
        tokio::time::sleep(LIMIT).await;
        let mut timer = timer.lock_owned().await;
        *timer = None;
        eprintln!(
            "nido-guest-agent: the root file system was frozen for more than {} s without an unfreeze request; unfreezing it",
            LIMIT.as_secs()
        );
        if is_real && let Err(error) = joined(tokio::task::spawn_blocking(thaw_root).await) {
            eprintln!("nido-guest-agent: the root file system stays frozen: {error}");
        }
    };
    tokio::spawn(thaw).abort_handle()
}

fn freeze_root() -> io::Result<()> {
    rustix::fs::sync();
    match sys::freeze(&File::open("/")?) {
        // It is frozen already.
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
        result => result,
    }
}

fn thaw_root() -> io::Result<()> {
    match sys::thaw(&File::open("/")?) {
        // It moves already.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_freeze_expires_without_a_thaw() {
        let freezer = Freezer::new(false);
        freezer.freeze().await.unwrap();
        tokio::time::sleep(LIMIT / 2).await;
        freezer.freeze().await.unwrap();
        tokio::time::sleep(LIMIT * 3 / 4).await;
        assert!(freezer.timer.lock().await.is_some(), "the second freeze did not start the timer anew");
        tokio::time::sleep(LIMIT).await;
        assert!(freezer.timer.lock().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn no_timer_runs_while_nothing_is_frozen() {
        let freezer = Freezer::new(false);
        freezer.thaw().await.unwrap();
        freezer.freeze().await.unwrap();
        let timer = freezer.timer.lock().await.clone().unwrap();
        freezer.thaw().await.unwrap();
        tokio::task::yield_now().await;
        assert!(timer.is_finished());
        assert!(freezer.timer.lock().await.is_none());
    }
}
