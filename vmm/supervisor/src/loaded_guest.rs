//! What is done to the machine of a guest that was loaded, before or after its identity reset: the link of its network card, the size
//! of its disk.

use nido_api::error::{Code, Error, Result};
use nido_api::sanitize::on_one_line;
use nido_engine::machine::Machine;
use nido_engine::qemu::Monitor;
use nido_engine::qemu::argv::NET;
use nido_store::{Origin, VmRow};
use qapi::qmp;

use super::qmp::QMP_TIMEOUT;

/// Whether the guest has a network card and is loaded: it may send nothing before its identity reset.
pub(super) fn has_link_to_hold(row: &VmRow, machine: &Machine) -> bool {
    row.origin != Origin::Boot && machine.net.has_card()
}

/// Sets the link of the guest's network card.
pub(super) async fn switch_link(monitor: &Monitor, up: bool) -> Result<()> {
    let set = qmp::set_link { name: NET.into(), up };
    monitor.execute(set, QMP_TIMEOUT).await.map(drop).map_err(|e| {
        let why = on_one_line(&e.to_string());
        Error::new(Code::QemuFailed, format!("the VM's network cannot be switched: {why}"))
    })
}

/// The guest was saved with a disk of its template's size; the VM may have been promised a larger one.
pub(super) async fn enlarge_disk(row: &VmRow, monitor: &Monitor) -> Result<()> {
    let baked = row.parts.frozen.last().map_or(row.disk_bytes, |frozen| frozen.virtual_bytes);
    if baked == row.disk_bytes {
        return Ok(());
    }
    let size = i64::try_from(row.disk_bytes).unwrap_or(i64::MAX);
    let resize = qmp::block_resize { device: None, node_name: Some("disk".into()), size };
    monitor.execute(resize, QMP_TIMEOUT).await.map(drop).map_err(|e| {
        let why = on_one_line(&e.to_string());
        Error::new(Code::QemuFailed, format!("the VM's disk cannot be enlarged: {why}"))
    })
}
