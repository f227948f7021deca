//! A server for one client, which has started it: messages come on standard input and go to standard output, a line each.
//!
//! Invariant: nothing but messages is ever written to standard output.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use nido_vmm::error::{Code, Error, Result};
use rmcp::ServiceExt;
use rmcp::service::ServerInitializeError;
use tokio::io::{AsyncRead, ReadBuf};
use tokio_util::sync::CancellationToken;

use crate::answer::plain;
use crate::app::{App, Principal};
use crate::server::Server;

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
    let server = Server::of(app, Principal::own_user());
    let (input, output) = rmcp::transport::stdio();
    // Calls are still answered then; listeners would be waited for in vain.
    let input = UntilEnd { input, ended: app.quiet().clone() };
    match server.serve((input, output)).await {
        Ok(running) => {
            let ended = running.waiting().await;
            ended.map(drop).map_err(|e| Error::internal(format!("the session broke down: {e}")))
        }
        // It went away before it said anything that needs an answer.
        Err(ServerInitializeError::ConnectionClosed(_)) => Ok(()),
        Err(error) => {
            let words = format!("the client does not speak MCP: {}", plain(&error.to_string()));
            Err(Error::new(Code::RequestInvalid, words))
        }
    }
}

/// Standard input that says when it has ended.
struct UntilEnd<R> {
    input: R,
    ended: CancellationToken,
}

impl<R: AsyncRead + Unpin> AsyncRead for UntilEnd<R> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let read = ready!(Pin::new(&mut self.input).poll_read(cx, into));
        if read.is_err() || into.filled().len() == before {
            self.ended.cancel();
        }
        Poll::Ready(read)
    }
}
