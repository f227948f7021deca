//! One file per verb: its flags, its help, its run.
//!
//! Invariant: a verb calls the core, and nothing but the core, for whatever it does to a VM.

mod agents;
mod api_server;
mod approvals;
mod approve;
mod audit;
mod completions;
mod confirmation;
mod copy;
mod cp;
mod create;
mod delete;
mod deliver;
mod doctor;
mod download;
mod events;
mod exec;
mod fork;
mod forward;
mod info;
mod listen_args;
mod logs;
mod ls;
mod man;
mod mcp_install;
mod mcp_server;
mod net;
mod pause;
mod pool;
mod pool_fill;
mod proxy;
mod restart;
mod restart_by_policy;
mod resume;
mod run;
mod secret;
mod selection;
mod shell;
mod snapshot;
mod spawn;
mod start;
mod stop;
mod supervise;
mod template;
mod token;
mod upload;
mod vm_args;
mod watch;
mod webhook;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::context::{Context, Global};
use crate::exit::{Codes, Outcome};

const EXAMPLES: &str = "\
Examples:
  nido template build sandbox          build the default template, once
  nido spawn web                       create a VM, start it, wait until it is ready
  nido exec web -- uname -a            run a command in it
  nido upload web ./site /srv/site     copy a file or a directory into it
  nido delete web --force --yes        delete it
  nido run -- python3 -c 'print(42)'   the same in one: a VM for a single command

Exit codes: exec, run and shell return the command's exit code; 124 timeout, 125 nido failed, 126
the command cannot be run, 127 it was not found, 128+n it was killed by signal n. Other commands:
0 success, 1 failure, 2 usage error, 70 defect of nido.";

/// Disposable virtual machines from one command: nido creates, runs and deletes QEMU microVMs.
#[derive(Debug, Parser)]
#[command(name = "nido", version, after_help = EXAMPLES, propagate_version = false, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

/// The commands of nido.
#[derive(Debug, Subcommand)]
pub enum Verb {
    Spawn(spawn::Args),
    Create(create::Args),
    Start(start::Args),
    Stop(stop::Args),
    Pause(pause::Args),
    Resume(resume::Args),
    Restart(restart::Args),
    Delete(delete::Args),
    Ls(ls::Args),
    Info(info::Args),
    Exec(exec::Args),
    Shell(shell::Args),
    Run(run::Args),
    Upload(upload::Args),
    Download(download::Args),
    Cp(cp::Args),
    Logs(logs::Args),
    Events(events::Args),
    Forward(forward::Args),
    Net(net::Args),
    Proxy(proxy::Args),
    Snapshot(snapshot::Args),
    Fork(fork::Args),
    Template(template::Args),
    Pool(pool::Args),
    ApiServer(api_server::Args),
    McpServer(mcp_server::Args),
    Secret(secret::Args),
    Token(token::Args),
    Audit(audit::Args),
    Approvals(approvals::Args),
    Approve(approve::Args),
    Deny(approve::DenyArgs),
    Webhook(webhook::Args),
    Doctor(doctor::Args),
    Completions(completions::Args),
    Man(man::Args),
    #[command(hide = true)]
    Supervise(supervise::Args),
    #[command(hide = true)]
    Watch(watch::Args),
    #[command(hide = true)]
    RestartByPolicy(restart_by_policy::Args),
    #[command(hide = true)]
    PoolFill(pool_fill::Args),
    #[command(hide = true)]
    Deliver(deliver::Args),
}

impl Verb {
    /// Whose exit codes count.
    pub const fn codes(&self) -> Codes {
        match self {
            Self::Exec(_) | Self::Run(_) | Self::Shell(_) => Codes::Guest,
            _ => Codes::Own,
        }
    }

    /// Whether it serves many callers at once.
    pub const fn serves(&self) -> bool {
        matches!(self, Self::ApiServer(_) | Self::McpServer(_))
    }

    /// Whether its process stays when the command that has started it is over.
    pub const fn stays(&self) -> bool {
        matches!(
            self,
            Self::Supervise(_) | Self::Watch(_) | Self::RestartByPolicy(_) | Self::PoolFill(_) | Self::Deliver(_)
        )
    }

    /// Whether it is there to give space back: a full disk does not keep it from that.
    pub const fn frees_space(&self) -> bool {
        matches!(self, Self::Delete(_) | Self::Stop(_) | Self::Snapshot(_) | Self::Template(_) | Self::Doctor(_))
    }

