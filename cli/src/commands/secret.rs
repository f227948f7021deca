//! `secret`: credentials that the engine puts into the requests of VMs, which never have them.

use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal as _, Read as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use clap::Subcommand;
use jiff::Timestamp;
use nido_api::error::{Code, Error};
use nido_api::name::SecretName;
use nido_api::operation as op;
use nido_api::{SECRET_BYTES_MAX, SecretInfo, SecretValue};
use nido_core::Nido;
use serde_json::json;
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;
use tokio::time::timeout;

use super::Context;
use super::confirmation::Confirmation;
use crate::exit::{Exit, Failure, Outcome};
use crate::output::table;
use crate::parse;

/// How long a command that prints a secret may take, unless the user sets another limit.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(120);
/// How much is read: a value, a line end, and one byte more than there may be.
const READ_MAX: u64 = SECRET_BYTES_MAX as u64 + 3;

const EXAMPLES: &str = "\
Examples:
  nido secret set github < token.txt
  nido secret set github --file token.txt
  nido secret set github --command gh auth token
  nido spawn bot --net restricted --allow api.github.com:443 --secret github@api.github.com
  nido secret refresh --all --older 50m
  nido secret list
  nido secret delete github

The guest sends the placeholder nido-secret-NAME in the header, for example
'Authorization: Bearer nido-secret-github'. The value is put in its place on the host, in requests
over TLS to that host only.";

/// Manage secrets that VMs use without having them
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Store a secret, or replace its value
    Set {
        /// Name of the secret
        name: SecretName,
        /// File with the value [default: standard input]
        #[arg(long, conflicts_with = "command")]
        file: Option<PathBuf>,
        /// Program that prints the value, and its arguments; run now, and again by secret refresh
        #[arg(long, num_args = 1.., allow_hyphen_values = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Run the commands of secrets again, and store what they print
    Refresh {
        /// Name of the secret
        #[arg(required_unless_present = "all", value_name = "NAME")]
        secrets: Vec<SecretName>,
        /// All secrets that have a command
        #[arg(long, conflicts_with = "secrets")]
        all: bool,
        /// Only values that are older than this, for example 50m
        #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
        older: Option<u64>,
        /// Time limit of each command [default: 2m]
        #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
        timeout: Option<u64>,
    },
    /// List secrets, without their values
    #[command(visible_alias = "ls")]
    List,
    /// Delete secrets
    #[command(visible_alias = "rm")]
    Delete {
        /// Name of the secret
        #[arg(required = true, value_name = "NAME")]
        secrets: Vec<SecretName>,
        #[command(flatten)]
        confirmation: Confirmation,
    },
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        match self.verb {
            Verb::Set { name, file, command } => {
                let source = match (&file, command.first()) {
                    (Some(_), _) => "file",
                    (None, Some(_)) => "command",
                    (None, None) => "stdin",
                };
                let command: Vec<_> = command.into_iter().map(OsString::into_vec).collect();
                let stored = async {
                    if command.is_empty() {
                        return nido.secret_set(&name, &value(file)?);
                    }
                    nido.secret_set_with_command(&name, &printed(&command, None).await?, &command)
                };
                let arguments = json!({ "name": name, "source": source });
                let stored = cx.audited(&nido, op::SECRET_SET, arguments, stored).await?;
                cx.output.answer(&stored, || format!("{}\n", stored.name))?;
            }
            Verb::Refresh { secrets, all, older, timeout } => {
                return refresh(cx, &nido, &Refresh { secrets, all, older_ms: older, timeout_ms: timeout }).await;
            }
            Verb::List => {
                let list = nido.secret_list()?;
                cx.output.answer(&list, || {
                    if cx.output.quiet {
                        return list.secrets.iter().map(|secret| format!("{}\n", secret.name)).collect();
                    }
                    table(["NAME", "UPDATED", "REFRESH"], list.secrets.iter().map(row))
                })?;
            }
            Verb::Delete { secrets, confirmation } => {
                if !confirmation.given(cx, "delete? Requests of VMs that use the secret fail") {
                    return Ok(Exit::Failure);
                }
                let mut all = Vec::new();
                for name in &secrets {
                    let gone = async { nido.secret_delete(name) };
                    all.push(cx.audited(&nido, op::SECRET_DELETE, json!({ "name": name }), gone).await?);
                }
                cx.answer_each("secrets", &all, |gone| format!("{}\n", gone.name))?;
            }
        }
        Ok(Exit::Success)
    }
}

