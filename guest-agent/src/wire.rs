//! The wire protocol between nido (the host) and the guest agent.
//!
//! # Layers
//!
//! ```text
//!  kernel vsock                        virtio-serial port "org.nido.agent"
//!  one connection = one session        resync ([`sync`]), then yamux: one stream = one session
//!          \                                   /
//!           \________ a byte stream __________/
//!                           |
//!          frames:  kind u8 | length u24 big-endian | payload
//!                           |
//!      kind 0x01 = one CBOR message ([`ToGuest`], [`ToHost`]); other kinds = raw bytes
//! ```
//!
//! # A session
//!
//! The host starts: [`ToGuest::Hello`] contains the range of protocol versions it supports, the VM's token and a
//! fresh nonce. The agent answers [`ToHost::Welcome`] with the version chosen, the nonce echoed, or
//! [`ToHost::Refused`] and closes. The host may send its first request right behind the hello, without waiting.
//!
//! After that the host sends one request at a time and reads until the reply that ends it:
//!
//! | request |  ended by|replies | ended by| ended by |
//! |---|---|---|
//! | `Ping` | | `Pong` |
//! | `Exec` | `Started`, stdout and stderr frames, `StdinCredit` | `Exited` or `Failed` |
//! | `Put`, then entries | | `PutDone` or `Failed` |
//! | `Get` | entries | `TreeEnd` or `Failed` |
//! | `Connect` | `Connected`, then the stream is raw bytes until both ends have closed | `Failed` or close |
//! | `Power` | | `PoweringOff` or `Failed` |
//! | `Freeze` | | `Frozen` or `Failed` |
//! | `Thaw` | | `Thawed` or `Failed` |
//! | `ResetIdentity` | | `IdentityReset` or `Failed` |
//!
//! `Exec`, `Put`, `Get` and `Connect` are answered `Refused` with [`Refusal::Busy`] where there are too many of their kind
//! ([`MAX_WORK`], [`MAX_TUNNELS`]); nothing has been done then.
//!
//! Closing a session cancels what runs in it: all processes that an exec started are killed, a half-written file is removed.
//! A `Failed` that answers `Put` may come while the host still sends; the session is closed afterwards.
//!
//! # Saving and loading
//!
//! A guest whose memory is to be saved first gets `Freeze`: the agent syncs the root disk and freezes its file system, so
//! that disk and memory match and the disk alone is clean. Without a `Thaw`, the agent unfreezes it after
//! [`FREEZE_LIMIT_MS`] of the guest's time. A guest that was loaded from saved memory has the identity of other guests:
//! before any other client can reach it, it gets `ResetIdentity`, which unfreezes its file system, and sets random numbers, the
//! time, a token and (if its disk has another VM's identity) a name, machine id and host keys of its own. From `IdentityReset`
//! on, only the new token opens sessions. If `ResetIdentity` fails, the guest must not be used.
//!
//! # Flow control
//!
//! A stream has back-pressure of its own (vsock credit, yamux window). Standard input has a credit on top, because
//! signals travel behind it: the host may have at most [`STDIN_WINDOW`] bytes of stdin outstanding, and the agent
//! returns credit with `StdinCredit` as the process takes them. So a process that does not read its stdin never
//! keeps a signal from arriving.
//!
//! # A tree of files (`Put` and `Get`)
//!
//! `Entry`, file bytes in [`kind::FILE_DATA`] frames, `EntryEnd`; repeated; then `TreeEnd`. Names are lists of path
//! components as raw bytes: never empty, never `.` or `..`, no `/`, no NUL, at most 255 bytes; the first entry has
//! no components at all and is the root of what is copied. A directory comes before what is in it. Only files,
//! directories and symlinks exist in this protocol; modes carry the nine permission bits.
//!
//! # Invariant
//!
//! Decoding any bytes ends in a message or an error: never a panic, and never an allocation larger than the limit
//! of the frame that is being read.

pub mod sync;

use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};

/// The newest protocol version this build speaks. Raised when an end without a change would misunderstand the other;
/// fields and messages that may be absent need no new version.
pub const VERSION: u16 = 3;
/// The oldest protocol version this build still speaks. A guest that resumes from memory (running, snapshot, fork) has the agent of
/// the nido that booted it: raising this strands such guests.
pub const VERSION_OLDEST: u16 = 3;

