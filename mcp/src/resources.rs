//! Resources: what can be read without a tool, so that a client can show it or keep it in view.

use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;
use nido_api::sanitize::{SHOWN_LIMIT, for_reader};
use nido_api::{LogRequest, LogSource};
use nido_core::Nido;
use rmcp::model::{Resource, ResourceContents, ResourceTemplate};
use serde::Serialize;

use crate::answer::ToolResult;
use crate::app::App;
use crate::pagination::{cursor_of_vms, page, place};
use crate::principal::Principal;
use crate::resource_uri::{LOGS, OUTPUT, TEMPLATES, VMS, logs_uri, output, vm_of};
use crate::tools;

/// Of how many VMs the consoles are on a page.
const LISTED: usize = 200;
/// How many of the last lines of a console are shown.
const LINES: usize = 500;
/// How many of a supervisor's.
const SUPERVISOR_LINES: usize = 100;

/// What can be read, and the cursor of the next page: consoles in order of their VMs' creation, and before the first of them what
/// else there is.
pub async fn list(app: &App, principal: &Principal, cursor: Option<&str>) -> Result<(Vec<Resource>, Option<String>)> {
    let named = may(app, principal, "vm_ls") && may(app, principal, "vm_info");
    let vms = if named { app.nido().await?.list()?.vms } else { Vec::new() };
    let (vms, next) = page(vms, place, cursor_of_vms(cursor)?, LISTED);
    let mut list = if cursor.is_none() { others(app, principal) } else { Vec::new() };
    list.extend(vms.iter().map(|vm| {
        Resource::new(logs_uri(&vm.name), format!("logs-{}", vm.name))
            .with_description("What happened to this VM, and the last lines of its supervisor and its console")
            .with_title(format!("Log of {}", vm.name))
            .with_mime_type("text/plain")
    }));
    Ok((list, next))
}

/// What there is whichever VMs there are.
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
        list.into_iter().filter(|one| tool_of(&one.uri).is_none_or(|tool| may(app, principal, tool))).collect();
    list.extend(app.outputs().of(&principal.actor).iter().map(|one| output(one)));
    list
}

/// The tool that shows what a resource shows: where it is not offered, neither is the resource.
fn tool_of(uri: &str) -> Option<&'static str> {
    match uri {
        VMS => Some("vm_ls"),
        TEMPLATES => Some("template_list"),
        _ if uri.starts_with(OUTPUT) => None,
        _ => Some("vm_info"),
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
    if let Some(tool) = tool_of(uri).filter(|tool| !may(app, principal, tool)) {
        return Err(Error::new(Code::Denied, format!("this server does not offer {tool}, which shows the same")));
    }
    let nido = app.nido().await?;
    if uri == VMS {
        return json(uri, &nido.list_with_idle().await?);
    }
    if uri == TEMPLATES {
        return json(uri, &nido.template_list()?);
    }
    if let Some(output) = uri.strip_prefix(OUTPUT).and_then(|id| app.outputs().get(&principal.actor, id)) {
        // As it is shown, but whole.
        let text = for_reader(&output.bytes, usize::MAX).text;
        return Ok(ResourceContents::text(text, uri).with_mime_type("text/plain"));
    }
    let name = vm_of(uri).ok_or_else(|| nothing(uri))?;
    Ok(ResourceContents::text(log(nido, &name).await?, uri).with_mime_type("text/plain"))
}

/// What there is to read about a VM: how it came here and why it stopped, what its supervisor says, and what its guest wrote. A guest that was
/// forked writes nothing to its console, so the console alone would be empty for most.
async fn log(nido: &Nido, name: &VmName) -> Result<String> {
    let info = nido.info(name).await?;
    let mut text = format!("== VM {name} ==\n{}: {}\n", info.created_at, "created");
    if let Some(started) = info.started_at {
        let path = info.timings.map_or_else(String::new, |timings| format!(" ({})", word(&timings.path)));
        text += &format!("{started}: started{path}\n");
    }
    text += &format!("state: {}\n", info.status.word());
    if let Some(failure) = &info.failure {
        text += &format!("failed: {} ({})\n", failure.message, word(&failure.cause));
        text.extend(failure.log_tail.iter().map(|line| format!("  {line}\n")));
    }
    for (title, source, lines) in [
        ("supervisor", LogSource::Supervisor, SUPERVISOR_LINES),
        ("console, written by the guest", LogSource::Console, LINES),
    ] {
        let mut log = nido.logs(name, LogRequest { source, tail_lines: Some(lines), follow: false })?;
        let mut bytes = Vec::new();
        while let Some(piece) = log.next().await {
            bytes.extend(piece?);
        }
        let shown = for_reader(&bytes, SHOWN_LIMIT).text;
        text += &format!("== {title} ==\n{}", if shown.is_empty() { "(nothing)\n" } else { &shown });
        if !text.ends_with('\n') {
            text.push('\n');
        }
    }
    Ok(crate::answer::readable_text(&text))
}

/// A value of the core as the word that it is in JSON.
fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn json(uri: &str, value: &impl Serialize) -> Result<ResourceContents> {
    let text = ToolResult::new(value)?.value.to_string();
    Ok(ResourceContents::text(text, uri).with_mime_type("application/json"))
}

fn nothing(uri: &str) -> Error {
    let uri = crate::answer::plain(nido_api::sanitize::head(uri, 200));
    Error::new(Code::RouteNotFound, format!("there is no resource '{uri}'"))
}
