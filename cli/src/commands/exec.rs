//! `exec`: a command in the guest, as if it ran here.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use nido_api::ExecRequest;
use nido_api::error::{Code, Error, Hint};
use nido_api::name::VmName;
use nido_api::operation as op;

use super::Context;
use crate::exit::Outcome;
use crate::{audit, parse, session, terminal};

const EXAMPLES: &str = "\
Examples:
  nido exec web -- uname -a
  nido exec web -w /srv -e LANG=C -u user -- ls -l
  tar c . | nido exec -i web -- tar x -C /srv
  nido exec -it web -- htop
  nido exec web --timeout 30s -- make test
  nido exec web --json -- id | jq .stdout

Without -i the command's standard input is empty. Background processes of the command keep running
after it has ended; a timeout, an interrupt or a killed nido ends them together with the command.
The exit code is the command's; 128+n if signal n killed it, 124 after its timeout, 125 if nido
failed, 126 if it cannot be run, 127 if it was not found. Ctrl-C interrupts the command; a second
one terminates it; a third one kills it and ends nido. SIGTERM and SIGHUP are passed on; if the
command does not end within some seconds, nido kills it and exits. On a terminal the command's
control characters are escaped, except with -t or --raw.";

/// Run a command in a VM
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Name of the VM
    name: VmName,
    #[command(flatten)]
    how: ExecArgs,
    /// Kill the command and its children after this time, for example 60s
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
    timeout: Option<u64>,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// How a command runs; shared with `run`.
#[derive(Debug, clap::Args)]
pub struct ExecArgs {
    /// Pass on standard input
    #[arg(long, short)]
    interactive: bool,
    /// Run on a terminal
    #[arg(long, short)]
    tty: bool,
    /// Write the guest's bytes to the terminal unescaped
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    place: PlaceArgs,
}

/// User and directory of a command; shared with `shell`.
#[derive(Debug, clap::Args)]
pub struct PlaceArgs {
    /// User in the guest: USER, USER:GROUP or :GROUP, by name or number [default: root]
    #[arg(long, short, value_name = "USER")]
    user: Option<String>,
    /// Directory in the guest [default: the user's home]
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<OsString>,
    /// Variable for the command; may be repeated. KEY alone passes on the value it has here
    #[arg(long, short, value_name = "KEY=VALUE")]
    env: Vec<OsString>,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let raw = self.how.raw;
        let request = self.how.request(self.command, self.timeout, cx.output.json)?;
        let nido = cx.nido().await?;
        let arguments = audit::exec(&self.name, &request);
        let command = session::run(&cx.output, &nido, &self.name, request, raw);
        cx.audited_command(&nido, op::VM_EXEC, arguments, command).await
    }
}

impl ExecArgs {
    /// Whether the guest's bytes reach the terminal as they are.
    pub const fn raw(&self) -> bool {
        self.raw
    }

    /// The core's request.
    pub fn request(self, command: Vec<OsString>, timeout_ms: Option<u64>, json: bool) -> Result<ExecRequest, Error> {
        if self.tty && json {
            return Err(
                Error::new(Code::SpecInvalid, "-t and --json exclude each other").hint(Hint::command_line("omit -t"))
            );
        }
        if self.tty {
            terminal::require(self.interactive, "-t", "omit -t")?;
        }
        let request = self.place.request(self.tty)?;
        let argv = command.into_iter().map(OsStringExt::into_vec).collect();
        Ok(ExecRequest { argv, stdin: self.interactive, timeout_ms, ..request })
    }
}

impl PlaceArgs {
    /// The core's request, still without a command.
    pub fn request(self, pty: bool) -> Result<ExecRequest, Error> {
        let own = |key: &OsString| std::env::var_os(key);
        Ok(ExecRequest {
            env: self.env.into_iter().map(|text| parse::variable(text, own)).collect::<Result<_, _>>()?,
            directory: self.workdir.map(OsStringExt::into_vec),
            user: self.user,
            pty: pty.then(terminal::size),
            term: if pty { std::env::var("TERM").ok() } else { None },
            ..ExecRequest::default()
        })
    }
}
