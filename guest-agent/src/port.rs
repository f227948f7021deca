//! The virtio-serial port as a byte stream.
//!
//! The kernel returns at most one page per read and takes at most 32 KiB per write, each write being a message of
//! its own to QEMU. So small pieces (the multiplexer's heads) are put together with what follows them, and large ones
//! go straight through. Invariant: bytes keep their order, and after [`Port::poll_flush`] none is held back.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::event::epoll;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

use crate::sys;

/// The most the kernel takes in one write, in bytes.
pub const KERNEL_CHUNK: usize = 32 * 1024;
/// The most the kernel gives in one read, in bytes.
const KERNEL_READ: usize = 4096;

/// A port, or a socket that stands for one.
pub struct Port {
    file: AsyncFd<OwnedFd>,
    /// Bytes read and not yet given out, from `start` on.
    ahead: Vec<u8>,
    start: usize,
    /// Bytes taken and not yet written.
    held: Vec<u8>,
}

impl Port {
    /// A port of the kernel's, opened non-blocking.
    ///
    /// # Errors
    /// It cannot be watched.
    pub fn of_device(file: OwnedFd) -> io::Result<Self> {
        let file = sys::watch(file)?;
        Ok(Self { file, ahead: Vec::new(), start: 0, held: Vec::new() })
    }

    /// A connected socket.
    ///
    /// # Errors
    /// It cannot be watched.
    pub fn of_socket(file: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&file, true)?;
        Self::of_device(file)
    }

    /// The next byte; `None` if the host's end is closed.
    ///
    /// # Errors
    /// The port is broken.
    pub async fn next_byte(&mut self) -> io::Result<Option<u8>> {
        if self.start == self.ahead.len() {
            let mut byte = [0];
            return Ok((self.read(&mut byte).await? == 1).then_some(byte[0]));
        }
        self.start += 1;
        Ok(Some(self.ahead[self.start - 1]))
    }

    /// The next `length` bytes; `None` if the host's end is closed before they have come.
    ///
    /// # Errors
    /// The port is broken.
    pub async fn next_bytes(&mut self, length: usize) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = vec![0; length];
        match self.read_exact(&mut bytes).await {
            Ok(_) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends a block of the preamble and what follows it; false if the host's end was closed meanwhile.
    ///
    /// # Errors
    /// The port is broken.
    pub async fn send_block(&mut self, block: &[u8]) -> io::Result<bool> {
        match self.write_all(block).await {
            Ok(()) => self.flush().await.map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Drops what an ended connection has not written.
    pub fn discard_unsent(&mut self) {
        self.held.clear();
    }

    /// Waits until the host's end of a device is open again and has sent something.
    ///
    /// The runtime takes a hang-up for final, so the device is watched through an edge-triggered `epoll` of its own
    /// until it is readable, and only then by the runtime again.
    ///
    /// # Errors
    /// It cannot be watched.
    pub async fn host_back(&mut self) -> io::Result<()> {
        (self.start, self.held) = (0, Vec::new());
        self.ahead.clear();
        let watch = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let edges = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&watch, self.file.get_ref(), epoll::EventData::new_u64(0), edges)?;
        let watch = sys::watch(watch)?;
        loop {
            let mut guard = watch.readable().await?;
            let mut events = Vec::with_capacity(1);
            let nothing_more = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
            epoll::wait(watch.get_ref(), rustix::buffer::spare_capacity(&mut events), Some(&nothing_more))?;
            guard.clear_ready();
            let happened = events.first().map_or(epoll::EventFlags::empty(), |event| event.flags);
            if happened.contains(epoll::EventFlags::IN) && !happened.contains(epoll::EventFlags::HUP) {
                break;
            }
        }
        let fresh = sys::watch(self.file.get_ref().try_clone()?)?;
        self.file = fresh;
        Ok(())
    }

    fn poll_read_file(&self, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard: AsyncFdReadyGuard<'_, _> = ready!(self.file.poll_read_ready(context))?;
            // The kernel's reads never fill more than a page, so zeroing ahead of them is bounded as well.
            let space = into.initialize_unfilled_to(into.remaining().min(KERNEL_READ));
            match guard.try_io(|file| Ok(rustix::io::read(file, space)?)) {
                Ok(Ok(count)) => {
                    into.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                // A hang-up stays "ready" for ever; trying again would spin.
                Err(_would_block) if guard.ready().is_read_closed() => return Poll::Ready(Ok(())),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_write_file(&self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.file.poll_write_ready(context))?;
            match guard.try_io(|file| Ok(rustix::io::write(file, bytes)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                // A port without a host takes nothing, and its hang-up stays "ready" for ever.
                Err(_would_block) if guard.ready().is_write_closed() => {
                    return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
                }
                Err(_would_block) => {}
            }
        }
    }

    fn poll_write_held(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.held.is_empty() {
            match ready!(self.poll_write_file(context, &self.held))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => drop(self.held.drain(..count)),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Port {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let port = self.get_mut();
        if port.start == port.ahead.len() {
            if into.remaining() >= KERNEL_READ {
                return port.poll_read_file(context, into);
            }
            port.start = 0;
            port.ahead.clear();
            let mut ahead = std::mem::take(&mut port.ahead);
            ahead.resize(KERNEL_READ, 0);
            let mut page = ReadBuf::new(&mut ahead);
            let polled = port.poll_read_file(context, &mut page);
            let count = page.filled().len();
            ahead.truncate(count);
            port.ahead = ahead;
            ready!(polled)?;
        }
        let count = into.remaining().min(port.ahead.len() - port.start);
        into.put_slice(&port.ahead[port.start..port.start + count]);
        port.start += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Port {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let port = self.get_mut();
        if port.held.is_empty() && bytes.len() >= KERNEL_CHUNK {
            return port.poll_write_file(context, &bytes[..KERNEL_CHUNK]);
        }
        if port.held.len() == KERNEL_CHUNK {
            ready!(port.poll_write_held(context))?;
        }
        let count = bytes.len().min(KERNEL_CHUNK - port.held.len());
        port.held.extend_from_slice(&bytes[..count]);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_write_held(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(context)
    }
}
