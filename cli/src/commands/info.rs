//! `info`: everything about one VM.

use jiff::Timestamp;
use nido_api::egress::{Denial, NetworkInfo};
use nido_api::{EgressRule, NetLimitKey, NetLimits, PresetRules, VmInfo, VmList};

use super::Context;
use super::ls::between;
use super::selection::{Selection, every};
use crate::exit::{Codes, Exit, Outcome};
use crate::output::pairs;
use crate::parse::{show_bytes, show_seconds};

const EXAMPLES: &str = "\
Examples:
  nido info web
  nido info web db
  nido info web --json | jq .agent";

/// Show everything about a VM
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    vms: Selection,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let names = self.vms.names(&nido, every)?;
        if self.vms.is_one()
            && let [name] = &names[..]
        {
            let vm = nido.info(name).await?;
            cx.output.answer(&vm, || pairs(&facts(&vm, Timestamp::now())))?;
            return Ok(Exit::Success);
        }
        let (mut list, mut exit) = (VmList { vms: Vec::new() }, Exit::Success);
        for name in &names {
            match nido.info(name).await {
                Ok(vm) => list.vms.push(vm),
                Err(error) => {
                    cx.output.error(&error);
                    exit = Exit::of_error(&error, Codes::Own);
                }
            }
        }
        let shown = |vm: &VmInfo| pairs(&facts(vm, Timestamp::now()));
        cx.output.answer(&list, || list.vms.iter().map(shown).collect::<Vec<_>>().join("\n"))?;
        Ok(exit)
    }
}

fn facts(vm: &VmInfo, now: Timestamp) -> Vec<(&'static str, String)> {
    let mut facts = vec![
        ("name", vm.name.to_string()),
        ("id", vm.id.clone()),
        ("status", status(vm)),
        ("template", vm.template.to_string()),
        (
            "size",
            format!(
                "{} CPU, {} memory, {} disk",
                vm.cpus,
                show_bytes(u64::from(vm.memory_mib) << 20),
                show_bytes(vm.disk_bytes)
            ),
        ),
    ];
    facts.extend(machine(vm));
    let mut some = |key, value: Option<String>| facts.extend(value.map(|value| (key, value)));
    some("network", Some(vm.net.name().into()));
    for rule in &vm.allow {
        some("allow", Some(rule.to_string()));
    }
    facts.extend(preset_rules(&vm.presets));
    facts.extend(limits(&vm.net_limits));
    facts.extend(vm.network.as_ref().map(|network| traffic(network, as_option)).unwrap_or_default());
    let mut some = |key, value: Option<String>| facts.extend(value.map(|value| (key, value)));
    some("address", vm.ip_address.clone());
    some("ssh", vm.ssh_command.clone());
    for forward in &vm.forwards {
        some("forward", Some(forward.to_string()));
    }
    for (key, value) in &vm.labels {
        some("label", Some(format!("{key}={value}")));
    }
    some("ephemeral", vm.ephemeral.then(|| "yes".into()));
    let restarts = |count| if count == 0 { String::new() } else { format!(" ({count} so far)") };
    some("restart", (!vm.restart.is_no()).then(|| format!("{}{}", vm.restart.word(), restarts(vm.restarts))));
    some("session", vm.lease.as_ref().map(|lease| format!("{}; deleted when it ends", lease.as_str())));
    some("created", Some(past(vm.created_at, now)));
    some("started", vm.started_at.map(|at| past(at, now)));
    some("expires", vm.expires_at.map(|at| format!("{at:.0} (in {})", show_seconds(between(now, at)))));
    some("idle until", vm.idle_at.map(|at| format!("{at:.0} (in {})", show_seconds(between(now, at)))));
    some(
        "last start",
        vm.timings.map(|t| format!("{:.0} ms: QEMU {:.0} ms, guest {:.0} ms", t.total_ms, t.qemu_ms, t.agent_ms)),
    );
    for hit in &vm.limits_hit {
        some("limit hit", Some(format!("{} × {}", hit.count, hit.describe())));
    }
    for warning in &vm.warnings {
        some("warning", Some(warning.clone()));
    }
    if let Some(failure) = &vm.failure {
        some("failure", Some(failure.message.clone()));
        for line in &failure.log_tail {
            some("  |", Some(line.clone()));
        }
    }
    facts
}

