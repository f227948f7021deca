//! The byte stream to a guest agent: how it is reached, and one stream type for both ways.
//!
//! Kernel vsock is a connection to the guest's CID. With virtio-serial the VM's supervisor listens on `agent.sock` and
//! splices each connection onto a fresh stream of the multiplexed port. Either way a connection is one session.
//!
//! Invariant: [`connect`] returns by its deadline, whatever the other side does.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nix::sys::socket as vsock;
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::time::{Instant, sleep, timeout_at};

use super::error::GuestError;

/// How long the first attempt at a connection may take. A guest that has just been restored loses the first one, and
/// the kernel's own limit is two seconds. Later attempts get longer, so that a slow guest is reached too.
const FIRST_ATTEMPT: Duration = Duration::from_millis(30);
/// How long a later attempt may take at most: the kernel's own limit, because a guest that needs longer than that for its
/// answer would never be reached.
const ATTEMPT_TIMEOUT_MAX: Duration = Duration::from_secs(2);
/// Pause after a refused attempt, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(50));

/// Where a VM's guest agent answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentAddress {
    /// Kernel vsock.
    Vsock {
        /// The guest's context id.
        cid: u32,
        /// The agent's port.
        port: u32,
    },
    /// Virtio-serial, through the VM's supervisor.
    Serial {
        /// The VM's directory.
        dir: PathBuf,
        /// Name of the supervisor's socket in it.
        socket: String,
    },
}

impl AgentAddress {
    /// What `info` calls this transport.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Vsock { .. } => "vsock",
            Self::Serial { .. } => "virtio-serial",
        }
    }
}

/// Connects, trying again until `deadline`.
///
/// # Errors
/// [`GuestError::Unreachable`] with the last reason.
pub async fn connect(endpoint: &AgentAddress, deadline: Instant) -> Result<Stream, GuestError> {
    let (mut attempt, mut pause) = (FIRST_ATTEMPT, PAUSE.0);
    let mut reason = String::from("no time left to try");
    while Instant::now() < deadline {
        match timeout_at(deadline.min(Instant::now() + attempt), dial(endpoint)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) if is_final(&error) => return Err(GuestError::Unreachable(error.to_string())),
            Ok(Err(error)) => {
                reason = error.to_string();
                sleep(pause.min(deadline.saturating_duration_since(Instant::now()))).await;
                pause = (pause * 2).min(PAUSE.1);
            }
            Err(_) => {
                reason = "the connection was not accepted".into();
                attempt = (attempt * 2).min(ATTEMPT_TIMEOUT_MAX);
            }
        }
    }
    Err(GuestError::Unreachable(reason))
}

/// Whether trying again cannot help.
fn is_final(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    matches!(errno, Some(libc::EACCES | libc::EPERM | libc::EAFNOSUPPORT | libc::EINVAL | libc::ENOTDIR | libc::ELOOP))
}

async fn dial(endpoint: &AgentAddress) -> io::Result<Stream> {
    match endpoint {
        AgentAddress::Vsock { cid, port } => dial_vsock(*cid, *port).await,
        AgentAddress::Serial { dir, socket } => {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let dir = rustix::fs::open(dir, flags, Mode::empty())?;
            // Through the descriptor, because a socket's address holds 108 bytes and a home may be deeper than that.
            let path = format!("/proc/self/fd/{}/{socket}", dir.as_raw_fd());
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            rustix::net::connect(&fd, &SocketAddrUnix::new(path)?)?;
            Stream::new(fd)
        }
    }
}

