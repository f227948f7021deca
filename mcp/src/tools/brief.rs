//! VMs as results show them: the fields that lead to the next call. `vm_info` shows all.
//!
//! Invariant: a field that is absent, empty or false is left out.

use std::collections::BTreeMap;

use nido_api::error::Result;
use nido_api::name::{TemplateName, VmName};
use nido_api::state::{FailureCause, VmState};
use nido_api::{ForwardSpec, LeaseId, VmInfo};
use serde::Serialize;

use crate::answer::{ToolResult, plain};

/// The fields of a VM that lead to the next call.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct VmBrief {
    name: VmName,
    id: String,
    status: VmState,
    template: TemplateName,
    #[serde(skip_serializing_if = "Option::is_none")]
    ip_address: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ssh_command: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    forwards: Vec<ForwardSpec>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    ephemeral: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    lease: Option<LeaseId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    idle_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<FailureBrief>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// Why a VM failed; `vm_info` has the last lines of its log.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct FailureBrief {
    cause: FailureCause,
    message: String,
}

impl From<VmInfo> for VmBrief {
    fn from(vm: VmInfo) -> Self {
        Self {
            name: vm.name,
            id: vm.id,
            status: vm.status,
            template: vm.template,
            ip_address: vm.ip_address,
            ssh_command: vm.ssh_command,
            forwards: vm.forwards,
            labels: vm.labels,
            ephemeral: vm.ephemeral,
            lease: vm.lease,
            // Milliseconds are of no use here.
            expires_at: vm.expires_at.map(|at| format!("{at:.0}")),
            idle_at: vm.idle_at.map(|at| format!("{at:.0}")),
            failure: vm.failure.map(|failure| FailureBrief { cause: failure.cause, message: failure.message }),
            warnings: vm.warnings,
        }
    }
}

/// A VM as the result of a call.
pub fn vm(vm: VmInfo) -> Result<ToolResult> {
    ToolResult::new(&VmBrief::from(vm))
}

/// Some VMs. What is long and the same for most VMs of a host is given once.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct VmBriefs {
    pub(super) vms: Vec<VmBrief>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) warnings: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_cursor: Option<String>,
}

/// VMs as a list, and the cursor of the next page.
pub fn vm_list(vms: Vec<VmInfo>, next_cursor: Option<String>) -> VmBriefs {
    let mut warnings: Vec<String> = Vec::new();
    let brief = |mut vm: VmInfo| {
        // The same for all VMs of a session; vm_info shows it.
        vm.lease = None;
        for warning in std::mem::take(&mut vm.warnings) {
            if !warnings.contains(&warning) {
                warnings.push(warning);
            }
        }
        VmBrief::from(vm)
    };
    let vms = vms.into_iter().map(brief).collect();
    VmBriefs { vms, warnings, next_cursor }
}

impl VmBriefs {
    /// The list for a reader: a line for each VM.
    pub fn text(&self) -> String {
        let mut text: String = self.vms.iter().map(line).collect();
        if text.is_empty() {
            text.push_str("no VMs\n");
        }
        text.extend(self.warnings.iter().map(|warning| format!("warning: {}\n", plain(warning))));
        if let Some(cursor) = &self.next_cursor {
            text += &format!("more: cursor {cursor}\n");
        }
        text
    }
}

fn line(vm: &VmBrief) -> String {
    let mut line = format!("{} {} {}", vm.name, vm.status.word(), vm.template);
    if vm.ephemeral {
        line += " ephemeral";
    }
    if let Some(at) = &vm.expires_at {
        line += &format!(" until {at}");
    }
    for forward in &vm.forwards {
        line += &format!(" {forward}");
    }
    for (key, value) in &vm.labels {
        line += &format!(" {}={}", plain(key), plain(value));
    }
    line + "\n"
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn info(name: &str, warnings: &[&str]) -> VmInfo {
        serde_json::from_value(json!({
            "name": name, "id": "0123456789abcdef", "status": "running", "template": "sandbox", "machine": "q35",
            "machine_reason": "vsock is missing", "accel": "kvm", "isolation": "hardware", "nested": false, "cpus": 1,
            "memory_mib": 512, "disk_bytes": 1, "net": "nat", "ip_address": null, "ssh_command": null, "forwards": [],
            "labels": {}, "ephemeral": true, "lease": "0123456789abcdef", "agent": { "ready": true, "version": null, "transport": null },
            "created_at": "2026-11-29T14:33:01.123Z", "started_at": null, "expires_at": "2026-11-29T15:33:01.123Z",
            "idle_at": null, "failure": null, "timings": null, "warnings": warnings,
        }))
        .unwrap()
    }

    #[test]
    fn a_list_omits_empty_fields_and_has_each_warning_once() {
        let list = vm_list(vec![info("a", &["no isolation"]), info("b", &["no isolation", "slow"])], None);
        let seen = serde_json::to_value(&list).unwrap();
        let vm = |name: &str| {
            json!({
                "name": name, "id": "0123456789abcdef", "status": "running", "template": "sandbox", "ephemeral": true,
                "expires_at": "2026-11-29T15:33:01Z",
            })
        };
        assert_eq!(seen, json!({ "vms": [vm("a"), vm("b")], "warnings": ["no isolation", "slow"] }));
        assert_eq!(list.text().lines().next(), Some("a running sandbox ephemeral until 2026-11-29T15:33:01Z"));
    }

    #[test]
    fn a_list_of_20_vms_fits_in_3_kilobytes() {
        let vms = (0..20).map(|number| info(&format!("agent-{number:02}"), &["no isolation"])).collect();
        let list = vm_list(vms, None);
        let data: Value = serde_json::to_value(&list).unwrap();
        assert!(data.to_string().len() <= 3000 && list.text().len() <= 3000, "{data}");
    }
}