/// What the VM runs on, and how its agent is reached.
fn machine(vm: &VmInfo) -> impl Iterator<Item = (&'static str, String)> {
    let facts = [
        ("machine", vm.machine.clone()),
        ("accel", vm.accel.clone()),
        ("isolation", vm.isolation.clone()),
        ("confinement", (!vm.confinement.is_empty()).then(|| vm.confinement.join(" "))),
        ("host limits", (!vm.host_limits.is_empty()).then(|| vm.host_limits.describe())),
        ("nested", vm.nested.then(|| "the guest can run VMs".to_owned())),
        ("reason", vm.machine_reason.clone()),
        ("agent", agent(vm)),
    ];
    facts.into_iter().filter_map(|(key, value)| Some((key, value?)))
}

/// The limits of the network that are not the usual ones.
pub(super) fn limits(limits: &NetLimits) -> Option<(&'static str, String)> {
    let shown = |(key, value): (NetLimitKey, u64)| {
        format!("{} {}", key.word(), if key.is_bytes() { show_bytes(value) } else { value.to_string() })
    };
    let words: Vec<_> = limits.iter().map(shown).collect();
    (!words.is_empty()).then(|| ("net limits", words.join(", ")))
}

/// The presets of the network, each with its rules.
pub(super) fn preset_rules(presets: &[PresetRules]) -> Vec<(&'static str, String)> {
    let of_one = |preset: &PresetRules| {
        let rules = preset.rules.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        ("allow", format!("{}: {rules}", preset.preset))
    };
    presets.iter().map(of_one).collect()
}

/// What the network has done, and what it refused; `remedy` says how a rule is added.
pub(super) fn traffic(network: &NetworkInfo, remedy: impl Fn(&EgressRule) -> String) -> Vec<(&'static str, String)> {
    let NetworkInfo { sent_bytes, received_bytes, open, denied, denials, .. } = network;
    let bytes = format!("{} sent, {} received, {open} open", show_bytes(*sent_bytes), show_bytes(*received_bytes));
    let mut facts = vec![("traffic", bytes)];
    facts.extend(denials.iter().map(|denial| ("denied", refusal_with(denial, &remedy))));
    let others = denied.saturating_sub(denials.iter().map(|denial| denial.count).sum());
    facts.extend((others > 0).then(|| ("denied", format!("{others} × others"))));
    facts
}

/// A refusal, and what would have allowed it.
pub(super) fn refusal(denial: &Denial) -> String {
    refusal_with(denial, as_option)
}

/// The option that allows it at the creation of a VM.
fn as_option(rule: &EgressRule) -> String {
    format!("--allow {rule}")
}

fn refusal_with(denial: &Denial, remedy: impl Fn(&EgressRule) -> String) -> String {
    let rule = denial.rule.as_ref().map(|rule| format!("; {} allows it", remedy(rule))).unwrap_or_default();
    format!("{} × {} ({}){rule}", denial.count, denial.what(), denial.reason.name())
}

/// The state, and why, where that is not a user's doing.
fn status(vm: &VmInfo) -> String {
    let detail = vm.status_detail.as_ref().map(|detail| format!(": {detail}")).unwrap_or_default();
    format!("{}{detail}", vm.status.word())
}

fn agent(vm: &VmInfo) -> Option<String> {
    let transport = vm.agent.transport.as_deref()?;
    let state = if vm.agent.ready { "ready" } else { "not ready" };
    let version = vm.agent.version.as_deref().map(|v| format!("version {v}, ")).unwrap_or_default();
    Some(format!("{state} ({version}{transport})"))
}

fn past(at: Timestamp, now: Timestamp) -> String {
    format!("{at:.0} ({} ago)", show_seconds(between(at, now)))
}
