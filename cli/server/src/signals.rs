//! Signals to nido itself, as events.
//!
//! Invariant: once [`Signals::listen`] has returned, none of these signals ends nido by itself any more; so it is only
//! called by verbs that have something to undo or to pass on, and they decide. A hangup that was ignored before, as `nohup` makes
//! it, stays ignored.

use nido_api::error::Error;
use rustix::process::Signal as Number;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// What came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignalEvent {
    /// A signal that requests an end, by its number.
    End(u8),
    /// The terminal has another size.
    Resized,
}

/// The signals that are listened to.
#[derive(Debug)]
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Option<Signal>,
    quit: Signal,
    resize: Signal,
}

/// SIGINT's number.
pub const INTERRUPT: u8 = number(Number::INT);
/// SIGTERM's number.
pub const TERMINATE: u8 = number(Number::TERM);
/// SIGKILL's number.
pub const KILL: u8 = number(Number::KILL);
/// SIGHUP's number.
pub const HANGUP: u8 = number(Number::HUP);
const QUIT: u8 = number(Number::QUIT);

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // signal numbers are 1 to 64
const fn number(signal: Number) -> u8 {
    signal.as_raw() as u8
}

impl Signals {
    /// Begins to listen.
    pub fn listen() -> Result<Self, Error> {
        let on = |kind| signal(kind).map_err(|error| Error::io("cannot listen for signals", error));
        Ok(Self {
            interrupt: on(SignalKind::interrupt())?,
            terminate: on(SignalKind::terminate())?,
            hangup: (!is_ignored(HANGUP)).then(|| on(SignalKind::hangup())).transpose()?,
            quit: on(SignalKind::quit())?,
            resize: on(SignalKind::window_change())?,
        })
    }

    /// The next one. May be dropped and called again without loss.
    pub async fn next(&mut self) -> SignalEvent {
        tokio::select! {
            _ = self.interrupt.recv() => SignalEvent::End(INTERRUPT),
            _ = self.terminate.recv() => SignalEvent::End(TERMINATE),
            () = received(&mut self.hangup) => SignalEvent::End(HANGUP),
            _ = self.quit.recv() => SignalEvent::End(QUIT),
            _ = self.resize.recv() => SignalEvent::Resized,
        }
    }

    /// The next one that requests termination.
    pub async fn next_end(&mut self) -> u8 {
        loop {
            if let SignalEvent::End(number) = self.next().await {
                return number;
            }
        }
    }
}

/// Waits for a signal; for ever if it is not listened to.
async fn received(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

/// Whether the parent process set a signal to be ignored.
fn is_ignored(signal: u8) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
