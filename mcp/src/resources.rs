//! Resources: what can be read without a tool, so that a client can show it or keep it in view.

use nido_vmm::api::{LogRequest, LogSource};
use nido_vmm::error::{Code, Error, Result};
use nido_vmm::name::VmName;
use nido_vmm::text::{SHOWN_LIMIT, for_reader};
use rmcp::model::{Resource, ResourceContents, ResourceTemplate};
use serde::Serialize;

use crate::answer::Done;
use crate::app::{App, Principal};
use crate::outputs::Output;
use crate::pages::{cursor_of_vms, page, place};

/// All VMs.
pub const VMS: &str = "vmops://vms";
/// All templates.
pub const TEMPLATES: &str = "vmops://templates";
/// The console of a VM.
pub const LOGS: &str = "vmops://vm/{name}/logs";
/// What a command wrote.
const OUTPUT: &str = "vmops://output/";
/// Of how many VMs the consoles are on a page.
const LISTED: usize = 200;
/// How many of the last lines of a console are shown.
const LINES: usize = 500;

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

/// What can be read, and the cursor of the next page: consoles in order of their VMs' creation, and before the first of them what
/// else there is.
pub async fn list(app: &App, principal: &Principal, cursor: Option<&str>) -> Result<(Vec<Resource>, Option<String>)> {
    let (vms, next) = page(app.nido().await?.list()?.vms, place, cursor_of_vms(cursor)?, LISTED);
    let mut list = if cursor.is_none() { others(app, principal) } else { Vec::new() };
    list.extend(vms.iter().map(|vm| {
        Resource::new(logs_uri(&vm.name), format!("logs-{}", vm.name))
            .with_description("The last lines that this VM wrote to its console")
            .with_title(format!("Console of {}", vm.name))
            .with_mime_type("text/plain")
    }));
    Ok((list, next))
}

/// What there is whichever VMs there are.
fn others(app: &App, principal: &Principal) -> Vec<Resource> {
    let mut list = vec![
        Resource::new(VMS, "vms")
            .with_title("VMs")
            .with_description("All virtual machines with their state, as vm_ls answers them")
            .with_mime_type("application/json"),
        Resource::new(TEMPLATES, "templates")
            .with_title("Templates")
            .with_description("All templates, as template_list answers them")
            .with_mime_type("application/json"),
    ];
    list.extend(app.outputs().of(&principal.actor).iter().map(|one| output(one)));
    list
}

/// What can be read of each VM.
pub fn templates() -> Vec<ResourceTemplate> {
    vec![
        ResourceTemplate::new(LOGS, "logs")
            .with_title("Console of a VM")
            .with_description("The last lines that a virtual machine wrote to its console. The guest wrote them")
            .with_mime_type("text/plain"),
    ]
}

/// Reads one.
pub async fn read(app: &App, principal: &Principal, uri: &str) -> Result<ResourceContents> {
    let nido = app.nido().await?;
    if uri == VMS {
        return json(uri, &nido.list()?);
    }
    if uri == TEMPLATES {
        return json(uri, &nido.template_list()?);
    }
    if let Some(output) = uri.strip_prefix(OUTPUT).and_then(|id| app.outputs().get(&principal.actor, id)) {
        // As it is shown, but whole.
        let text = for_reader(&output.bytes, usize::MAX).text;
        return Ok(ResourceContents::text(text, uri).with_mime_type("text/plain"));
    }
    let name = uri.strip_prefix("vmops://vm/").and_then(|rest| rest.strip_suffix("/logs"));
    let name = name.and_then(|name| name.parse::<VmName>().ok()).ok_or_else(|| nothing(uri))?;
    let request = LogRequest { source: LogSource::Console, tail_lines: Some(LINES), follow: false };
    let mut log = nido.logs(&name, request)?;
    let mut bytes = Vec::new();
    while let Some(piece) = log.next().await {
        bytes.extend(piece?);
    }
    Ok(ResourceContents::text(for_reader(&bytes, SHOWN_LIMIT).text, uri).with_mime_type("text/plain"))
}

fn json(uri: &str, value: &impl Serialize) -> Result<ResourceContents> {
    let text = Done::new(value)?.value.to_string();
    Ok(ResourceContents::text(text, uri).with_mime_type("application/json"))
}

fn nothing(uri: &str) -> Error {
    let uri = crate::answer::plain(nido_vmm::text::head(uri, 200));
    Error::new(Code::RouteNotFound, format!("there is no resource '{uri}'"))
}
