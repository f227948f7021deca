//! `mcp-server`: tools for agents, over the Model Context Protocol.

use std::sync::Arc;

use clap::Subcommand;
use nido_mcp::{App, Settings, stdio};

use super::Context;
use crate::exit::{Exit, Outcome};
use crate::signals::Signals;

const EXAMPLES: &str = "\
Examples:
  nido mcp-server start
  nido mcp-server start --read-only
  nido mcp-server start --tools vm_spawn,vm_exec,vm_delete

The client starts it, speaks on its standard input and reads its standard output, where nothing but messages is ever
written; what is worth telling goes to standard error. It ends when standard input does. VMs do not depend on it.";

/// Serve agents over the Model Context Protocol
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Start(Start),
}

/// Serve until standard input ends, or a signal comes
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
struct Start {
    /// Only offer tools that change nothing
    #[arg(long)]
    read_only: bool,
    /// Only offer these tools
    #[arg(long, value_name = "TOOL", value_delimiter = ',', value_parser = tool())]
    tools: Option<Vec<String>>,
    /// Do not offer these tools
    #[arg(long, value_name = "TOOL", value_delimiter = ',', value_parser = tool())]
    exclude_tools: Vec<String>,
}

/// Names of tools, and nothing else.
fn tool() -> clap::builder::PossibleValuesParser {
    clap::builder::PossibleValuesParser::new(nido_mcp::tools::ALL.map(|tool| tool.name))
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let Verb::Start(start) = self.verb;
        let settings = Settings { read_only: start.read_only, tools: start.tools, exclude: start.exclude_tools };
        let app = App::new(Arc::new(cx.nido().await?), settings);
        let mut signals = Signals::listen()?;
        let end = async {
            signals.next_end().await;
        };
        stdio::serve(&app, end).await?;
        Ok(Exit::Success)
    }
}