async fn dial_vsock(cid: u32, port: u32) -> io::Result<Stream> {
    let flags = vsock::SockFlag::SOCK_CLOEXEC | vsock::SockFlag::SOCK_NONBLOCK;
    let fd = vsock::socket(vsock::AddressFamily::Vsock, vsock::SockType::Stream, flags, None)?;
    let started = vsock::connect(fd.as_raw_fd(), &vsock::VsockAddr::new(cid, port));
    let stream = Stream::new(fd)?;
    match started {
        Ok(()) => return Ok(stream),
        Err(nix::errno::Errno::EINPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    // Writable is what a connecting socket becomes when it is decided.
    drop(stream.fd.writable().await?);
    rustix::net::sockopt::socket_error(stream.as_fd())??;
    Ok(stream)
}

/// A connected socket. Reading and writing need no exclusive access, so both ways can be used at once.
#[derive(Debug)]
pub struct Stream {
    fd: AsyncFd<OwnedFd>,
}

impl Stream {
    /// Takes a connected stream socket.
    ///
    /// # Errors
    /// The descriptor cannot be watched.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self { fd: watch(fd, Interest::READABLE | Interest::WRITABLE)? })
    }

    /// Reads what is there, waiting for at least one byte; 0 is the end. Dropping the future loses nothing.
    pub async fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        self.fd.async_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut *into)?)).await
    }

    /// Writes some of `bytes`. Dropping the future writes nothing.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.fd.async_io(Interest::WRITABLE, |fd| Ok(send(fd, bytes)?)).await
    }

    /// Ends the stream for everyone who holds it.
    pub fn end(&self) {
        // Fails only if it has ended already.
        let _ = shutdown(self.as_fd(), Shutdown::Both);
    }

    /// The socket, no longer watched by the runtime, still non-blocking.
    pub fn into_fd(self) -> OwnedFd {
        self.fd.into_inner()
    }
}

/// Watches a descriptor.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // Deprecated because it cannot hold every type to its promise not to close the descriptor while it is watched; an
    // owned one does not. The successor is the same call, marked unsafe.
    #[allow(deprecated)]
    AsyncFd::with_interest(fd, interest)
}

/// One `send` that never raises a signal.
pub fn send(fd: impl AsFd, bytes: &[u8]) -> rustix::io::Result<usize> {
    rustix::net::send(fd, bytes, rustix::net::SendFlags::NOSIGNAL)
}

/// Ends one or both ways of a socket.
pub fn shutdown(fd: BorrowedFd<'_>, how: Shutdown) -> rustix::io::Result<()> {
    let how = match how {
        Shutdown::Read => rustix::net::Shutdown::Read,
        Shutdown::Write => rustix::net::Shutdown::Write,
        Shutdown::Both => rustix::net::Shutdown::Both,
    };
    rustix::net::shutdown(fd, how)
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.fd.poll_read_ready(cx))?;
            match guard.try_io(|fd| Ok(rustix::io::read(fd, buf.initialize_unfilled())?)) {
                Ok(Ok(count)) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.fd.poll_write_ready(cx))?;
            match guard.try_io(|fd| Ok(send(fd, bytes)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(outcome) => return Poll::Ready(outcome),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match shutdown(self.as_fd(), Shutdown::Write) {
            Ok(()) | Err(rustix::io::Errno::NOTCONN) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn in_ms(ms: u64) -> Instant {
        Instant::now() + Duration::from_millis(ms)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_socket_deep_below_the_address_limit_is_reached() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&dir).unwrap();
        // Binding has the same limit, so it goes through a descriptor as well.
        let held = std::fs::File::open(&dir).unwrap();
        let listener = UnixListener::bind(format!("/proc/self/fd/{}/agent.sock", held.as_raw_fd())).unwrap();
        let endpoint = AgentAddress::Serial { dir, socket: "agent.sock".into() };
        let stream = connect(&endpoint, in_ms(10_000)).await.unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        io::Write::write_all(&mut peer, b"hello").unwrap();
        let mut got = [0; 8];
        assert_eq!(stream.read(&mut got).await.unwrap(), 5);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_socket_that_appears_later_is_reached() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = AgentAddress::Serial { dir: dir.path().into(), socket: "agent.sock".into() };
        // The first attempt is made, and fails, before the listener is polled for the first time.
        let late = async { UnixListener::bind(dir.path().join("agent.sock")).unwrap() };
        let (stream, _listener) = tokio::join!(connect(&endpoint, in_ms(10_000)), late);
        stream.unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_absent_socket_is_unreachable_by_the_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = AgentAddress::Serial { dir: dir.path().into(), socket: "agent.sock".into() };
        let outcome = connect(&endpoint, in_ms(30)).await;
        assert!(matches!(outcome, Err(GuestError::Unreachable(_))), "{outcome:?}");
    }
}
