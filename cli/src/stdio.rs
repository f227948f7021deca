//! Standard input and output as channels: one thread reads, one writes, so that a full pipe or a silent keyboard never
//! keeps nido from hearing the guest or a signal.
//!
//! Invariant: at most a few pieces are on their way at any time; a slow reader slows the guest down in the end.

use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tokio::sync::{mpsc, oneshot};

/// How much is read at once, in bytes.
const PIECE: usize = 64 * 1024;
/// How many pieces may be on their way.
const PIECES: usize = 4;

/// Which stream of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// Reads standard input to its end. The channel closes there; an error is the last item.
pub fn read() -> mpsc::Receiver<io::Result<Vec<u8>>> {
    let (pieces, receiver) = mpsc::channel(PIECES);
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut buffer = vec![0; PIECE];
        loop {
            let piece = match stdin.read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => Ok(buffer[..length].to_vec()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
            let last = piece.is_err();
            if pieces.blocking_send(piece).is_err() || last {
                return;
            }
        }
    });
    receiver
}

/// Writes standard output and standard error, in the order the pieces come.
#[derive(Debug)]
pub struct Writer {
    pieces: mpsc::Sender<(Stream, Vec<u8>)>,
    ended: oneshot::Receiver<io::Result<()>>,
}

impl Writer {
    /// Starts the thread.
    pub fn start() -> Self {
        let (pieces, mut receiver) = mpsc::channel::<(Stream, Vec<u8>)>(PIECES);
        let (end, ended) = oneshot::channel();
        std::thread::spawn(move || {
            let mut outcome = Ok(());
            while let (Ok(()), Some((stream, bytes))) = (&outcome, receiver.blocking_recv()) {
                outcome = write(stream, &bytes);
            }
            let _ = end.send(outcome);
        });
        Self { pieces, ended }
    }

    /// Waits for room for one more piece; `None` if writing has failed. May be dropped without loss.
    pub async fn room(&self) -> Option<mpsc::Permit<'_, (Stream, Vec<u8>)>> {
        self.pieces.reserve().await.ok()
    }

    /// Waits until everything is written.
    pub async fn finish(self) -> io::Result<()> {
        drop(self.pieces);
        self.ended.await.unwrap_or(Ok(()))
    }
}

/// Writes at once, and waits for it.
pub fn write(stream: Stream, bytes: &[u8]) -> io::Result<()> {
    match stream {
        Stream::Out => write_all(io::stdout().as_fd(), bytes),
        Stream::Err => write_all(io::stderr().as_fd(), bytes),
    }
}

/// Writes without the standard library's line buffer, and also where another process made the file non-blocking.
fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(length) => bytes = &bytes[length..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                poll(&mut [PollFd::new(&fd, PollFlags::OUT)], None)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
