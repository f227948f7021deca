//! nido on a terminal: a pseudo-terminal whose other side is the test.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::{Child, Stdio};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use super::{DEADLINE, Nido};

/// `O_NOCTTY`: it shall not become the test's own terminal.
const NOCTTY: i32 = 0o400;

/// A nido whose three standard streams are one terminal.
pub struct Terminal {
    child: Child,
    ours: File,
    // Kept open, so that the terminal can be looked at when nido has ended.
    theirs: File,
    seen: String,
}

impl Nido<'_> {
    /// Starts it on a terminal of 40 rows and 120 columns.
    pub fn on_terminal(self) -> Terminal {
        let ours: OwnedFd = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let name = ptsname(&ours, Vec::new()).unwrap().into_string().unwrap();
        let theirs = OpenOptions::new().read(true).write(true).custom_flags(NOCTTY).open(name).unwrap();
        resize(&theirs, 40, 120);
        let stream = || Stdio::from(theirs.try_clone().unwrap());
        let mut command = self.env("TERM", "xterm").command();
        let child = command.stdin(stream()).stdout(stream()).stderr(stream()).spawn().unwrap();
        Terminal { child, ours: ours.into(), theirs, seen: String::new() }
    }
}

fn resize(terminal: &File, rows: u16, columns: u16) {
    tcsetwinsize(terminal, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
}

impl Terminal {
    /// Waits until `text` has been shown.
    pub fn shows(&mut self, text: &str) {
        let deadline = Instant::now() + DEADLINE;
        while !self.seen.contains(text) {
            assert!(Instant::now() < deadline && self.read(1000), "'{text}' was not shown, but {:?}", self.seen);
        }
    }

    /// Reads the output of so many milliseconds.
    fn read(&mut self, milliseconds: i64) -> bool {
        let timeout = Timespec { tv_sec: milliseconds / 1000, tv_nsec: milliseconds % 1000 * 1_000_000 };
        if poll(&mut [PollFd::new(&self.ours, PollFlags::IN)], Some(&timeout)) != Ok(1) {
            return milliseconds > 0;
        }
        let mut buffer = [0; 4096];
        let length = self.ours.read(&mut buffer).unwrap_or(0);
        self.seen.push_str(&String::from_utf8_lossy(&buffer[..length]));
        length > 0
    }

    /// Types.
    pub fn types(&mut self, text: &str) {
        self.ours.write_all(text.as_bytes()).unwrap();
    }

    /// Gives the terminal another size and notifies nido. (It is not nido's controlling terminal.)
    pub fn resizes(&mut self, rows: u16, columns: u16) {
        resize(&self.theirs, rows, columns);
        self.signal(Signal::WINCH);
    }

    /// Sends nido a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Whether every key is passed on as it is.
    pub fn is_raw(&self) -> bool {
        !tcgetattr(&self.theirs).unwrap().local_modes.contains(LocalModes::ICANON)
    }

    /// Waits for nido's end: its exit code, and all that was shown.
    pub fn ends(mut self) -> (i32, String) {
        let deadline = Instant::now() + DEADLINE;
        let status = loop {
            // Read meanwhile: a full terminal would keep nido from ending.
            self.read(20);
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                let _ = self.child.kill();
                panic!("nido does not end; shown was {:?}", self.seen);
            }
        };
        while self.read(0) {}
        assert!(!self.is_raw(), "the terminal was left in raw mode");
        (status.code().unwrap_or(-1), self.seen.clone())
    }
}
