//! What of a prompt a caller can do on this server: which tools, which kinds of commands, which files, and a VM within the limits.
//!
//! Invariant: a call that a prompt makes is one that the server would not refuse because of its settings.

use nido_api::error::Result;
use nido_api::name::{TemplateName, VmName};
use nido_api::{Limits, NetChoice, SpawnRequest};
use nido_core::policy::{Policy, decide_shell, decide_upload};
use serde_json::Value;

use crate::app::App;
use crate::principal::Principal;
use crate::prompt_text::PromptVm;
use crate::tools;

/// The tools without which no prompt can be followed.
const NEEDED: [&str; 4] = ["vm_spawn", "vm_exec", "vm_delete", "job_get"];
/// A name that stands for any.
const ANY_VM: &str = "sandbox";

/// What a caller can do in a VM of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PromptAccess {
    /// Lines for a shell.
    pub shell: bool,
    /// Files into the VM.
    pub upload: bool,
    /// Files of this host into the VM.
    pub host_files: bool,
    /// Files out of the VM.
    pub download: bool,
}

/// What this caller can do in a VM of this template; `None` if no prompt can be followed.
pub fn access(app: &App, principal: &Principal, template: &TemplateName) -> Option<PromptAccess> {
    let may = |tool: &str| tools::is_offered(tool, app.settings(), principal);
    if !NEEDED.iter().all(|tool| may(tool)) {
        return None;
    }
    let (shell, upload) = commands_and_uploads(&app.settings().policy, template);
    let upload = upload && may("vm_upload");
    let host_files = upload && !app.host_paths().read.paths().is_empty();
    Some(PromptAccess { shell, upload, host_files, download: may("vm_download") })
}

fn commands_and_uploads(policy: &Policy, template: &TemplateName) -> (bool, bool) {
    let Ok(name) = ANY_VM.parse::<VmName>() else { return (false, false) };
    let shell = decide_shell(policy, &name, template).into_result().is_ok();
    (shell, decide_upload(policy, &name, template).into_result().is_ok())
}

/// The template of a prompt that names none: `sandbox`, or the first that the caller may use.
pub fn usual_template(limits: &Limits) -> Result<TemplateName> {
    let sandbox: TemplateName = ANY_VM.parse()?;
    Ok(match &limits.templates {
        Some(templates) if !templates.contains(&sandbox) => templates.first().cloned().unwrap_or(sandbox),
        _ => sandbox,
    })
}

/// The same VM within the limits, as far as less is as good.
///
/// # Errors
/// `limit_exceeded`, `denied` if the caller may have no such VM at all.
pub fn within(limits: &Limits, vm: PromptVm) -> Result<PromptVm> {
    let ttl_max = limits.ttl_max_ms.map_or(u64::MAX, |ms| ms / 1000);
    let memory_mib = vm.memory_mib.map(|mib| mib.min(limits.max_memory_mib.unwrap_or(mib)));
    // Without rules, which a prompt does not have, the last two reach nothing.
    let mut candidates = [vm.net, NetChoice::None, NetChoice::Restricted].into_iter();
    let is_allowed = |net: &NetChoice| limits.net.as_ref().is_none_or(|allowed| allowed.contains(net));
    let net = candidates.find(is_allowed).unwrap_or(NetChoice::Nat);
    let vm = PromptVm { memory_mib, ttl_seconds: vm.ttl_seconds.min(ttl_max), net, ..vm };
    let (spec, _) = request(vm.arguments())?.split(tools::DEFAULT_NET);
    limits.check(&spec, 0).map(|()| vm)
}

fn request(mut arguments: Value) -> Result<SpawnRequest> {
    if let Some(fields) = arguments.as_object_mut()
        && let Some(Value::Number(seconds)) = fields.remove("ttl_seconds")
    {
        fields.insert("ttl_ms".into(), (seconds.as_u64().unwrap_or(0).saturating_mul(1000)).into());
    }
    tools::spawn_request(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm() -> PromptVm {
        PromptVm {
            name: "test-1".into(),
            template: "sandbox".into(),
            memory_mib: Some(1024),
            ttl_seconds: 10_800,
            net: tools::DEFAULT_NET,
        }
    }

    #[test]
    fn a_vm_of_a_prompt_keeps_within_the_limits_or_is_refused() {
        assert_eq!(within(&Limits::default(), vm()).unwrap(), vm());
        let limits = Limits {
            max_memory_mib: Some(600),
            ttl_max_ms: Some(60_000),
            net: Some(vec![NetChoice::None]),
            ..Limits::default()
        };
        let less = PromptVm { memory_mib: Some(600), ttl_seconds: 60, net: NetChoice::None, ..vm() };
        assert_eq!(within(&limits, vm()).unwrap(), less);
        let restricted = Limits { net: Some(vec![NetChoice::Restricted]), ..Limits::default() };
        assert_eq!(within(&restricted, PromptVm { net: NetChoice::Nat, ..vm() }).unwrap().net, NetChoice::Restricted);
        let nat = Limits { net: Some(vec![NetChoice::Nat]), ..Limits::default() };
        assert_eq!(within(&nat, vm()).unwrap().net, NetChoice::Nat);
        let templates = Some(vec!["debian-12".parse().unwrap()]);
        let limits = Limits { templates, ..Limits::default() };
        assert!(within(&limits, vm()).is_err());
        assert_eq!(usual_template(&limits).unwrap().as_str(), "debian-12");
    }
}
