//! Network cards, and the kernel's routing socket for the three requests that it gets.
//!
//! Invariant: each request is answered by the kernel before the next; "it is so already" is success.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket};

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkCard {
    /// The kernel's name for it.
    pub name: String,
    /// The kernel's number for it.
    pub index: u32,
    /// Its hardware address.
    pub mac: [u8; 6],
}

/// The Ethernet card that comes first by name and is a device, not something made by software.
///
/// # Errors
/// There is none.
pub fn first_card() -> io::Result<NetworkCard> {
    let mut names: Vec<_> =
        std::fs::read_dir("/sys/class/net")?.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    names
        .iter()
        .find_map(|name| card(name))
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is no network card"))
}

fn card(name: &str) -> Option<NetworkCard> {
    const ETHERNET: &str = "1";
    let fact = |fact: &str| {
        let text = std::fs::read_to_string(format!("/sys/class/net/{name}/{fact}")).ok()?;
        Some(text.trim().to_owned())
    };
    let is_device = std::fs::exists(format!("/sys/class/net/{name}/device")).ok()?;
    if !is_device || fact("type")? != ETHERNET {
        return None;
    }
    let mut mac = [0; 6];
    for (byte, text) in mac.iter_mut().zip(fact("address")?.split(':')) {
        *byte = u8::from_str_radix(text, 16).ok()?;
    }
    Some(NetworkCard { name: name.into(), index: fact("ifindex")?.parse().ok()?, mac })
}

/// The kernel's routing socket.
pub struct Routes(OwnedFd);

impl Routes {
    /// Opens it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn open() -> io::Result<Self> {
        let protocol = SockProtocol::NetlinkRoute;
        Ok(Self(socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?))
    }

    /// Brings an interface up, or down, which removes its routes.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_up(&self, index: u32, up: bool) -> io::Result<()> {
        const UP: u32 = libc::IFF_UP.cast_unsigned();
        let mut body = vec![0; 4];
        body.extend(index.to_ne_bytes());
        body.extend(if up { UP } else { 0 }.to_ne_bytes());
        body.extend(UP.to_ne_bytes());
        self.send_request(libc::RTM_NEWLINK, 0, &body)
    }

    /// Sets the largest packet of an interface, in bytes.
    ///
    /// # Errors
    /// The kernel, or the card, refuses.
    pub fn set_mtu(&self, index: u32, mtu: u32) -> io::Result<()> {
        let mut body = vec![0; 4];
        body.extend(index.to_ne_bytes());
        body.extend([0; 8]);
        attribute(&mut body, libc::IFLA_MTU, mtu.to_ne_bytes());
        self.send_request(libc::RTM_NEWLINK, 0, &body)
    }

    /// Gives an interface an address.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn add_address(&self, index: u32, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        let host_bits = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
        let broadcast = Ipv4Addr::from(u32::from(address) | host_bits);
        let mut body = address_head(index, prefix);
        for (kind, value) in
            [(libc::IFA_ADDRESS, address), (libc::IFA_LOCAL, address), (libc::IFA_BROADCAST, broadcast)]
        {
            attribute(&mut body, kind, value.octets());
        }
        self.send_request(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, &body)
    }

    /// Takes an address from an interface.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove_address(&self, index: u32, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        let mut body = address_head(index, prefix);
        attribute(&mut body, libc::IFA_LOCAL, address.octets());
        match self.send_request(libc::RTM_DELADDR, 0, &body) {
            // Another program in the guest has done it.
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(()),
            result => result,
        }
    }

    /// Sends everything else through a gateway.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn default_route(&self, index: u32, gateway: Ipv4Addr) -> io::Result<()> {
        let mut body = vec![libc::AF_INET as u8, 0, 0, 0];
        body.extend([libc::RT_TABLE_MAIN, libc::RTPROT_STATIC, libc::RT_SCOPE_UNIVERSE, libc::RTN_UNICAST]);
        body.extend([0; 4]);
        attribute(&mut body, libc::RTA_GATEWAY, gateway.octets());
        attribute(&mut body, libc::RTA_OIF, index.to_ne_bytes());
        self.send_request(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, &body)
    }

    fn send_request(&self, kind: u16, flags: libc::c_int, body: &[u8]) -> io::Result<()> {
        const HEAD: usize = 16;
        let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags;
        let mut message = Vec::with_capacity(HEAD + body.len());
        message.extend(((HEAD + body.len()) as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((flags as u16).to_ne_bytes());
        message.extend([0; 8]);
        message.extend(body);
        sendto(self.0.as_raw_fd(), &message, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        let mut answer = [0; 512];
        let length = recv(self.0.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        match answer.get(HEAD..HEAD + 4) {
            Some(&[a, b, c, d]) if length >= HEAD + 4 => match i32::from_ne_bytes([a, b, c, d]).saturating_neg() {
                0 | libc::EEXIST => Ok(()),
                errno => Err(io::Error::from_raw_os_error(errno)),
            },
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel's reply is truncated")),
        }
    }
}

fn address_head(index: u32, prefix: u8) -> Vec<u8> {
    let mut body = vec![libc::AF_INET as u8, prefix, 0, 0];
    body.extend(index.to_ne_bytes());
    body
}

fn attribute(body: &mut Vec<u8>, kind: u16, value: [u8; 4]) {
    body.extend(8u16.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
}
