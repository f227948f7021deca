//! The VM's network: an engine in this process, to which QEMU passes the frames of the guest's card.
//!
//! Invariants: while no supervisor runs, the guest has no network, and QEMU's end finds the next supervisor by the name of its
//! socket; a clone that no user has claimed reaches nothing.

use std::os::unix::net::UnixDatagram;
use std::path::Path;

use nido_api::error::{Error, Result};
use nido_api::{NetChoice, NetLimits};
use nido_engine::home::{NETWORK_QEMU_SOCKET, NETWORK_SOCKET, VmDir};
use nido_files::private_dir::{make_socket_private, remove_socket};
use nido_net::{Credentials, Limits, Mode, Network, Policy, Reports, Settings};
use nido_store::{Purpose, VmRow};

use super::{name_pins, traffic};

/// Starts the network of a VM that has a card. The working directory is the VM's. `continues`: bytes that have passed before count.
///
/// # Errors
/// The socket cannot be bound, or no thread can be started.
pub(super) fn start(
    row: &VmRow,
    dir: &VmDir,
    (attach, continues): (bool, bool),
    credentials: Option<Credentials>,
    reports: Reports,
) -> Result<Option<Network>> {
    if !row.spec.net.has_card() {
        return Ok(None);
    }
    let failed = |e| Error::io("cannot start the VM's network", e);
    let ours = Path::new(NETWORK_SOCKET);
    remove_socket(ours).map_err(failed)?;
    let socket = UnixDatagram::bind(ours).map_err(failed)?;
    make_socket_private(ours).map_err(failed)?;
    let pins = name_pins::of_start(row, dir, attach);
    let limits = limits(&row.spec.net_limits);
    let (count, file) = traffic::of_start(dir, &row.spec.net_limits, continues)?;
    let settings = Settings { pins, credentials, limits, traffic: (count, Some(file)), ..Settings::new(policy(row)) };
    Network::start(socket, NETWORK_QEMU_SOCKET.into(), settings, reports).map(Some).map_err(failed)
}

/// What the network may use.
fn limits(set: &NetLimits) -> Limits {
    let usual = Limits::default();
    let count = |set: Option<u64>, usual: usize| set.and_then(|set| usize::try_from(set).ok()).unwrap_or(usual);
    let rate = |set: Option<u64>, usual: u32| set.and_then(|set| u32::try_from(set).ok()).unwrap_or(usual);
    Limits {
        tcp_flows: count(set.connections, usual.tcp_flows),
        udp_flows: count(set.udp, usual.udp_flows),
        new_flows_per_second: rate(set.new_connections, usual.new_flows_per_second),
        questions_per_second: rate(set.questions, usual.questions_per_second),
        sent_bytes: set.sent_bytes,
        received_bytes: set.received_bytes,
    }
}

/// What the guest of a VM may reach.
pub(super) fn policy(row: &VmRow) -> Policy {
    match (row.purpose, row.spec.net) {
        // No VM for a user is that: a guest that is saved as the warm image of a template whose rules bound those of its VMs.
        (_, NetChoice::Nat) if row.parts.allow.is_some() => Policy { mode: Mode::Restricted, rules: Vec::new() },
        (Purpose::Pool, _) => Policy { mode: Mode::Restricted, rules: Vec::new() },
        (_, NetChoice::Nat) => Policy { mode: Mode::Nat, rules: row.spec.rules() },
        (_, NetChoice::Restricted | NetChoice::None) => Policy { mode: Mode::Restricted, rules: row.spec.rules() },
    }
}
