//! Snapshots: a VM as it was at one moment.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::name::{SnapshotName, VmName};

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SnapshotInfo {
    /// The VM.
    pub vm: VmName,
    /// Its name, unique for that VM.
    pub name: SnapshotName,
    /// When it was taken.
    pub created_at: Timestamp,
    /// Whether it contains memory and devices, so that a restored VM continues from that moment. Otherwise only the
    /// disk.
    pub running: bool,
    /// Bytes on the host's disk.
    pub size_bytes: u64,
    /// For how long the running VM's CPUs were paused for it, in milliseconds. Absent if they did not run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub paused_ms: Option<u64>,
    /// Why it cannot be restored, if it is damaged. It can be deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub damaged: Option<String>,
}

/// A list of snapshots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SnapshotList {
    /// The oldest first.
    pub snapshots: Vec<SnapshotInfo>,
}

/// How a snapshot is restored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RestoreRequest {
    /// Restore only the disk, and leave the VM stopped.
    pub disk_only: bool,
    /// Time limit for the guest to become ready, in milliseconds.
    pub timeout_ms: Option<u64>,
}