    /// Does it.
    pub async fn run(self, cx: &Context) -> Outcome {
        match self {
            Self::Spawn(args) => args.run(cx).await,
            Self::Create(args) => args.run(cx).await,
            Self::Start(args) => args.run(cx).await,
            Self::Stop(args) => args.run(cx).await,
            Self::Pause(args) => args.run(cx).await,
            Self::Resume(args) => args.run(cx).await,
            Self::Restart(args) => args.run(cx).await,
            Self::Delete(args) => args.run(cx).await,
            Self::Ls(args) => args.run(cx).await,
            Self::Info(args) => args.run(cx).await,
            Self::Exec(args) => args.run(cx).await,
            Self::Shell(args) => args.run(cx).await,
            Self::Run(args) => Box::pin(args.run(cx)).await,
            Self::Upload(args) => args.run(cx).await,
            Self::Download(args) => args.run(cx).await,
            Self::Cp(args) => args.run(cx).await,
            Self::Logs(args) => args.run(cx).await,
            Self::Events(args) => args.run(cx).await,
            Self::Forward(args) => args.run(cx).await,
            Self::Net(args) => args.run(cx).await,
            Self::Proxy(args) => args.run(cx).await,
            Self::Snapshot(args) => args.run(cx).await,
            Self::Fork(args) => Box::pin(args.run(cx)).await,
            Self::Template(args) => Box::pin(args.run(cx)).await,
            Self::Pool(args) => Box::pin(args.run(cx)).await,
            Self::ApiServer(args) => Box::pin(args.run(cx)).await,
            Self::McpServer(args) => Box::pin(args.run(cx)).await,
            Self::Secret(args) => args.run(cx).await,
            Self::Token(args) => args.run(cx).await,
            Self::Audit(args) => args.run(cx).await,
            Self::Approvals(args) => args.run(cx).await,
            Self::Approve(args) => args.run(cx).await,
            Self::Deny(args) => args.run(cx).await,
            Self::Webhook(args) => args.run(cx).await,
            Self::Doctor(args) => args.run(cx).await,
            Self::Completions(args) => args.run(cx),
            Self::Man(args) => args.run(cx),
            Self::Supervise(args) => Box::pin(args.run(cx)).await,
            Self::Watch(args) => args.run(cx).await,
            Self::RestartByPolicy(args) => args.run(cx).await,
            Self::PoolFill(args) => Box::pin(args.run(cx)).await,
            Self::Deliver(args) => args.run(cx).await,
        }
    }
}

/// Begins to log to stderr, if that was requested. Supervisors, pool fillers and delivery workers always log: their stderr is
/// their log file.
pub fn start_log(cli: &Cli) {
    let told = match (cli.global.verbose, &cli.verb) {
        (0, verb) if verb.stays() => "info",
        // A server's stderr is its log, or its client keeps it. The protocol's library warns of every answer that is an error, and of clients that
        // have disconnected: the client has been notified, or is gone.
        (0, Verb::McpServer(_) | Verb::ApiServer(_)) => "warn,rmcp=off",
        (0, _) => return,
        // Below a warning the protocol's library writes whole messages: standard input, environment, contents of files.
        (1, _) => "debug,rmcp=warn",
        (_, _) => "trace,rmcp=warn",
    };
    let told = EnvFilter::new(told);
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(told)
        .with_ansi(false)
        // A line that cannot be written (the disk is full, the reader is gone) would be reported on the same stderr, with a
        // panic if that fails, too: a supervisor must outlive its log.
        .log_internal_errors(false)
        .init();
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::CommandFactory as _;
    use nido_api::operation;

    use super::Cli;

    /// Commands that are no operation on a home: servers, help, the processes of nido itself; and `cp`, which is uploads and downloads.
    const NO_OPERATION: [&str; 13] = [
        "cp",
        "api-server start",
        "api-server openapi",
        "mcp-server start",
        "mcp-server install",
        "completions",
        "man",
        "supervise",
        "watch",
        "restart-by-policy",
        "pool-fill",
        "deliver",
        "doctor",
    ];

    /// The words of every command that has no commands of its own.
    fn leaves(command: &clap::Command, before: &str, all: &mut BTreeSet<String>) {
        for sub in command.get_subcommands() {
            let words = format!("{before} {}", sub.get_name()).trim().to_owned();
            match sub.has_subcommands() {
                true => leaves(sub, &words, all),
                false => drop(all.insert(words)),
            }
        }
    }

    #[test]
    fn the_commands_are_those_of_the_registry() {
        let mut commands = BTreeSet::new();
        leaves(&Cli::command(), "", &mut commands);
        let words = operation::ALL.iter().filter_map(|operation| operation.command);
        // What a flag selects is an operation of its own.
        let words = words.map(|words| words.split(" --").next().unwrap_or_default().to_owned());
        let expected: BTreeSet<_> = words.chain(NO_OPERATION.map(str::to_owned)).collect();
        assert_eq!(commands, expected);
    }
}
