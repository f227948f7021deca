//! A server for one client, which has started it: messages come on standard input and go to standard output, a line each.
//!
//! Invariants: nothing but messages is ever written to standard output; every request that has an id is answered; a client that
//! does not read its answers is not read from either, and what one that has closed its end still sends is not carried out.

use std::collections::HashSet;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::future::BoxFuture;
use nido_api::error::{Code, Error, Result};
use rmcp::model::{JsonRpcMessage, RequestId};
use rmcp::service::{RxJsonRpcMessage, ServerInitializeError, TxJsonRpcMessage};
use rmcp::transport::Transport;
use rmcp::transport::async_rw::AsyncRwTransport;
use rmcp::{RoleServer, ServiceExt};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, BufReader, Empty};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::answer::plain;
use crate::app::App;
use crate::messages::{self, IdScanner, ParsedMessage, Refusal};
use crate::principal::Principal;
use crate::server::Server;

/// The longest message, in bytes.
const MESSAGE_MAX: usize = 16 << 20;
/// How many messages may wait for a client to read them before nothing more is read from it.
const UNREAD_MAX: usize = 64;
/// How many requests may be without an answer.
const UNANSWERED_MAX: usize = 1024;

/// Serves until standard input ends, or `end` comes.
///
/// # Errors
/// `request_invalid` if the client does not speak the protocol.
pub async fn serve(app: &Arc<App>, end: impl Future<Output = ()>) -> Result<()> {
    let served = tokio::select! {
        served = session(app) => served,
        () = end => Ok(()),
    };
    app.finish().await;
    served
}

async fn session(app: &Arc<App>) -> Result<()> {
    let server = Server::of(app, Principal::own_user(app.settings().scope));
    let (input, output) = rmcp::transport::stdio();
    // Calls are still answered then; listeners would never end.
    match server.serve(LineTransport::new(input, output, client_disconnected, app.quiet().clone())).await {
        Ok(running) => {
            let ended = running.waiting().await;
            ended.map(drop).map_err(|e| Error::internal(format!("the session broke down: {e}")))
        }
        // It disconnected before it sent a request.
        Err(ServerInitializeError::ConnectionClosed(_)) => Ok(()),
        Err(error) => {
            let words = format!("the client does not speak MCP: {}", plain(&error.to_string()));
            Err(Error::new(Code::RequestInvalid, words))
        }
    }
}

/// Requests that have not been answered.
type OpenRequests = Arc<Mutex<HashSet<RequestId>>>;

fn open(requests: &OpenRequests) -> MutexGuard<'_, HashSet<RequestId>> {
    requests.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the reader of standard output has closed its end.
fn client_disconnected() -> bool {
    let output = rustix::stdio::stdout();
    let mut looked = [PollFd::new(&output, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut looked, Some(&now)).is_ok() && looked[0].revents().intersects(PollFlags::ERR | PollFlags::HUP)
}

/// The messages that are on their way out.
#[derive(Debug, Default)]
struct OutgoingMessages {
    number: AtomicUsize,
    fewer: Notify,
    /// One could not be written.
    broken: CancellationToken,
}

impl OutgoingMessages {
    /// Waits while the client has too much to read. False if it reads nothing any more.
    async fn has_room(&self) -> bool {
        while self.number.load(Ordering::Relaxed) >= UNREAD_MAX {
            tokio::select! {
                () = self.fewer.notified() => {}
                () = self.broken.cancelled() => return false,
            }
        }
        !self.broken.is_cancelled()
    }
}

/// One of them, until it is written or given up.
struct OutgoingMessage(Arc<OutgoingMessages>);

impl OutgoingMessage {
    fn new(unread: &Arc<OutgoingMessages>) -> Self {
        unread.number.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(unread))
    }
}

impl Drop for OutgoingMessage {
    fn drop(&mut self) {
        self.0.number.fetch_sub(1, Ordering::Relaxed);
        self.0.fewer.notify_one();
    }
}

