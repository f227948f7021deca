//! A WebSocket client, as small as tests need one (RFC 6455): short messages, no fragments.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use serde_json::Value;

use super::DEADLINE;

/// A connection.
pub struct WebSocket {
    stream: TcpStream,
    /// The code that the server closed it with.
    pub code: Option<u16>,
}

/// A message.
#[derive(Debug, PartialEq)]
pub enum Message {
    /// Text, which is JSON.
    Text(Value),
    /// Bytes.
    Binary(Vec<u8>),
    /// The end.
    Close,
}

impl WebSocket {
    /// Asks for one. A refusal comes back as its status and its body.
    pub fn open(address: &str, path: &str, headers: &[(&str, &str)]) -> Result<Self, (u16, String)> {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut head = format!(
            "GET {path} HTTP/1.1\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n\
             sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nhost: {address}\r\n"
        );
        for (key, value) in headers {
            head.push_str(&format!("{key}: {value}\r\n"));
        }
        stream.write_all(format!("{head}\r\n").as_bytes()).unwrap();
        let head = head_of(&mut stream);
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        if status == 101 {
            let lower = head.to_lowercase();
            assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=") && lower.contains("sec-websocket-protocol: nido"));
            return Ok(Self { stream, code: None });
        }
        let lower = head.to_lowercase();
        let length = lower.split("content-length: ").nth(1).unwrap().lines().next().unwrap().parse().unwrap();
        let mut body = vec![0; length];
        stream.read_exact(&mut body).unwrap();
        Err((status, String::from_utf8(body).unwrap()))
    }

    /// Sends JSON.
    pub fn send_json(&mut self, message: &Value) {
        self.send(1, message.to_string().as_bytes());
    }

    /// Sends bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.send(2, bytes);
    }

    /// Sends the close message.
    pub fn close(&mut self) {
        self.send(8, &[]);
    }

    /// Clients mask what they send; a mask of zeros is one.
    fn send(&mut self, kind: u8, payload: &[u8]) {
        let mut frame = vec![0x80 | kind];
        match u16::try_from(payload.len()).unwrap() {
            short @ 0..126 => frame.push(0x80 | u8::try_from(short).unwrap()),
            long => frame.extend([&[0x80 | 126][..], &long.to_be_bytes()].concat()),
        }
        frame.extend([0; 4]);
        frame.extend(payload);
        self.stream.write_all(&frame).unwrap();
    }

    /// The next message. Pings are not returned; they are answered.
    pub fn next(&mut self) -> Message {
        loop {
            let mut head = [0; 2];
            if self.stream.read_exact(&mut head).is_err() {
                return Message::Close;
            }
            let mut length = u64::from(head[1] & 0x7f);
            if length >= 126 {
                let mut more = [0; 8];
                let from = if length == 126 { 6 } else { 0 };
                self.stream.read_exact(&mut more[from..]).unwrap();
                length = u64::from_be_bytes(more);
            }
            let mut payload = vec![0; usize::try_from(length).unwrap()];
            self.stream.read_exact(&mut payload).unwrap();
            match head[0] & 0x0f {
                1 => return Message::Text(serde_json::from_slice(&payload).unwrap()),
                2 => return Message::Binary(payload),
                8 => {
                    self.code = payload.first_chunk().map(|code| u16::from_be_bytes(*code));
                    return Message::Close;
                }
                9 => self.send(10, &payload),
                _ => {}
            }
        }
    }

    /// Reads up to the text message that has this key; what came on its way are the bytes of standard output and error.
    pub fn until(&mut self, key: &str) -> (Value, Vec<u8>, Vec<u8>) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        loop {
            match self.next() {
                Message::Text(mut text) if text.get(key).is_some() => return (text[key].take(), out, err),
                Message::Binary(bytes) if bytes[0] == 1 => out.extend(&bytes[1..]),
                Message::Binary(bytes) if bytes[0] == 2 => err.extend(&bytes[1..]),
                other => panic!("{other:?} before {key}; {}", String::from_utf8_lossy(&out)),
            }
        }
    }

    /// Reads until standard output (or the terminal) has printed this.
    pub fn expect(&mut self, wanted: &str) {
        let mut out = Vec::new();
        while !String::from_utf8_lossy(&out).contains(wanted) {
            match self.next() {
                Message::Binary(bytes) => out.extend(&bytes[1..]),
                other => panic!("{other:?} before {wanted:?}: {}", String::from_utf8_lossy(&out)),
            }
        }
    }
}

fn head_of(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}