/// The version that both ends of a session speak: the newest that is in both ranges, each from the oldest to the newest.
#[must_use]
pub fn common_version(ours: (u16, u16), theirs: (u16, u16)) -> Option<u16> {
    let newest = ours.1.min(theirs.1);
    (newest >= ours.0 && newest >= theirs.0).then_some(newest)
}
/// The vsock port the agent listens on.
pub const VSOCK_PORT: u32 = 1024;
/// The name of the virtio-serial port.
pub const SERIAL_PORT: &str = "org.nido.agent";
/// Length of a frame's head: kind and length.
pub const HEAD: usize = 4;
/// Largest payload of a message frame, in bytes.
pub const MAX_MESSAGE: usize = 256 * 1024;
/// Largest payload of a raw frame, in bytes.
pub const MAX_RAW: usize = 256 * 1024;
/// How many bytes of standard input may be outstanding.
pub const STDIN_WINDOW: u32 = 256 * 1024;
/// Length of a VM's token, in bytes.
pub const TOKEN_LEN: usize = 32;
/// How many random bytes an identity reset has.
pub const ENTROPY_LEN: usize = 64;
/// Time after which a frozen file system is unfrozen, in milliseconds by the guest's clock.
pub const FREEZE_LIMIT_MS: u64 = 60_000;
/// Longest path component, in bytes.
pub const MAX_COMPONENT: usize = 255;
/// How many entries that were left out are named.
pub const MAX_LEFT_OUT: usize = 100;
/// How much of the path of a skipped entry is reported, in bytes.
pub const MAX_LEFT_OUT_PATH: usize = 1024;
/// Deepest nesting of an entry.
pub const MAX_DEPTH: usize = 256;
/// How many commands and copies a guest runs at once. Further ones wait for [`QUEUE_LIMIT_MS`] and are then refused.
pub const MAX_WORK: usize = 64;
/// How many commands and copies wait for their turn. Further ones are refused at once.
pub const MAX_QUEUED: usize = 256;
/// How long a command or copy waits for its turn, in milliseconds.
pub const QUEUE_LIMIT_MS: u64 = 10_000;
/// How many connections to ports of the guest are open at once. They take no places of commands and copies.
pub const MAX_TUNNELS: usize = 256;
/// How many sessions there are at most: the above, and room for pings, power requests and sessions that have not asked for
/// anything yet.
pub const MAX_SESSIONS: usize = MAX_WORK + MAX_QUEUED + MAX_TUNNELS + 64;
/// How many warnings a reply to a ping contains.
pub const MAX_WARNINGS: usize = 8;
/// Longest warning of a reply to a ping, in bytes.
pub const MAX_WARNING: usize = 200;

/// What a frame carries.
pub mod kind {
    /// One CBOR message.
    pub const MESSAGE: u8 = 0x01;
    /// Bytes for the process's standard input (host to guest).
    pub const STDIN: u8 = 0x10;
    /// Bytes of the process's standard output, or of its terminal (guest to host).
    pub const STDOUT: u8 = 0x11;
    /// Bytes of the process's standard error (guest to host).
    pub const STDERR: u8 = 0x12;
    /// Bytes of the file whose `Entry` came last.
    pub const FILE_DATA: u8 = 0x20;
}

/// What a side understands beyond the first release of this protocol version: bits of [`Welcome::features`] and
/// [`Get::features`].
pub mod feature {
    /// `Hole` messages.
    pub const HOLES: u32 = 1;
    /// [`EntryKind::Link`](super::EntryKind::Link).
    pub const LINKS: u32 = 2;
    /// Entries that cannot be read are left out and named in [`Summary::left_out`](super::Summary::left_out).
    pub const LEFT_OUT: u32 = 4;
    /// [`Entry::owner`](super::Entry::owner).
    pub const OWNERS: u32 = 8;
}

