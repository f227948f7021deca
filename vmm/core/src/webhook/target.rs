//! Where messages may be posted: which URLs, and which addresses behind them.
//!
//! The user who adds an endpoint chooses its URL, and the owner of its domain the address: without a check either
//! could make nido post to services that only this host or its network reaches. So an address counts only if it is one of
//! the Internet's; what is in doubt is not.

use std::net::IpAddr;

use nido_api::error::{Code, Error, Hint, Result};
use nido_api::is_global;
use reqwest::Url;

/// The longest URL, in bytes.
const URL_MAX: usize = 2048;

/// The URL of an endpoint, checked as far as that is possible without requesting the name's addresses.
///
/// # Errors
/// `webhook_invalid`.
pub fn parse(url: &str, allow_private: bool) -> Result<Url> {
    let refused = |why: &str, hint: &str| Err(Error::new(Code::WebhookInvalid, format!("the URL {why}")).hint(hint));
    let example = "for example https://example.com/hooks/nido";
    if url.len() > URL_MAX {
        return refused("is longer than 2048 bytes", example);
    }
    // The parser repairs what it reads: `https:///x` would be the host `x`.
    let has_host = url.split_once("://").is_some_and(|(_, rest)| !rest.starts_with('/'));
    if !has_host || url.contains(|c: char| c.is_whitespace() || c.is_control() || c == '\\') {
        return refused("cannot be parsed", example);
    }
    let Ok(mut parsed) = Url::parse(url) else { return refused("cannot be parsed", example) };
    match parsed.scheme() {
        "https" => {}
        "http" if allow_private => {}
        "http" => {
            return refused("is not encrypted", "use https, or permit private networks if the endpoint is in yours");
        }
        _ => return refused("is not an http or https URL", example),
    }
    if !parsed.username().is_empty() || parsed.password().is_some() {
        return refused("holds a user name or a password", "messages are signed; let the endpoint check that");
    }
    if parsed.port() == Some(0) {
        return refused("names port 0", example);
    }
    let Some(host) = parsed.host_str() else { return refused("has no host", example) };
    if let Some(address) = literal(host)
        && !allow_private
    {
        check(address)?;
    }
    parsed.set_fragment(None);
    Ok(parsed)
}

/// The address that a URL names by itself.
#[must_use]
pub fn literal(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// Refuses an address that is not one of the Internet's.
///
/// # Errors
/// `webhook_invalid`.
pub fn check(address: IpAddr) -> Result<()> {
    if is_global(address) {
        return Ok(());
    }
    Err(Error::new(Code::WebhookInvalid, format!("the endpoint's address {address} is not a public one"))
        .hint("permit private networks if the endpoint is in one, or on this host")
        .or_hint(Hint::command_line("pass --allow-private")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_http_without_credentials() {
        for bad in [
            "",
            "example.com",
            "ftp://example.com",
            "file:///etc/passwd",
            "https://",
            "http://example.com/",
            "https://u@example.com/",
            "https://u:p@example.com/",
            "https://127.0.0.1/",
            "https://2130706433/",
            "https://0x7f.1/",
            "https://0177.0.0.1/",
            "https://[::1]/",
            "https://[::ffff:10.0.0.1]/",
            "https://169.254.169.254/latest/meta-data/",
            "https://example.com:0/",
            "https://127.0.0.1./",
            "https:///example.com/",
            "https:example.com/",
            "https:/example.com/",
            "https:\\\\example.com/",
            "https://example.com/ a",
            " https://example.com/",
            "https://exam\tple.com/",
            &format!("https://example.com/{}", "a".repeat(URL_MAX)),
        ] {
            let error = parse(bad, false).unwrap_err();
            assert_eq!(error.code(), Code::WebhookInvalid, "{bad}");
            assert!(error.hint_for(nido_api::FrontEnd::Cli).is_some());
        }
        for good in
            ["https://example.com", "https://example.com:8443/a?b=c#d", "https://1.1.1.1/", "https://[2606:4700::1]/"]
        {
            assert!(parse(good, false).unwrap().fragment().is_none(), "{good}");
        }
        for own in ["http://127.0.0.1:8080/x", "http://[::1]/", "https://10.0.0.1/", "http://localhost/"] {
            parse(own, true).unwrap();
        }
        assert!(parse("gopher://127.0.0.1", true).is_err());
    }
}
