//! A VM's specification as nido stores it: in the column `vms.spec` and in `vm.json`. The API's type is strict about what clients
//! write; this one reads what any version of nido wrote.
//!
//! Invariants: fields that this version does not know are ignored, absent ones have the defaults of the version that wrote none. A
//! field that must not be ignored, because the VM would then have less isolation or keep less than its user asked for, comes with a
//! higher [`FORMAT`]; a specification of a higher format is not read.

use std::collections::BTreeMap;

use nido_api::name::{TemplateName, VmName};
use nido_api::restart::RestartPolicy;
use nido_api::{
    AccelChoice, EgressRule, ForwardSpec, LeaseId, MachineChoice, NetChoice, NetLimits, PresetRules, SecretUse,
    SecretVariable, VmSpec,
};
use serde::{Deserialize, Serialize};

/// The format that this version writes, and the highest that it reads.
const FORMAT: u32 = 1;

/// A specification, as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct StoredSpec {
    /// Its format; absent before formats were numbered.
    #[serde(default = "first_format")]
    format: u32,
    name: VmName,
    template: TemplateName,
    cpus: u32,
    memory_mib: u32,
    #[serde(default)]
    disk_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    disk_quota_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_processes: Option<u32>,
    #[serde(default)]
    net: NetChoice,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    allow: Vec<EgressRule>,
    #[serde(default, skip_serializing_if = "StoredNetLimits::is_empty")]
    net_limits: StoredNetLimits,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    presets: Vec<PresetRules>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    secrets: Vec<SecretUse>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    secret_env: Vec<SecretVariable>,
    #[serde(default)]
    machine: MachineChoice,
    #[serde(default)]
    accel: AccelChoice,
    #[serde(default)]
    require_isolation: bool,
    #[serde(default)]
    require_confinement: bool,
    #[serde(default)]
    nested: bool,
    #[serde(default)]
    forwards: Vec<ForwardSpec>,
    #[serde(default)]
    ttl_ms: Option<u64>,
    #[serde(default)]
    idle_ms: Option<u64>,
    // Virtual columns of the store read the next two and `lease`: see `schema.rs`.
    #[serde(default)]
    ephemeral: bool,
    #[serde(default, skip_serializing_if = "RestartPolicy::is_no")]
    restart: RestartPolicy,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lease: Option<LeaseId>,
}

/// The API's type is strict about unknown fields.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct StoredNetLimits {
    #[serde(skip_serializing_if = "Option::is_none")]
    connections: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    new_connections: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    udp: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    questions: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sent_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    received_bytes: Option<u64>,
}

