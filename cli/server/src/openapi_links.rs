//! What a client can do next with a response: the links of the description (OpenAPI 3.1). Pure data.
//!
//! Invariant: a link names an operation that there is, and gives it every part of its path.

use serde_json::{Value, json};

/// One link: from which operation and status, its name, to which operation, with which parameters.
type Link = (&'static str, u16, &'static str, &'static str, &'static [(&'static str, &'static str)]);

/// The VM that the response describes.
const VM: &[(&str, &str)] = &[("name", "$response.body#/name")];
/// The first of the VMs that it describes.
const FIRST_VM: &[(&str, &str)] = &[("name", "$response.body#/vms/0/name")];
const FIRST_COPY: &[(&str, &str)] = &[("name", "$response.body#/copies/0/name")];
const SNAPSHOT: &[(&str, &str)] = &[("name", "$request.path.name"), ("snapshot", "$response.body#/name")];
const FORWARD: &[(&str, &str)] = &[("name", "$request.path.name"), ("host_port", "$response.body#/host_port")];
const WEBHOOK: &[(&str, &str)] = &[("id", "$response.body#/id")];
const FIRST_WEBHOOK: &[(&str, &str)] = &[("id", "$response.body#/webhooks/0/id")];
const FIRST_TEMPLATE: &[(&str, &str)] = &[("name", "$response.body#/templates/0/name")];
const TEMPLATE: &[(&str, &str)] = &[("name", "$response.body#/template/name")];
const OPERATION: &[(&str, &str)] = &[("id", "$response.body#/id")];

const LINKS: [Link; 30] = [
    ("vm_spawn", 201, "info", "vm_info", VM),
    ("vm_spawn", 201, "exec", "vm_exec", VM),
    ("vm_spawn", 201, "logs", "vm_logs", VM),
    ("vm_spawn", 201, "forward", "forward_add", VM),
    ("vm_spawn", 201, "fork", "vm_fork", VM),
    ("vm_spawn", 201, "start", "vm_start", VM),
    ("vm_spawn", 201, "stop", "vm_stop", VM),
    ("vm_spawn", 201, "snapshot", "snapshot_create", VM),
    ("vm_spawn", 201, "delete", "vm_delete", VM),
    ("vm_list", 200, "info", "vm_info", FIRST_VM),
    ("vm_fork", 201, "info", "vm_info", FIRST_COPY),
    ("vm_fork", 201, "exec", "vm_exec", FIRST_COPY),
    ("vm_fork", 201, "delete", "vm_delete", FIRST_COPY),
    ("snapshot_create", 201, "restore", "snapshot_restore", SNAPSHOT),
    ("snapshot_create", 201, "delete", "snapshot_delete", SNAPSHOT),
    ("forward_add", 201, "remove", "forward_remove", FORWARD),
    ("template_list", 200, "info", "template_info", FIRST_TEMPLATE),
    ("template_create", 201, "info", "template_info", TEMPLATE),
    ("template_create", 201, "delete", "template_delete", TEMPLATE),
    ("webhook_list", 200, "deliveries", "webhook_deliveries", FIRST_WEBHOOK),
    ("webhook_list", 200, "test", "webhook_test", FIRST_WEBHOOK),
    ("webhook_add", 201, "deliveries", "webhook_deliveries", WEBHOOK),
    ("webhook_add", 201, "test", "webhook_test", WEBHOOK),
    ("webhook_add", 201, "remove", "webhook_remove", WEBHOOK),
    ("webhook_deliveries", 200, "redeliver", "webhook_redeliver", &[("delivery", "$response.body#/deliveries/0/id")]),
    ("events", 200, "behind", "events", &[("since", "$response.body#/cursor")]),
    ("operation_list", 200, "poll", "operation_get", &[("id", "$response.body#/operations/0/id")]),
    ("operation_get", 200, "cancel", "operation_cancel", OPERATION),
    ("*", 202, "poll", "operation_get", OPERATION),
    ("*", 202, "cancel", "operation_cancel", OPERATION),
];

/// The links of a response of `operation` with `status`; those of a 202 are the same for all.
pub fn of(operation: &str, status: &str, goes_on: bool) -> Option<Value> {
    let wanted = |link: &&Link| link.1.to_string() == status && (link.0 == operation || (link.0 == "*" && goes_on));
    let links = LINKS.iter().filter(wanted).map(|(_, _, name, to, parameters)| {
        let parameters: serde_json::Map<_, _> =
            parameters.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
        ((*name).to_owned(), json!({ "operationId": to, "parameters": parameters }))
    });
    let links: serde_json::Map<_, _> = links.collect();
    (!links.is_empty()).then_some(Value::Object(links))
}
