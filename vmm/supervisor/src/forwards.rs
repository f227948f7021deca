//! Published ports while the VM runs: one listener and one task each.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use nido_api::ForwardSpec;
use nido_api::error::{Code, Error, Result};
use nido_engine::guest::{Connections, Guest};
use nido_guest_agent::wire::Connect;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::control_server::ActiveSessions;

/// The forwards that stand. Dropping it ends all of them.
#[derive(Debug, Default)]
pub(super) struct Forwards {
    tasks: BTreeMap<ForwardSpec, JoinHandle<()>>,
    /// What all of them share.
    places: Connections,
}

/// Takes the port of the host; the reply has its number.
pub(super) async fn bind(spec: &ForwardSpec) -> Result<(ForwardSpec, TcpListener)> {
    let address = SocketAddr::new(spec.host, spec.host_port);
    let refused = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::AddrInUse => {
            Error::new(Code::PortInUse, format!("port {} of {} is in use", spec.host_port, spec.host))
                .hint("choose another port, or omit it to get a free one")
        }
        std::io::ErrorKind::PermissionDenied => {
            Error::new(Code::Denied, format!("this user may not listen on port {}", spec.host_port))
                .hint("use a port above 1023")
        }
        // The second is what a multicast address, or one that takes a scope, is answered.
        std::io::ErrorKind::AddrNotAvailable | std::io::ErrorKind::InvalidInput => {
            Error::new(Code::SpecInvalid, format!("this host has no address {}", spec.host))
                .hint("127.0.0.1 or 0.0.0.0 are always there")
        }
        _ => Error::io(format!("cannot listen on {address}"), e),
    };
    let listener = TcpListener::bind(address).await.map_err(refused)?;
    let port = listener.local_addr().map_err(refused)?.port();
    Ok((ForwardSpec { host_port: port, ..spec.clone() }, listener))
}

impl Forwards {
    /// Starts carrying connections.
    pub(super) fn start(&mut self, spec: ForwardSpec, listener: TcpListener, guest: Guest, users: ActiveSessions) {
        let to = Connect { host: None, port: spec.guest_port };
        let places = self.places.clone();
        let task = tokio::spawn(async move { guest.forward(listener, to, &places, || users.enter()).await });
        if let Some(old) = self.tasks.insert(spec, task) {
            old.abort();
        }
    }

    /// Stops one. Its port is free when this returns.
    pub(super) async fn stop(&mut self, spec: &ForwardSpec) {
        if let Some(task) = self.tasks.remove(spec) {
            end(task).await;
        }
    }

    /// Stops all of them. Their ports are free when this returns.
    pub(super) async fn close(&mut self) {
        for task in std::mem::take(&mut self.tasks).into_values() {
            end(task).await;
        }
    }
}

async fn end(task: JoinHandle<()>) {
    task.abort();
    // That it was cancelled is what is wanted.
    let _ = task.await;
}

impl Drop for Forwards {
    fn drop(&mut self) {
        self.tasks.values().for_each(JoinHandle::abort);
    }
}
