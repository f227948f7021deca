//! What the guest agent is given at boot: name, token, channel, network; and the token's other use, the host's connection.

use nido_api::NetChoice;
use nido_api::error::{Error, Result};
use nido_engine::guest::{AgentAddress, Guest};
use nido_engine::home::{AGENT_SOCKET, GUEST_CONFIG, VmDir};
use nido_engine::machine::{Machine, Transport};
use nido_files::atomic_file::{self, Durability};
use nido_files::random;
use nido_guest_agent::config::{Channel, GuestConfig, Init, Network, StaticNetwork};
use nido_net::subnet;
use nido_store::{Origin, Purpose, VmRow};

use super::Context;

impl Context {
    /// The agent of a VM's guest, as a client reaches it.
    ///
    /// # Errors
    /// The VM's token cannot be read.
    pub fn guest(&self, row: &VmRow) -> Result<Guest> {
        let dir = self.vm_dir(&row.id);
        let endpoint = match row.machine.as_ref().map(|m| m.transport) {
            Some(Transport::Vsock { cid }) => AgentAddress::Vsock { cid, port: nido_guest_agent::wire::VSOCK_PORT },
            Some(Transport::VirtioSerial { .. }) | None => {
                AgentAddress::Serial { dir: dir.path().to_owned(), socket: AGENT_SOCKET.into() }
            }
        };
        Ok(Guest::new(endpoint, read_token(&dir)?))
    }
}

/// Writes the configuration that the guest reads at boot, with a new token.
///
/// # Errors
/// `disk_full`, `internal`.
pub fn write_guest_config(dir: &VmDir, row: &VmRow, machine: &Machine) -> Result<()> {
    // Who is loaded only to be saved again keeps what it knows.
    let token = match (&row.origin, row.purpose) {
        (Origin::Restore { token, .. }, Purpose::Bake) => nido_api::hex::decode(token),
        _ => random::bytes::<{ nido_guest_agent::wire::TOKEN_LEN }>()?.to_vec(),
    };
    let config = GuestConfig {
        hostname: hostname(row),
        token: token.into(),
        init: match row.parts.init {
            nido_images::Init::Agent => Init::Agent,
            nido_images::Init::Systemd => Init::System,
        },
        channel: match machine.transport {
            Transport::Vsock { .. } => Channel::Vsock,
            Transport::VirtioSerial { .. } => Channel::Serial,
        },
        network: guest_network(row.spec.net),
        identity: row.id.clone(),
        nested: row.spec.nested,
    };
    let bytes = minicbor::to_vec(&config)
        .map_err(|e| Error::internal(format!("cannot write the guest's configuration: {e}")))?;
    atomic_file::write_private(&dir.file(GUEST_CONFIG), &bytes, Durability::Kill)
        .map_err(|e| Error::io("cannot write the guest's configuration", e))
}

/// The guest's own name. One that is there to be baked has the shortest, so that its forks only ever write more over it.
fn hostname(row: &VmRow) -> String {
    if row.purpose == Purpose::Bake { "n".into() } else { row.spec.name.to_string() }
}

/// The guest's network settings.
#[must_use]
pub fn guest_network(net: NetChoice) -> Option<Network> {
    net.has_card().then(|| {
        Network::Static(StaticNetwork {
            address: subnet::GUEST_V4.to_string(),
            prefix: subnet::PREFIX_V4,
            gateway: Some(subnet::GATEWAY_V4.to_string()),
            dns: vec![subnet::DNS_V4.to_string()],
            mtu: Some(subnet::MTU as u32),
        })
    })
}

/// Reads the VM's token.
///
/// # Errors
/// The file is missing or cannot be read.
pub fn read_token(dir: &VmDir) -> Result<Vec<u8>> {
    let bytes = std::fs::read(dir.file(GUEST_CONFIG)).map_err(|e| Error::io("cannot read the VM's token", e))?;
    let config: GuestConfig = minicbor::decode(&bytes)
        .map_err(|e| Error::internal(format!("the guest's configuration cannot be read: {e}")))?;
    Ok(config.token.into())
}
