//! Decides about the head of a request that gets secrets: pure.

use http::header::{self, HeaderMap, HeaderName};
use http::{StatusCode, Uri};

/// Why a request is not passed on: what the guest gets.
pub type Refusal = (StatusCode, String);

/// Headers that are about one connection.
const HOP_HEADERS: [HeaderName; 6] = [
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Headers that `Connection` cannot remove.
const KEPT_HEADERS: [HeaderName; 2] = [header::CONTENT_LENGTH, header::HOST];

/// The host that a request names, with its port if it has one; why the request is not clear about it.
pub fn authority_of(head: &http::request::Parts) -> Result<String, &'static str> {
    if head.method == http::Method::CONNECT {
        return Err("CONNECT is not passed on");
    }
    if head.headers.contains_key(header::TRANSFER_ENCODING) && head.headers.contains_key(header::CONTENT_LENGTH) {
        return Err("the request has two lengths");
    }
    let mut hosts = head.headers.get_all(header::HOST).iter();
    let (host, second) = (hosts.next(), hosts.next());
    let host = host.map(|host| host.to_str().map_err(|_| "the host of the request is not a name")).transpose()?;
    match (head.uri.authority(), host, second) {
        (_, _, Some(_)) => Err("the request has two hosts"),
        (None, None, None) => Err("the request has no host"),
        (Some(authority), None, None) => Ok(authority.as_str().to_owned()),
        (Some(authority), Some(host), None) if !authority.as_str().eq_ignore_ascii_case(host) => {
            Err("the request has two hosts")
        }
        (_, Some(host), None) => Ok(host.to_owned()),
    }
}

/// Whether an authority is this host, at this port or none.
pub fn is_for(authority: &str, host: &str, port: u16) -> bool {
    let (name, named_port) = authority.split_once(':').map_or((authority, None), |(name, port)| (name, Some(port)));
    name.eq_ignore_ascii_case(host) && named_port.is_none_or(|named| named == port.to_string())
}

/// Text of the guest's for a record.
pub fn shown(text: &str) -> String {
    text.chars().filter(char::is_ascii_graphic).take(253).collect()
}

/// The URI of the request that is passed on: in origin form, or with the authority as HTTP/2 wants it.
pub fn uri(authority: Option<&str>, uri: &Uri) -> Result<Uri, Refusal> {
    let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let built = match authority {
        Some(authority) => Uri::builder().scheme("https").authority(authority).path_and_query(path).build(),
        None => Uri::builder().path_and_query(path).build(),
    };
    built.map_err(|_| (StatusCode::BAD_REQUEST, "the request has no valid path".to_owned()))
}

pub fn has_word(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|found| found.trim().eq_ignore_ascii_case(word))
}

/// Removes what is about one connection, also what `Connection` names.
pub fn remove_hop_headers(headers: &mut HeaderMap) {
    let values = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let named: Vec<_> = values.flat_map(|value| value.split(',')).filter_map(|name| name.trim().parse().ok()).collect();
    for name in named.iter().chain(&HOP_HEADERS).filter(|name| !KEPT_HEADERS.contains(name)) {
        headers.remove(name);
    }
}
