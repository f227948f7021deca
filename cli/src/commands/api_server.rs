//! `api-server`: the REST API and the page for people, until a signal ends it.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Subcommand;
use nido_core::host_paths::DefaultPaths;
use nido_core::policy::Policy;
use nido_engine::host::delegation;
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

The server prints its address as the first line of standard output. Over TCP every request needs a
token, also on this machine; over a unix socket, which only its owner can use, none does. VMs keep
running when the server stops.";

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
    /// Print the OpenAPI 3.1 description, as served at /openapi.json
    Openapi,
}

/// Serve until a signal; running requests may finish
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
struct Start {
    #[command(flatten)]
    listen: ListenArgs,
    /// Serve MCP clients as well, at /mcp; use tokens of nido token create --only mcp
    #[arg(long)]
    mcp: bool,
    /// Policy file for /mcp: commands, confirmation, host paths. It does not apply to the REST API
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
        // First of all: the group must not have another process yet, such as a supervisor.
        match delegation::leave_group_for_vms() {
            Ok(true) => tracing::info!("the server has moved to a child of its control group, beside those of VMs"),
            Ok(false) => {}
            Err(error) => tracing::warn!("VMs get no control groups with limits: {error}"),
        }
        let policy = start.mcp_policy.as_deref().map(Policy::load).transpose()?.unwrap_or_default();
        let options = start.listen.options(true)?;
        let nido = Arc::new(cx.nido().await?);
        let settings = start.mcp.then(|| Settings { policy, ..Settings::default() });
        let settings = match settings {
            Some(settings) => Some(settings.with_plain_rules(&nido).await?),
            None => None,
        };
        let agents = settings.map(|settings| agents(cx, Arc::clone(&nido), settings, &DefaultPaths::default()));
        let agents = agents.transpose()?;
        let owner = Arc::clone(&nido);
        serve(nido, agents, options, |address| cx.listening(address, &owner)).await?;
        Ok(Exit::Success)
    }
}
