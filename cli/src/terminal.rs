//! The terminal that stdin is: raw mode, size, and its way back to what it was.
//!
//! Invariant: the settings found at [`RawMode::enter`] are put back when the guard drops, when nido panics, and when it
//! ends by a signal (which reaches the guard's owner as an event).

use std::io::{self, IsTerminal as _};
use std::sync::{Mutex, PoisonError};

use nido_api::error::{Code, Error, Hint};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// The settings to go back to, while raw mode is on.
static SAVED_TERMIOS: Mutex<Option<Termios>> = Mutex::new(None);

/// Raw mode is on as long as this lives.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Every key goes to the guest from now on, Ctrl-C too.
    pub fn enter() -> Result<Self, Error> {
        let failed = |error: rustix::io::Errno| Error::io("cannot switch the terminal to raw mode", error.into());
        let before = tcgetattr(io::stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        *SAVED_TERMIOS.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let inner = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            inner(panic);
        }));
        let guard = Self(());
        tcsetattr(io::stdin(), OptionalActions::Now, &raw).map_err(failed)?;
        Ok(guard)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    if let Some(before) = SAVED_TERMIOS.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // If the terminal is gone there is nothing to put back.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}

/// Rows and columns of the terminal that stdout is; 24 × 80 if it does not report them.
pub fn size() -> (u16, u16) {
    match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row, size.ws_col),
        _ => (24, 80),
    }
}

/// Refuses a terminal session where there is no terminal.
pub fn require(stdin: bool, what: &str, hint: &str) -> Result<(), Error> {
    let missing = match (stdin && !io::stdin().is_terminal(), !io::stdout().is_terminal()) {
        (true, _) => "standard input",
        (_, true) => "standard output",
        _ => return Ok(()),
    };
    Err(Error::new(Code::SpecInvalid, format!("{what} needs a terminal, but {missing} is not one"))
        .hint(Hint::command_line(hint)))
}
