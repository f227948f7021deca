//! The stable codes of failures, and the kind of each.

/// What sort of failure it is; decides exit codes and HTTP statuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The request is wrong in itself.
    Invalid,
    /// What it speaks of does not exist.
    NotFound,
    /// The state of things does not allow it now.
    Conflict,
    /// The caller may not.
    Denied,
    /// Something that is needed is not there, or did not answer.
    Unavailable,
    /// A defect of nido.
    Internal,
}

macro_rules! codes {
    ($($variant:ident $slug:literal $kind:ident $status:literal $title:literal;)*) => {
        /// A stable name for a failure. The slugs are a written promise.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code { $(#[doc = $title] $variant,)* }

        impl Code {
            /// Every code there is.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];
            /// The code with this slug; `internal` for one of a newer nido.
            #[must_use]
            pub fn from_slug(slug: &str) -> Self {
                Self::ALL.iter().copied().find(|code| code.slug() == slug).unwrap_or(Self::Internal)
            }
            /// The slug, e.g. `vm_not_found`.
            #[must_use]
            pub const fn slug(self) -> &'static str { match self { $(Self::$variant => $slug,)* } }
            /// The kind it belongs to.
            #[must_use]
            pub const fn kind(self) -> Kind { match self { $(Self::$variant => Kind::$kind,)* } }
            /// The HTTP status that goes with it.
            #[must_use]
            pub const fn status(self) -> u16 { match self { $(Self::$variant => $status,)* } }
            /// A few words that are the same for every occurrence.
            #[must_use]
            pub const fn title(self) -> &'static str { match self { $(Self::$variant => $title,)* } }
        }
    };
}

