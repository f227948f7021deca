//! The guest's first network card: loopback up, card up, address, route, name servers; as configured by the host or by DHCP.
//!
//! Invariant: requests to the network never delay the channel to the host, and of two set-ups the
//! later one stays.

mod dhcp;
mod link;

use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nido_guest_agent::config::{Network, StaticNetwork};

use crate::etc_files::{PUBLIC, replace_file};
use crate::warnings::warn;

/// Where programs look for name servers.
const RESOLVER: &str = "/etc/resolv.conf";

/// What a card is set up with.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Settings {
    address: Ipv4Addr,
    prefix: u8,
    gateway: Option<Ipv4Addr>,
    dns: Vec<Ipv4Addr>,
    mtu: Option<u32>,
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
            mtu: given.mtu,
        })
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

/// What is set up now. Kept, because asking the kernel for it would be most of the work of a ping, and of an identity reset
/// that changes nothing.
static CURRENT: Mutex<Current> = Mutex::new(Current { round: 0, wanted: None, is_settled: false, address: None });

struct Current {
    /// Counts set-ups, so that a lease of an older one is not applied any more.
    round: u64,
    /// What was requested.
    wanted: Option<Network>,
    /// Whether it is there, or is being requested.
    is_settled: bool,
    /// The card's address and the length of its prefix.
    address: Option<(Ipv4Addr, u8)>,
}

fn current() -> MutexGuard<'static, Current> {
    CURRENT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The address that the agent has given to the first network card.
pub fn address() -> Option<Ipv4Addr> {
    current().address.map(|(address, _)| address)
}

/// Configures the network, whatever its state was. Nothing happens if it is so already. Requests to the network itself
/// are not awaited.
///
/// # Errors
/// There is no card, or the kernel refuses.
pub fn set(wanted: Option<&Network>) -> io::Result<()> {
    let (round, old) = {
        let mut current = current();
        if current.is_settled && current.wanted.as_ref() == wanted {
            return Ok(());
        }
        current.round += 1;
        current.wanted = wanted.cloned();
        current.is_settled = false;
        (current.round, current.address.take())
    };
    if let Some((address, prefix)) = old {
        let (routes, card) = (link::Routes::open()?, link::first_card()?);
        routes.remove_address(card.index, address, prefix)?;
        routes.set_up(card.index, false)?;
    }
    if wanted == Some(&Network::Dhcp) {
        current().is_settled = true;
        let ask = move || {
            if let Err(error) = set_up(Some(&Network::Dhcp), round) {
                warn(format!("the network could not be set up: {error}"));
            }
        };
        std::thread::Builder::new().name("network".into()).stack_size(crate::THREAD_STACK).spawn(ask)?;
        return Ok(());
    }
    set_up(wanted, round)?;
    current().is_settled = true;
    Ok(())
}

/// Sets up loopback and the first card. With DHCP it does not return while the lease is kept.
fn set_up(network: Option<&Network>, round: u64) -> io::Result<()> {
    let routes = link::Routes::open()?;
    routes.set_up(1, true)?;
    let Some(network) = network else { return Ok(()) };
    let card = link::first_card()?;
    routes.set_up(card.index, true)?;
    match network {
        Network::Static(given) => apply(&routes, &card, &Settings::parse(given)?, round),
        Network::Dhcp => dhcp::keep_lease(&card, |settings| apply(&routes, &card, settings, round)),
    }
}

fn apply(routes: &link::Routes, card: &link::NetworkCard, settings: &Settings, round: u64) -> io::Result<()> {
    {
        let mut current = current();
        if current.round != round {
            return Err(io::Error::other("another network was set up meanwhile"));
        }
        routes.add_address(card.index, settings.address, settings.prefix)?;
        current.address = Some((settings.address, settings.prefix));
    }
    // Packets of the usual size are only slower.
    if let Some(mtu) = settings.mtu
        && let Err(error) = routes.set_mtu(card.index, mtu)
    {
        warn(format!("the largest packet could not be set to {mtu} bytes: {error}"));
    }
    if let Some(gateway) = settings.gateway {
        routes.default_route(card.index, gateway)?;
    }
    if settings.dns.is_empty() {
        return Ok(());
    }
    let servers: String = settings.dns.iter().map(|server| format!("nameserver {server}\n")).collect();
    // Addresses work without names, and the guest's user may want the file as it is.
    if let Err(error) = replace_file(Path::new(RESOLVER), servers.as_bytes(), PUBLIC) {
        warn(format!("the name servers are not in {RESOLVER}: {error}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(address: &str, prefix: u8) -> StaticNetwork {
        StaticNetwork {
            address: address.into(),
            prefix,
            gateway: Some("10.0.2.2".into()),
            dns: vec!["10.0.2.3".into()],
            mtu: Some(65_520),
        }
    }

    #[test]
    fn settings_are_numbers() {
        let settings = Settings::parse(&given("10.0.2.15", 24)).unwrap();
        assert_eq!((settings.address, settings.prefix), (Ipv4Addr::new(10, 0, 2, 15), 24));
        assert!(Settings::parse(&given("ten", 24)).is_err());
        assert!(Settings::parse(&given("10.0.2.15", 33)).is_err());
    }
}
