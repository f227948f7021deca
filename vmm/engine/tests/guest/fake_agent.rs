//! A peer at the other end of `agent.sock` that sends what a test specifies.

use nido_engine::guest::{AgentAddress, Guest, Progress};
use nido_guest_agent::wire::{self, Entry, EntryKind, Head, ToGuest, ToHost, kind};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use crate::rig::TOKEN;

/// An agent at the other end of `agent.sock` that sends what a test specifies.
pub struct FakeAgent {
    pub dir: TempDir,
    pub listener: UnixListener,
    pub guest: Guest,
}

/// The liar's end of one session.
pub struct FakeSession(pub UnixStream);

impl FakeAgent {
    pub fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let listener = UnixListener::bind(dir.path().join("agent.sock")).unwrap();
        let endpoint = AgentAddress::Serial { dir: dir.path().into(), socket: "agent.sock".into() };
        Self { dir, listener, guest: Guest::new(endpoint, TOKEN.to_vec()) }
    }

    pub async fn accept(&self) -> FakeSession {
        FakeSession(self.listener.accept().await.unwrap().0)
    }

    /// A session that has been greeted as it should be, its first request read.
    pub async fn accept_welcome(&self) -> FakeSession {
        let mut end = self.accept().await;
        let hello = end.hello().await;
        end.send_message(&welcome(hello.nonce)).await;
        end.read().await;
        end
    }
}

impl FakeSession {
    pub async fn read(&mut self) -> ToGuest {
        let mut head = [0; wire::HEAD];
        self.0.read_exact(&mut head).await.unwrap();
        let mut payload = vec![0; Head::parse(head).unwrap().length];
        self.0.read_exact(&mut payload).await.unwrap();
        wire::decode(&payload).unwrap()
    }

    pub async fn hello(&mut self) -> wire::Hello {
        match self.read().await {
            ToGuest::Hello(hello) => hello,
            other => panic!("not a hello: {other:?}"),
        }
    }

    pub async fn send_message(&mut self, message: &ToHost) {
        self.raw(&wire::encode(message).unwrap()).await;
    }

    /// The other side may have had enough.
    pub async fn raw(&mut self, bytes: &[u8]) {
        let _ = self.0.write_all(bytes).await;
    }

    pub async fn data(&mut self, bytes: &[u8]) {
        self.raw(&Head { kind: kind::FILE_DATA, length: bytes.len() }.bytes()).await;
        self.raw(bytes).await;
    }

    pub async fn entry(&mut self, path: &[&str], kind: EntryKind, mode: u16) {
        let path = path.iter().map(|c| c.as_bytes().to_vec().into()).collect();
        self.send_message(&ToHost::Entry(Entry { path, kind, mode, mtime_ns: 0, owner: None, stored: None })).await;
    }

    pub async fn whole(&mut self, path: &[&str], kind: EntryKind) {
        self.entry(path, kind, 0o755).await;
        self.send_message(&ToHost::EntryEnd).await;
    }
}

pub fn welcome(nonce: u64) -> ToHost {
    ToHost::Welcome(wire::Welcome { version: wire::VERSION, nonce, agent: "liar".into(), features: None })
}

pub fn nowhere(_: Progress) {}
