//! `api-server`: the REST API and the page for people, until a signal ends it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use nido_vmm::error::{Code, Error};

use super::Context;
use crate::exit::{Exit, Outcome};
use crate::parse::duration_ms;
use crate::serve::{Hosts, Listen, Options, Patience, Tls, openapi, serve};

const EXAMPLES: &str = "\
Examples:
  nido token create --name ci --scope run
  nido api-server start
  curl -H \"Authorization: Bearer $TOKEN\" http://127.0.0.1:8080/v1/vms
  nido api-server start --socket /run/user/1000/nido.sock
  curl --unix-socket /run/user/1000/nido.sock http://localhost/v1/vms
  nido api-server start --allow-remote --tls-cert cert.pem --tls-key key.pem --allow-host ci.example

The first line on standard output is the address, when it listens. Over TCP every request needs a token, also on this machine. Over a unix socket, which only its owner can use,
none does. VMs do not depend on the server: it may be stopped at any time.";

/// Serve the REST API
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Start(Start),
    /// Print the description of the API: OpenAPI 3.1, as it is served at /openapi.json
    Openapi,
}

/// Serve until a signal ends it; what runs then may finish
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
struct Start {
    /// The port; 0 takes a free one
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// Listen on a unix socket instead
    #[arg(long, value_name = "PATH", conflicts_with_all = ["port", "allow_remote", "bind"], value_hint = clap::ValueHint::FilePath)]
    socket: Option<PathBuf>,
    /// Let other machines in: listen on every address. Takes --tls-cert and --tls-key, or --insecure-http
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
    /// A name under which clients know this machine; may be repeated
    #[arg(long = "allow-host", value_name = "NAME")]
    hosts: Vec<String>,
    /// How many requests a caller may make in a second, on average
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    rate: u32,
    /// How long to wait for the next byte of a request's body; twice as long for all of a JSON body, and for a client to read
    #[arg(long, value_name = "TIME", hide = true, default_value = "30s", value_parser = duration_ms)]
    patience: u64,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let start = match self.verb {
            Verb::Start(start) => start,
            Verb::Openapi => {
                cx.output.data(&openapi())?;
                return Ok(Exit::Success);
            }
        };
        let options = start.options()?;
        let nido = cx.nido().await?;
        let ready = |address: &str| {
            let listening = serde_json::json!({ "address": address });
            // Nobody may be there to read it; that is no reason not to serve.
            let _ = cx.output.answer(&listening, || format!("{address}\n"));
        };
        serve(nido, options, ready).await?;
        Ok(Exit::Success)
    }
}

impl Start {
    fn options(self) -> Result<Options, Error> {
        let hosts = Hosts { names: self.hosts };
        let patience = Patience::of(Duration::from_millis(self.patience));
        if let Some(path) = self.socket {
            return Ok(Options { listen: Listen::Unix(path), hosts, rate: self.rate, patience });
        }
        let tls = self.tls_cert.zip(self.tls_key).map(|(certificate, key)| Tls { certificate, key });
        let everywhere = IpAddr::V4(if self.allow_remote { Ipv4Addr::UNSPECIFIED } else { Ipv4Addr::LOCALHOST });
        let address = self.bind.unwrap_or(everywhere);
        if !address.is_loopback() && !self.allow_remote {
            let words = format!("{address} can be reached by other machines");
            return Err(Error::new(Code::Denied, words).hint("--allow-remote lets them in"));
        }
        if !address.is_loopback() && tls.is_none() && !self.insecure_http {
            return Err(Error::new(Code::Denied, "other machines are let in over an encrypted connection only")
                .hint("--tls-cert and --tls-key, or --insecure-http if something else encrypts it"));
        }
        let address = SocketAddr::new(address, self.port);
        Ok(Options { listen: Listen::Tcp { address, tls }, hosts, rate: self.rate, patience })
    }
}
