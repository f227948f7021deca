//! A terminal for `nido`, as a person's terminal emulator gives it: the test holds the other end.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Instant;

use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use super::wait::{BOOT_TEST_TIMEOUT, eventually};

/// A command on a terminal.
pub struct Terminal {
    child: Child,
    keys: File,
    screen: mpsc::Receiver<Vec<u8>>,
    seen: Vec<u8>,
    /// The near end, to look at its settings.
    line: OwnedFd,
}

impl Terminal {
    /// Starts a command with the terminal as its controlling terminal and as all three of its streams.
    pub fn start(mut command: Command, rows: u16, columns: u16) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let far = openpt(flags).unwrap();
        grantpt(&far).unwrap();
        unlockpt(&far).unwrap();
        tcsetwinsize(&far, size(rows, columns)).unwrap();
        let line = ioctl_tiocgptpeer(&far, flags).unwrap();
        let stream = || Stdio::from(line.try_clone().unwrap());
        let child = command.stdin(stream()).stdout(stream()).stderr(stream()).spawn().unwrap();
        drop(command);
        let keys = File::from(far);
        let mut reader = keys.try_clone().unwrap();
        let (tell, screen) = mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                if tell.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { child, keys, screen, seen: Vec::new(), line }
    }

    /// Types.
    pub fn keys(&mut self, text: &str) {
        self.keys.write_all(text.as_bytes()).unwrap();
    }

    /// Makes the window another size.
    pub fn resize(&self, rows: u16, columns: u16) {
        tcsetwinsize(&self.keys, size(rows, columns)).unwrap();
    }

    /// Reads the screen until it shows `wanted` (bytes that came since the last such wait).
    #[track_caller]
    pub fn expect(&mut self, wanted: &str) -> String {
        let deadline = Instant::now() + BOOT_TEST_TIMEOUT;
        loop {
            let text = String::from_utf8_lossy(&self.seen).into_owned();
            if let Some(at) = text.find(wanted) {
                let end = at + wanted.len();
                self.seen = text.as_bytes()[end..].to_vec();
                return text[..end].to_owned();
            }
            match self.screen.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(piece) => self.seen.extend(piece),
                Err(_) => panic!("no {wanted:?} on the screen: {text:?}"),
            }
        }
    }

    /// Whether the terminal echoes and edits lines, as it does by default.
    pub fn is_cooked(&self) -> bool {
        let modes = tcgetattr(&self.line).unwrap().local_modes;
        modes.contains(LocalModes::ICANON | LocalModes::ECHO)
    }

    /// Waits for the command's end; gives its exit code and what the screen showed since the last wait.
    #[track_caller]
    pub fn wait(mut self) -> (i32, String) {
        let status = eventually("the command's end", || self.child.try_wait().unwrap());
        let cooked = self.is_cooked();
        drop(self.line);
        self.seen.extend(self.screen.iter().flatten());
        assert!(cooked, "the terminal is as it was");
        (status.code().unwrap_or(-1), String::from_utf8_lossy(&self.seen).into_owned())
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}
