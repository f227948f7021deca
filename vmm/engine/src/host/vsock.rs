//! Can this user give a VM a kernel vsock device?
//!
//! Invariant: `Usable` is returned only after `/dev/vhost-vsock` was really opened.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Whether `/dev/vhost-vsock` can be used, and if not, why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum VsockVerdict {
    /// The device opened.
    Usable,
    /// There is no such device: the kernel module `vhost_vsock` is not loaded or not built.
    Absent,
    /// The device is there, this user may not open it.
    NotPermitted,
    /// The device is there and does not open; `reason` is the system's sentence.
    Unusable {
        /// The system's error.
        reason: String,
    },
}

/// Opens `/dev/vhost-vsock` and returns the result. Costs microseconds, so it is never cached.
#[must_use]
pub fn probe() -> VsockVerdict {
    probe_at(Path::new("/dev/vhost-vsock"))
}

fn probe_at(device: &Path) -> VsockVerdict {
    match OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => VsockVerdict::Usable,
        Err(error) => match error.kind() {
            ErrorKind::NotFound => VsockVerdict::Absent,
            ErrorKind::PermissionDenied => VsockVerdict::NotPermitted,
            _ => VsockVerdict::Unusable { reason: error.to_string() },
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_openable_device_is_usable_and_others_have_a_reason() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("vhost-vsock");
        assert_eq!(probe_at(&device), VsockVerdict::Absent);
        std::fs::write(&device, b"").unwrap();
        assert_eq!(probe_at(&device), VsockVerdict::Usable);
        assert!(matches!(probe_at(dir.path()), VsockVerdict::Unusable { .. }));
    }
}
