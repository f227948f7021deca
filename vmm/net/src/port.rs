//! The host's end of the link: a datagram socket, one frame each. QEMU's end has its own socket in the same directory.
//!
//! Frames are sent from a second socket, which is connected: then the kernel reports when QEMU can take another. A connected socket
//! would not receive from a QEMU that has been restarted.
//!
//! Invariant: a QEMU that does not read costs frames, never time of other connections; one that is restarted is found again.

use std::cell::Cell;
use std::io;
use std::path::{Path, PathBuf};

use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};
use tokio::net::UnixDatagram;

use crate::subnet::{ETHERNET_HEADER, MTU};

/// The largest frame.
pub const FRAME_MAX: usize = ETHERNET_HEADER + MTU;
/// Buffers of the socket, in bytes: a few of the largest frames.
const SOCKET_BUFFER: usize = 1 << 20;

/// The host's end of the link.
#[derive(Debug)]
pub struct Port {
    /// Receives.
    socket: UnixDatagram,
    /// Sends.
    sender: UnixDatagram,
    /// QEMU's socket.
    peer: PathBuf,
    connected: Cell<bool>,
    /// Frames that QEMU did not take.
    lost: Cell<u64>,
}

impl Port {
    /// Takes a socket that is bound, and does not block.
    ///
    /// # Errors
    /// It cannot be used.
    pub fn new(socket: std::os::unix::net::UnixDatagram, peer: PathBuf) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        // More is better, and not necessary.
        let sender = UnixDatagram::unbound()?;
        let _ = set_socket_send_buffer_size(&sender, SOCKET_BUFFER);
        let _ = set_socket_recv_buffer_size(&socket, SOCKET_BUFFER);
        let socket = UnixDatagram::from_std(socket)?;
        Ok(Self { socket, sender, peer, connected: Cell::new(false), lost: Cell::new(0) })
    }

    /// Waits for a frame of the guest's.
    ///
    /// # Errors
    /// The socket can no longer be used.
    pub async fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.recv(buffer).await
    }

    /// A frame that has arrived already; `None` if no frame waits.
    pub fn try_receive(&self, buffer: &mut [u8]) -> Option<usize> {
        self.socket.try_recv(buffer).ok()
    }

    /// Sends a frame, and waits while QEMU takes none. A frame to a QEMU that is not there is lost.
    pub async fn send(&self, frame: &[u8]) {
        while let Err(error) = self.try_send(frame) {
            if error.kind() != io::ErrorKind::WouldBlock || self.sender.writable().await.is_err() {
                return self.lost.set(self.lost.get() + 1);
            }
        }
    }

    /// How many frames were lost.
    pub fn lost(&self) -> u64 {
        self.lost.get()
    }

    fn try_send(&self, frame: &[u8]) -> io::Result<usize> {
        let sent = if self.connect() { self.sender.try_send(frame) } else { Err(io::ErrorKind::NotConnected.into()) };
        match sent {
            // Another QEMU may have taken the place of the one before.
            Err(error) if is_gone(&error) => {
                self.connected.set(false);
                if self.connect() { self.sender.try_send(frame) } else { Err(error) }
            }
            sent => sent,
        }
    }

    fn connect(&self) -> bool {
        if !self.connected.get() {
            self.connected.set(connect(&self.sender, &self.peer).is_ok());
        }
        self.connected.get()
    }
}

fn connect(socket: &UnixDatagram, peer: &Path) -> io::Result<()> {
    let address = rustix::net::SocketAddrUnix::new(peer)?;
    Ok(rustix::net::connect(socket, &address)?)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::NotConnected
            | io::ErrorKind::NotFound
            | io::ErrorKind::BrokenPipe
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory of this test's own, removed at its end.
    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("nido-net-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[tokio::test]
    async fn a_peer_that_is_restarted_is_found_again() {
        let dir = Directory::new("restart");
        let (ours, theirs) = (dir.0.join("s"), dir.0.join("q"));
        let port = Port::new(std::os::unix::net::UnixDatagram::bind(&ours).unwrap(), theirs.clone()).unwrap();
        port.send(b"nobody").await;
        assert_eq!(port.lost(), 1);
        for frame in [b"first", b"again"] {
            let _ = std::fs::remove_file(&theirs);
            let qemu = UnixDatagram::bind(&theirs).unwrap();
            qemu.send_to(frame, &ours).await.unwrap();
            let mut buffer = [0; 64];
            let length = port.receive(&mut buffer).await.unwrap();
            assert_eq!(&buffer[..length], frame);
            port.send(frame).await;
            let length = qemu.recv(&mut buffer).await.unwrap();
            assert_eq!(&buffer[..length], frame);
        }
        assert_eq!(port.lost(), 1);
    }
}
