//! `net`: the network of a VM, and its rules.

use clap::Subcommand;
use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;
use nido_api::operation as op;
use nido_api::{AllowEntry, EgressRule, PresetInfo, PresetList, PresetName, RuleChangeResult, VmNetwork};
use serde_json::json;

use super::Context;
use super::info::{limits, preset_rules, traffic};
use crate::exit::{Exit, Outcome};
use crate::output::{pairs, table};

const EXAMPLES: &str = "\
Examples:
  nido net show web                       rules, traffic and refusals, each with the rule that allows it
  nido net allow web pypi.org host:5432
  nido net allow web @pip                 the servers of the host's pip
  nido net presets pip
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
    /// List presets with their rules
    Presets {
        /// Name of a preset [default: all]
        name: Option<PresetName>,
    },
}

#[derive(Debug, clap::Args)]
struct RulesArgs {
    /// Name of the VM
    name: VmName,
    /// Rules: a domain name, *.NAME, an address, a network or host:PORT, with ports (80,443 if absent); or @PRESET
    #[arg(value_name = "RULE", required = true)]
    rules: Vec<AllowEntry>,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        match self.verb {
            Verb::Show { name } => {
                let network = nido.net_show(&name).await?;
                cx.output.answer(&network, || pairs(&facts(&name, &network)))?;
            }
            Verb::Presets { name } => {
                let list = selected(nido.net_presets().await?, name.as_ref())?;
                let is_one = name.is_some();
                cx.output.answer(&list, || if is_one { described(&list) } else { listed_presets(&list) })?;
                if !cx.output.json {
                    list.damaged.iter().for_each(|damage| cx.output.warn(damage));
                }
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
    facts.extend(preset_rules(&shown.presets));
    facts.extend(limits(&shown.limits));
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

/// The presets of the list, or the one with this name.
fn selected(list: PresetList, name: Option<&PresetName>) -> Result<PresetList> {
    let Some(name) = name else { return Ok(list) };
    let presets: Vec<_> = list.presets.into_iter().filter(|preset| preset.name == *name).collect();
    if presets.is_empty() {
        return Err(
            Error::new(Code::SpecInvalid, format!("there is no preset '{name}'")).hint("nido net presets lists all")
        );
    }
    Ok(PresetList { presets, damaged: list.damaged })
}

fn listed_presets(list: &PresetList) -> String {
    let rows = list.presets.iter().map(|preset| {
        let rules = preset.rules.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        let rules = preset.error.as_ref().map_or(rules, |why| format!("- ({why})"));
        [preset.name.to_string(), preset.source.clone(), rules]
    });
    table(["NAME", "SOURCE", "RULES"], rows)
}

fn described(list: &PresetList) -> String {
    let facts = |preset: &PresetInfo| {
        let mut facts = vec![("name", preset.name.to_string()), ("description", preset.description.clone())];
        facts.push(("source", preset.source.clone()));
        facts.extend(preset.read.iter().map(|read| ("read", read.clone())));
        facts.extend(preset.rules.iter().map(|rule| ("rule", rule.to_string())));
        facts.extend(preset.warnings.iter().map(|warning| ("warning", warning.clone())));
        facts.extend(preset.error.iter().map(|why| ("error", why.clone())));
        facts
    };
    pairs(&list.presets.iter().flat_map(facts).collect::<Vec<_>>())
}
