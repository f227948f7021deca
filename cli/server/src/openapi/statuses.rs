//! Which errors an operation can answer with: those of its core method, and those of what every request passes.

use std::collections::BTreeMap;

use axum::http::Method;
use nido_api::error::Code;
use serde_json::{Map, Value, json};

/// Of a machine that is started.
const START: &[Code] = &[
    Code::IsolationRequired,
    Code::ConfinementRequired,
    Code::TemplateMismatch,
    Code::PortInUse,
    Code::LimitExceeded,
    Code::QemuMissing,
    Code::QemuTooOld,
    Code::QemuFailed,
    Code::KvmUnavailable,
    Code::NestedUnavailable,
    Code::GuestFailed,
    Code::ToolMissing,
    Code::AgentUnreachable,
    Code::Timeout,
    Code::DiskFull,
];
/// Of what is done to a VM by its supervisor.
const SUPERVISOR_CODES: &[Code] =
    &[Code::VmBusy, Code::VmNotRunning, Code::QemuFailed, Code::AgentUnreachable, Code::Timeout, Code::DiskFull];
/// Of what the agent does in a guest.
const GUEST: &[Code] = &[
    Code::GuestDenied,
    Code::GuestBusy,
    Code::GuestNotFound,
    Code::GuestInvalid,
    Code::GuestFailed,
    Code::UserNotFound,
    Code::AgentVersion,
    Code::LimitExceeded,
];
const COMMAND: &[Code] = &[Code::CommandNotFound, Code::CommandCannotRun, Code::DirectoryNotFound];
const FILES: &[Code] = &[Code::PathInvalid, Code::PathNotFound, Code::PathExists];
const TEMPLATE: &[Code] = &[Code::TemplateNotFound, Code::VmBusy];
const SNAPSHOT: &[Code] = &[Code::SnapshotNotFound];
/// Of what is made of a VM or a recipe.
const BUILD: &[Code] = &[Code::TemplateExists, Code::TemplateInUse, Code::TemplateBuildFailed, Code::TemplateMismatch];

/// What an operation's own core method gives.
fn own(id: &str) -> Vec<&'static [Code]> {
    match id {
        "vm_spawn" => vec![START, TEMPLATE, &[Code::VmExists, Code::NameInvalid]],
        "run" => vec![
            START,
            SUPERVISOR_CODES,
            TEMPLATE,
            GUEST,
            COMMAND,
            &[Code::VmExists, Code::VmNotFound, Code::NameInvalid],
        ],
        "vm_start" | "vm_restart" => vec![START, SUPERVISOR_CODES, TEMPLATE],
        "snapshot_restore" => vec![START, SUPERVISOR_CODES, SNAPSHOT],
        "vm_fork" => vec![START, SUPERVISOR_CODES, &[Code::VmExists]],
        "vm_stop" | "vm_delete" | "vm_pause" | "vm_resume" => vec![SUPERVISOR_CODES],
        "vm_exec" => vec![SUPERVISOR_CODES, GUEST, COMMAND],
        "vm_download" | "vm_upload" => vec![SUPERVISOR_CODES, GUEST, FILES],
        "snapshot_create" => vec![SUPERVISOR_CODES, &[Code::SnapshotExists, Code::LimitExceeded, Code::GuestFailed]],
        "snapshot_info" => vec![SNAPSHOT],
        "snapshot_delete" => vec![SNAPSHOT, SUPERVISOR_CODES],
        "forward_add" => vec![SUPERVISOR_CODES, &[Code::PortInUse, Code::LimitExceeded]],
        "forward_remove" => vec![SUPERVISOR_CODES, &[Code::ForwardNotFound]],
        "net_allow" => vec![SUPERVISOR_CODES, &[Code::DiskFull]],
        "net_deny" => vec![SUPERVISOR_CODES, &[Code::RuleNotFound, Code::DiskFull]],
        "template_info" => vec![&[Code::TemplateNotFound, Code::TemplateMismatch]],
        "template_create" => vec![START, SUPERVISOR_CODES, BUILD, &[Code::VmNotFound, Code::TemplateNotFound]],
        "template_build" | "template_bake" => vec![START, SUPERVISOR_CODES, BUILD, TEMPLATE],
        "template_delete" => vec![TEMPLATE, &[Code::TemplateInUse]],
        "pool_list" => vec![&[Code::QemuMissing, Code::QemuTooOld, Code::QemuFailed]],
        "pool_info" => vec![TEMPLATE, &[Code::QemuMissing]],
        "pool_set" => vec![START, TEMPLATE],
        "webhook_add" => vec![&[Code::WebhookInvalid, Code::LimitExceeded, Code::DiskFull]],
        "webhook_info" | "webhook_deliveries" | "webhook_remove" => vec![&[Code::WebhookNotFound]],
        "webhook_test" | "webhook_redeliver" => vec![&[Code::WebhookNotFound, Code::WebhookInvalid, Code::VmBusy]],
        "events" => vec![&[Code::CursorExpired]],
        "operation_get" | "operation_cancel" => vec![&[Code::OperationNotFound]],
        "host" => vec![&[Code::QemuMissing]],
        _ => vec![],
    }
}

