//! `mcp-server`: tools for agents, over the Model Context Protocol.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Subcommand, ValueEnum};
use nido_api::Scope;
use nido_api::error::{Code, Error, Hint};
use nido_core::Nido;
use nido_core::host_paths::DefaultPaths;
use nido_core::policy::{Confirm, Policy};
use nido_mcp::{SESSION_GRACE, SESSION_IDLE, Settings, stdio};
use nido_server::signals::Signals;
use nido_server::{ListenAddress, serve};

use super::Context;
use super::agents::agents;
use super::listen_args::ListenArgs;
use super::mcp_install::Install;
use crate::exit::{Exit, Outcome};
use crate::parse::duration_ms;

const EXAMPLES: &str = "\
Examples:
  nido mcp-server install --client claude-code --write
  nido mcp-server start
  nido mcp-server start --read-only
  nido mcp-server start --tools vm_spawn,vm_exec,vm_delete --policy policy.toml
  nido mcp-server start --transport http --port 8080
  nido mcp-server start --transport http --socket /run/user/1000/nido-mcp.sock

Over stdio the client starts the server, which reads messages from standard input, writes them to
standard output, logs to standard error and exits when standard input ends. Over http it serves at
/mcp, with tokens of `nido token`. VMs keep running when the server stops, except ephemeral ones
of agents: they are deleted with their session.";

/// Serve AI agents over the Model Context Protocol
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Start(Box<Start>),
    Install(Install),
}

/// Serve until standard input ends, or until a signal
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
struct Start {
    /// Transport
    #[arg(long, value_enum, default_value = "stdio")]
    transport: Transport,
    /// Offer only tools that change nothing
    #[arg(long)]
    read_only: bool,
    /// Offer only these tools
    #[arg(long, value_name = "TOOL", value_delimiter = ',', value_parser = tool())]
    tools: Option<Vec<String>>,
    /// Do not offer these tools
    #[arg(long, value_name = "TOOL", value_delimiter = ',', value_parser = tool())]
    exclude_tools: Vec<String>,
    /// Policy file: allowed commands, confirmation, host paths
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    policy: Option<PathBuf>,
    /// Operations that a person must confirm: always, never, or tools like vm_exec@foreign,vm_delete [default: the
    /// policy's, else always]
    #[arg(long, value_name = "WHEN")]
    confirm: Option<Confirm>,
    /// Time limit of a call; a longer one returns a job, which continues
    #[arg(long, value_name = "TIME", default_value = "40s", value_parser = duration)]
    answer_within: Duration,
    /// Scope of the client over stdio: read, run or admin [default: admin]
    #[arg(long)]
    scope: Option<Scope>,
    /// Idle time after which a session over HTTP ends, with its ephemeral VMs [default: 30m]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    session_idle: Option<Duration>,
    /// Time that ephemeral VMs of an ended HTTP session wait for the caller's next session [default: 60s]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    session_grace: Option<Duration>,
    /// Serve without tokens; requires --socket, whose owner is the only caller
    #[arg(long)]
    no_token: bool,
    #[command(flatten)]
    listen: ListenArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Transport {
    /// Standard input and output, for a client that starts the server
    Stdio,
    /// Streamable HTTP, at /mcp
    Http,
}

/// Where a client that runs on this machine, as this user, may have files copied from: the directory that it started
/// this in, unless that is everything there is, all that the user has, or where nido keeps its tokens; and one of nido's own, which
/// is the only one that files are copied to.
fn own_paths(nido: &Nido) -> Result<DefaultPaths, Error> {
    let own = nido.home().exchange();
    std::fs::create_dir_all(&own).map_err(|e| Error::io(format!("cannot make {}", own.display()), e))?;
    let here = std::env::current_dir().and_then(std::fs::canonicalize).ok();
    let user = std::env::var_os("HOME").and_then(|home| std::fs::canonicalize(home).ok());
    let kept = std::fs::canonicalize(nido.home().root()).ok();
    let holds = |here: &PathBuf, other: &Option<PathBuf>| other.as_ref().is_some_and(|other| other.starts_with(here));
    let within = |here: &PathBuf| kept.as_ref().is_some_and(|kept| here.starts_with(kept));
    let narrow =
        |here: &PathBuf| here.parent().is_some() && !holds(here, &user) && !holds(here, &kept) && !within(here);
    Ok(DefaultPaths { read: here.filter(narrow).into_iter().chain([own.clone()]).collect(), write: vec![own] })
}

/// A time, and not none.
fn duration(text: &str) -> Result<Duration, Error> {
    Ok(Duration::from_millis(duration_ms(text)?.max(1)))
}

/// Names of tools, and nothing else.
fn tool() -> clap::builder::PossibleValuesParser {
    clap::builder::PossibleValuesParser::new(nido_mcp::tools::ALL.map(nido_mcp::tools::Tool::name))
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let mut start = match self.verb {
            Verb::Start(start) => start,
            Verb::Install(install) => return install.run(cx),
        };
        let settings = start.settings()?;
        match start.transport {
            Transport::Stdio => Box::pin(start.stdio(cx, settings)).await,
            Transport::Http => start.http(cx, settings).await,
        }
    }
}

