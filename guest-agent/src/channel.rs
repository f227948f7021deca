//! How the host reaches the agent: kernel vsock, a virtio-serial port, or (in tests) a unix socket that stands for the
//! port.
//!
//! Invariant: an agent without a client does nothing at all. It sleeps until the kernel wakes it, with no timer, also
//! while the port's other end is closed (where `poll` reports hang-up and `read` returns nothing, again and again).

use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nido_guest_agent::wire::{MAX_SESSIONS, SERIAL_PORT, VSOCK_PORT, sync};
use rustix::fs::{Mode, OFlags};
use tokio::task::JoinSet;
use tokio_util::compat::TokioAsyncReadCompatExt;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

use crate::agent::Agent;
use crate::port::Port;
use crate::{mux_stream, session};

/// Streams in one multiplexed connection: more than sessions, so that one too many is refused and not fatal.
const MAX_STREAMS: usize = 2 * MAX_SESSIONS;
/// What all streams together may have under way towards the guest, in bytes: the least that yamux allows.
const RECEIVE_WINDOW: usize = MAX_STREAMS * 256 * 1024;
/// Largest frame of the multiplexer, in bytes: with its 12-byte head it fills whole buffers of the kernel's port.
const MUX_FRAME: usize = 4 * crate::port::KERNEL_CHUNK - 12;

/// How long no further connection is accepted after one that could not be.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// Serves sessions over kernel vsock, one connection each, for ever. When the guest is loaded from saved memory, the
/// connections of before are reset and the listener stays, whatever the machine's number is now.
///
/// # Errors
/// The guest has no vsock.
pub async fn serve_vsock(agent: Arc<Agent>) -> io::Result<()> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, VSOCK_PORT))?;
    let mut sessions = JoinSet::new();
    loop {
        tokio::select! {
            connection = listener.accept() => match connection {
                // Programs inside the guest can connect, too, and have no business here.
                Ok((stream, peer)) if peer.cid() == VMADDR_CID_HOST && sessions.len() < MAX_STREAMS => {
                    sessions.spawn(session::serve(agent.clone(), mux_stream::split(stream)));
                }
                Ok(_) => {}
                Err(error) if is_fatal(&error) => return Err(error),
                // The failure may persist for a while.
                Err(_this_one) => tokio::time::sleep(ACCEPT_PAUSE).await,
            },
            Some(_ended) = sessions.join_next() => {}
        }
    }
}

/// Whether a failed accept means that the listener is unusable.
fn is_fatal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK))
}

/// Serves sessions over the virtio-serial port, for ever.
///
/// # Errors
/// The guest has no such port, or it broke.
pub async fn serve_serial(agent: Arc<Agent>) -> io::Result<()> {
    let file = open_serial_port()?;
    let mut port = Port::of_device(file)?;
    loop {
        serve_port(&agent, &mut port).await?;
        port.host_back().await?;
    }
}

/// Finds the port by its name.
fn open_serial_port() -> io::Result<OwnedFd> {
    for entry in std::fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        let name = std::fs::read(entry.path().join("name")).unwrap_or_default();
        if name.trim_ascii() == SERIAL_PORT.as_bytes() {
            let device = Path::new("/dev").join(entry.file_name());
            let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
            return Ok(rustix::fs::open(device, flags, Mode::empty())?);
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("no virtio-serial port is named {SERIAL_PORT}")))
}

/// Serves sessions over a unix socket on which the host listens, as QEMU connects a port to it; connects again as
/// QEMU does when the host has gone. Ends when the receiver is dropped.
///
/// # Errors
/// The receiver was dropped.
pub async fn serve_socket(agent: Arc<Agent>, path: &Path) -> io::Result<()> {
    const REDIAL_TIMEOUT: Duration = Duration::from_secs(10);
    loop {
        let mut port = Port::of_socket(dial(path, REDIAL_TIMEOUT).await?)?;
        // A host that was killed with something unread resets the connection: that counts as closed.
        let _ = serve_port(&agent, &mut port).await;
    }
}

async fn dial(path: &Path, patience: Duration) -> io::Result<OwnedFd> {
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        match std::os::unix::net::UnixStream::connect(path) {
            Ok(stream) => return Ok(stream.into()),
            Err(error) if tokio::time::Instant::now() > deadline => return Err(error),
            Err(_not_yet) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Serves one connection of the port after another, until the host's end is closed.
async fn serve_port(agent: &Arc<Agent>, port: &mut Port) -> io::Result<()> {
    while agree(agent, port).await? {
        serve_mux(agent, port).await;
        port.discard_unsent();
    }
    Ok(())
}

/// Waits until host and agent have synchronized the beginning of a connection, and replies to bootstrap requests meanwhile; false if the host's
/// end is closed.
async fn agree(agent: &Arc<Agent>, port: &mut Port) -> io::Result<bool> {
    let mut scanner = sync::Scanner::default();
    let mut offered = None;
    loop {
        let Some(byte) = port.next_byte().await? else { return Ok(false) };
        let answer = match scanner.push(byte) {
            Some(sync::Block { kind: sync::Kind::Probe, nonce }) => {
                offered = Some(nonce);
                Some(sync::Block { kind: sync::Kind::Ack, nonce }.bytes().to_vec())
            }
            Some(sync::Block { kind: sync::Kind::Letter(length), nonce }) => {
                let Some(bootstrap_request) = port.next_bytes(length.into()).await? else { return Ok(false) };
                let words = session::answer_bootstrap_request(agent, &bootstrap_request).await;
                let length = u16::try_from(words.len()).unwrap_or_default();
                let block = sync::Block { kind: sync::Kind::Reply(length), nonce };
                Some([&block.bytes(), &words[..length.into()]].concat())
            }
            Some(sync::Block { kind: sync::Kind::Go, nonce }) if offered == Some(nonce) => return Ok(true),
            Some(_) | None => None,
        };
        if let Some(answer) = answer
            && !port.send_block(&answer).await?
        {
            return Ok(false);
        }
    }
}

/// Serves the streams of one multiplexed connection until it ends, for whatever reason; its sessions end with it.
async fn serve_mux(agent: &Arc<Agent>, port: &mut Port) {
    let mut config = yamux::Config::default();
    config.set_max_num_streams(MAX_STREAMS);
    config.set_max_connection_receive_window(Some(RECEIVE_WINDOW));
    config.set_split_send_size(MUX_FRAME);
    let mut connection = yamux::Connection::new(port.compat(), config, yamux::Mode::Server);
    while let Some(Ok(stream)) = poll_fn(|context| connection.poll_next_inbound(context)).await {
        tokio::spawn(session::serve(agent.clone(), mux_stream::split_mux(stream)));
    }
}
