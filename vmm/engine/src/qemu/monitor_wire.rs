//! QMP on the wire: lines in, messages out; commands in, lines out. Pure.
//!
//! Invariant: no input makes this panic or hold more than [`LINE_BYTES_MAX`] of unfinished line, and a message of an
//! unknown sort is not an error.

use qapi::Command;
use serde_json::{Value, json};

/// The longest line accepted. QEMU's replies to nido's commands stay under a twentieth of it.
pub const LINE_BYTES_MAX: usize = 1 << 20;

/// A line that can be nothing of QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// It is longer than [`LINE_BYTES_MAX`].
    #[error("a line of the monitor is longer than {LINE_BYTES_MAX} bytes")]
    LineTooLong,
    /// It is not a JSON object.
    #[error("the monitor sent invalid QMP")]
    NotQmp,
}

/// Cuts a stream of bytes into lines.
#[derive(Debug, Default)]
pub struct Lines {
    buffer: Vec<u8>,
    searched: usize,
}

impl Lines {
    /// Takes bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole line, without its end. Call until `None` after every push.
    ///
    /// # Errors
    /// The line is too long; the stream is of no use any more.
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, WireError> {
        loop {
            let Some(at) = self.buffer[self.searched..].iter().position(|b| *b == b'\n') else {
                self.searched = self.buffer.len();
                return if self.searched > LINE_BYTES_MAX { Err(WireError::LineTooLong) } else { Ok(None) };
            };
            let rest = self.buffer.split_off(self.searched + at + 1);
            let mut line = std::mem::replace(&mut self.buffer, rest);
            self.searched = 0;
            line.pop();
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            match line.len() {
                0 => {}
                1..=LINE_BYTES_MAX => return Ok(Some(line)),
                _ => return Err(WireError::LineTooLong),
            }
        }
    }
}

/// A message of QEMU.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// Its first words.
    Greeting(Value),
    /// A command succeeded.
    Return {
        /// The command's number.
        id: Option<u64>,
        /// What it returned.
        value: Value,
    },
    /// A command failed.
    Error {
        /// The command's number; absent if QEMU could not read the command.
        id: Option<u64>,
        /// QEMU's class of error.
        class: String,
        /// QEMU's sentence.
        desc: String,
    },
    /// Something happened.
    Event(Event),
    /// A message of an unknown type.
    Other,
}

/// An event of QEMU, as received; [`Event::typed`] reads it.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name, e.g. `SHUTDOWN`.
    pub name: String,
    /// Its details, an object or null.
    pub data: Value,
    raw: Value,
}

impl Event {
    /// The event in the types of the schema; `None` if it is newer than the schema or does not fit it.
    #[must_use]
    pub fn typed(&self) -> Option<qapi::qmp::Event> {
        serde_json::from_value(self.raw.clone()).ok()
    }
}

/// Reads one line.
///
/// # Errors
/// It is not a JSON object.
pub fn read(line: &[u8]) -> Result<Message, WireError> {
    let mut value: Value = serde_json::from_slice(line).map_err(|_| WireError::NotQmp)?;
    let object = value.as_object_mut().ok_or(WireError::NotQmp)?;
    let id = object.get("id").and_then(Value::as_u64);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    if let Some(greeting) = object.remove("QMP") {
        Ok(Message::Greeting(greeting))
    } else if let Some(value) = object.remove("return") {
        Ok(Message::Return { id, value })
    } else if let Some(error) = object.remove("error") {
        Ok(Message::Error { id, class: text(&error["class"]), desc: text(&error["desc"]) })
    } else if let Some(name) = object.get("event").and_then(Value::as_str) {
        let (name, data) = (name.to_owned(), object.get("data").cloned().unwrap_or_default());
        Ok(Message::Event(Event { name, data, raw: value }))
    } else {
        Ok(Message::Other)
    }
}

