//! What the lines about a VM state about it. Pure.

use std::collections::BTreeMap;

use jiff::Timestamp;
use nido_api::name::VmName;
use nido_api::{
    AllowEntry, AuditLog, EventKind, ReceiptNetwork, ReceiptSecret, ReceiptStart, ReceiptVm, SecretUse, VmSource,
};
use serde_json::Value;

use super::super::event_record::EventParams;
use super::super::line::Line;

/// What the lines of a VM state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The VM.
    pub vm: ReceiptVm,
    /// Its starts from saved memory, the oldest first.
    pub starts: Vec<ReceiptStart>,
    /// The first change of rules whose whole arguments are not there: the rules are not known from it on.
    pub unknown_rules: Option<u64>,
    /// Its networks and rules, the oldest first.
    pub network: Vec<ReceiptNetwork>,
    /// The secrets that its requests got, in the order of their first use.
    pub secrets: Vec<ReceiptSecret>,
    /// The last event: a process that is killed may have copied one twice.
    last_event: Option<u64>,
}

/// Derives the facts about the VM of this id from its lines of both logs, and the whole arguments that its lines shorten.
pub fn facts(id: &str, name: &VmName, events: &[Line], acts: &[Line], arguments: &BTreeMap<String, String>) -> Facts {
    let vm = ReceiptVm {
        id: id.to_owned(),
        name: name.clone(),
        created_at: None,
        deleted_at: None,
        template: None,
        parts: Default::default(),
    };
    let mut facts = Facts {
        vm,
        starts: Vec::new(),
        unknown_rules: None,
        network: Vec::new(),
        secrets: Vec::new(),
        last_event: None,
    };
    events.iter().for_each(|line| facts.take_event(line));
    acts.iter().for_each(|line| facts.take_act(line, arguments));
    facts
}

impl Facts {
    fn take_event(&mut self, line: &Line) {
        let Ok(params) = serde_json::from_slice::<EventParams>(&line.record.params) else { return };
        self.vm.template = self.vm.template.take().or(params.details.template);
        let is_again = self.last_event.is_some_and(|last| params.cursor <= last);
        self.last_event = self.last_event.max(Some(params.cursor));
        if let (Some(secret), Some(requests), false) = (params.details.secret, params.details.secret_requests, is_again)
        {
            self.take_use(secret, requests, params.at);
        }
        if !params.details.image.is_empty() && !is_again {
            let (at, seq, image) = (params.at, line.record.seq, params.details.image);
            self.starts.push(ReceiptStart { at, seq, image });
        }
        let tool = &line.record.tool;
        if *tool == EventKind::VmCreated.word().as_bytes() && self.vm.created_at.is_none() {
            self.vm.created_at = Some(params.at);
            let Some(VmSource { parts, net, allow, presets, .. }) = params.details.source else { return };
            let presets = presets.into_iter().map(|preset| AllowEntry::Preset(preset.preset));
            let allow = allow.into_iter().map(AllowEntry::Rule).chain(presets).collect();
            self.vm.parts = parts;
            let (log, seq) = (AuditLog::Events, line.record.seq);
            self.network.push(ReceiptNetwork { since: params.at, log, seq, net, allow });
        } else if *tool == EventKind::VmDeleted.word().as_bytes() {
            self.vm.deleted_at = Some(params.at);
        }
    }

    fn take_use(&mut self, secret: SecretUse, requests: u64, at: Timestamp) {
        match self.secrets.iter_mut().find(|known| known.secret == secret) {
            Some(known) => {
                known.requests = known.requests.saturating_add(requests);
                known.last_at = at;
            }
            None => self.secrets.push(ReceiptSecret { secret, requests, first_at: at, last_at: at }),
        }
    }

    /// A change of the rules that succeeded continues the list. Without the rules of the creation the list stays empty.
    fn take_act(&mut self, line: &Line, arguments: &BTreeMap<String, String>) {
        let record = &line.record;
        if record.stage != b"outcome" || record.result != b"success" || self.unknown_rules.is_some() {
            return;
        }
        let Some(before) = self.network.last() else { return };
        let params = match shortened_arguments(line) {
            None => &record.params[..],
            Some(sha256) => match arguments.get(&sha256) {
                Some(whole) => whole.as_bytes(),
                None => {
                    self.unknown_rules = Some(record.seq);
                    return;
                }
            },
        };
        let Some(change) = change_of(&record.tool, params) else { return };
        let mut allow = before.allow.clone();
        match change {
            Change::Allow(added) => allow.extend(added.into_iter().filter(|entry| !before.allow.contains(entry))),
            Change::Deny(removed) => allow.retain(|entry| !removed.contains(entry)),
        }
        let net = before.net;
        self.network.push(ReceiptNetwork { since: record.time, log: AuditLog::Acts, seq: record.seq, net, allow });
    }
}

/// The SHA-256 of the whole arguments of a change of rules that its line shortens.
pub fn shortened_arguments(line: &Line) -> Option<String> {
    if !matches!(&*line.record.tool, b"net_allow" | b"net_deny") {
        return None;
    }
    let params: Value = serde_json::from_slice(&line.record.params).ok()?;
    Some(params.get("cut")?.get("sha256")?.as_str()?.to_owned())
}

/// A change of rules, as a line states it.
enum Change {
    Allow(Vec<AllowEntry>),
    Deny(Vec<AllowEntry>),
}

/// The change that a line requests. Front ends name the rules `allow`, `rules`, `rule` and `deny`.
fn change_of(tool: &[u8], params: &[u8]) -> Option<Change> {
    let params: Value = serde_json::from_slice(params).ok()?;
    let of = |key: &str| match params.get(key) {
        Some(Value::Array(rules)) => rules.iter().filter_map(|rule| rule.as_str()?.parse().ok()).collect(),
        Some(Value::String(rule)) => rule.parse().into_iter().collect(),
        _ => Vec::<AllowEntry>::new(),
    };
    let rules: Vec<_> = ["allow", "rules", "rule"].into_iter().flat_map(of).collect();
    match tool {
        // An agent's call has one of them, or only lists.
        b"vm_network" if !rules.is_empty() => Some(Change::Allow(rules)),
        b"vm_network" => Some(of("deny")).filter(|removed| !removed.is_empty()).map(Change::Deny),
        b"net_allow" => Some(Change::Allow(rules)),
        b"net_deny" => Some(Change::Deny(rules)),
        _ => None,
    }
}
