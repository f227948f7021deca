//! Files into and out of the guest, streamed as a tree of entries.
//!
//! The disk is worked by a thread of its own, so that a slow or stuck file system never holds up another session; a
//! short queue of large pieces joins it to the session. Invariant: memory does not grow with the size or the number
//! of files, and a half-written file is never seen under its final name.

mod destination;
mod get;
mod leaf;
mod output;
mod put;

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nido_guest_agent::wire::{self, Entry, Get, HEAD, Put, ToGuest, ToHost, kind};
use tokio::sync::mpsc;

use crate::framing::{FrameError, FrameReader, FrameWriter, Incoming};
use crate::mux_stream::Chunk;
use crate::refusal::Refusal;

/// How many pieces may wait between the session and the disk.
const QUEUE: usize = 2;
/// Payload of a frame of file bytes that the agent sends, in bytes: with its head it fills a frame of the multiplexer.
const CHUNK: usize = 4 * crate::port::KERNEL_CHUNK - 12 - HEAD;

/// A piece of a tree on its way from the session to the disk.
#[derive(Debug)]
enum Inbound {
    Entry(Entry),
    Bytes(Chunk),
    Hole(u64),
    EntryEnd,
    TreeEnd,
}

/// A piece of a tree on its way from the disk to the session.
enum Outbound {
    Entry(Entry),
    /// A whole frame, its head still to be filled in.
    Frame(Vec<u8>),
    Hole(u64),
    EntryEnd,
}

/// How a `Put` ended, as far as the session is concerned.
pub enum ReceiveOutcome {
    /// The tree has been read to its end.
    Done,
    /// `Failed` was sent to the host, which may still be sending.
    Failed,
}

/// Receives a tree from the host and writes it.
///
/// # Errors
/// The session is at its end; what was half written has been removed.
pub async fn receive(
    request: Put,
    input: &mut FrameReader,
    output: &mut FrameWriter,
) -> Result<ReceiveOutcome, FrameError> {
    let (pieces, queue) = mpsc::channel(QUEUE);
    let mut written = tokio::task::spawn_blocking(move || put::write_tree(&request, queue));
    let summary = tokio::select! {
        written = &mut written => written.map_err(io::Error::other)?,
        over = pass_on(input, &pieces) => {
            over?;
            drop(pieces);
            written.await.map_err(io::Error::other)?
        }
    };
    match summary {
        Ok(summary) => {
            output.send(&ToHost::PutDone(summary)).await?;
            Ok(ReceiveOutcome::Done)
        }
        Err(Refusal { fault, message }) => {
            output.send(&ToHost::Failed(wire::Failed { fault, message })).await?;
            Ok(ReceiveOutcome::Failed)
        }
    }
}

/// Hands pieces to the disk until the tree is complete or the disk takes no more.
async fn pass_on(input: &mut FrameReader, pieces: &mpsc::Sender<Inbound>) -> Result<(), FrameError> {
    loop {
        let piece = match input.next().await? {
            Some(Incoming::Raw(kind::FILE_DATA, bytes)) => Inbound::Bytes(bytes),
            Some(Incoming::Message(ToGuest::Entry(entry))) => Inbound::Entry(entry),
            Some(Incoming::Message(ToGuest::Hole(length))) => Inbound::Hole(length),
            Some(Incoming::Message(ToGuest::EntryEnd)) => Inbound::EntryEnd,
            Some(Incoming::Message(ToGuest::TreeEnd)) => Inbound::TreeEnd,
            Some(_) => return Err(wire::WireError::Malformed("a frame that does not belong to a tree".into()).into()),
            None => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        };
        let is_last = matches!(piece, Inbound::TreeEnd);
        // A closed queue means that the disk has failed; its own reply has the cause.
        if pieces.send(piece).await.is_err() || is_last {
            return Ok(());
        }
    }
}

/// Reads files and sends them as a tree.
///
/// # Errors
/// The session is at its end.
pub async fn send(request: Get, output: &mut FrameWriter) -> Result<(), FrameError> {
    let (pieces, mut queue) = mpsc::channel(QUEUE);
    let read = tokio::task::spawn_blocking(move || get::read_tree(&request, &pieces));
    while let Some(piece) = queue.recv().await {
        match piece {
            Outbound::Entry(entry) => output.send(&ToHost::Entry(entry)).await?,
            Outbound::Frame(mut frame) => output.send_raw(kind::FILE_DATA, &mut frame).await?,
            Outbound::Hole(length) => output.send(&ToHost::Hole(length)).await?,
            Outbound::EntryEnd => output.send(&ToHost::EntryEnd).await?,
        }
    }
    let answer = match read.await.map_err(io::Error::other)? {
        Ok(summary) => ToHost::TreeEnd(summary),
        Err(Refusal { fault, message }) => ToHost::Failed(wire::Failed { fault, message }),
    };
    Ok(output.send(&answer).await?)
}

/// A path as the host gives it: absolute, or relative to a home directory.
fn resolve(path: &[u8], home: &std::path::Path) -> Result<PathBuf, Refusal> {
    if path.contains(&0) {
        return Err(Refusal::new(wire::Fault::Invalid, "a path cannot hold NUL"));
    }
    Ok(home.join(std::ffi::OsStr::from_bytes(path)))
}
