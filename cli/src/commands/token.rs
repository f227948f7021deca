//! `token`: who may use the servers, and for what.

use clap::Subcommand;
use nido_vmm::api::{Door, Scope, TokenInfo, TokenRequest};
use nido_vmm::error::Error;
use nido_vmm::name::VmName;
use nido_vmm::nido::Nido;
use serde_json::{Value, json};

use super::Context;
use crate::exit::{Exit, Outcome};
use crate::output::table;
use crate::parse;

const EXAMPLES: &str = "\
Examples:
  nido token create --name ci --scope run --expires 30d
  nido token create --name agents --scope run --only mcp
  nido token list
  nido token revoke ci

Scopes: read looks at VMs, logs and events; run also makes, uses and deletes VMs; admin also templates, pools,
webhooks and the audit log. A token for agents is --only mcp: any other is good for the REST API of the same server, too,
where neither the policy of the MCP server nor its questions to a person hold. A token is shown once, when it is made; nido keeps only a hash of it.";

/// Manage the tokens of the servers
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a token and show it, once
    Create {
        /// What it is called in lists and in the audit log
        #[arg(long)]
        name: String,
        /// What it is good for: read, run or admin
        #[arg(long)]
        scope: Scope,
        /// The one part of a server that it is good for: mcp; all of it if absent
        #[arg(long, value_name = "PART")]
        only: Option<Door>,
        /// How long it is good, like 12h or 30d; for ever if absent
        #[arg(long, value_name = "DURATION", value_parser = parse::duration_ms)]
        expires: Option<u64>,
    },
    /// List the tokens there are, without their secrets
    #[command(visible_alias = "ls")]
    List,
    /// Revoke tokens, at once
    #[command(visible_alias = "rm")]
    Revoke {
        /// Name or id
        #[arg(required = true, value_name = "NAME")]
        tokens: Vec<String>,
    },
}

const HEAD: [&str; 6] = ["NAME", "SCOPE", "ONLY", "ID", "CREATED", "EXPIRES"];

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        match self.verb {
            Verb::Create { name, scope, only, expires } => {
                let arguments = json!({ "name": name, "scope": scope, "only": only, "expires_in_ms": expires });
                let made = async { nido.token_create(&TokenRequest { name, scope, only, expires_in_ms: expires }) };
                let made = cx.audited(&nido, "token_create", arguments, made).await?;
                cx.output.answer(&made, || format!("{}\n", made.token))?;
                cx.output.talk("this is the only time it is shown");
            }
            Verb::List => {
                let list = nido.token_list()?;
                cx.output.answer(&list, || {
                    if cx.output.quiet {
                        return list.tokens.iter().map(|token| format!("{}\n", token.name)).collect();
                    }
                    table(HEAD, list.tokens.iter().map(row))
                })?;
            }
            Verb::Revoke { tokens } => {
                for named in tokens {
                    let gone = async { nido.token_revoke(&named) };
                    let gone = cx.audited(&nido, "token_revoke", revoked(&nido, &named)?, gone).await?;
                    cx.output.answer(&gone, || format!("{}\n", gone.name))?;
                }
            }
        }
        Ok(Exit::Success)
    }
}

/// The token that is revoked, as the audit log has it: once it is gone, nobody knows whose id that was. What cannot be a name is
/// left out; it may be the token itself.
fn revoked(nido: &Nido, named: &str) -> Result<Value, Error> {
    let tokens = nido.token_list()?.tokens;
    let is_named = named.parse::<VmName>().is_ok();
    Ok(match tokens.iter().find(|token| token.name == named || token.id == named) {
        Some(token) => json!({ "name": token.name, "id": token.id }),
        None if is_named => json!({ "name": named }),
        None => json!({ "name": { "bytes": named.len() } }),
    })
}

fn row(token: &TokenInfo) -> [String; 6] {
    [
        token.name.clone(),
        token.scope.word().into(),
        token.only.map_or("-", Door::word).into(),
        token.id.clone(),
        format!("{:.0}", token.created_at),
        token.expires_at.map_or_else(|| "never".into(), |end| format!("{end:.0}")),
    ]
}
