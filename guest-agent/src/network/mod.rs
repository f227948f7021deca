//! The guest's first network card: loopback up, card up, address, route, name servers; as the host says or by DHCP.
//!
//! Invariant: a network that does not come up never holds up the channel to the host. It is set up beside it, and
//! what went wrong is said on the console.

mod dhcp;
mod link;

use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use nido_guest_agent::config::{Network, StaticNetwork};

/// What a card is set up with.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Settings {
    address: Ipv4Addr,
    prefix: u8,
    gateway: Option<Ipv4Addr>,
    dns: Vec<Ipv4Addr>,
}

impl Settings {
    fn parse(given: &StaticNetwork) -> io::Result<Self> {
        let number =
            |text: &str| text.parse::<Ipv4Addr>().map_err(|_| invalid(format!("{text:?} is not an IPv4 address")));
        if given.prefix > 32 {
            return Err(invalid(format!("{} is not the length of a prefix", given.prefix)));
        }
        Ok(Self {
            address: number(&given.address)?,
            prefix: given.prefix,
            gateway: given.gateway.as_deref().map(number).transpose()?,
            dns: given.dns.iter().map(|server| number(server)).collect::<Result<_, _>>()?,
        })
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

/// Sets up loopback and the first card. With DHCP it does not return while the lease is kept, so it wants a thread of
/// its own.
///
/// # Errors
/// There is no card, the kernel refuses, or nobody answers.
pub fn set_up(network: Option<&Network>) -> io::Result<()> {
    let routes = link::Routes::open()?;
    routes.up(1)?;
    let Some(network) = network else { return Ok(()) };
    let card = link::first_card()?;
    routes.up(card.index)?;
    match network {
        Network::Static(given) => apply(&routes, &card, &Settings::parse(given)?),
        Network::Dhcp => dhcp::keep_lease(&card, |settings| apply(&routes, &card, settings)),
    }
}

fn apply(routes: &link::Routes, card: &link::Card, settings: &Settings) -> io::Result<()> {
    routes.add_address(card.index, settings.address, settings.prefix)?;
    *ADDRESS.lock().unwrap_or_else(PoisonError::into_inner) = Some(settings.address);
    if let Some(gateway) = settings.gateway {
        routes.default_route(card.index, gateway)?;
    }
    if settings.dns.is_empty() {
        return Ok(());
    }
    let servers: String = settings.dns.iter().map(|server| format!("nameserver {server}\n")).collect();
    replace_file(Path::new("/etc/resolv.conf"), servers.as_bytes())
}

/// Writes a small file of the guest's configuration by renaming, unless it holds just that already.
///
/// # Errors
/// The file system refuses.
pub fn replace_file(path: &Path, contents: &[u8]) -> io::Result<()> {
    if std::fs::read(path).is_ok_and(|present| present == contents) {
        return Ok(());
    }
    let temporary = path.with_extension("nido-new");
    std::fs::write(&temporary, contents)?;
    std::fs::rename(&temporary, path)
}

/// The address that the agent has given to the first network card. Kept, because asking the kernel for it would be
/// most of the work of a ping.
pub fn address() -> Option<Ipv4Addr> {
    *ADDRESS.lock().unwrap_or_else(PoisonError::into_inner)
}

static ADDRESS: Mutex<Option<Ipv4Addr>> = Mutex::new(None);

#[cfg(test)]
mod tests {
    use super::*;

    fn given(address: &str, prefix: u8) -> StaticNetwork {
        StaticNetwork {
            address: address.into(),
            prefix,
            gateway: Some("10.0.2.2".into()),
            dns: vec!["10.0.2.3".into()],
        }
    }

    #[test]
    fn settings_are_numbers() {
        let settings = Settings::parse(&given("10.0.2.15", 24)).unwrap();
        assert_eq!((settings.address, settings.prefix), (Ipv4Addr::new(10, 0, 2, 15), 24));
        assert!(Settings::parse(&given("ten", 24)).is_err());
        assert!(Settings::parse(&given("10.0.2.15", 33)).is_err());
    }

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let directory = std::env::temp_dir().join(format!("nido-agent-test-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let file = directory.join("resolv.conf");
        std::os::unix::fs::symlink("/nowhere/at/all", &file).unwrap();
        replace_file(&file, b"nameserver 10.0.2.3\n").unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"nameserver 10.0.2.3\n");
        assert!(!file.is_symlink());
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
