//! Which boot of the host this is.

/// Identifies the host's current boot.
pub(super) fn boot_id() -> Option<String> {
    Some(std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned())
}
