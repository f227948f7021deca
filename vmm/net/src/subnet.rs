//! The addresses of a VM's network: the same for each VM, and the same as those of QEMU's user network, so that what a guest
//! has in its caches stays true.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The hardware address of the guest's card: QEMU's default for the first one.
pub const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];
/// The hardware address of the gateway and the name server.
pub const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 0x0a, 0x00, 0x02, 0x02];

/// The guest's IPv4 address.
pub const GUEST_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The gateway's: the host's loopback is behind it, where rules allow that.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The name server's.
pub const DNS_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// Length of the IPv4 network's prefix.
pub const PREFIX_V4: u8 = 24;

/// The IPv6 network, in which the guest selects its addresses.
pub const NETWORK_V6: Ipv6Addr = Ipv6Addr::new(0xfd6e, 0x6964, 0x6f, 0, 0, 0, 0, 0);
/// The gateway's IPv6 address in it.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd6e, 0x6964, 0x6f, 0, 0, 0, 0, 2);
/// The name server's IPv6 address in it.
pub const DNS_V6: Ipv6Addr = Ipv6Addr::new(0xfd6e, 0x6964, 0x6f, 0, 0, 0, 0, 3);
/// The gateway's address on the link.
pub const GATEWAY_LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);

/// The largest IP packet of the link. Large packets are what makes it fast: each costs a system call and a wake-up of QEMU.
pub const MTU: usize = 65_520;
/// Length of an Ethernet header.
pub const ETHERNET_HEADER: usize = 14;

/// Whether this is the gateway.
#[must_use]
pub fn is_gateway(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4 == GATEWAY_V4,
        IpAddr::V6(v6) => v6 == GATEWAY_V6 || v6 == GATEWAY_LINK_LOCAL,
    }
}

/// Whether this is the name server.
#[must_use]
pub fn is_name_server(address: IpAddr) -> bool {
    address == IpAddr::V4(DNS_V4) || address == IpAddr::V6(DNS_V6)
}

/// Whether an address is in the VM's own network, where there is only the gateway and the name server.
#[must_use]
pub fn is_inside(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.octets()[..3] == GATEWAY_V4.octets()[..3],
        IpAddr::V6(v6) => v6.segments()[..4] == NETWORK_V6.segments()[..4] || v6.is_unicast_link_local(),
    }
}

/// Whether the guest may send from this address.
#[must_use]
pub fn is_guest(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4 == GUEST_V4,
        IpAddr::V6(v6) => is_inside(address) && !is_gateway(address) && v6 != DNS_V6,
    }
}

/// The router of an address's family: where ICMP errors come from.
#[must_use]
pub fn router(family: IpAddr) -> IpAddr {
    match family {
        IpAddr::V4(_) => GATEWAY_V4.into(),
        IpAddr::V6(_) => GATEWAY_V6.into(),
    }
}