/// Why bytes are not a frame or a message of this protocol.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WireError {
    /// A frame kind that this version does not know.
    #[error("unknown frame kind {0:#04x}")]
    UnknownKind(u8),
    /// A frame longer than its kind allows.
    #[error("a frame of {length} bytes is over the limit of {limit}")]
    TooLong {
        /// The length announced.
        length: usize,
        /// The limit for this kind.
        limit: usize,
    },
    /// The payload of a message frame is not a message.
    #[error("not a message of this protocol: {0}")]
    Malformed(String),
    /// A path component that must not be used.
    #[error("the path component {0:?} is not allowed")]
    BadComponent(String),
}

/// The head of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// One of [`kind`].
    pub kind: u8,
    /// Length of the payload in bytes.
    pub length: usize,
}

impl Head {
    /// Reads a head and checks it against the limit of its kind, before anything is allocated for the payload.
    ///
    /// # Errors
    /// [`WireError::UnknownKind`], [`WireError::TooLong`].
    pub fn parse(bytes: [u8; HEAD]) -> Result<Self, WireError> {
        let [kind, a, b, c] = bytes;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        let limit = match kind {
            kind::MESSAGE => MAX_MESSAGE,
            kind::STDIN | kind::STDOUT | kind::STDERR | kind::FILE_DATA => MAX_RAW,
            other => return Err(WireError::UnknownKind(other)),
        };
        if length > limit {
            return Err(WireError::TooLong { length, limit });
        }
        Ok(Self { kind, length })
    }

    /// The four bytes of this head. `length` must be within the kind's limit.
    #[must_use]
    pub fn bytes(self) -> [u8; HEAD] {
        let [_, a, b, c] = u32::try_from(self.length).unwrap_or(u32::MAX).to_be_bytes();
        [self.kind, a, b, c]
    }
}

/// Encodes a message as a whole frame.
///
/// # Errors
/// [`WireError::TooLong`] if it does not fit in one.
pub fn encode<M: Encode<()>>(message: &M) -> Result<Vec<u8>, WireError> {
    let mut frame = vec![0; HEAD];
    minicbor::encode(message, &mut frame).map_err(|e| WireError::Malformed(e.to_string()))?;
    let length = frame.len() - HEAD;
    if length > MAX_MESSAGE {
        return Err(WireError::TooLong { length, limit: MAX_MESSAGE });
    }
    frame[..HEAD].copy_from_slice(&Head { kind: kind::MESSAGE, length }.bytes());
    Ok(frame)
}

/// Decodes the payload of a message frame. Bytes behind the message are an error.
///
/// # Errors
/// [`WireError::Malformed`].
pub fn decode<'b, M: Decode<'b, ()>>(payload: &'b [u8]) -> Result<M, WireError> {
    let mut decoder = minicbor::Decoder::new(payload);
    let message = decoder.decode().map_err(|e| WireError::Malformed(e.to_string()))?;
    if decoder.position() != payload.len() {
        return Err(WireError::Malformed("bytes after the message".into()));
    }
    Ok(message)
}

/// Decodes the message frame at the front of bytes that are all there will be; gives what is behind it, too.
///
/// # Errors
/// [`WireError::Malformed`] if there is no whole message frame.
pub fn decode_first<'b, M: Decode<'b, ()>>(bytes: &'b [u8]) -> Result<(M, &'b [u8]), WireError> {
    let cut = || WireError::Malformed("it was truncated".into());
    let (head, rest) = bytes.split_first_chunk::<HEAD>().ok_or_else(cut)?;
    let head = Head::parse(*head)?;
    if head.kind != kind::MESSAGE {
        return Err(WireError::Malformed(format!("a frame of kind {:#04x} here", head.kind)));
    }
    let (payload, rest) = rest.split_at_checked(head.length).ok_or_else(cut)?;
    Ok((decode(payload)?, rest))
}

