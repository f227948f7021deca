//! Resources: what can be read without a tool, so that a client can show it or keep it in view.

use nido_api::error::{Code, Error, Result};
use nido_api::sanitize::for_reader;
use nido_api::{PageRequest, VmPage, VmQuery};
use rmcp::model::{Resource, ResourceContents, ResourceTemplate};
use serde::Serialize;

use crate::answer::ToolResult;
use crate::app::App;
use crate::principal::Principal;
use crate::resource_uri::{LOGS, OUTPUT, TEMPLATES, VMS, logs_uri, output, vm_of};
use crate::{log_text, tools};

/// Of how many VMs the consoles are on a page.
const LISTED: usize = 200;
/// How many of the last lines of a supervisor and of a console are shown.
const LINES: [usize; 2] = [100, 500];

/// What can be read, and the cursor of the next page: consoles in order of their VMs' creation, and before the first of them what
/// else there is.
pub async fn list(app: &App, principal: &Principal, cursor: Option<&str>) -> Result<(Vec<Resource>, Option<String>)> {
    let named = ["vm_ls", "vm_info", "vm_logs"].iter().all(|tool| may(app, principal, tool));
    let page = PageRequest { limit: Some(LISTED), cursor: cursor.map(str::to_owned) };
    let all = if named { app.nido().await?.list()?.vms } else { Vec::new() };
    let VmPage { vms, next_cursor: next } = VmQuery { page, ..VmQuery::default() }.page(all)?;
    let mut list = if cursor.is_none() { others(app, principal) } else { Vec::new() };
    list.extend(vms.iter().map(|vm| {
        Resource::new(logs_uri(&vm.name), format!("logs-{}", vm.name))
            .with_description("What happened to this VM, and the last lines of its supervisor and its console")
            .with_title(format!("Log of {}", vm.name))
            .with_mime_type("text/plain")
    }));
    Ok((list, next))
}

/// Resources that do not depend on the VMs.
fn others(app: &App, principal: &Principal) -> Vec<Resource> {
    let list = [
        Resource::new(VMS, "vms")
            .with_title("VMs")
            .with_description("All virtual machines with their state, as vm_ls answers them")
            .with_mime_type("application/json"),
        Resource::new(TEMPLATES, "templates")
            .with_title("Templates")
            .with_description("All templates, as template_list answers them")
            .with_mime_type("application/json"),
    ];
    let mut list: Vec<_> =
        list.into_iter().filter(|one| tools_of(&one.uri).iter().all(|tool| may(app, principal, tool))).collect();
    list.extend(app.outputs().of(&principal.actor).iter().map(|one| output(one)));
    list
}

/// The tools that show what a resource shows: where one is not offered, neither is the resource.
fn tools_of(uri: &str) -> &'static [&'static str] {
    match uri {
        VMS => &["vm_ls"],
        TEMPLATES => &["template_list"],
        _ if uri.starts_with(OUTPUT) => &[],
        _ => &["vm_info", "vm_logs"],
    }
}

fn may(app: &App, principal: &Principal, tool: &str) -> bool {
    tools::is_offered(tool, app.settings(), principal)
}

/// What can be read of each VM.
pub fn templates() -> Vec<ResourceTemplate> {
    vec![
        ResourceTemplate::new(LOGS, "logs")
            .with_title("Log of a VM")
            .with_description("What happened to a virtual machine, and the last lines of its supervisor and its console. The guest wrote the console")
            .with_mime_type("text/plain"),
    ]
}

/// Reads one.
pub async fn read(app: &App, principal: &Principal, uri: &str) -> Result<ResourceContents> {
    if let Some(tool) = tools_of(uri).iter().find(|tool| !may(app, principal, tool)) {
        return Err(Error::new(Code::Denied, format!("this server does not offer {tool}, which shows the same")));
    }
    let nido = app.nido().await?;
    if uri == VMS {
        return json(uri, &tools::vm_list(nido.list_page(&VmQuery::default()).await?.vms, None));
    }
    if uri == TEMPLATES {
        return json(uri, &tools::template_list(nido.template_list()?, None));
    }
    if let Some(output) = uri.strip_prefix(OUTPUT).and_then(|id| app.outputs().get(&principal.actor, id)) {
        // As it is shown, but whole.
        let text = for_reader(&output.bytes, usize::MAX).text;
        return Ok(ResourceContents::text(text, uri).with_mime_type("text/plain"));
    }
    let name = vm_of(uri).ok_or_else(|| nothing(uri))?;
    Ok(ResourceContents::text(log_text::report(nido, &name, LINES).await?, uri).with_mime_type("text/plain"))
}

fn json(uri: &str, value: &impl Serialize) -> Result<ResourceContents> {
    let text = ToolResult::new(value)?.value.to_string();
    Ok(ResourceContents::text(text, uri).with_mime_type("application/json"))
}

fn nothing(uri: &str) -> Error {
    let uri = crate::answer::plain(nido_api::sanitize::head(uri, 200));
    Error::new(Code::RouteNotFound, format!("there is no resource '{uri}'"))
}