impl Start {
    fn settings(&mut self) -> Result<Settings, Error> {
        let mut policy = self.policy.as_deref().map(Policy::load).transpose()?.unwrap_or_default();
        policy.read_only |= self.read_only;
        policy.confirm = self.confirm.take().unwrap_or(policy.confirm);
        let (tools, exclude) = (self.tools.take(), std::mem::take(&mut self.exclude_tools));
        let session_idle = self.session_idle.unwrap_or(SESSION_IDLE);
        let session_grace = match self.transport {
            // The session is the process: nothing of it waits.
            Transport::Stdio => Duration::ZERO,
            Transport::Http => self.session_grace.unwrap_or(SESSION_GRACE),
        };
        let (scope, answer_within) = (self.scope.unwrap_or(Scope::Admin), self.answer_within);
        Ok(Settings { policy, tools, exclude, answer_within, scope, session_idle, session_grace })
    }

    async fn stdio(self, cx: &Context, settings: Settings) -> Outcome {
        if self.no_token || self.session_idle.is_some() || self.session_grace.is_some() || self.listen.is_given() {
            let words = "--port, --socket, --no-token and similar options are for --transport http";
            return Err(Error::new(Code::SpecInvalid, words)
                .hint(Hint::command_line("pass --transport http, or omit them"))
                .into());
        }
        if std::io::stdin().is_terminal() {
            cx.output.note(
                "waiting for messages of an MCP client on standard input; configure one with nido mcp-server install",
            );
        }
        let nido = cx.nido().await?;
        let defaults = own_paths(&nido)?;
        let settings = settings.with_plain_rules(&nido).await?;
        let app = agents(cx, Arc::new(nido), settings, &defaults)?;
        let mut signals = Signals::listen()?;
        let end = async {
            signals.next_end().await;
        };
        stdio::serve(&app, end).await?;
        Ok(Exit::Success)
    }

    async fn http(self, cx: &Context, settings: Settings) -> Outcome {
        if self.scope.is_some() {
            let words = "--scope is for stdio; over http the token determines the scope";
            return Err(Error::new(Code::SpecInvalid, words)
                .hint(Hint::command_line("nido token create --name NAME --scope SCOPE"))
                .into());
        }
        let options = self.listen.options(false)?;
        if self.no_token && !matches!(options.listen, ListenAddress::Unix(_)) {
            let words = "a port without a token would be open to every program on this machine and to every guest with --net nat, \
             which reaches the host's loopback at 10.0.2.2";
            return Err(Error::new(Code::Denied, words)
                .hint(Hint::command_line(
                    "use --socket PATH, which only its owner can use, or create a token: nido token create --name NAME --scope run --only mcp",
                ))
                .into());
        }
        let nido = Arc::new(cx.nido().await?);
        let settings = settings.with_plain_rules(&nido).await?;
        let agents = agents(cx, Arc::clone(&nido), settings, &DefaultPaths::default())?;
        let owner = Arc::clone(&nido);
        serve(nido, Some(agents), options, |address| cx.listening(address, &owner)).await?;
        Ok(Exit::Success)
    }
}
