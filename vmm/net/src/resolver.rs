//! What the host's own network has: name servers, and a route for IPv6.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

/// The file that names the host's name servers.
const RESOLV_CONF: &str = "/etc/resolv.conf";
const DNS_PORT: u16 = 53;
/// How many name servers the C library uses.
const SERVERS_MAX: usize = 3;

/// The host's name servers in its order; that of its loopback if none is configured, as the C library has it.
#[must_use]
pub fn servers_of_host() -> Vec<SocketAddr> {
    let mut found = servers(&std::fs::read_to_string(RESOLV_CONF).unwrap_or_default());
    if found.is_empty() {
        found.push(Ipv4Addr::LOCALHOST.into());
    }
    found.into_iter().map(|server| SocketAddr::new(server, DNS_PORT)).collect()
}

fn servers(text: &str) -> Vec<IpAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        if words.next()? == "nameserver" { words.next()?.parse().ok() } else { None }
    };
    text.lines().filter_map(server).take(SERVERS_MAX).collect()
}

/// The addresses of a name in the host's own file of names.
#[must_use]
pub fn in_hosts_file(text: &str, name: &str) -> Vec<IpAddr> {
    let addresses = text.lines().filter_map(|line| {
        let mut words = line.split('#').next()?.split_whitespace();
        let address = words.next()?.parse().ok()?;
        words.any(|word| word.eq_ignore_ascii_case(name)).then_some(address)
    });
    addresses.collect()
}

/// Whether the host has a route for IPv6. Nothing is sent.
#[must_use]
pub fn host_routes_ipv6() -> bool {
    const ANY_HOST: Ipv6Addr = Ipv6Addr::new(0x2001, 0x4860, 0x4860, 0, 0, 0, 0, 0x8888);
    UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).is_ok_and(|socket| socket.connect((ANY_HOST, DNS_PORT)).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hosts_file_are_whole_words() {
        let text = "127.0.0.1 localhost\n1.2.3.4  Web.example.com www # old.example.com\n::9 web.example.com\nx y\n";
        assert_eq!(in_hosts_file(text, "web.example.com"), [IpAddr::from([1, 2, 3, 4]), "::9".parse().unwrap()]);
        assert!(in_hosts_file(text, "example.com").is_empty());
        assert!(in_hosts_file(text, "old.example.com").is_empty());
    }

    #[test]
    fn servers_are_used_in_their_order() {
        let text = "# nameserver 9.9.9.9\nsearch example.com\nnameserver  10.0.0.53\nnameserver 1.1.1.1\n";
        assert_eq!(servers(text), [IpAddr::from([10, 0, 0, 53]), [1, 1, 1, 1].into()]);
        assert!(servers("options edns0\nnameserver\nnameserver x\n").is_empty());
        assert_eq!(servers(&"nameserver ::1\n".repeat(9)).len(), SERVERS_MAX);
    }
}
