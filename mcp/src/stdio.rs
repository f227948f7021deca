//! A server for one client, which has started it: messages come on standard input and go to standard output, a line each.
//!
//! Invariant: nothing but messages is ever written to standard output.

use std::sync::Arc;

use nido_vmm::error::{Error, Result};
use rmcp::ServiceExt;
use rmcp::service::ServerInitializeError;

use crate::app::{App, Principal};
use crate::server::Server;

/// Serves until standard input ends, or `end` comes.
///
/// # Errors
/// `internal` if the client does not speak the protocol.
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
    match server.serve(rmcp::transport::stdio()).await {
        Ok(running) => {
            let ended = running.waiting().await;
            ended.map(drop).map_err(|e| Error::internal(format!("the session broke down: {e}")))
        }
        // It went away before it said anything that needs an answer.
        Err(ServerInitializeError::ConnectionClosed(_)) => Ok(()),
        Err(error) => Err(Error::internal(format!("the client does not speak MCP: {error}"))),
    }
}
