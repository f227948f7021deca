//! A client for HTTP/1.1, as small as tests need one: a request, its answer, and a stream that is read as it comes.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;

use serde_json::Value;

use super::{DEADLINE, Home, RunningNido};

/// A server that runs, and a token that opens it.
pub struct Server {
    live: Option<RunningNido>,
    address: String,
    token: String,
}

/// An HTTP response.
#[derive(Debug)]
pub struct HttpResponse {
    /// Its status.
    pub status: u16,
    /// Its headers, in lower case.
    pub headers: Vec<(String, String)>,
    /// Its body.
    pub body: Vec<u8>,
}

impl Server {
    /// Starts one, with a token for everything.
    pub fn start(home: &Home) -> Self {
        Self::with(home, &[])
    }

    /// The same with more flags.
    pub fn with(home: &Home, flags: &[&str]) -> Self {
        Self::serving(home, "api-server", flags)
    }

    /// Another verb that serves.
    pub fn serving(home: &Home, verb: &str, flags: &[&str]) -> Self {
        let made = home.nido(["token", "create", "--name", "tests", "--scope", "admin", "--json"]).run().ok().json();
        Self::with_token(home, (verb, flags), made["token"].as_str().unwrap().to_owned())
    }

    fn with_token(home: &Home, (verb, flags): (&str, &[&str]), token: String) -> Self {
        let mut nido = home.nido([verb, "start", "--port", "0"]);
        for flag in flags {
            nido = nido.arg(flag);
        }
        let live = nido.start();
        let address = live.line().rsplit("://").next().unwrap().to_owned();
        Self { live: Some(live), address, token }
    }

    /// Kills it; the next one takes its place, and the same token.
    pub fn killed(mut self, home: &Home) -> Self {
        let live = self.live.take().unwrap();
        live.kill();
        assert!(live.end(), "it has ended by itself");
        Self::with_token(home, ("api-server", &[]), std::mem::take(&mut self.token))
    }

    /// Another one of the same home, with the same token, while this one lives.
    pub fn beside(&self, home: &Home) -> Self {
        Self::with_token(home, ("api-server", &[]), self.token.clone())
    }

    /// Kills it, and no other takes its place.
    pub fn gone(mut self) {
        let live = self.live.take().unwrap();
        live.kill();
        assert!(live.end(), "it has ended by itself");
    }

    /// Where it listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Its process.
    pub fn live(&self) -> &RunningNido {
        self.live.as_ref().unwrap()
    }

    /// Waits for its end, which was requested.
    pub fn ended(mut self) {
        self.live.take().unwrap().wait().ok();
    }

    /// The token for everything.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// A request with the token and no body.
    pub fn get(&self, path: &str) -> HttpResponse {
        self.send("GET", path, &[], b"")
    }

    /// A request with a JSON body.
    pub fn post(&self, path: &str, body: &Value) -> HttpResponse {
        self.send("POST", path, &[("content-type", "application/json")], body.to_string().as_bytes())
    }

    /// A request with the token.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> HttpResponse {
        let bearer = format!("Bearer {}", self.token);
        let headers = [headers, &[("authorization", bearer.as_str())]].concat();
        self.plain(method, path, &headers, body)
    }

    /// A request as it is.
    pub fn plain(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> HttpResponse {
        self.open(method, path, headers, body).answer()
    }

    /// A request whose body is declared to have `length` bytes, and that is not sent further than `body`.
    pub fn begin(&self, method: &str, path: &str, headers: &[(&str, &str)], length: usize, body: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let mut head = format!("{method} {path} HTTP/1.1\r\ncontent-length: {length}\r\n");
        for (key, value) in headers {
            head.push_str(&format!("{key}: {value}\r\n"));
        }
        head.push_str("\r\n");
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).unwrap();
        stream
    }

    /// The answer to a request that was begun.
    pub fn answer_to(stream: TcpStream) -> HttpResponse {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Stream::read(BufReader::new(stream)).answer()
    }

    /// A request whose answer is read as it comes.
    pub fn open(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Stream {
        Stream::read(BufReader::new(self.unread(method, path, headers, body)))
    }

    /// A request whose answer is not read.
    pub fn unread(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut head = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
        if !headers.iter().any(|(key, _)| *key == "host") {
            head.push_str(&format!("host: {}\r\n", self.address));
        }
        for (key, value) in headers {
            head.push_str(&format!("{key}: {value}\r\n"));
        }
        head.push_str("\r\n");
        // A server that refuses the head may have closed already.
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
        stream
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(live) = self.live.take() {
            live.signal(rustix::process::Signal::TERM);
            if !std::thread::panicking() {
                live.wait().ok();
            }
        }
    }
}

/// An answer whose body comes bit by bit.
pub struct Stream {
    /// Its status.
    pub status: u16,
    headers: Vec<(String, String)>,
    reader: BufReader<TcpStream>,
}

impl Stream {
    fn read(mut reader: BufReader<TcpStream>) -> Self {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("no answer: {line:?}")).parse().unwrap();
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let Some((key, value)) = line.trim_end().split_once(": ") else { break };
            headers.push((key.to_lowercase(), value.to_owned()));
        }
        Self { status, headers, reader }
    }

    /// A header; empty if it is not there.
    pub fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value)
    }

    /// The next line of an event stream that is not empty: chunk sizes are left out.
    pub fn line(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.reader.read_line(&mut line).unwrap() > 0, "the stream has ended");
            let line = line.trim_end();
            if line.contains(':') && !line.starts_with(':') {
                return line.to_owned();
            }
        }
    }

    /// Everything.
    fn answer(mut self) -> HttpResponse {
        let mut body = Vec::new();
        let chunked = self.headers.iter().any(|(key, value)| key == "transfer-encoding" && value == "chunked");
        if !chunked {
            self.reader.read_to_end(&mut body).unwrap();
            return HttpResponse { status: self.status, headers: self.headers, body };
        }
        loop {
            let mut size = String::new();
            self.reader.read_line(&mut size).unwrap();
            let size = usize::from_str_radix(size.trim(), 16).expect("the size of a chunk: the answer broke off");
            let begin = body.len();
            body.resize(begin + size, 0);
            self.reader.read_exact(&mut body[begin..]).unwrap();
            self.reader.read_line(&mut String::new()).unwrap();
            if size == 0 {
                return HttpResponse { status: self.status, headers: self.headers, body };
            }
        }
    }
}

impl HttpResponse {
    /// A header's value.
    pub fn header(&self, key: &str) -> &str {
        self.headers.iter().find(|(name, _)| name == key).map_or("", |(_, value)| value)
    }

    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The body as JSON, after a check of the status.
    #[track_caller]
    pub fn ok(self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        self.json()
    }

    /// Expects a problem of this status and code.
    #[track_caller]
    pub fn problem(self, status: u16, code: &str) -> Value {
        let problem = self.json();
        assert_eq!((self.status, problem["code"].as_str()), (status, Some(code)), "{problem}");
        assert_eq!((self.header("content-type"), &problem["status"]), ("application/problem+json", &status.into()));
        assert!(!problem["detail"].as_str().unwrap().is_empty());
        problem
    }
}
