//! SIGTERM and its kind: the host shuts down, the user logs out, an administrator ends the supervisor. The guest is asked to power
//! off, within a limit; QEMU has these signals blocked, so it waits for that. SIGKILL is another matter: it ends the supervisor only.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that ask a supervisor to end.
#[derive(Debug)]
pub(super) struct Termination {
    term: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Termination {
    /// From here on signals are kept until they are read.
    pub(super) fn listen() -> io::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Returns when one of them has come.
    pub(super) async fn requested(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.interrupt.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}
