//! Every child of the agent is reaped in one place, so that no exit status is lost: not by the reaping of
//! orphans that process 1 owes the system, and not by another command.
//!
//! Invariant: a status belongs either to the launcher of that process or is dropped.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use rustix::process::{Pid, WaitOptions, WaitStatus, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, oneshot};

use crate::sys::{self, Launch, LaunchError};

/// How a process ended: its exit code or the signal that killed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// Its exit code.
    Code(u8),
    /// The signal that killed it.
    Signal(u8),
}

impl ExitStatus {
    fn from_status(status: WaitStatus) -> Option<Self> {
        let byte = |value: i32| u8::try_from(value & 0xff).unwrap_or(u8::MAX);
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Some(Self::Code(byte(code))),
            (None, Some(signal)) => Some(Self::Signal(byte(signal))),
            (None, None) => None,
        }
    }
}

/// The running children of the agent.
#[derive(Default)]
pub struct Reaper {
    book: Mutex<ChildTable>,
    /// Notified when a round of reaping found no child left.
    wait_until_empty: Notify,
}

#[derive(Default)]
struct ChildTable {
    /// The waiters, by process.
    waiting: HashMap<i32, oneshot::Sender<ExitStatus>>,
    /// Launches under way: a process may end before its launcher has put it into `waiting`.
    launching: usize,
    /// Statuses that arrived during a launch and have no launcher yet.
    unclaimed: HashMap<i32, ExitStatus>,
}

impl Reaper {
    fn book(&self) -> std::sync::MutexGuard<'_, ChildTable> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a process. Blocks until its program has been loaded, so not for the runtime's thread.
    ///
    /// # Errors
    /// See [`LaunchError`].
    pub fn launch(&self, launch: &Launch<'_>) -> Result<(Pid, oneshot::Receiver<ExitStatus>), LaunchError> {
        self.book().launching += 1;
        let launched = sys::launch(launch);
        let mut book = self.book();
        let result = launched.map(|pid| {
            let (sender, receiver) = oneshot::channel();
            match book.unclaimed.remove(&pid.as_raw_nonzero().get()) {
                // The receiver is in hand, so this cannot fail.
                Some(ended) => drop(sender.send(ended)),
                None => drop(book.waiting.insert(pid.as_raw_nonzero().get(), sender)),
            }
            (pid, receiver)
        });
        book.launching -= 1;
        if book.launching == 0 {
            book.unclaimed.clear();
        }
        result
    }

    /// Reaps for ever.
    ///
    /// # Errors
    /// SIGCHLD cannot be watched.
    pub async fn reap(&self) -> std::io::Result<()> {
        let mut died = signal(SignalKind::child())?;
        loop {
            self.reap_ended();
            died.recv().await;
        }
    }

    /// Reaps what has ended; whether no child is left.
    fn reap_ended(&self) -> bool {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => self.hand_over(pid, status),
                Ok(None) => return false,
                Err(rustix::io::Errno::INTR) => {}
                Err(_no_child) => {
                    self.wait_until_empty.notify_waiters();
                    return true;
                }
            }
        }
    }

    fn hand_over(&self, pid: Pid, status: WaitStatus) {
        let (pid, Some(ended)) = (pid.as_raw_nonzero().get(), ExitStatus::from_status(status)) else { return };
        let mut book = self.book();
        match book.waiting.remove(&pid) {
            // Its launcher may have lost interest.
            Some(sender) => drop(sender.send(ended)),
            None if book.launching > 0 => drop(book.unclaimed.insert(pid, ended)),
            None => {}
        }
    }

    /// Ready once no child is left; for process 1, whose children inherit all orphans to it, once no process is left.
    pub async fn wait_until_empty(&self) {
        let mut told = std::pin::pin!(self.wait_until_empty.notified());
        // Registered before looking, so that the last death is not missed.
        told.as_mut().enable();
        if !self.reap_ended() {
            told.await;
        }
    }
}