codes! {
    VmNotFound "vm_not_found" NotFound 404 "No such VM";
    VmExists "vm_exists" Conflict 409 "A VM of that name exists";
    VmNotRunning "vm_not_running" Conflict 409 "The VM is not running";
    VmBusy "vm_busy" Conflict 409 "The VM is busy";
    VmReplaced "vm_replaced" Conflict 412 "The name belongs to another VM now";
    NameInvalid "name_invalid" Invalid 422 "Not a valid name";
    TemplateNotFound "template_not_found" NotFound 404 "No such template";
    TemplateExists "template_exists" Conflict 409 "A template of that name exists";
    TemplateInUse "template_in_use" Conflict 409 "The template is in use";
    TemplateMismatch "template_mismatch" Conflict 409 "The template does not fit this host";
    TemplateBuildFailed "template_build_failed" Unavailable 503 "The template could not be built";
    SnapshotNotFound "snapshot_not_found" NotFound 404 "No such snapshot";
    SnapshotExists "snapshot_exists" Conflict 409 "A snapshot of that name exists";
    SnapshotDamaged "snapshot_damaged" Conflict 409 "The snapshot is damaged";
    ArchiveInvalid "archive_invalid" Invalid 422 "Not a template archive that can be used";
    QemuMissing "qemu_missing" Unavailable 503 "QEMU is not installed";
    QemuTooOld "qemu_too_old" Unavailable 503 "QEMU is too old";
    QemuFailed "qemu_failed" Unavailable 503 "QEMU failed";
    KvmUnavailable "kvm_unavailable" Unavailable 503 "KVM cannot be used";
    NestedUnavailable "nested_unavailable" Unavailable 503 "The host does not allow nested VMs";
    IsolationRequired "isolation_required" Denied 403 "Hardware isolation is required";
    ConfinementRequired "confinement_required" Denied 403 "Confinement of QEMU is required";
    GuestFailed "guest_failed" Unavailable 503 "The guest failed";
    AgentUnreachable "agent_unreachable" Unavailable 504 "The guest agent does not reply";
    AgentVersion "agent_version" Conflict 409 "The guest agent has another protocol version";
    CommandNotFound "command_not_found" NotFound 422 "No such command in the guest";
    CommandCannotRun "command_cannot_run" Invalid 422 "The command cannot be run";
    UserNotFound "user_not_found" NotFound 422 "No such user in the guest";
    DirectoryNotFound "directory_not_found" NotFound 422 "No such directory in the guest";
    GuestDenied "guest_denied" Denied 422 "The guest refused access";
    GuestBusy "guest_busy" Conflict 409 "The guest reports that it is busy";
    GuestNotFound "guest_not_found" NotFound 404 "No such file or directory in the guest";
    GuestInvalid "guest_invalid" Invalid 422 "The guest refused the request as invalid";
    PathNotFound "path_not_found" NotFound 404 "No such file or directory";
    PathExists "path_exists" Conflict 409 "The destination exists";
    PathInvalid "path_invalid" Invalid 422 "The path cannot be used";
    PortClosed "port_closed" Unavailable 503 "Nothing listens on that port in the guest";
    ForwardNotFound "forward_not_found" NotFound 404 "No such forward";
    RuleNotFound "rule_not_found" NotFound 404 "No such rule";
    PortInUse "port_in_use" Conflict 409 "The port is in use";
    Timeout "timeout" Unavailable 504 "The timeout was reached";
    Interrupted "interrupted" Unavailable 503 "Interrupted";
    Denied "denied" Denied 403 "Not allowed";
    ApprovalRequired "approval_required" Denied 403 "Approval is required";
    ApprovalNotFound "approval_not_found" NotFound 404 "No such approval";
    ApprovalEnded "approval_ended" Conflict 409 "The approval has expired or was used";
    Unauthorized "unauthorized" Denied 401 "Authentication is required";
    SecretNotFound "secret_not_found" NotFound 404 "No such secret";
    TokenNotFound "token_not_found" NotFound 404 "No such token";
    TokenExists "token_exists" Conflict 409 "A token of that name exists";
    OperationNotFound "operation_not_found" NotFound 404 "No such operation";
    JobNotFound "job_not_found" NotFound 404 "No such job";
    RouteNotFound "route_not_found" NotFound 404 "No such resource";
    MethodNotAllowed "method_not_allowed" Invalid 405 "Not a method of this resource";
    RequestInvalid "request_invalid" Invalid 400 "The request cannot be read";
    RequestTimeout "request_timeout" Invalid 408 "The request was sent too slowly";
    BodyTooLarge "body_too_large" Invalid 413 "The body is too large";
    MediaTypeUnsupported "media_type_unsupported" Invalid 415 "Unsupported media type";
    RateLimited "rate_limited" Unavailable 429 "Too many requests";
    AuditFailed "audit_failed" Unavailable 503 "The audit log cannot be written";
    AuditBroken "audit_broken" Conflict 409 "The hash chain of the audit log is broken";
    AnswerTooLarge "answer_too_large" Conflict 409 "The request was carried out; its response was too large to store";
    RequestInProgress "request_in_progress" Conflict 409 "The same request is in progress";
    OutcomeUnknown "outcome_unknown" Conflict 409 "The outcome of the request is unknown";
    LimitExceeded "limit_exceeded" Conflict 409 "A limit was reached";
    CursorExpired "cursor_expired" NotFound 410 "The cursor is outside the events that are kept";
    DiskFull "disk_full" Unavailable 507 "The disk is full";
    ToolMissing "tool_missing" Unavailable 503 "A required program is not installed";
    PermissionDenied "permission_denied" Denied 403 "The operating system of the host does not permit it";
    ReadOnly "read_only" Conflict 409 "The file system is read-only";
    AddressInUse "address_in_use" Conflict 409 "The address is in use";
    PathUnusable "path_unusable" Conflict 409 "The path cannot be used on this host";
    HostFailed "host_failed" Unavailable 503 "The host's operating system reported an error";
    SpecInvalid "spec_invalid" Invalid 422 "The request is not valid";
    WebhookInvalid "webhook_invalid" Invalid 422 "Not a valid webhook";
    WebhookNotFound "webhook_not_found" NotFound 404 "No such webhook, or no such delivery";
    StoreDamaged "store_damaged" Unavailable 503 "The store is damaged";
    Internal "internal" Internal 500 "Internal error";
}