/// Lines as messages. Invalid messages are answered here.
struct LineTransport<R, W: AsyncWrite> {
    input: BufReader<R>,
    line: Vec<u8>,
    /// The line is too long to be kept: its id is looked for while the rest goes by.
    too_long: Option<IdScanner>,
    output: AsyncRwTransport<RoleServer, Empty, W>,
    open: OpenRequests,
    unread: Arc<OutgoingMessages>,
    /// Whether the client has closed its end of the output.
    client_disconnected: fn() -> bool,
    /// An answer that is on its way out. It is part of the state, because the library drops `receive` where it is.
    answering: Option<BoxFuture<'static, io::Result<()>>>,
    /// Done when the input has ended.
    ended: CancellationToken,
}

impl<R: AsyncRead + Send + Unpin, W: AsyncWrite + Send + Unpin + 'static> LineTransport<R, W> {
    fn new(input: R, output: W, client_disconnected: fn() -> bool, ended: CancellationToken) -> Self {
        let output = AsyncRwTransport::new_server(tokio::io::empty(), output);
        Self {
            input: BufReader::new(input),
            line: Vec::new(),
            too_long: None,
            output,
            open: OpenRequests::default(),
            unread: Arc::default(),
            client_disconnected,
            answering: None,
            ended,
        }
    }

    /// Why a request is not carried out.
    fn refusal(&self, request: &RequestId) -> Option<Refusal> {
        let mut open = open(&self.open);
        let words = if open.contains(request) {
            "a request with this id has not been answered yet".to_owned()
        } else if open.len() >= UNANSWERED_MAX {
            format!("{UNANSWERED_MAX} requests have not been answered yet; wait for some of them")
        } else {
            open.insert(request.clone());
            return None;
        };
        Some(Refusal::invalid(Some(request.clone()), words))
    }

    /// The next line, or nothing at the end. Dropped and called again, it continues where it was.
    async fn next(&mut self) -> Option<ParsedMessage> {
        loop {
            let available = self.input.fill_buf().await.ok().filter(|bytes| !bytes.is_empty())?;
            let end = available.iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(available.len(), |at| at + 1);
            match &mut self.too_long {
                Some(seeker) => seeker.feed(&available[..taken]),
                None => self.line.extend_from_slice(&available[..taken]),
            }
            self.input.consume(taken);
            if self.line.len() > MESSAGE_MAX {
                let mut seeker = IdScanner::default();
                seeker.feed(&self.line);
                self.line = Vec::new();
                self.too_long = Some(seeker);
            }
            if end.is_none() {
                continue;
            }
            if let Some(seeker) = self.too_long.take() {
                let words = format!("the message is longer than {MESSAGE_MAX} bytes");
                return Some(ParsedMessage::Refused(Refusal::invalid(seeker.id(), words)));
            }
            let read = messages::read(&self.line);
            self.line.clear();
            return Some(read);
        }
    }

    fn refuse(&mut self, Refusal { id, error }: Refusal) {
        self.answering = Some(Box::pin(self.output.send(TxJsonRpcMessage::<RoleServer>::error(error, id))));
    }
}

