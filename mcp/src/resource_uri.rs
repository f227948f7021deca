//! The URIs of the resources, written and parsed. Pure.

use nido_api::name::VmName;
use rmcp::model::Resource;

use crate::output_store::Output;

/// All VMs.
pub const VMS: &str = "vmops://vms";
/// All templates.
pub const TEMPLATES: &str = "vmops://templates";
/// The console of a VM.
pub const LOGS: &str = "vmops://vm/{name}/logs";
/// What a command wrote.
pub const OUTPUT: &str = "vmops://output/";

/// The console of this VM.
pub fn logs_uri(vm: &VmName) -> String {
    LOGS.replace("{name}", vm.as_str())
}

/// What one of a caller's outputs is called.
pub fn output_uri(output: &Output) -> String {
    format!("{OUTPUT}{}", output.id)
}

/// The resource that an output is.
pub fn output(output: &Output) -> Resource {
    let name = format!("output-{}", output.id);
    Resource::new(output_uri(output), name)
        .with_description("What a command of yours wrote, whole. It was written inside a VM")
        .with_title(output.title.clone())
        .with_mime_type("text/plain")
        .with_size(output.bytes.len() as u64)
}

/// The VM whose log this is.
pub fn vm_of(uri: &str) -> Option<VmName> {
    uri.strip_prefix("vmops://vm/")?.strip_suffix("/logs")?.parse().ok()
}
