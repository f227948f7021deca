//! The name server of a guest. With `nat` the host's own name servers answer. With `restricted`, names that rules allow are resolved by the host, and what they resolve
//! to is remembered. No byte of the guest's reaches another name server but the name itself, in lower case.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nido_api::egress::{DenialReason, DeniedProtocol, DomainName};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{UdpSocket, lookup_host};
use tokio::time::timeout;

use crate::denials::Refused;
use crate::dns::{self, Kind, Malformed, Query};
use crate::resolver;
use crate::shared::Shared;
use crate::subnet::{GATEWAY_V4, GATEWAY_V6};

/// How long the host may take to resolve a name.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one name server may take before the next one is asked.
const SERVER_TIMEOUT: Duration = Duration::from_secs(2);
/// For how long the guest may use an answer, in seconds: the host does not report for how long it is valid.
const TTL: u32 = 30;
/// The longest message over TCP, in bytes.
const MESSAGE_MAX: usize = 4096;
/// How long a connection of the guest's to the name server may be idle.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// The name of the gateway.
const HOST_NAME: &str = "host.nido.internal";
/// The text with which a refused name is explained.
const NO_RULE: &str = "no network rule of this VM names it";

/// Passes a message on to the host's name servers, one after the other until one replies: for a guest whose network is not
/// restricted.
pub async fn relay(message: &[u8], servers: &[SocketAddr]) -> Option<Vec<u8>> {
    for server in servers {
        if let Ok(Ok(response)) = timeout(SERVER_TIMEOUT, query_server(message, *server)).await {
            return Some(response);
        }
    }
    None
}

async fn query_server(message: &[u8], server: SocketAddr) -> io::Result<Vec<u8>> {
    let any = if server.is_ipv4() { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(message).await?;
    let mut response = vec![0; MESSAGE_MAX];
    loop {
        let length = socket.recv(&mut response).await?;
        // The number of the exchange; what else is in it the guest checks itself.
        if length >= 2 && response.get(..2) == message.get(..2) {
            response.truncate(length);
            return Ok(response);
        }
    }
}

/// The response to a message over UDP; `None` if it gets none.
pub async fn respond(shared: &Shared, message: &[u8]) -> Option<Vec<u8>> {
    respond_within(shared, message, None).await
}

/// Serves one connection over TCP.
pub async fn serve(shared: Rc<Shared>, mut stream: DuplexStream) {
    while let Ok(Ok(length)) = timeout(IDLE_TIMEOUT, stream.read_u16()).await {
        let mut message = vec![0; usize::from(length).min(MESSAGE_MAX)];
        if usize::from(length) > MESSAGE_MAX || stream.read_exact(&mut message).await.is_err() {
            return;
        }
        let Some(response) = respond_within(&shared, &message, Some(usize::from(u16::MAX))).await else { return };
        let length = u16::try_from(response.len()).unwrap_or(u16::MAX);
        if stream.write_u16(length).await.is_err() || stream.write_all(&response).await.is_err() {
            return;
        }
    }
}

async fn respond_within(shared: &Shared, message: &[u8], limit: Option<usize>) -> Option<Vec<u8>> {
    if !shared.questions.take(Instant::now()) {
        deny(shared, None, DenialReason::RateLimit);
        return Query::parse(message).ok().map(|query| dns::failure(&query));
    }
    let query = match Query::parse(message) {
        Ok(query) => query,
        Err(malformed) => {
            if let Malformed::NameNotAllowed(query) = &malformed {
                deny(shared, Some(query.name.clone()), DenialReason::NameNotAllowed);
            }
            return malformed.response();
        }
    };
    let limit = limit.unwrap_or_else(|| query.udp_limit());
    // Nobody is asked for other types: their number would be one more thing that the guest can send.
    let answer = match query.kind {
        Kind::A | Kind::Aaaa => resolve(shared, &query.name).await,
        Kind::Other(_) => admit(shared, &query.name).map_or_else(|answer| answer, |_| Answer::Addresses(Vec::new())),
    };
    Some(match answer {
        Answer::Addresses(addresses) if !matches!(query.kind, Kind::Other(_)) => {
            dns::answer(&query, &addresses, TTL, limit)
        }
        Answer::Addresses(_) => dns::empty(&query),
        Answer::Unknown => dns::refuse(&query, None),
        Answer::Refused => dns::refuse(&query, Some(NO_RULE)),
        Answer::Failed => dns::failure(&query),
    })
}

fn deny(shared: &Shared, name: Option<String>, reason: DenialReason) {
    shared.deny(Refused { protocol: DeniedProtocol::Dns, name, address: None, port: None, reason });
}

/// What is known about a name.
pub enum Answer {
    /// The addresses that the guest may know.
    Addresses(Vec<IpAddr>),
    /// It does not exist.
    Unknown,
    /// The guest may not know it.
    Refused,
    /// The host's name servers do not reply.
    Failed,
}

/// The name that the host is asked for, if rules allow that; what is known without it otherwise.
fn admit(shared: &Shared, text: &str) -> Result<DomainName, Answer> {
    if text == HOST_NAME {
        return Err(Answer::Addresses(vec![GATEWAY_V4.into(), GATEWAY_V6.into()]));
    }
    let Ok(name) = text.parse::<DomainName>() else {
        deny(shared, Some(text.to_owned()), DenialReason::NameNotAllowed);
        return Err(Answer::Refused);
    };
    if let Err(reason) = shared.admit_question(&name) {
        deny(shared, Some(name.to_string()), reason);
        return Err(Answer::Refused);
    }
    Ok(name)
}

/// Resolves a name in canonical form, if rules allow it, and remembers the result.
pub async fn resolve(shared: &Shared, text: &str) -> Answer {
    let name = match admit(shared, text) {
        Ok(name) => name,
        Err(answer) => return answer,
    };
    let found = match timeout(LOOKUP_TIMEOUT, lookup(&shared.hosts, &name)).await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) if is_unknown(&error) => return Answer::Unknown,
        Ok(Err(_)) | Err(_) => return Answer::Failed,
    };
    let routes_ipv6 = resolver::host_routes_ipv6();
    let reachable = |address: &IpAddr| address.is_ipv4() || routes_ipv6;
    let allowed: Vec<_> = found.iter().copied().filter(|address| shared.allows_answer(*address)).collect();
    if allowed.is_empty() && !found.is_empty() {
        let (protocol, reason) = (DeniedProtocol::Dns, DenialReason::AddressPrivate);
        let address = found.first().copied();
        shared.deny(Refused { protocol, name: Some(name.to_string()), address, port: None, reason });
        return Answer::Refused;
    }
    let allowed: Vec<_> = allowed.into_iter().filter(reachable).collect();
    shared.remember(&name, &allowed);
    Answer::Addresses(allowed)
}

async fn lookup(hosts: &Path, name: &DomainName) -> io::Result<Vec<IpAddr>> {
    // A name with a dot at its end is complete: no search domain of the host's is added. The file of hosts has none.
    let own = resolver::in_hosts_file(&std::fs::read_to_string(hosts).unwrap_or_default(), name.as_str());
    if !own.is_empty() {
        return Ok(own);
    }
    let mut addresses: Vec<_> =
        lookup_host((format!("{name}."), 0)).await?.map(|found: SocketAddr| found.ip()).collect();
    addresses.dedup();
    Ok(addresses)
}

/// Whether an error of the C library is that there is no such name, or no address for it.
fn is_unknown(error: &io::Error) -> bool {
    let text = error.to_string();
    !text.contains("Temporary failure") && !text.contains("System error") && !text.contains("Memory")
}
