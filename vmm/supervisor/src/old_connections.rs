//! The connections that a guest believes in and nobody else knows: those from before it was saved, or before its supervisor was
//! replaced. A program that sends finds out by itself; one that only reads would wait for ever. So the guest is asked for them, and
//! the network resets each.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use nido_engine::guest::{Event, Guest, GuestError};
use nido_guest_agent::wire::Exec;
use tokio::time::Instant;

/// Where a Linux guest lists its connections.
const LISTS: [&str; 2] = ["/proc/net/tcp", "/proc/net/tcp6"];
/// How long the guest may take to report them.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How much of its report is read, in bytes.
const REPORT_MAX: usize = 1 << 20;
/// How many connections are reset at most.
const CONNECTIONS_MAX: usize = 4096;
/// The states of a connection that waits for the other end: established, the two that wait for its end, and the one that waits for
/// the program.
const WAITING: [&str; 4] = ["01", "04", "05", "08"];

/// Both ends of a connection: the guest's, and the other.
pub(super) type Ends = (SocketAddr, SocketAddr);

/// Asks the guest.
///
/// # Errors
/// Of the agent.
pub(super) async fn list(guest: &Guest) -> Result<Vec<Ends>, GuestError> {
    let argv = ["cat"].into_iter().chain(LISTS).map(|word| word.as_bytes().to_vec().into()).collect();
    let timeout_ms = u64::try_from(TIMEOUT.as_millis()).ok();
    let deadline = Instant::now() + TIMEOUT;
    let mut running = guest.exec(Exec { argv, timeout_ms, ..Exec::default() }, deadline).await?;
    let mut report = Vec::new();
    while let Some(event) = running.events.next().await? {
        if let Event::Stdout(bytes) = event {
            report.extend(bytes);
        }
        if report.len() > REPORT_MAX {
            break;
        }
    }
    Ok(parse(&String::from_utf8_lossy(&report)))
}

/// What is listed, as far as it can be read.
fn parse(report: &str) -> Vec<Ends> {
    let connection = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let (guest, remote, state) = (words.next()?, words.next()?, words.next()?);
        let (guest, remote) = (end(guest)?, end(remote)?);
        let is_outside = !guest.ip().is_loopback() && !remote.ip().is_unspecified();
        (WAITING.contains(&state) && is_outside).then_some((guest, remote))
    };
    report.lines().filter_map(connection).take(CONNECTIONS_MAX).collect()
}

/// `0F02000A:9C40`: the address in words of the guest's byte order, and the port.
fn end(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let words = (0..address.len() / 8).map(|at| {
        let word = address.get(8 * at..8 * at + 8)?;
        u32::from_str_radix(word, 16).ok().map(u32::to_le_bytes)
    });
    let octets: Vec<u8> = words.collect::<Option<Vec<_>>>()?.concat();
    let address = match octets.len() {
        4 => IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(octets).ok()?)),
        16 => IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(octets).ok()?)).to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(address, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_to_the_outside_are_found() {
        let report = "  sl  local_address rem_address   st tx_queue rx_queue\n\
            0: 0100007F:1F90 00000000:0000 0A 00000000:00000000\n\
            1: 0F02000A:9C40 0202000A:1389 01 00000000:00000000\n\
            2: 0100007F:1F90 0100007F:9C40 01 00000000:00000000\n\
            3: 0F02000A:9C41 0202000A:1389 06 00000000:00000000\n\
            4: 0000000000000000FFFF00000F02000A:9C42 0000000000000000FFFF00000202000A:0050 08 0\n\
            5: 64696EFD00006F0000000000FE123456:9C43 B80D0120000000000000000001000000:01BB 01 0\n\
            6: zz:1 0202000A:1389 01 0\n";
        let text: Vec<_> = parse(report).into_iter().map(|(guest, remote)| format!("{guest} {remote}")).collect();
        assert_eq!(
            text,
            [
                "10.0.2.15:40000 10.0.2.2:5001",
                "10.0.2.15:40002 10.0.2.2:80",
                "[fd6e:6964:6f::5634:12fe]:40003 [2001:db8::1]:443",
            ]
        );
    }

    #[test]
    fn a_report_of_anything_is_read() {
        for report in ["", ":", "a b c d", "0: : : 01", "0: 0F02000A: 0202000A:1389 01", "0: é02000A:1 0202000A:1 01"]
        {
            assert!(parse(report).is_empty(), "{report}");
        }
    }
}
