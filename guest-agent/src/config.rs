//! The configuration of the guest before the first session: one CBOR array, passed as the QEMU firmware
//! configuration file `opt/nido/config` (readable by the guest's root only), so it is there before any channel is.
//!
//! It comes from the host and is small by construction; still it is decoded with the same care as the wire.

use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};

/// Name of the firmware configuration file.
pub const FW_CFG_NAME: &str = "opt/nido/config";
/// Where Linux shows that file once the module `qemu_fw_cfg` is loaded.
pub const FW_CFG_PATH: &str = "/sys/firmware/qemu_fw_cfg/by_name/opt/nido/config/raw";
/// Largest configuration the agent accepts, in bytes.
pub const MAX_CONFIG: usize = 16 * 1024;

/// The configuration of one VM.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct GuestConfig {
    /// The guest's host name: the VM's name.
    #[n(0)]
    pub hostname: String,
    /// The VM's token, checked in every session's hello.
    #[n(1)]
    pub token: ByteVec,
    /// The program that is process 1 after the root disk is mounted.
    #[n(2)]
    pub init: Init,
    /// How host and agent talk.
    #[n(3)]
    pub channel: Channel,
    /// The first network card's settings; absent if the VM has none.
    #[n(4)]
    pub network: Option<Network>,
    /// The VM's id. A root disk that carries another one (it belongs to a template) gets a new machine id and host keys.
    #[n(5)]
    pub identity: String,
    /// VMs will be run inside this one.
    #[n(6)]
    pub nested: bool,
}

/// The program that is process 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Init {
    /// The agent itself.
    #[n(0)]
    Agent,
    /// `/sbin/init`; the agent runs as a service of it, from `/run/nido/nido-guest-agent`.
    #[n(1)]
    System,
}

/// How host and agent talk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Channel {
    /// Kernel vsock.
    #[n(0)]
    Vsock,
    /// A virtio-serial port with multiplexed streams.
    #[n(1)]
    Serial,
}

/// The first network card's settings.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Network {
    /// Ask the network.
    #[n(0)]
    Dhcp,
    /// As configured by the host.
    #[n(1)]
    Static(#[n(0)] StaticNetwork),
}

/// Addresses from the host. Numeric text.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct StaticNetwork {
    /// IPv4 address of the guest.
    #[n(0)]
    pub address: String,
    /// Length of the network prefix.
    #[n(1)]
    pub prefix: u8,
    /// IPv4 address of the gateway.
    #[n(2)]
    pub gateway: Option<String>,
    /// Name servers.
    #[n(3)]
    pub dns: Vec<String>,
    /// Largest packet of the link, in bytes; as it is if absent.
    #[n(4)]
    pub mtu: Option<u32>,
}
