//! `api-server`: the REST API and the page for people, until a signal ends it.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Subcommand;
use nido_core::host_paths::DefaultPaths;
use nido_core::policy::Policy;
use nido_mcp::Settings;
use nido_server::{openapi, serve};

use super::Context;
use super::agents::agents;
use super::listen_args::ListenArgs;
use crate::exit::{Exit, Outcome};

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
    Start(Box<Start>),
    /// Print the description of the API: OpenAPI 3.1, as it is served at /openapi.json
    Openapi,
}

/// Serve until a signal ends it; what runs then may finish
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
struct Start {
    #[command(flatten)]
    listen: ListenArgs,
    /// Serve agents as well, at /mcp; give them tokens of nido token create --only mcp
    #[arg(long)]
    mcp: bool,
    /// What agents may do at /mcp: commands, confirmation, paths of the host. The REST API does not know it
    #[arg(long, value_name = "FILE", requires = "mcp", value_hint = clap::ValueHint::FilePath)]
    mcp_policy: Option<PathBuf>,
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
        let policy = start.mcp_policy.as_deref().map(Policy::load).transpose()?.unwrap_or_default();
        let options = start.listen.options(true)?;
        let nido = Arc::new(cx.nido().await?);
        let settings = start.mcp.then(|| Settings { policy, ..Settings::default() });
        let agents = settings.map(|settings| agents(cx, Arc::clone(&nido), settings, &DefaultPaths::default()));
        let agents = agents.transpose()?;
        let owner = Arc::clone(&nido);
        serve(nido, agents, options, |address| cx.listening(address, &owner)).await?;
        Ok(Exit::Success)
    }
}