/// Which secrets are refreshed, and how long each may take.
struct Refresh {
    secrets: Vec<SecretName>,
    all: bool,
    older_ms: Option<u64>,
    timeout_ms: Option<u64>,
}

/// Runs the commands of secrets. A secret whose command fails keeps its value, and the others are refreshed nevertheless.
async fn refresh(cx: &Context, nido: &Nido, request: &Refresh) -> Outcome {
    let stored = nido.secret_list()?.secrets;
    let is_due = |secret: &SecretInfo| {
        request
            .older_ms
            .is_none_or(|age| Timestamp::now().duration_since(secret.updated_at).as_millis() >= i128::from(age))
    };
    let is_chosen = |name: &SecretName| stored.iter().find(|one| one.name == *name).is_none_or(is_due);
    let names: Vec<_> = if request.all {
        stored.iter().filter(|one| one.refreshable && is_due(one)).map(|one| one.name.clone()).collect()
    } else {
        request.secrets.iter().filter(|name| is_chosen(name)).cloned().collect()
    };
    let (mut all, mut failed) = (Vec::new(), None);
    for name in &names {
        let refreshed = async {
            let command = nido.secret_command(name)?;
            let value = printed(&command, request.timeout_ms).await?;
            nido.secret_refreshed(name, &value, &command)
        };
        match cx.audited(nido, op::SECRET_REFRESH, json!({ "name": name }), refreshed).await {
            Ok(info) => all.push(info),
            Err(Failure::Nido(error)) if names.len() > 1 => {
                cx.output.warn(&format!("{name} keeps its value: {error}"));
                failed = Some(error);
            }
            Err(failure) => return Err(failure),
        }
    }
    cx.answer_each("secrets", &all, |one| format!("{}\n", one.name))?;
    failed.map_or(Ok(Exit::Success), |error| Err(error.into()))
}

fn row(secret: &SecretInfo) -> [String; 3] {
    let refresh = if secret.refreshable { "command" } else { "-" };
    [secret.name.to_string(), secret.updated_at.to_string(), refresh.into()]
}

/// The value, from a file or standard input.
fn value(file: Option<PathBuf>) -> Result<SecretValue, Error> {
    let mut bytes = Vec::new();
    match file {
        Some(path) => {
            let opened = std::fs::File::open(&path).and_then(|file| file.take(READ_MAX).read_to_end(&mut bytes));
            opened.map_err(|e| Error::io_at("read", &path, e))?;
        }
        None => {
            let input = io::stdin();
            if input.is_terminal() {
                return Err(Error::new(
                    Code::SpecInvalid,
                    "standard input is a terminal, on which the secret would be seen",
                )
                .hint("redirect a file or pipe a program's output, or use --file or --command"));
            }
            input.take(READ_MAX).read_to_end(&mut bytes).map_err(|e| Error::io("cannot read the secret", e))?;
        }
    }
    SecretValue::new(bytes)
}

/// What a command prints. When this returns, the command has ended, or was killed.
async fn printed(command: &[Vec<u8>], timeout_ms: Option<u64>) -> Result<SecretValue, Error> {
    let failed = |why: String| Error::new(Code::SpecInvalid, format!("the command of the secret {why}"));
    let mut words = command.iter().map(|word| OsStr::from_bytes(word));
    let Some(program) = words.next() else { return Err(failed("is empty".into())) };
    let limit = timeout_ms.map_or(COMMAND_TIMEOUT, Duration::from_millis);
    let mut child = Command::new(program)
        .args(words)
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| failed(format!("cannot be started: {e}")))?;
    let output = async {
        let mut bytes = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            stdout.take(READ_MAX).read_to_end(&mut bytes).await?;
        }
        Ok((child.wait().await?, bytes))
    };
    let ended: Result<io::Result<_>, _> = timeout(limit, output).await;
    let Ok(ended) = ended else {
        // A background process of it may hold its output open; it is waited for no longer.
        let _ = child.kill().await;
        return Err(failed(format!("did not end within {} s", limit.as_secs_f64())));
    };
    let (status, bytes) = ended.map_err(|e| failed(format!("cannot be read: {e}")))?;
    if !status.success() {
        return Err(failed(format!("failed: {status}")));
    }
    SecretValue::new(bytes)
}