/// Writes one command as a line.
///
/// # Errors
/// The command cannot be represented in JSON.
pub fn write<C: Command>(command: &C, id: u64) -> Result<Vec<u8>, serde_json::Error> {
    let mut line = serde_json::to_vec(&json!({
        "execute": C::NAME,
        "arguments": serde_json::to_value(command)?,
        "id": id,
    }))?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(lines: &mut Lines) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| lines.next_line().unwrap()).collect()
    }

    proptest! {
        #[test]
        fn lines_do_not_depend_on_how_they_arrive(
            texts in proptest::collection::vec("[^\r\n]{1,30}", 0..8),
            cuts in proptest::collection::vec(1usize..20, 1..20),
        ) {
            let stream = texts.iter().flat_map(|t| [t.as_bytes(), b"\r\n"].concat()).collect::<Vec<u8>>();
            let (mut lines, mut got, mut rest, mut cuts) = (Lines::default(), Vec::new(), stream.as_slice(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
                lines.push(now);
                got.extend(all(&mut lines));
                rest = later;
            }
            prop_assert_eq!(got, texts.iter().map(|t| t.as_bytes().to_vec()).collect::<Vec<_>>());
        }

        #[test]
        fn no_line_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
        }
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut lines = Lines::default();
        lines.push(&vec![b'x'; LINE_BYTES_MAX]);
        assert_eq!(lines.next_line(), Ok(None));
        lines.push(b"xy");
        assert_eq!(lines.next_line(), Err(WireError::LineTooLong));
    }

    #[test]
    fn an_event_newer_than_the_schema_is_still_an_event() {
        let line = br#"{"timestamp":{"seconds":1,"microseconds":2},"event":"QUANTUM_LEAP","data":{"far":true}}"#;
        let Ok(Message::Event(event)) = read(line) else { panic!("no event") };
        assert_eq!((event.name.as_str(), &event.data["far"]), ("QUANTUM_LEAP", &Value::Bool(true)));
        assert!(event.typed().is_none());
    }

    #[test]
    fn known_events_are_typed() {
        let line = br#"{"timestamp":{"seconds":1,"microseconds":2},"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-shutdown"}}"#;
        let Ok(Message::Event(event)) = read(line) else { panic!("no event") };
        assert!(matches!(event.typed(), Some(qapi::qmp::Event::SHUTDOWN { data, .. }) if data.guest));
    }

    #[test]
    fn a_command_is_one_line_with_its_number() {
        let line = write(&qapi::qmp::query_status {}, 7).unwrap();
        assert_eq!(line, b"{\"execute\":\"query-status\",\"arguments\":{},\"id\":7}\n");
    }

    #[test]
    fn fuzz_monitor() {
        let seeds = [
            r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}"#,
            r#"{"return": {"running": true, "status": "running"}, "id": 7}"#,
            r#"{"error": {"class": "GenericError", "desc": "no"}, "id": 7}"#,
            r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "BLOCK_IO_ERROR", "data": {"nospace": true}}"#,
        ];
        let seeds = seeds.map(|line| format!("{line}\r\n").into_bytes());
        nido_fuzz::fuzz("monitor", &[&seeds[..], &[seeds.concat()]].concat(), |input| {
            let (mut whole, mut pieces) = (Lines::default(), Lines::default());
            whole.push(input);
            let drain = |lines: &mut Lines| {
                std::iter::from_fn(|| lines.next_line().transpose()).take(input.len() + 1).collect::<Vec<_>>()
            };
            let of_whole = drain(&mut whole);
            let of_pieces: Vec<_> = input
                .chunks(7)
                .flat_map(|piece| {
                    pieces.push(piece);
                    drain(&mut pieces)
                })
                .collect();
            assert_eq!(of_whole, of_pieces);
            for line in of_whole.into_iter().flatten() {
                if let Ok(Message::Event(event)) = read(&line) {
                    let _ = event.typed();
                }
            }
        });
    }
}