/// The codes of an operation, by status.
fn codes(id: &str, method: &Method, path: &str, parameters: bool) -> BTreeMap<u16, Vec<&'static str>> {
    let mut all: Vec<Code> = own(id).concat();
    all.extend([Code::Internal, Code::Interrupted]);
    let is_open = matches!(id, "health" | "openapi");
    if !is_open {
        all.extend([Code::Unauthorized, Code::Denied, Code::RateLimited, Code::AuditFailed]);
    }
    all.push(Code::SpecInvalid);
    if path.starts_with("/v1/vms/{name}") {
        all.extend([Code::VmNotFound, Code::NameInvalid, Code::VmReplaced, Code::RequestInvalid]);
    } else if parameters && path.contains("{name}") {
        all.push(Code::NameInvalid);
    }
    if *method == Method::POST || *method == Method::PUT {
        let body = [Code::RequestInvalid, Code::RequestTimeout, Code::MediaTypeUnsupported];
        all.extend(body);
        if id != "vm_upload" {
            all.push(Code::BodyTooLarge);
        }
    }
    if *method == Method::POST {
        all.extend([Code::RequestInProgress, Code::OutcomeUnknown, Code::AnswerTooLarge, Code::LimitExceeded]);
    }
    let mut by_status = BTreeMap::<u16, Vec<&'static str>>::new();
    // In the order of the list of codes, each once.
    for code in Code::ALL.iter().filter(|code| all.contains(code)) {
        by_status.entry(code.status()).or_default().push(code.slug());
    }
    by_status
}

/// The statuses whose codes are the same wherever they appear.
const COMMON: [u16; 7] = [400, 401, 408, 413, 415, 429, 500];

/// Adds the errors of an operation to its responses.
pub fn add(operation: &mut Value, method: &Method, path: &str) {
    let id = operation["operationId"].as_str().unwrap_or_default().to_owned();
    let Some(responses) = operation["responses"].as_object_mut() else { return };
    for (status, slugs) in codes(&id, method, path, true) {
        let answer = match COMMON.contains(&status) {
            true => json!({ "$ref": format!("#/components/responses/{status}") }),
            false => problem(&slugs),
        };
        responses.entry(status.to_string()).or_insert(answer);
    }
}

fn problem(slugs: &[&str]) -> Value {
    let codes: Vec<_> = slugs.iter().map(|slug| format!("`{slug}`")).collect();
    json!({
        "description": codes.join(", "),
        "content": { "application/problem+json": { "schema": { "$ref": "#/components/schemas/Problem" } } }
    })
}

/// The responses that operations share.
pub fn common() -> Map<String, Value> {
    let of = |status: u16| {
        let slugs: Vec<_> = Code::ALL.iter().filter(|code| code.status() == status).map(|code| code.slug()).collect();
        let mut answer = problem(&slugs);
        let header = match status {
            401 => Some(("WWW-Authenticate", "How a caller authenticates: `Bearer`.")),
            429 => Some(("Retry-After", "Seconds after which the request may be sent again.")),
            405 => Some(("Allow", "The methods that the resource has.")),
            _ => None,
        };
        if let Some((name, about)) = header {
            answer["headers"] = json!({ name: { "description": about, "schema": { "type": "string" } } });
        }
        (status.to_string(), answer)
    };
    COMMON.into_iter().chain([405]).map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    // Every operation had all fifteen errors, so a client learned nothing.
    #[test]
    fn an_operation_names_its_own_errors() {
        let of = |id, method, path| codes(id, &method, path, true);
        let list = of("vm_list", Method::GET, "/v1/vms");
        assert_eq!(list.keys().copied().collect::<Vec<_>>(), [401, 403, 422, 429, 500, 503]);
        let exec = of("vm_exec", Method::POST, "/v1/vms/{name}/exec");
        assert!(exec[&404] == ["vm_not_found", "guest_not_found"], "{exec:?}");
        assert!(exec[&422].contains(&"command_not_found") && exec[&409].contains(&"request_in_progress"));
        assert_eq!(of("events", Method::GET, "/v1/events")[&410], ["cursor_expired"]);
        assert!(!of("health", Method::GET, "/healthz").contains_key(&401));
    }
}