impl StoredNetLimits {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl From<NetLimits> for StoredNetLimits {
    fn from(limits: NetLimits) -> Self {
        let NetLimits { connections, new_connections, udp, questions, sent_bytes, received_bytes } = limits;
        Self { connections, new_connections, udp, questions, sent_bytes, received_bytes }
    }
}

impl From<StoredNetLimits> for NetLimits {
    fn from(stored: StoredNetLimits) -> Self {
        let StoredNetLimits { connections, new_connections, udp, questions, sent_bytes, received_bytes } = stored;
        Self { connections, new_connections, udp, questions, sent_bytes, received_bytes }
    }
}

const fn first_format() -> u32 {
    1
}

/// The specification as it is stored.
///
/// # Errors
/// Of the serialization.
pub fn stored_spec(spec: &VmSpec) -> serde_json::Result<serde_json::Value> {
    serde_json::to_value(StoredSpec::from(spec.clone()))
}

/// The specification that was stored.
///
/// # Errors
/// One sentence: it is damaged, or a newer nido wrote it.
pub fn spec_of_stored(stored: serde_json::Value) -> Result<VmSpec, String> {
    // First: a newer format may have any shape.
    check_format(stored.get("format").and_then(serde_json::Value::as_u64))?;
    serde_json::from_value::<StoredSpec>(stored).map(VmSpec::from).map_err(|e| e.to_string())
}

/// The same from its text. A list of VMs reads many: no value is built in between.
///
/// # Errors
/// See [`spec_of_stored`].
pub(crate) fn spec_of_text(text: &str) -> Result<VmSpec, String> {
    #[derive(Deserialize)]
    struct Format {
        #[serde(default)]
        format: Option<u64>,
    }
    check_format(serde_json::from_str::<Format>(text).map_err(|e| e.to_string())?.format)?;
    serde_json::from_str::<StoredSpec>(text).map(VmSpec::from).map_err(|e| e.to_string())
}

fn check_format(format: Option<u64>) -> Result<(), String> {
    match format {
        Some(format) if format > u64::from(FORMAT) => {
            Err(format!("a newer nido wrote it (format {format}; this one reads up to {FORMAT})"))
        }
        _ => Ok(()),
    }
}

impl From<VmSpec> for StoredSpec {
    fn from(spec: VmSpec) -> Self {
        // By name: a new field of the API has to be stored, too.
        let VmSpec {
            name,
            template,
            cpus,
            memory_mib,
            disk_bytes,
            disk_quota_bytes,
            max_processes,
            net,
            allow,
            net_limits,
            presets,
            secrets,
            secret_env,
            machine,
            accel,
            require_isolation,
            require_confinement,
            nested,
            forwards,
            ttl_ms,
            idle_ms,
            ephemeral,
            restart,
            labels,
            lease,
        } = spec;
        Self {
            format: FORMAT,
            name,
            template,
            cpus,
            memory_mib,
            disk_bytes,
            disk_quota_bytes,
            max_processes,
            net,
            allow,
            net_limits: net_limits.into(),
            presets,
            secrets,
            secret_env,
            machine,
            accel,
            require_isolation,
            require_confinement,
            nested,
            forwards,
            ttl_ms,
            idle_ms,
            ephemeral,
            restart,
            labels,
            lease,
        }
    }
}

impl From<StoredSpec> for VmSpec {
    fn from(stored: StoredSpec) -> Self {
        Self {
            name: stored.name,
            template: stored.template,
            cpus: stored.cpus,
            memory_mib: stored.memory_mib,
            disk_bytes: stored.disk_bytes,
            disk_quota_bytes: stored.disk_quota_bytes,
            max_processes: stored.max_processes,
            net: stored.net,
            allow: stored.allow,
            net_limits: stored.net_limits.into(),
            presets: stored.presets,
            secrets: stored.secrets,
            secret_env: stored.secret_env,
            machine: stored.machine,
            accel: stored.accel,
            require_isolation: stored.require_isolation,
            require_confinement: stored.require_confinement,
            nested: stored.nested,
            forwards: stored.forwards,
            ttl_ms: stored.ttl_ms,
            idle_ms: stored.idle_ms,
            ephemeral: stored.ephemeral,
            restart: stored.restart,
            labels: stored.labels,
            lease: stored.lease,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec() -> VmSpec {
        let mut spec = VmSpec::named("web".parse().unwrap());
        spec.labels.insert("role".into(), "demo".into());
        spec.forwards = vec!["8080:80".parse().unwrap()];
        spec.net = NetChoice::Restricted;
        spec.allow = ["example.com:443", "[2001:db8::/32]:53/udp"].map(|rule| rule.parse().unwrap()).into();
        let rules = vec!["pypi.org:443".parse().unwrap()];
        spec.presets = vec![PresetRules { rules, ..PresetRules::unexpanded("@pip".parse().unwrap()) }];
        VmSpec {
            ttl_ms: Some(7),
            nested: true,
            restart: RestartPolicy::Always,
            secrets: vec!["key@example.com:x-key".parse().unwrap()],
            secret_env: vec!["KEY=key".parse().unwrap()],
            disk_bytes: Some(1 << 30),
            disk_quota_bytes: Some(2 << 30),
            max_processes: Some(64),
            net_limits: NetLimits { udp: Some(7), sent_bytes: Some(1 << 40), ..NetLimits::default() },
            ..spec
        }
    }

    /// Read as a value, and as text.
    fn read(stored: serde_json::Value) -> Result<VmSpec, String> {
        let of_text = spec_of_text(&stored.to_string());
        let of_value = spec_of_stored(stored);
        assert_eq!(of_text.is_ok(), of_value.is_ok());
        assert!(of_text.is_err() || of_text == of_value);
        of_value
    }

    #[test]
    fn stored_specs_are_read_back() {
        assert_eq!(read(stored_spec(&spec()).unwrap()).unwrap(), spec());
    }

    // A field that a newer nido had added made the row, and with it every command, unreadable.
    #[test]
    fn unknown_fields_are_ignored_and_newer_formats_refused() {
        let mut stored = stored_spec(&spec()).unwrap();
        stored["future"] = json!({"a": 1});
        stored["net_limits"]["future"] = json!(1);
        assert_eq!(read(stored.clone()).unwrap(), spec());
        stored["format"] = json!(FORMAT + 1);
        assert!(read(stored).unwrap_err().contains("newer nido"));
    }

    // What the first versions stored was the API's own type.
    #[test]
    fn specs_of_the_first_versions_are_read() {
        assert_eq!(read(serde_json::to_value(spec()).unwrap()).unwrap(), spec());
        let oldest = json!({"name": "web", "template": "sandbox", "cpus": 1, "memory_mib": 512});
        assert_eq!(read(oldest).unwrap(), VmSpec::named("web".parse().unwrap()));
        for damaged in [
            json!(7),
            json!({}),
            json!({"name": "web", "template": "t", "cpus": 1, "memory_mib": 1, "allow": ["@new"]}),
            json!({"name": "-"}),
            json!({"name": "web", "template": "t", "cpus": "two"}),
        ] {
            assert!(read(damaged).is_err());
        }
    }
}
