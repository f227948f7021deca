//! QEMU as nido uses it: its command line, its process, its monitor.
//!
//! Invariant: QEMU works in the VM's own directory, and every file and socket of the VM is named on the command line
//! relative to it, so neither long paths nor commas in them matter.

pub mod argv;
#[cfg(test)]
mod argv_golden;
mod child;
pub mod migration;
pub mod monitor;
mod monitor_wire;
mod needs;
pub mod process;

pub use child::GroupToJoin;
pub use monitor::{Monitor, MonitorError, MonitorEvent};
pub use needs::needs;
pub use process::{Launch, QemuExit, QemuProcess};