impl<R: AsyncRead + Send + Unpin, W: AsyncWrite + Send + Unpin + 'static> Transport<RoleServer>
    for LineTransport<R, W>
{
    type Error = io::Error;

    fn send(&mut self, item: TxJsonRpcMessage<RoleServer>) -> impl Future<Output = io::Result<()>> + Send + 'static {
        match &item {
            JsonRpcMessage::Response(response) => drop(open(&self.open).remove(&response.id)),
            JsonRpcMessage::Error(error) => drop(error.id.as_ref().map(|id| open(&self.open).remove(id))),
            _ => {}
        }
        let one = OutgoingMessage::new(&self.unread);
        let sent = self.output.send(item);
        async move {
            let sent = sent.await;
            if sent.is_err() {
                one.0.broken.cancel();
            }
            sent
        }
    }

    async fn receive(&mut self) -> Option<RxJsonRpcMessage<RoleServer>> {
        loop {
            if let Some(answering) = &mut self.answering {
                let sent = Pin::new(answering).await;
                self.answering = None;
                if sent.is_err() {
                    self.ended.cancel();
                    return None;
                }
            }
            let unread = Arc::clone(&self.unread);
            let read = if unread.has_room().await {
                tokio::select! {
                    read = self.next() => read.filter(|_| !(self.client_disconnected)()),
                    () = unread.broken.cancelled() => None,
                }
            } else {
                None
            };
            let Some(read) = read else {
                self.ended.cancel();
                return None;
            };
            match read {
                ParsedMessage::Nothing => {}
                ParsedMessage::Refused(refusal) => self.refuse(refusal),
                ParsedMessage::Message(message) => {
                    if let JsonRpcMessage::Request(request) = &*message
                        && let Some(refusal) = self.refusal(&request.id)
                    {
                        self.refuse(refusal);
                        continue;
                    }
                    // One that was cancelled is not answered: its id is free again.
                    if let JsonRpcMessage::Notification(notification) = &*message
                        && let rmcp::model::ClientNotification::CancelledNotification(cancelled) =
                            &notification.notification
                        && let Some(id) = &cancelled.params.request_id
                    {
                        open(&self.open).remove(id);
                    }
                    return Some(*message);
                }
            }
        }
    }

    async fn close(&mut self) -> io::Result<()> {
        self.output.close().await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rmcp::model::{ErrorCode, ErrorData};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    use super::*;

    const TEST_TIMEOUT: Duration = Duration::from_secs(10);

    fn request(id: usize) -> Vec<u8> {
        format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},\"method\":\"ping\"}}\n").into_bytes()
    }

    fn lines(unread: bool) -> (LineTransport<DuplexStream, DuplexStream>, DuplexStream, DuplexStream) {
        let (said, input) = duplex(1 << 20);
        let (output, heard) = duplex(16);
        let gone = if unread { || true } else { || false };
        (LineTransport::new(input, output, gone, CancellationToken::new()), said, heard)
    }

    fn answer(id: i64) -> TxJsonRpcMessage<RoleServer> {
        let error = ErrorData::new(ErrorCode::INVALID_REQUEST, "no", None);
        TxJsonRpcMessage::<RoleServer>::error(error, Some(RequestId::Number(id)))
    }

    // 2,650 unread responses took 1.1 GB.
    #[tokio::test]
    async fn a_client_that_does_not_read_is_not_read_from() {
        let (mut lines, mut said, mut heard) = lines(false);
        said.write_all(&request(1)).await.unwrap();
        for id in 0..i64::try_from(UNREAD_MAX).unwrap() {
            tokio::spawn(lines.send(answer(id)));
        }
        let waited = tokio::time::timeout(Duration::from_millis(100), lines.receive()).await;
        assert!(waited.is_err(), "a request was read while {UNREAD_MAX} answers wait");
        let reader = tokio::spawn(async move {
            let mut all = Vec::new();
            while all.iter().filter(|byte| **byte == b'\n').count() < UNREAD_MAX {
                let mut part = [0; 4096];
                let read = heard.read(&mut part).await.unwrap();
                all.extend_from_slice(&part[..read]);
            }
        });
        assert!(tokio::time::timeout(TEST_TIMEOUT, lines.receive()).await.unwrap().is_some());
        tokio::time::timeout(TEST_TIMEOUT, reader).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_client_that_has_closed_its_end_is_not_obeyed() {
        let (mut gone, mut said, _heard) = lines(true);
        said.write_all(&request(1)).await.unwrap();
        assert!(gone.receive().await.is_none() && gone.ended.is_cancelled());

        let (mut broken, mut said, heard) = lines(false);
        drop(heard);
        assert!(broken.send(answer(1)).await.is_err());
        said.write_all(&request(1)).await.unwrap();
        assert!(broken.receive().await.is_none() && broken.ended.is_cancelled());
    }

    #[tokio::test]
    async fn requests_without_an_answer_are_bounded() {
        let (mut lines, mut said, heard) = lines(false);
        for id in 0..UNANSWERED_MAX {
            said.write_all(&request(id)).await.unwrap();
            assert!(lines.receive().await.is_some(), "{id}");
        }
        let mut heard = BufReader::new(heard);
        let mut next = async |lines: &mut LineTransport<_, _>, id: usize| {
            said.write_all(&request(id)).await.unwrap();
            let mut refused = String::new();
            tokio::select! {
                read = lines.receive() => assert!(read.is_none(), "{read:?}"),
                read = heard.read_line(&mut refused) => drop(read.unwrap()),
            }
            refused
        };
        let refused = next(&mut lines, UNANSWERED_MAX).await;
        assert!(refused.contains("1024 requests have not been answered yet"), "{refused}");
        let twice = next(&mut lines, 5).await;
        assert!(twice.contains("a request with this id has not been answered yet"), "{twice}");
    }
}
