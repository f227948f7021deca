//! The flags of every verb that serves over HTTP: where it listens, and whom it lets in.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use nido_api::error::{Code, Error};
use nido_server::{Hosts, ListenAddress, Options, PublicUrl, Timeouts, Tls, TlsFiles};

use crate::parse::duration_ms;

/// Where a server listens, and whom it lets in.
#[derive(Debug, clap::Args)]
pub struct ListenArgs {
    /// The port; 0 takes a free one [default: 8080]
    #[arg(long)]
    port: Option<u16>,
    /// Listen on a unix socket instead
    #[arg(long, value_name = "PATH", conflicts_with_all = ["port", "allow_remote", "bind"], value_hint = clap::ValueHint::FilePath)]
    socket: Option<PathBuf>,
    /// Let other machines in: listen on every address, encrypted. Without --tls-cert and --tls-key with a self-signed
    /// certificate that is made on first use; its fingerprint is printed
    #[arg(long)]
    allow_remote: bool,
    /// The address to listen on [default: 127.0.0.1; with --allow-remote 0.0.0.0]
    #[arg(long, value_name = "ADDRESS")]
    bind: Option<IpAddr>,
    /// The server's certificate, and those between it and the root, as PEM
    #[arg(long, value_name = "FILE", requires = "tls_key", value_hint = clap::ValueHint::FilePath)]
    tls_cert: Option<PathBuf>,
    /// Its private key, as PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert", value_hint = clap::ValueHint::FilePath)]
    tls_key: Option<PathBuf>,
    /// Let other machines in without encryption: tokens and everything else can be read on the way
    #[arg(long, requires = "allow_remote")]
    insecure_http: bool,
    /// Where clients reach this server through a proxy, for example `https://ci.example/nido/`: its host and its origin are
    /// accepted, and links lead there. The proxy removes the path
    #[arg(long, value_name = "URL", conflicts_with = "socket")]
    public_url: Option<PublicUrl>,
    /// A name under which clients know this machine; may be repeated
    #[arg(long = "allow-host", value_name = "NAME")]
    hosts: Vec<String>,
    /// Let web pages of this origin use the MCP server, for example http://localhost:6274; may be repeated
    #[arg(long = "allow-origin", value_name = "ORIGIN", value_parser = origin)]
    origins: Vec<String>,
    /// How many requests a caller may make in a second, on average
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    rate: u32,
    /// How long to wait for the next byte of a request's body; twice as long for all of a JSON body, and for a client to read
    #[arg(long, value_name = "TIME", hide = true, default_value = "30s", value_parser = duration_ms)]
    patience: u64,
}

impl ListenArgs {
    /// Whether something was said about where to listen.
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
            let words = format!("{address} can be reached by other machines");
            return Err(Error::new(Code::Denied, words).hint("--allow-remote lets them in"));
        }
        // Other machines are never let in without encryption by mistake.
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
