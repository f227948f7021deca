//! The flags of every verb that serves over HTTP: where it listens, and which clients it accepts.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use nido_api::error::{Code, Error, Hint};
use nido_server::{Hosts, ListenAddress, Options, PublicUrl, Timeouts, Tls, TlsFiles};

use crate::parse::duration_ms;

/// Where a server listens, and which clients it accepts.
#[derive(Debug, clap::Args)]
pub struct ListenArgs {
    /// Port; 0 selects a free one [default: 8080]
    #[arg(long)]
    port: Option<u16>,
    /// Listen on a unix socket instead
    #[arg(long, value_name = "PATH", conflicts_with_all = ["port", "allow_remote", "bind"], value_hint = clap::ValueHint::FilePath)]
    socket: Option<PathBuf>,
    /// Accept clients on other machines: listen on every address, with TLS. Without --tls-cert and --tls-key nido
    /// creates a self-signed certificate on first use and prints its fingerprint
    #[arg(long)]
    allow_remote: bool,
    /// Address to listen on [default: 127.0.0.1; with --allow-remote 0.0.0.0]
    #[arg(long, value_name = "ADDRESS")]
    bind: Option<IpAddr>,
    /// Certificate chain of the server, as PEM
    #[arg(long, value_name = "FILE", requires = "tls_key", value_hint = clap::ValueHint::FilePath)]
    tls_cert: Option<PathBuf>,
    /// Private key of the server, as PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert", value_hint = clap::ValueHint::FilePath)]
    tls_key: Option<PathBuf>,
    /// Accept clients on other machines without encryption: tokens and all other data can be read on the network
    #[arg(long, requires = "allow_remote")]
    insecure_http: bool,
    /// URL at which a reverse proxy publishes this server, for example `https://ci.example/nido/`: its host and origin
    /// are accepted, and links use it. The proxy must remove the path
    #[arg(long, value_name = "URL", conflicts_with = "socket")]
    public_url: Option<PublicUrl>,
    /// Host name to accept in requests; may be repeated
    #[arg(long = "allow-host", value_name = "NAME")]
    hosts: Vec<String>,
    /// Origin whose web pages may use the MCP server, for example http://localhost:6274; may be repeated
    #[arg(long = "allow-origin", value_name = "ORIGIN", value_parser = origin)]
    origins: Vec<String>,
    /// Requests a second that a caller may make, on average
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    rate: u32,
    /// Timeout for the next byte of a request's body; twice as long for a whole JSON body, and for a client to read
    #[arg(long, value_name = "TIME", hide = true, default_value = "30s", value_parser = duration_ms)]
    patience: u64,
}

impl ListenArgs {
    /// Whether an address to listen on was given.
    pub fn is_given(&self) -> bool {
        self.port.is_some() || self.socket.is_some() || self.allow_remote || self.bind.is_some()
    }

    /// How the server is started; whether it is `rest` that it serves, too.
    pub fn options(self, rest: bool) -> Result<Options, Error> {
        let hosts = Hosts { names: self.hosts, origins: self.origins, public: self.public_url };
        let rate = self.rate;
        let timeouts = Timeouts::from_body_idle(Duration::from_millis(self.patience));
        if let Some(path) = self.socket {
            return Ok(Options { listen: ListenAddress::Unix(path), hosts, rate, timeouts, rest });
        }
        let tls = self.tls_cert.zip(self.tls_key).map(|(certificate, key)| Tls::Files(TlsFiles { certificate, key }));
        let everywhere = IpAddr::V4(if self.allow_remote { Ipv4Addr::UNSPECIFIED } else { Ipv4Addr::LOCALHOST });
        let address = self.bind.unwrap_or(everywhere);
        if !address.is_loopback() && !self.allow_remote {
            let words = format!("{address} is reachable from other machines");
            return Err(Error::new(Code::Denied, words)
                .hint(Hint::command_line("pass --allow-remote to accept clients on them")));
        }
        // Other machines are never accepted without encryption by mistake.
        let tls = tls.or((!address.is_loopback() && !self.insecure_http).then_some(Tls::Own));
        let address = SocketAddr::new(address, self.port.unwrap_or(8080));
        Ok(Options { listen: ListenAddress::Tcp { address, tls }, hosts, rate, timeouts, rest })
    }
}

/// An origin as browsers send it: a scheme, a host, perhaps a port, and nothing behind.
fn origin(text: &str) -> Result<String, Error> {
    let rest = text.split_once("://").map(|(_, rest)| rest).unwrap_or_default();
    let is_origin = !rest.is_empty() && !rest.contains(['/', '?', '#', '*', ' ']) && text.is_ascii();
    if is_origin {
        return Ok(text.to_ascii_lowercase());
    }
    let words = format!("'{}' is not an origin", text.escape_debug());
    Err(Error::new(Code::SpecInvalid, words)
        .hint("scheme and host, and a port if there is one: https://app.example.com"))
}

#[cfg(test)]
mod tests {
    use super::origin;

    #[test]
    fn an_origin_is_a_scheme_and_a_host() {
        assert_eq!(origin("http://localhost:6274").unwrap(), "http://localhost:6274");
        assert_eq!(origin("vscode-webview://0A1B").unwrap(), "vscode-webview://0a1b");
        for wrong in ["", "*", "localhost", "https://", "https://a/", "https://a/b", "https://*.a"] {
            assert!(origin(wrong).is_err(), "{wrong}");
        }
    }
}
