//! `secret`: credentials that the engine puts into the requests of VMs, which never have them.

use std::io::{IsTerminal as _, Read as _};
use std::path::PathBuf;

use clap::Subcommand;
use nido_api::error::{Code, Error};
use nido_api::name::SecretName;
use nido_api::operation as op;
use nido_api::{SECRET_BYTES_MAX, SecretInfo, SecretValue};
use serde_json::json;

use super::Context;
use super::confirmation::Confirmation;
use crate::exit::{Exit, Outcome};
use crate::output::table;

const EXAMPLES: &str = "\
Examples:
  nido secret set github < token.txt
  nido secret set github --file token.txt
  nido secret set github --command gh auth token
  nido spawn bot --net restricted --allow api.github.com:443 --secret github@api.github.com
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
        /// Program that prints the value, and its arguments; it is run now, and not again
        #[arg(long, num_args = 1.., allow_hyphen_values = true, value_name = "COMMAND")]
        command: Vec<String>,
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
                let stored = async { nido.secret_set(&name, &value(file, &command)?) };
                let arguments = json!({ "name": name, "source": source });
                let stored = cx.audited(&nido, op::SECRET_SET, arguments, stored).await?;
                cx.output.answer(&stored, || format!("{}\n", stored.name))?;
            }
            Verb::List => {
                let list = nido.secret_list()?;
                cx.output.answer(&list, || {
                    if cx.output.quiet {
                        return list.secrets.iter().map(|secret| format!("{}\n", secret.name)).collect();
                    }
                    table(["NAME", "UPDATED"], list.secrets.iter().map(row))
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

fn row(secret: &SecretInfo) -> [String; 2] {
    [secret.name.to_string(), secret.updated_at.to_string()]
}

/// The value, from where the user has it.
fn value(file: Option<PathBuf>, command: &[String]) -> Result<SecretValue, Error> {
    let most = SECRET_BYTES_MAX as u64 + 3;
    let mut bytes = Vec::new();
    match (file, command.split_first()) {
        (Some(path), _) => {
            let opened = std::fs::File::open(&path).and_then(|file| file.take(most).read_to_end(&mut bytes));
            opened.map_err(|e| Error::io_at("read", &path, e))?;
        }
        (None, Some((program, arguments))) => {
            let failed = |why: String| Error::new(Code::SpecInvalid, format!("the command of the secret {why}"));
            let stderr = std::process::Stdio::inherit();
            let run = std::process::Command::new(program).args(arguments).stderr(stderr).output();
            let output = run.map_err(|e| failed(format!("cannot be started: {e}")))?;
            if !output.status.success() {
                return Err(failed(format!("failed: {}", output.status)));
            }
            bytes = output.stdout;
        }
        (None, None) => {
            let input = std::io::stdin();
            if input.is_terminal() {
                return Err(Error::new(
                    Code::SpecInvalid,
                    "standard input is a terminal, on which the secret would be seen",
                )
                .hint("redirect a file or pipe a program's output, or use --file or --command"));
            }
            input.take(most).read_to_end(&mut bytes).map_err(|e| Error::io("cannot read the secret", e))?;
        }
    }
    SecretValue::new(bytes)
}
