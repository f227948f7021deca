//! `net`: the network of a VM, and its rules.

use clap::Subcommand;
use nido_api::name::VmName;
use nido_api::operation as op;
use nido_api::{EgressRule, RuleChangeResult, VmNetwork};
use serde_json::json;

use super::Context;
use super::info::traffic;
use crate::exit::{Exit, Outcome};
use crate::output::pairs;

const EXAMPLES: &str = "\
Examples:
  nido net show web                       rules, traffic and refusals, each with the rule that allows it
  nido net allow web pypi.org host:5432
  nido net deny web host:5432             resets connections that no rule allows any more

A running VM follows the rules at once, a stopped one when it starts.";

/// Show the network of a VM, change its rules
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show rules, traffic and refusals
    Show {
        /// Name of the VM
        name: VmName,
    },
    /// Allow destinations
    Allow(RulesArgs),
    /// Remove rules, named as listed
    Deny(RulesArgs),
}

#[derive(Debug, clap::Args)]
struct RulesArgs {
    /// Name of the VM
    name: VmName,
    /// Rules: a domain name, *.NAME, an address, a network or host:PORT, with ports (80,443 if absent)
    #[arg(value_name = "RULE", required = true)]
    rules: Vec<EgressRule>,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        match self.verb {
            Verb::Show { name } => {
                let network = nido.net_show(&name).await?;
                cx.output.answer(&network, || pairs(&facts(&name, &network)))?;
            }
            Verb::Allow(RulesArgs { name, rules }) => {
                let arguments = json!({ "name": name, "allow": rules });
                let grant = Context::grant();
                let changed = nido.net_allow(&name, rules, &grant);
                let changed = cx.audited(&nido, op::NET_ALLOW, arguments, changed).await?;
                if !cx.output.json {
                    changed.warnings.iter().for_each(|warning| cx.output.warn(warning));
                }
                cx.output.answer(&changed, || listed(&changed, cx.output.quiet))?;
            }
            Verb::Deny(RulesArgs { name, rules }) => {
                let arguments = json!({ "name": name, "rules": rules });
                let changed = nido.net_deny(&name, rules);
                let changed = cx.audited(&nido, op::NET_DENY, arguments, changed).await?;
                cx.output.answer(&changed, || listed(&changed, cx.output.quiet))?;
            }
        }
        Ok(Exit::Success)
    }
}

fn facts(name: &VmName, shown: &VmNetwork) -> Vec<(&'static str, String)> {
    let mut facts = vec![("network", shown.net.name().to_owned())];
    facts.extend(shown.allow.iter().map(|rule| ("allow", rule.to_string())));
    let remedy = |rule: &EgressRule| format!("nido net allow {name} '{rule}'");
    facts.extend(shown.network.as_ref().map(|network| traffic(network, remedy)).unwrap_or_default());
    facts.extend(shown.warnings.iter().map(|warning| ("warning", warning.clone())));
    facts
}

/// The changed rules, one a line, and those that are as they were.
fn listed(changed: &RuleChangeResult, quiet: bool) -> String {
    let of_change = changed.changed.iter().map(|rule| format!("{rule}\n"));
    let unchanged = changed.unchanged.iter().filter(|_| !quiet).map(|rule| format!("{rule} (unchanged)\n"));
    of_change.chain(unchanged).collect()
}
