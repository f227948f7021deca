//! The watcher of a VM's time to live: `nido watch-ttl`, one small process beside each QEMU that has one.
//!
//! The supervisor keeps the time to live. The watcher is there for a supervisor that was killed, or hangs, while no nido command
//! runs: it has QEMU's pidfd as standard input, sleeps until the time is up or QEMU has ended, starts a supervisor if there is none
//! (which stops the guest in order), and kills QEMU if that does not end it.
//!
//! Invariant: at most one watcher a VM stays (it holds `ttl.lock`), and it ends with QEMU.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nido_api::error::{Error, Result};
use nido_engine::home::{SUPERVISOR_LOCK, TTL_LOCK};
use nido_engine::qemu::QemuProcess;
use nido_files::lock::Held;
use tokio::time::timeout;

use super::{Nido, OpenOptions};

/// How long one sleep lasts at most: the wall clock may be set, and the host may sleep.
const CLOCK_CHECK_INTERVAL: Duration = Duration::from_secs(60);
/// How long a supervisor may take to stop the VM once its time is up: more than it gives the guest.
const SUPERVISOR_STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a watcher whose VM should have ended looks for its supervisor.
const SUPERVISOR_CHECK_INTERVAL: Duration = Duration::from_secs(1);

impl Nido {
    /// The hidden verb: returns when the VM's QEMU has ended, by itself or because its time was up.
    ///
    /// # Errors
    /// Standard input is no pidfd, or the home cannot be opened.
    pub async fn watch_ttl(options: OpenOptions, id: &str, at_ms: i64) -> Result<()> {
        let failed = |e| Error::io("cannot watch QEMU", e);
        let pidfd: OwnedFd = std::io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
        let qemu = QemuProcess::of_pidfd(pidfd).map_err(failed)?;
        // Its working directory is the VM's: no home needs to be open while it sleeps.
        let Ok(Some(_only_one)) = Held::try_take(TTL_LOCK.as_ref()) else { return Ok(()) };
        while let Some(left) = left_until(at_ms, Timestamp::now()) {
            if timeout(left.min(CLOCK_CHECK_INTERVAL), qemu.wait()).await.is_ok() {
                return Ok(());
            }
        }
        tracing::info!("the time to live of VM {id} is over");
        let deadline = Instant::now() + SUPERVISOR_STOP_TIMEOUT;
        while Instant::now() < deadline {
            if let Err(error) = have_stopped(&options, id).await {
                tracing::error!("no supervisor for VM {id}: {error}");
            }
            if timeout(SUPERVISOR_CHECK_INTERVAL, qemu.wait()).await.is_ok() {
                return Ok(());
            }
        }
        tracing::error!("VM {id} does not stop; terminating its QEMU");
        qemu.kill().map_err(failed)?;
        let _ = timeout(SUPERVISOR_STOP_TIMEOUT, qemu.wait()).await;
        Ok(())
    }
}

/// A supervisor that lives stops the VM by itself; one that was killed is replaced by one that does.
async fn have_stopped(options: &OpenOptions, id: &str) -> Result<()> {
    let lock = std::path::Path::new(SUPERVISOR_LOCK);
    let Ok(Some(held)) = Held::try_take(lock) else { return Ok(()) };
    Nido::open_unreconciled(options.clone())?.supervise_again(id, held).await.map(drop)
}

/// How long it is until then by the wall clock; `None` once it has come.
fn left_until(at_ms: i64, now: Timestamp) -> Option<Duration> {
    let left = at_ms.saturating_sub(now.as_millisecond());
    u64::try_from(left).ok().filter(|left| *left > 0).map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_to_live_ends_by_the_wall_clock() {
        let now = Timestamp::from_millisecond(1_000).unwrap();
        assert_eq!(left_until(1_500, now), Some(Duration::from_millis(500)));
        assert_eq!(left_until(1_000, now), None);
        assert_eq!(left_until(i64::MIN, now), None);
    }
}
