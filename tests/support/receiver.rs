//! An endpoint for webhooks: takes messages on loopback and replies as configured.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::Value;

/// How to treat one message.
#[derive(Debug, Clone)]
pub enum Reply {
    /// These bytes, and the connection stays open.
    Say(String),
    /// These bytes, and the connection is closed.
    Last(String),
    /// Nothing, for as long as the receiver lives.
    Hang,
}

impl Reply {
    /// A status, and header lines that each end in `\r\n`.
    pub fn status(status: u16, headers: &str) -> Self {
        Self::Say(format!("HTTP/1.1 {status} Whatever\r\n{headers}content-length: 0\r\n\r\n"))
    }
}

/// A message as it came.
#[derive(Debug, Clone)]
pub struct Message {
    /// Header lines, names in small letters.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: String,
    /// Whether it was answered with 200.
    pub taken: bool,
}

impl Message {
    /// A header; fails if it is not there.
    pub fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|(key, _)| key == name);
        &found.unwrap_or_else(|| panic!("{name} is missing: {self:?}")).1
    }

    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

#[derive(Debug, Default)]
struct Shared {
    replies: VecDeque<Reply>,
    always: Option<Reply>,
    dawdles: Duration,
    messages: Vec<Message>,
    streams: Vec<TcpStream>,
    ends: bool,
}

/// A receiver that listens until it is dropped. By default it accepts messages.
pub struct Receiver {
    port: u16,
    encrypted: bool,
    shared: Arc<Mutex<Shared>>,
    accepts: Option<JoinHandle<()>>,
}

impl Receiver {
    /// At a free port.
    pub fn start() -> Self {
        Self::at(0)
    }

    /// At this port.
    pub fn at(port: u16) -> Self {
        Self::with(port, None)
    }

    /// At a free port, encrypted with this.
    pub fn encrypted(config: Arc<ServerConfig>) -> Self {
        Self::with(0, Some(config))
    }

    fn with(port: u16, tls: Option<Arc<ServerConfig>>) -> Self {
        let encrypted = tls.is_some();
        let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Mutex::new(Shared::default()));
        let ours = shared.clone();
        let accepts = std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let mut now = ours.lock().unwrap();
                if now.ends {
                    return;
                }
                now.streams.push(stream.try_clone().unwrap());
                drop(now);
                let (shared, tls) = (ours.clone(), tls.clone());
                std::thread::spawn(move || {
                    let socket = stream.try_clone()?;
                    match tls.map(ServerConnection::new) {
                        None => serve(stream, &socket, &shared),
                        Some(session) => {
                            let session = session.map_err(std::io::Error::other)?;
                            serve(StreamOwned::new(session, stream), &socket, &shared)
                        }
                    }
                });
            }
        });
        Self { port, encrypted, shared, accepts: Some(accepts) }
    }

    /// Its URL.
    pub fn url(&self) -> String {
        if self.encrypted {
            return format!("https://localhost:{}/hook", self.port);
        }
        format!("http://127.0.0.1:{}/hook", self.port)
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The next messages that come are treated like this, one each.
    pub fn reply(&self, replies: impl IntoIterator<Item = Reply>) {
        self.shared.lock().unwrap().replies.extend(replies);
    }

    /// From now on whatever has no reply of its own is treated like this; taken, if there is none.
    pub fn always(&self, reply: Option<Reply>) {
        self.shared.lock().unwrap().always = reply;
    }

    /// From now on it answers nothing.
    pub fn hang(&self) {
        self.always(Some(Reply::Hang));
    }

    /// From now on it takes its time for each answer.
    pub fn dawdle(&self, time: Duration) {
        self.shared.lock().unwrap().dawdles = time;
    }

    /// All messages so far.
    pub fn messages(&self) -> Vec<Message> {
        self.shared.lock().unwrap().messages.clone()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        {
            let mut shared = self.shared.lock().unwrap();
            shared.ends = true;
            for stream in shared.streams.drain(..) {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        self.accepts.take().unwrap().join().unwrap();
    }
}

/// Takes messages over one connection, encrypted or not.
fn serve(stream: impl Read + Write, socket: &TcpStream, shared: &Mutex<Shared>) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut headers = Vec::new();
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if !line.starts_with("POST /") {
            return Ok(());
        }
        loop {
            line.clear();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            headers.push((name.to_lowercase(), value.to_owned()));
        }
        let length =
            headers.iter().find(|(name, _)| name == "content-length").map_or(0, |(_, value)| value.parse().unwrap());
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let (reply, pause) = {
            let mut shared = shared.lock().unwrap();
            let told = shared.replies.pop_front().or_else(|| shared.always.clone());
            let body = String::from_utf8(body).unwrap();
            shared.messages.push(Message { headers, body, taken: told.is_none() });
            (told.unwrap_or_else(|| Reply::status(200, "")), shared.dawdles)
        };
        std::thread::sleep(pause);
        match reply {
            Reply::Say(text) => reader.get_mut().write_all(text.as_bytes())?,
            Reply::Last(text) => {
                reader.get_mut().write_all(text.as_bytes())?;
                return socket.shutdown(Shutdown::Both);
            }
            // Until the connection is closed.
            Reply::Hang => return reader.read_to_end(&mut Vec::new()).map(drop),
        }
    }
}
