//! The names of what is in a home, relative to it. `docs/state.md` has what each is for and who writes it.
//!
//! `Home` of nido-engine makes paths of them for everything on top of it, nido-images for its own. The names in a VM's directory
//! are beside `Home`.

/// The store, an SQLite database.
pub const DATABASE: &str = "nido.db";
/// The last backup of the store.
pub const DATABASE_BACKUP: &str = "nido.db.backup";
/// The backup before the last.
pub const DATABASE_BACKUP_OLDER: &str = "nido.db.backup.1";
/// Held by the process that makes a backup of the store.
pub const DATABASE_BACKUP_LOCK: &str = "nido.db.backup.lock";
/// A new store while it is rebuilt.
pub const DATABASE_REBUILT: &str = "nido.db.rebuilt";
/// Held by the process that rebuilds the store.
pub const REBUILD_LOCK: &str = "rebuild.lock";
/// Space that is kept for giving space back.
pub const SPACE_RESERVE: &str = "space.reserve";
/// The directories of VMs, by id.
pub const VMS: &str = "vms";
/// The manifests of templates, by name. A process that publishes or removes parts holds a flock(2) lock on it.
pub const TEMPLATES: &str = "templates";
/// Held (flock(2)) shared while a VM is created, exclusively while parts are removed.
pub const TEMPLATES_LOCK: &str = "templates.lock";
/// The parts of templates, by SHA-256.
pub const BLOBS: &str = "blobs/sha256";
/// The scratch directories of builds and imports.
pub const BUILD: &str = "build";
/// Facts about this host that take time to determine.
pub const CACHE: &str = "cache";
/// Kernels kept for later builds.
pub const KERNELS: &str = "cache/kernels";
/// Logs of background processes and builds.
pub const LOGS: &str = "logs";
/// Held by the process that fills the pools.
pub const POOL_LOCK: &str = "pool.lock";
/// Held by the process that delivers webhook messages.
pub const DELIVERY_LOCK: &str = "deliver.lock";
/// Held by the guardian, the process that gives a QEMU a supervisor again.
pub const GUARDIAN_LOCK: &str = "guardian.lock";
/// Liveness locks of servers and sessions, by id.
pub const LIVENESS_LOCKS: &str = "present";
/// Where agents on this machine may have files copied from and to.
pub const EXCHANGE: &str = "exchange";
/// The server's own certificate.
pub const TLS: &str = "tls";
/// The sealed secrets, a file for each.
pub const SECRETS: &str = "secrets";
/// The key that seals them.
pub const SECRETS_KEY: &str = "secrets.key";
/// Where the audit log is: a path, relative to the home where it lies within.
pub const AUDIT_PLACE: &str = "audit-place";
/// The audit log, unless it is elsewhere.
pub const AUDIT: &str = "audit";

/// The log of the last build of a template, in [`LOGS`].
#[must_use]
pub fn template_log(template: &str) -> String {
    format!("template-{template}.log")
}
