//! The entries of the registry, by noun.

use super::ConfirmationScope::{Any, Ephemeral, Foreign, Overwrite, Widen};
use super::{Operation, Scope};

/// Defines a constant for each operation, and [`ALL`] in the same order.
macro_rules! operations {
    ($(#[doc = $about:literal] $name:ident = $entry:expr;)*) => {
        $(#[doc = $about] pub const $name: &Operation = &$entry.about($about.trim_ascii());)*
        /// Every operation.
        pub const ALL: &[&Operation] = &[$($name),*];
    };
}

use Operation as Op;

operations! {
    /// Lists VMs.
    VM_LS = Op::read("vm_ls", "vm", "list").command("ls").tool("vm_ls").get("/v1/vms", "vm_list");
    /// Returns a VM.
    VM_INFO = Op::read("vm_info", "vm", "info").command("info").tool("vm_info").get("/v1/vms/{name}", "vm_info");
    /// Returns the logs of a VM.
    VM_LOGS = Op::read("vm_logs", "vm", "logs").command("logs").tool("vm_logs").get("/v1/vms/{name}/logs", "vm_logs");
    /// Creates a VM and starts it.
    VM_SPAWN = Op::write("vm_spawn", "vm", "spawn").long_running()
        .command("spawn").tool("vm_spawn").post("/v1/vms", "vm_spawn");
    /// Creates a VM without starting it.
    VM_CREATE = Op::write("vm_create", "vm", "create").command("create").tool("vm_create");
    /// Starts a VM.
    VM_START = Op::write("vm_start", "vm", "start").long_running()
        .command("start").tool("vm_start").post("/v1/vms/{name}/start", "vm_start");
    /// Stops a VM.
    VM_STOP = Op::destroy("vm_stop", "vm", "stop").long_running().confirmed(&[Ephemeral]).frees_space()
        .command("stop").tool("vm_stop").post("/v1/vms/{name}/stop", "vm_stop");
    /// Stops a VM and starts it again.
    VM_RESTART = Op::write("vm_restart", "vm", "restart").long_running()
        .command("restart").post("/v1/vms/{name}/restart", "vm_restart");
    /// Pauses the CPUs of a VM.
    VM_PAUSE = Op::write("vm_pause", "vm", "pause").command("pause").post("/v1/vms/{name}/pause", "vm_pause");
    /// Resumes a paused VM.
    VM_RESUME = Op::write("vm_resume", "vm", "resume")
        .command("resume").tool("vm_start").post("/v1/vms/{name}/resume", "vm_resume");
    /// Deletes a VM with its disk and snapshots.
    VM_DELETE = Op::destroy("vm_delete", "vm", "delete").long_running().confirmed(&[Any]).frees_space()
        .command("delete").tool("vm_delete").delete("/v1/vms/{name}", "vm_delete");
    /// Copies a running VM.
    VM_FORK = Op::write("vm_fork", "vm", "fork").long_running().confirmed(&[Foreign])
        .command("fork").tool("vm_fork").post("/v1/vms/{name}/fork", "vm_fork");
    /// Runs a command in a VM.
    VM_EXEC = Op::destroy("vm_exec", "vm", "exec").long_running().confirmed(&[Foreign]).has_output()
        .command("exec").tool("vm_exec").post("/v1/vms/{name}/exec", "vm_exec");
    /// Opens a login shell in a VM.
    VM_SHELL = Op::destroy("vm_shell", "vm", "shell").confirmed(&[Foreign]).command("shell");
    /// Runs a command in a VM of its own, which is deleted afterwards.
    VM_RUN = Op::write("vm_run", "vm", "run").long_running().has_output()
        .command("run").tool("vm_run").post("/v1/runs", "run");
    /// Copies a file into a VM.
    VM_UPLOAD = Op::destroy("vm_upload", "vm", "upload").confirmed(&[Foreign])
        .command("upload").tool("vm_upload").put("/v1/vms/{name}/files", "vm_upload");
    /// Copies a file out of a VM.
    VM_DOWNLOAD = Op::destroy("vm_download", "vm", "download").confirmed(&[Overwrite])
        .command("download").tool("vm_download").get("/v1/vms/{name}/files", "vm_download");
    /// Connects to a port of a VM.
    VM_PROXY = Op::write("vm_proxy", "vm", "proxy").command("proxy");
    /// Lists, publishes and withdraws ports of a VM.
    VM_PORTS = Op::destroy("vm_ports", "vm", "ports").confirmed(&[Foreign]).tool("vm_ports");
    /// Shows the network of a VM, and adds or removes rules.
    VM_NETWORK = Op::destroy("vm_network", "vm", "network").confirmed(&[Foreign, Widen]).tool("vm_network");
    /// Lists the published ports of a VM.
    FORWARD_LIST = Op::read("forward_list", "forward", "list")
        .command("forward ls").tool("vm_ports").get("/v1/vms/{name}/forwards", "forward_list");
    /// Publishes a port of a VM on the host.
    FORWARD_ADD = Op::write("forward_add", "forward", "add")
        .command("forward add").tool("vm_ports").post("/v1/vms/{name}/forwards", "forward_add");
    /// Withdraws a published port.
    FORWARD_REMOVE = Op::write("forward_remove", "forward", "remove")
        .command("forward rm").tool("vm_ports").delete("/v1/vms/{name}/forwards/{host_port}", "forward_remove");
    /// Returns the rules of a VM's network, and what that has done.
    NET_SHOW = Op::read("net_show", "network", "show")
        .command("net show").tool("vm_network").get("/v1/vms/{name}/network", "net_show");
    /// Adds rules to a VM's network, also while it runs.
    NET_ALLOW = Op::write("net_allow", "network", "allow")
        .command("net allow").tool("vm_network").post("/v1/vms/{name}/network/rules", "net_allow");
    /// Removes rules from a VM's network, also while it runs.
    NET_DENY = Op::write("net_deny", "network", "deny")
        .command("net deny").tool("vm_network").delete("/v1/vms/{name}/network/rules/{rule}", "net_deny");
    /// Lists presets of network rules.
    NET_PRESETS = Op::read("net_presets", "network", "presets").command("net presets").get("/v1/network/presets", "net_presets");
    /// Lists the snapshots of a VM.
    SNAPSHOT_LIST = Op::read("snapshot_list", "snapshot", "list")
        .command("snapshot ls").tool("vm_info").get("/v1/vms/{name}/snapshots", "snapshot_list");
    /// Returns a snapshot.
    SNAPSHOT_INFO = Op::read("snapshot_info", "snapshot", "info")
        .tool("vm_info").get("/v1/vms/{name}/snapshots/{snapshot}", "snapshot_info");
    /// Takes a snapshot of a VM.
    VM_SNAPSHOT = Op::write("vm_snapshot", "snapshot", "create").long_running()
        .command("snapshot create").tool("vm_snapshot").post("/v1/vms/{name}/snapshots", "snapshot_create");
    /// Restores a snapshot of a VM.
    VM_RESTORE = Op::destroy("vm_restore", "snapshot", "restore").long_running().confirmed(&[Any])
        .command("snapshot restore").tool("vm_restore")
        .post("/v1/vms/{name}/snapshots/{snapshot}/restore", "snapshot_restore");
    /// Deletes a snapshot.
    VM_SNAPSHOT_DELETE = Op::destroy("vm_snapshot_delete", "snapshot", "delete").confirmed(&[Any]).frees_space()
        .command("snapshot delete").delete("/v1/vms/{name}/snapshots/{snapshot}", "snapshot_delete");
    /// Lists templates.
    TEMPLATE_LIST = Op::read("template_list", "template", "list")
        .command("template ls").tool("template_list").get("/v1/templates", "template_list");
    /// Returns a template.
    TEMPLATE_INFO = Op::read("template_info", "template", "info")
        .command("template info").get("/v1/templates/{name}", "template_info");
    /// Builds a template from its recipe.
    TEMPLATE_BUILD = Op::write("template_build", "template", "build").admin().long_running()
        .command("template build").post("/v1/templates/{name}/build", "template_build");
    /// Creates a template from the disk of a VM.
    TEMPLATE_CREATE = Op::write("template_create", "template", "create").admin().long_running()
        .command("template create").tool("template_create").post("/v1/templates", "template_create");
    /// Saves a booted guest of a template as its warm image.
    TEMPLATE_BAKE = Op::write("template_bake", "template", "bake").admin().long_running()
        .command("template bake").post("/v1/templates/{name}/bake", "template_bake");
    /// Writes a template to a file.
    TEMPLATE_EXPORT = Op::write("template_export", "template", "export").admin().command("template export");
    /// Creates a template from a file.
    TEMPLATE_IMPORT = Op::write("template_import", "template", "import").admin().command("template import");
    /// Deletes a template.
    TEMPLATE_DELETE = Op::destroy("template_delete", "template", "delete").admin().confirmed(&[Any]).frees_space()
        .command("template delete").delete("/v1/templates/{name}", "template_delete");
    /// Lists pools.
    POOL_LIST = Op::read("pool_list", "pool", "list").command("pool ls").get("/v1/pools", "pool_list");
    /// Returns the pools of a template.
    POOL_INFO = Op::read("pool_info", "pool", "info").get("/v1/pools/{name}", "pool_info");
    /// Sets how many VMs of a template wait in its pool.
    POOL_SET = Op::write("pool_set", "pool", "set").admin().command("pool set").put("/v1/pools/{name}", "pool_set");
    /// Lists webhooks.
    WEBHOOK_LIST = Op::read("webhook_list", "webhook", "list").admin()
        .command("webhook list").get("/v1/webhooks", "webhook_list");
    /// Returns a webhook.
    WEBHOOK_INFO = Op::read("webhook_info", "webhook", "info").admin().get("/v1/webhooks/{id}", "webhook_info");
    /// Lists the deliveries of a webhook.
    WEBHOOK_DELIVERIES = Op::read("webhook_deliveries", "webhook", "deliveries").admin()
        .command("webhook deliveries").get("/v1/webhooks/{id}/deliveries", "webhook_deliveries");
    /// Adds a webhook.
    WEBHOOK_ADD = Op::write("webhook_add", "webhook", "add").admin()
        .command("webhook add").post("/v1/webhooks", "webhook_add");
    /// Removes a webhook and its pending messages.
    WEBHOOK_REMOVE = Op::destroy("webhook_remove", "webhook", "remove").admin().confirmed(&[Any])
        .command("webhook remove").delete("/v1/webhooks/{id}", "webhook_remove");
    /// Sends a test message to a webhook.
    WEBHOOK_TEST = Op::write("webhook_test", "webhook", "test").admin()
        .command("webhook test").post("/v1/webhooks/{id}/test", "webhook_test");
    /// Sends a message to a webhook again.
    WEBHOOK_REDELIVER = Op::write("webhook_redeliver", "webhook", "redeliver").admin()
        .command("webhook redeliver").post("/v1/webhooks/deliveries/{delivery}/redeliver", "webhook_redeliver");
    /// Returns events, or follows them.
    EVENTS = Op::read("events", "event", "list").command("events").get("/v1/events", "events");
    /// Lists the caller's jobs.
    OPERATION_LIST = Op::read("operation_list", "operation", "list").get("/v1/operations", "operation_list");
    /// Returns a job as an operation of the REST API.
    OPERATION_INFO = Op::read("operation_info", "operation", "info")
        .tool("job_get").get("/v1/operations/{id}", "operation_get");
    /// Cancels a job and deletes its record.
    OPERATION_CANCEL = Op::destroy("operation_cancel", "operation", "cancel")
        .tool("job_cancel").delete("/v1/operations/{id}", "operation_cancel");
    /// Returns a job.
    JOB_GET = Op::read("job_get", "job", "get").tool("job_get");
    /// Cancels a job.
    JOB_CANCEL = Op::destroy("job_cancel", "job", "cancel").tool("job_cancel");
    /// Returns lines of the audit log.
    AUDIT_SHOW = Op::read("audit_show", "audit", "show").admin().command("audit show").get("/v1/audit", "audit_show");
    /// Verifies the audit log.
    AUDIT_VERIFY = Op::read("audit_verify", "audit", "verify").admin().command("audit verify");
    /// Signs the last line of the audit log.
    AUDIT_CHECKPOINT = Op::read("audit_checkpoint", "audit", "checkpoint").admin().command("audit checkpoint");
    /// Writes a signed receipt of a VM.
    AUDIT_RECEIPT = Op::read("audit_receipt", "audit", "receipt").admin().command("audit receipt");
    /// Verifies a receipt.
    AUDIT_VERIFY_RECEIPT = Op::read("audit_verify_receipt", "audit", "verify-receipt").admin().command("audit verify-receipt");
    /// Prints the public key of checkpoints and receipts.
    AUDIT_KEY = Op::read("audit_key", "audit", "key").admin().command("audit key");
    /// Lists approvals.
    APPROVAL_LIST = Op::read("approval_list", "approval", "list").admin().command("approvals");
    /// Approves a requested operation.
    APPROVAL_APPROVE = Op::write("approval_approve", "approval", "approve").admin().confirmed(&[Any]).command("approve");
    /// Denies a requested operation.
    APPROVAL_DENY = Op::write("approval_deny", "approval", "deny").admin().command("deny");
    /// Stores a secret, or replaces its value.
    SECRET_SET = Op::write("secret_set", "secret", "set").admin().command("secret set");
    /// Runs the command of a secret again, and stores what it prints.
    SECRET_REFRESH = Op::write("secret_refresh", "secret", "refresh").admin().command("secret refresh");
    /// Lists secrets, without their values.
    SECRET_LIST = Op::read("secret_list", "secret", "list").admin().command("secret list");
    /// Deletes secrets.
    SECRET_DELETE = Op::destroy("secret_delete", "secret", "delete").admin().confirmed(&[Any]).command("secret delete");
    /// Creates a token.
    TOKEN_CREATE = Op::write("token_create", "token", "create").admin().command("token create");
    /// Lists tokens.
    TOKEN_LIST = Op::read("token_list", "token", "list").admin().command("token list");
    /// Revokes a token.
    TOKEN_REVOKE = Op::destroy("token_revoke", "token", "revoke").admin().confirmed(&[Any]).command("token revoke");
    /// Returns what was found about the host.
    HOST_INFO = Op::read("host_info", "host", "info").get("/v1/host", "host");
    /// Checks the host.
    HOST_CHECK = Op::write("host_check", "host", "check").command("doctor").post("/v1/host/check", "host_check");
    /// Removes the orphans of crashes.
    DOCTOR_GC = Op::write("doctor_gc", "host", "gc").admin().frees_space().command("doctor --gc");
    /// Restores VMs whose row in the store was lost.
    DOCTOR_ADOPT = Op::write("doctor_adopt", "host", "adopt").admin().command("doctor --adopt");
    /// Replaces a missing or damaged store by one with what can still be read.
    DOCTOR_REBUILD = Op::write("doctor_rebuild", "host", "rebuild").admin().command("doctor --rebuild");
    /// Lists what an MCP client can read without a tool.
    RESOURCE_LIST = Op::read("resource_list", "resource", "list");
    /// Reads what an MCP client can read without a tool.
    RESOURCE_READ = Op::read("resource_read", "resource", "read");
    /// Completes an argument for an MCP client.
    COMPLETION = Op::read("completion", "completion", "list");
    /// Stands for a request of the REST API that belongs to no operation.
    OTHER = Op::write("other", "request", "other");
    /// Deletes the ephemeral VMs of an MCP session that has ended.
    SESSION_END = Op::destroy("session_end", "session", "end").scope(Scope::Run);
}
