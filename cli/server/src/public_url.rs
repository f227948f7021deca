//! Where clients reach the server through a proxy: what it changes in answers.
//!
//! Invariant: it is set on the command line. Headers of a request cannot change it.

use std::str::FromStr;

use axum::http::{HeaderMap, HeaderValue, Uri, header};
use nido_api::error::{Code, Error};

/// An address of a server, as its clients know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicUrl {
    /// Scheme, host and port, as browsers send it.
    pub origin: String,
    /// The host.
    pub host: String,
    /// The path that the proxy removes, without a slash at its end.
    pub path: String,
}

impl FromStr for PublicUrl {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || {
            Error::new(Code::SpecInvalid, format!("'{}' is not the URL of a server", text.escape_debug()))
                .hint("scheme, host, and the path that the proxy removes: https://ci.example/nido/")
        };
        let uri: Uri = text.parse().map_err(|_| bad())?;
        let (scheme, authority) = (uri.scheme_str().ok_or_else(bad)?, uri.authority().ok_or_else(bad)?);
        let is_plain = uri.query().is_none() && !text.contains('#') && !authority.as_str().contains('@');
        if !matches!(scheme, "http" | "https") || !is_plain {
            return Err(bad());
        }
        let usual = if scheme == "https" { 443 } else { 80 };
        let port = authority.port_u16().filter(|port| *port != usual);
        let host = authority.host().to_ascii_lowercase();
        let origin = port.map_or_else(|| format!("{scheme}://{host}"), |port| format!("{scheme}://{host}:{port}"));
        Ok(Self { origin, host, path: uri.path().trim_end_matches('/').to_owned() })
    }
}

impl PublicUrl {
    /// Lets the links of a response lead through the proxy.
    pub fn adapt(&self, headers: &mut HeaderMap) {
        if self.path.is_empty() {
            return;
        }
        let adapted = |value: &HeaderValue, begin: &str| {
            let rest = value.to_str().ok()?.strip_prefix(begin)?;
            HeaderValue::from_str(&format!("{}{}/{rest}", &begin[..begin.len() - 1], self.path)).ok()
        };
        for (name, begin) in [(header::LOCATION, "/"), (header::LINK, "</")] {
            if let Some(value) = headers.get(&name).and_then(|value| adapted(value, begin)) {
                headers.insert(name, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_an_origin_and_a_path() {
        let url: PublicUrl = "https://CI.example:443/a/nido/".parse().unwrap();
        assert_eq!(
            (url.origin.as_str(), url.host.as_str(), url.path.as_str()),
            ("https://ci.example", "ci.example", "/a/nido")
        );
        let url: PublicUrl = "http://10.0.0.1:8081".parse().unwrap();
        assert_eq!((url.origin.as_str(), url.path.as_str()), ("http://10.0.0.1:8081", ""));
        for wrong in ["", "ci.example", "/nido", "ftp://a/", "https://", "https://a/?x", "https://u@a/", "https://a/#x"]
        {
            assert!(wrong.parse::<PublicUrl>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn links_lead_through_the_proxy() {
        let url: PublicUrl = "https://ci.example/nido/".parse().unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(header::LOCATION, HeaderValue::from_static("/v1/vms/web"));
        headers.insert(header::LINK, HeaderValue::from_static("</v1/vms?cursor=x>; rel=\"next\""));
        url.adapt(&mut headers);
        assert_eq!(headers[header::LOCATION], "/nido/v1/vms/web");
        assert_eq!(headers[header::LINK], "</nido/v1/vms?cursor=x>; rel=\"next\"");
        let plain: PublicUrl = "https://ci.example".parse().unwrap();
        plain.adapt(&mut headers);
        assert_eq!(headers[header::LOCATION], "/nido/v1/vms/web");
    }
}
