//! The monitor's socket: one client at a time, as with QEMU. A message may bring a file.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::Sender;

use rustix::io::retry_on_intr;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::machine::Happening;

/// Bytes that are read at once.
const BUFFER: usize = 4096;

/// Accepts clients on a thread of its own.
pub fn listen(listener: UnixListener, sender: Sender<Happening>) {
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let Ok(reader) = stream.try_clone() else { continue };
            let _ = sender.send(Happening::Connected(stream));
            let _ = read_messages(&reader, &sender);
            let _ = sender.send(Happening::Disconnected);
        }
    });
}

/// Reads one client's messages to their end, one in each line.
fn read_messages(stream: &UnixStream, sender: &Sender<Happening>) -> io::Result<()> {
    let mut unread = Vec::new();
    loop {
        let (mut bytes, mut space) = ([0; BUFFER], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = retry_on_intr(|| {
            recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)
        });
        let count = received?.bytes;
        if count == 0 {
            return Ok(());
        }
        for message in control.drain() {
            let RecvAncillaryMessage::ScmRights(files) = message else { continue };
            files.for_each(|file| drop(sender.send(Happening::File(File::from(file)))));
        }
        unread.extend_from_slice(&bytes[..count]);
        while let Some(end) = unread.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = unread.drain(..=end).collect();
            let _ = sender.send(Happening::Line(String::from_utf8_lossy(&line).into_owned()));
        }
    }
}
