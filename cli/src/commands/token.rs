//! `token`: who may use the servers, and for what.

use std::net::IpAddr;

use clap::Subcommand;
use nido_api::error::{Code, Error};
use nido_api::name::{TemplateName, VmName};
use nido_api::operation as op;
use nido_api::{AllowEntry, Limits, NetChoice, Scope, SecretUse, TokenAudience, TokenInfo, TokenRequest};
use nido_core::Nido;
use serde_json::{Value, json};

use super::Context;
use super::confirmation::Confirmation;
use crate::exit::{Exit, Outcome};
use crate::output::table;
use crate::parse;

const EXAMPLES: &str = "\
Examples:
  nido token create --name ci --scope run --expires 30d
  nido token create --name agents --scope run --only mcp
  nido token create --name guests --scope run --max-vms 3 --max-memory 1G --ttl-max 1h --net none --publish none
  nido token list
  nido token revoke ci

Scopes: read allows reading VMs, logs and events; run also creating, using and deleting VMs; admin
also templates, pools, webhooks and the audit log. Create tokens for agents with --only mcp: any
other token also gives access to the REST API of the same server, which has no policy and no
confirmation. A token is shown only once; nido stores a hash.";

/// Manage access tokens of the servers
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Create a token and print it, once
    Create {
        /// Name of the token in lists and in the audit log
        #[arg(long)]
        name: String,
        /// Scope: read, run or admin
        #[arg(long)]
        scope: Scope,
        /// Part of a server to restrict it to: mcp [default: all]
        #[arg(long, value_name = "PART")]
        only: Option<TokenAudience>,
        /// Validity, like 12h or 30d [default: does not expire]
        #[arg(long, value_name = "DURATION", value_parser = parse::duration_ms)]
        expires: Option<u64>,
        #[command(flatten)]
        limits: Box<LimitArgs>,
    },
    /// List tokens, without their secrets
    #[command(visible_alias = "ls")]
    List,
    /// Revoke tokens at once
    #[command(visible_alias = "rm")]
    Revoke {
        /// Name or id of the token
        #[arg(required = true, value_name = "NAME")]
        tokens: Vec<String>,
        #[command(flatten)]
        confirmation: Confirmation,
    },
}

const HEAD: [&str; 7] = ["NAME", "SCOPE", "ONLY", "ID", "CREATED", "EXPIRES", "LIMITS"];

/// Limits of VMs that are created with a token; absent ones do not apply.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Limits of VMs that are created with it")]
struct LimitArgs {
    /// VMs at a time
    #[arg(long, value_name = "N")]
    max_vms: Option<u32>,
    /// Virtual CPUs of one VM
    #[arg(long, value_name = "N")]
    max_cpus: Option<u32>,
    /// Memory of one VM
    #[arg(long, value_name = "SIZE", value_parser = parse::memory_mib)]
    max_memory: Option<u32>,
    /// Disk of one VM
    #[arg(long, value_name = "SIZE", value_parser = parse::size)]
    max_disk: Option<u64>,
    /// Longest time to live of a VM, which then needs one
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
    ttl_max: Option<u64>,
    /// Every VM needs a time to live
    #[arg(long)]
    ttl_required: bool,
    /// Networks that a VM may have
    #[arg(long, value_name = "KIND", value_delimiter = ',', value_parser = network)]
    net: Option<Vec<NetChoice>>,
    /// Rule or @PRESET that covers rules of a VM, which then has net restricted or none; may be repeated; 'none' for no rule
    #[arg(long, value_name = "RULE", value_parser = parse::allowed)]
    allow: Option<Vec<Option<AllowEntry>>>,
    /// Addresses of the host on which ports may be published; 'none' for no address
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',', value_parser = address)]
    publish: Option<Vec<Option<IpAddr>>>,
    /// Templates that may be used
    #[arg(long, value_name = "TEMPLATE", value_delimiter = ',')]
    templates: Option<Vec<TemplateName>>,
    /// Secret that a VM may use, with its host and header; may be repeated [default: none]
    #[arg(long, value_name = "NAME@HOST[:HEADER]")]
    secret: Option<Vec<SecretUse>>,
}

impl From<LimitArgs> for Limits {
    fn from(args: LimitArgs) -> Self {
        Self {
            max_vms: args.max_vms,
            max_cpus: args.max_cpus,
            max_memory_mib: args.max_memory,
            max_disk_bytes: args.max_disk,
            ttl_max_ms: args.ttl_max,
            ttl_required: args.ttl_required,
            net: args.net,
            allow: args.allow.map(|entries| entries.into_iter().flatten().collect()),
            publish: args.publish.map(|addresses| addresses.into_iter().flatten().collect()),
            templates: args.templates,
            secrets: args.secret,
        }
    }
}

fn network(word: &str) -> Result<NetChoice, Error> {
    serde_json::from_value(word.into())
        .map_err(|_| Error::new(Code::SpecInvalid, format!("'{}' is not a network", word.escape_debug())))
}

fn address(word: &str) -> Result<Option<IpAddr>, Error> {
    if word == "none" {
        return Ok(None);
    }
    let wrong =
        |_| Error::new(Code::SpecInvalid, format!("'{}' is neither an IP address nor 'none'", word.escape_debug()));
    word.parse().map(Some).map_err(wrong)
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        match self.verb {
            Verb::Create { name, scope, only, expires: expires_in_ms, limits } => {
                let request = TokenRequest { name, scope, only, expires_in_ms, limits: (*limits).into() };
                let arguments = json!(request);
                let made = async {
                    let limits = nido.with_plain_rules(request.limits).await?;
                    nido.token_create(&TokenRequest { limits, ..request })
                };
                let made = cx.audited(&nido, op::TOKEN_CREATE, arguments, made).await?;
                cx.output.answer(&made, || format!("{}\n", made.token))?;
                cx.output.note("this is the only time it is shown");
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
            Verb::Revoke { tokens, confirmation } => {
                if !confirmation.given(cx, "revoke? Programs that use the token lose access") {
                    return Ok(Exit::Failure);
                }
                let mut all = Vec::new();
                for named in &tokens {
                    let gone = async { nido.token_revoke(named) };
                    all.push(cx.audited(&nido, op::TOKEN_REVOKE, revoked(&nido, named)?, gone).await?);
                }
                cx.answer_each("tokens", &all, |gone| format!("{}\n", gone.name))?;
            }
        }
        Ok(Exit::Success)
    }
}

/// The token that is revoked, as the audit log has it: once it is deleted, the owner of the id is unknown. What cannot be a name is
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

fn row(token: &TokenInfo) -> [String; 7] {
    [
        token.name.clone(),
        token.scope.word().into(),
        token.only.map_or("-", TokenAudience::word).into(),
        token.id.clone(),
        format!("{:.0}", token.created_at),
        token.expires_at.map_or_else(|| "never".into(), |end| format!("{end:.0}")),
        if token.limits.is_none() { "-".into() } else { crate::output::json(&token.limits, false) },
    ]
}