/// Messages of the host.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ToGuest {
    /// Opens a session.
    #[n(0)]
    Hello(#[n(0)] Hello),
    /// Requests a reply.
    #[n(1)]
    Ping,
    /// Runs a command.
    #[n(2)]
    Exec(#[n(0)] Exec),
    /// No more standard input.
    #[n(3)]
    StdinEof,
    /// Sends a signal to the running command's process group.
    #[n(4)]
    Signal(#[n(0)] u8),
    /// The terminal has a new size.
    #[n(5)]
    Resize(#[n(0)] WindowSize),
    /// Writes files into the guest: a tree follows.
    #[n(6)]
    Put(#[n(0)] Put),
    /// The next entry of a tree.
    #[n(7)]
    Entry(#[n(0)] Entry),
    /// The entry is complete.
    #[n(8)]
    EntryEnd,
    /// The tree is complete.
    #[n(9)]
    TreeEnd,
    /// Reads files out of the guest.
    #[n(10)]
    Get(#[n(0)] Get),
    /// Connects to a TCP port inside the guest.
    #[n(11)]
    Connect(#[n(0)] Connect),
    /// Powers the guest off, or restarts it.
    #[n(12)]
    Power(#[n(0)] Power),
    /// Writes everything to the root disk and holds its file system still.
    #[n(13)]
    Freeze,
    /// Unfreezes it.
    #[n(14)]
    Thaw,
    /// Resets the identity of a guest that was loaded from saved memory.
    #[n(15)]
    ResetIdentity(#[n(0)] IdentityReset),
    /// So many bytes of the file whose `Entry` came last are zeros that take no room. Only to an agent with
    /// [`feature::HOLES`].
    #[n(20)]
    Hole(#[n(0)] u64),
    /// Sets the wall clock: the guest, or its host, was paused. In nanoseconds since 1970. Agents of older templates do not know
    /// it, and close the session.
    #[n(16)]
    SetClock(#[n(0)] i64),
    /// So many processes and threads all commands may have together, and asks how many were refused. May be repeated. Agents of
    /// older templates do not know it, and close the session.
    #[n(17)]
    LimitProcesses(#[n(0)] u32),
}

/// Messages of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ToHost {
    /// The session is open.
    #[n(0)]
    Welcome(#[n(0)] Welcome),
    /// The session is refused and closed.
    #[n(1)]
    Refused(#[n(0)] Refused),
    /// The reply to a ping.
    #[n(2)]
    Pong(#[n(0)] Pong),
    /// The command runs.
    #[n(3)]
    Started(#[n(0)] u32),
    /// So many more bytes of standard input may be sent.
    #[n(4)]
    StdinCredit(#[n(0)] u32),
    /// The command has ended, and all of its output has been sent.
    #[n(5)]
    Exited(#[n(0)] Exited),
    /// Everything was written.
    #[n(6)]
    PutDone(#[n(0)] Summary),
    /// The next entry of a tree.
    #[n(7)]
    Entry(#[n(0)] Entry),
    /// The entry is complete.
    #[n(8)]
    EntryEnd,
    /// The tree is complete.
    #[n(9)]
    TreeEnd(#[n(0)] Summary),
    /// The connection stands; raw bytes follow.
    #[n(10)]
    Connected,
    /// The guest has synced its disks and goes down now.
    #[n(11)]
    PoweringOff,
    /// The request could not be carried out.
    #[n(12)]
    Failed(#[n(0)] Failed),
    /// The root file system is frozen.
    #[n(13)]
    Frozen,
    /// It is unfrozen.
    #[n(14)]
    Thawed,
    /// The identity was reset.
    #[n(15)]
    IdentityReset(#[n(0)] Pong),
    /// So many bytes of the file whose `Entry` came last are zeros that take no room. Only if [`Get::features`] has
    /// [`feature::HOLES`].
    #[n(20)]
    Hole(#[n(0)] u64),
    /// The clock is right.
    #[n(16)]
    ClockSet,
    /// The limit of processes is in force; so many were refused since the guest got its identity.
    #[n(17)]
    ProcessesRefused(#[n(0)] u64),
}

/// Opens a session.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Hello {
    /// Oldest protocol version the host accepts.
    #[n(0)]
    pub oldest: u16,
    /// Newest protocol version the host accepts.
    #[n(1)]
    pub newest: u16,
    /// The VM's token, [`TOKEN_LEN`] bytes.
    #[n(2)]
    pub token: ByteVec,
    /// Echoed in the reply, so that no reply of an older session can be taken for this one's.
    #[n(3)]
    pub nonce: u64,
}

/// Answers a hello.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Welcome {
    /// The version both sides speak from here on.
    #[n(0)]
    pub version: u16,
    /// The nonce of the hello.
    #[n(1)]
    pub nonce: u64,
    /// The agent's own version, for people.
    #[n(2)]
    pub agent: String,
    /// Bits of [`feature`]: what the agent understands.
    #[n(3)]
    pub features: Option<u32>,
}

/// Answers a hello that is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Refused {
    /// Why.
    #[n(0)]
    pub reason: Refusal,
    /// Oldest protocol version the agent speaks.
    #[n(1)]
    pub oldest: u16,
    /// Newest protocol version the agent speaks.
    #[n(2)]
    pub newest: u16,
}

/// Why a hello is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Refusal {
    /// No version in common.
    #[n(0)]
    Version,
    /// Not this VM's token.
    #[n(1)]
    Token,
    /// Something other than a hello came first.
    #[n(2)]
    NoHello,
    /// Too many sessions at once.
    #[n(3)]
    Busy,
}

/// The reply to a ping, with the agent's status.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Pong {
    /// The agent's own version.
    #[n(0)]
    pub agent: String,
    /// Milliseconds since the guest's kernel started.
    #[n(1)]
    pub uptime_ms: u64,
    /// Sessions open now, this one included.
    #[n(2)]
    pub sessions: u32,
    /// Whether the agent is the guest's first process.
    #[n(3)]
    pub is_init: bool,
    /// The guest's address on its first network card, if it has one.
    #[n(4)]
    pub address: Option<String>,
    /// What the guest could not do at its start and runs without, for people: at most [`MAX_WARNINGS`] of at most
    /// [`MAX_WARNING`] bytes.
    #[n(5)]
    pub warnings: Option<Vec<String>>,
}

/// Runs a command.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct Exec {
    /// Program and arguments; at least the program. A program without `/` is looked up in `PATH`.
    #[n(0)]
    pub argv: Vec<ByteVec>,
    /// Environment on top of the user's own: `KEY=VALUE`.
    #[n(1)]
    pub env: Vec<ByteVec>,
    /// Working directory; the user's home if absent.
    #[n(2)]
    pub directory: Option<ByteVec>,
    /// USER, USER:GROUP or :GROUP, each a name or a number; root if absent.
    #[n(3)]
    pub user: Option<String>,
    /// Whether standard input will be sent. Else it is `/dev/null`.
    #[n(4)]
    pub stdin: bool,
    /// Run on a terminal of this size; stdout and stderr are then one stream.
    #[n(5)]
    pub pty: Option<WindowSize>,
    /// Kill the whole process group after so long.
    #[n(6)]
    pub timeout_ms: Option<u64>,
    /// Run the user's login shell instead of `argv`, which must be empty.
    #[n(7)]
    pub login_shell: bool,
    /// The value of `TERM` on a terminal.
    #[n(8)]
    pub term: Option<String>,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct WindowSize {
    /// Lines.
    #[n(0)]
    pub rows: u16,
    /// Columns.
    #[n(1)]
    pub columns: u16,
}

/// How a command ended. Exactly one of `code` and `signal` is set.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Exited {
    /// Its exit code.
    #[n(0)]
    pub code: Option<u8>,
    /// The signal that killed it.
    #[n(1)]
    pub signal: Option<u8>,
    /// Whether its time ran out.
    #[n(2)]
    pub timed_out: bool,
    /// How long it ran, by the guest's clock.
    #[n(3)]
    pub duration_ms: u64,
}

/// Writes files into the guest.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Put {
    /// Destination, absolute or relative to the user's home.
    #[n(0)]
    pub path: ByteVec,
    /// If the destination is a directory, the copy is put into it under this name. Absent: the destination itself is
    /// meant, whatever it is.
    #[n(1)]
    pub name: Option<ByteVec>,
    /// The owner of the files; root if absent.
    #[n(2)]
    pub user: Option<String>,
    /// Make missing parent directories.
    #[n(3)]
    pub parents: bool,
    /// Whether a file that exists takes the mode given instead of keeping its own. Absent: it takes it.
    #[n(4)]
    pub set_mode: Option<bool>,
}

/// Reads files out of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Get {
    /// What to read, absolute or relative to root's home. A symlink given here is followed; those inside are not.
    #[n(0)]
    pub path: ByteVec,
    /// Bits of [`feature`]: what the host understands.
    #[n(1)]
    pub features: Option<u32>,
}

/// One file, directory or symlink of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Entry {
    /// Path components below the root of the tree; none for the root itself.
    #[n(0)]
    pub path: Vec<ByteVec>,
    /// What it is.
    #[n(1)]
    pub kind: EntryKind,
    /// The nine permission bits.
    #[n(2)]
    pub mode: u16,
    /// Modification time, nanoseconds since 1970.
    #[n(3)]
    pub mtime_ns: i64,
    /// User and group by number, where they are to be kept; then an existing file takes the mode, too.
    #[n(4)]
    pub owner: Option<Owner>,
    /// How many bytes the file takes on the disk of the side that sends it. A claim.
    #[n(5)]
    pub stored: Option<u64>,
}

/// The owner of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Owner {
    /// The user's number.
    #[n(0)]
    pub uid: u32,
    /// The group's number.
    #[n(1)]
    pub gid: u32,
}

/// An entry that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SkippedEntry {
    /// Its whole path, cut to [`MAX_LEFT_OUT_PATH`] bytes.
    #[n(0)]
    pub path: ByteVec,
    /// Why, for people.
    #[n(1)]
    pub reason: String,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum EntryKind {
    /// A file; its bytes follow. `size` is what the sender expects, for progress only.
    #[n(0)]
    File(#[n(0)] u64),
    /// A directory.
    #[n(1)]
    Directory,
    /// A symlink and its target.
    #[n(2)]
    Symlink(#[n(0)] ByteVec),
    /// Another name of a file that was sent before in this tree: its path below the root.
    #[n(3)]
    Link(#[n(0)] Vec<ByteVec>),
}

/// What was copied.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct Summary {
    /// Files, directories and symlinks.
    #[n(0)]
    pub entries: u64,
    /// Bytes of files.
    #[n(1)]
    pub bytes: u64,
    /// Things left out (sockets, devices, pipes).
    #[n(2)]
    pub skipped: u64,
    /// Where it was written (`Put`).
    #[n(3)]
    pub path: Option<ByteVec>,
    /// Which entries could not be read and are missing from the copy; the first [`MAX_LEFT_OUT`] of them.
    #[n(4)]
    pub left_out: Option<Vec<SkippedEntry>>,
    /// How many there were.
    #[n(5)]
    pub left_out_count: Option<u64>,
}

/// Connects to a TCP port as seen from inside the guest.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Connect {
    /// A numeric address; `127.0.0.1` (then `::1`) if absent.
    #[n(0)]
    pub host: Option<String>,
    /// The port.
    #[n(1)]
    pub port: u16,
}

/// What to do with the power.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Power {
    /// Orderly power-off.
    #[n(0)]
    Off,
    /// Orderly restart.
    #[n(1)]
    Restart,
}

/// The identity reset of a guest that was loaded from saved memory.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub struct IdentityReset {
    /// The VM's token from now on, [`TOKEN_LEN`] bytes.
    #[n(0)]
    pub token: ByteVec,
    /// [`ENTROPY_LEN`] bytes for the kernel's random numbers.
    #[n(1)]
    pub entropy: ByteVec,
    /// The time, nanoseconds since 1970.
    #[n(2)]
    pub time_ns: i64,
    /// The guest's host name: the VM's name.
    #[n(3)]
    pub hostname: String,
    /// The VM's id. A disk that carries another one gets a new machine id and new host keys.
    #[n(4)]
    pub identity: String,
    /// The first network card's settings.
    #[n(5)]
    pub network: Option<crate::config::Network>,
    /// The root disk is larger than the guest knows: its file system shall grow, beside the first sessions.
    #[n(6)]
    pub disk_grown: bool,
}

impl std::fmt::Debug for IdentityReset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IdentityReset")
            .field("hostname", &self.hostname)
            .field("identity", &self.identity)
            .field("time_ns", &self.time_ns)
            .finish_non_exhaustive()
    }
}

/// Why a request was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Failed {
    /// What went wrong, for programs.
    #[n(0)]
    pub fault: Fault,
    /// What went wrong, for people. Hostile text as far as the host is concerned.
    #[n(1)]
    pub message: String,
}

/// Kinds of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Fault {
    /// No such program.
    #[n(0)]
    CommandNotFound,
    /// The program is there and cannot be run.
    #[n(1)]
    CannotRun,
    /// No such user in the guest.
    #[n(2)]
    NoUser,
    /// No such directory to run in.
    #[n(3)]
    NoDirectory,
    /// No such file or directory.
    #[n(4)]
    NotFound,
    /// Permission denied.
    #[n(5)]
    Denied,
    /// The guest's disk is full.
    #[n(6)]
    DiskFull,
    /// A directory where a file was expected or the other way round.
    #[n(7)]
    WrongType,
    /// Nothing listens there, or it cannot be reached.
    #[n(8)]
    Unreachable,
    /// The request breaks the protocol or a limit.
    #[n(9)]
    Invalid,
    /// Anything else.
    #[n(10)]
    Other,
    /// Something in the guest is in the way for now.
    #[n(11)]
    Busy,
}

/// Checks one path component that came from the other side.
///
/// # Errors
/// [`WireError::BadComponent`] if it is empty, `.`, `..`, too long, or holds `/` or NUL.
pub fn check_component(component: &[u8]) -> Result<(), WireError> {
    let bad = component.is_empty()
        || component == b"."
        || component == b".."
        || component.len() > MAX_COMPONENT
        || component.iter().any(|&b| b == b'/' || b == 0);
    if bad { Err(WireError::BadComponent(String::from_utf8_lossy(component).into_owned())) } else { Ok(()) }
}

/// Checks the path of an entry that came from the other side.
///
/// # Errors
/// [`WireError::BadComponent`] for a bad component or a nesting deeper than [`MAX_DEPTH`].
pub fn check_path(path: &[ByteVec]) -> Result<(), WireError> {
    if path.len() > MAX_DEPTH {
        return Err(WireError::BadComponent("nested too deep".into()));
    }
    path.iter().try_for_each(|c| check_component(c))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Both ends took one version only, so each change of the protocol disconnected every running guest.
    #[test]
    fn two_ranges_of_versions_meet_at_the_newest_common_one() {
        for (ours, theirs, common) in [
            ((3, 5), (3, 4), Some(4)),
            ((3, 5), (5, 9), Some(5)),
            ((3, 3), (3, 3), Some(3)),
            ((3, 5), (6, 9), None),
            ((6, 9), (3, 5), None),
        ] {
            assert_eq!(common_version(ours, theirs), common, "{ours:?} {theirs:?}");
            assert_eq!(common_version(theirs, ours), common, "{theirs:?} {ours:?}");
        }
        const { assert!(VERSION_OLDEST <= VERSION) };
    }

    fn sample_exec() -> ToGuest {
        ToGuest::Exec(Exec {
            argv: vec![b"sh".to_vec().into(), b"-c".to_vec().into(), vec![0xff, 0].into()],
            env: vec![b"A=b".to_vec().into()],
            directory: Some(b"/tmp".to_vec().into()),
            user: Some("user".into()),
            pty: Some(WindowSize { rows: 24, columns: 80 }),
            timeout_ms: Some(5),
            ..Exec::default()
        })
    }

    fn sample_identity_reset() -> ToGuest {
        ToGuest::ResetIdentity(IdentityReset {
            token: vec![7; TOKEN_LEN].into(),
            entropy: vec![9; ENTROPY_LEN].into(),
            time_ns: 1_700_000_000_123_456_789,
            hostname: "web".into(),
            identity: "0123456789abcdef".into(),
            network: Some(crate::config::Network::Dhcp),
            disk_grown: false,
        })
    }

    #[test]
    fn messages_survive_the_wire() {
        let simple = [ToGuest::Ping, ToGuest::Signal(9), ToGuest::Power(Power::Off), ToGuest::Freeze, ToGuest::Thaw];
        for message in simple.into_iter().chain([sample_exec(), sample_identity_reset()]) {
            let frame = encode(&message).unwrap();
            let head = Head::parse(frame[..HEAD].try_into().unwrap()).unwrap();
            assert_eq!(head, Head { kind: kind::MESSAGE, length: frame.len() - HEAD });
            assert_eq!(decode::<ToGuest>(&frame[HEAD..]).unwrap(), message);
        }
    }

    #[test]
    fn an_oversized_length_is_refused_before_allocation() {
        let head = [kind::MESSAGE, 0xff, 0xff, 0xff];
        assert!(matches!(Head::parse(head), Err(WireError::TooLong { .. })));
    }

    #[test]
    fn a_hostile_array_length_does_not_allocate() {
        // An Exec whose argv claims 2^32-1 elements and holds none.
        let payload = [0x82, 0x02, 0x81, 0x89, 0x9a, 0xff, 0xff, 0xff, 0xff];
        assert!(decode::<ToGuest>(&payload).is_err());
    }

    #[test]
    fn components_that_escape_are_refused() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"a\0", &[b'x'; 256]] {
            assert!(check_component(bad).is_err(), "{bad:?}");
        }
        for good in [&b"a"[..], b"...", b"\xff", b"a b\n"] {
            assert!(check_component(good).is_ok(), "{good:?}");
        }
    }

    proptest! {
        #[test]
        fn decoding_never_panics(payload in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let _ = decode::<ToGuest>(&payload);
            let _ = decode::<ToHost>(&payload);
        }

        #[test]
        fn damaged_messages_never_panic(at in 0usize..256, byte in any::<u8>()) {
            for message in [sample_exec(), sample_identity_reset()] {
                let mut frame = encode(&message).unwrap();
                let at = HEAD + at % (frame.len() - HEAD);
                frame[at] = byte;
                let _ = decode::<ToGuest>(&frame[HEAD..]);
            }
        }

        #[test]
        fn every_renewal_survives_the_wire(
            token in proptest::collection::vec(any::<u8>(), 0..80),
            entropy in proptest::collection::vec(any::<u8>(), 0..80),
            time_ns in any::<i64>(),
            hostname in any::<String>(),
            identity in any::<String>(),
        ) {
            let (token, entropy) = (token.into(), entropy.into());
            let message = ToGuest::ResetIdentity(IdentityReset { token, entropy, time_ns, hostname, identity, network: None, disk_grown: false });
            let frame = encode(&message).unwrap();
            prop_assert_eq!(decode::<ToGuest>(&frame[HEAD..]).unwrap(), message);
        }

        #[test]
        fn heads_roundtrip(kind in any::<u8>(), length in 0usize..(1 << 24)) {
            let head = Head { kind, length };
            match Head::parse(head.bytes()) {
                Ok(parsed) => prop_assert_eq!(parsed, head),
                Err(WireError::TooLong { length: seen, limit }) => prop_assert!(seen == length && length > limit),
                Err(other) => prop_assert_eq!(other, WireError::UnknownKind(kind)),
            }
        }

        #[test]
        fn a_block_is_found_behind_any_noise(noise in proptest::collection::vec(any::<u8>(), 0..200), nonce in any::<[u8; 16]>()) {
            let block = sync::Block { kind: sync::Kind::Probe, nonce };
            let mut scanner = sync::Scanner::default();
            let mut found = Vec::new();
            for byte in noise.into_iter().chain(block.bytes()) {
                found.extend(scanner.push(byte));
            }
            prop_assert_eq!(found.last(), Some(&block));
        }

        #[test]
        fn a_block_is_found_behind_a_cut_block(cut in 1usize..sync::BLOCK, nonce in any::<[u8; 16]>()) {
            let block = sync::Block { kind: sync::Kind::Ack, nonce };
            let mut scanner = sync::Scanner::default();
            let bytes = block.bytes();
            let mut found = None;
            for &byte in bytes[..cut].iter().chain(&bytes) {
                found = scanner.push(byte).or(found);
            }
            prop_assert_eq!(found, Some(block));
        }
    }
}
