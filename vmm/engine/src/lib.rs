//! How one VM runs on this host: what machine a request becomes, QEMU's command line, process and monitor, the guest agent's client,
//! disks, snapshots and paths. Nothing here depends on the store or the caller.
//!
//! ```text
//!   machine.rs + host/     request and host facts become a machine      [machine.rs: pure]
//!   qemu/                  its command line, process, monitor, migration
//!   guest/                 the client of the agent inside
//!   secrets.rs             secrets, sealed by a key of the home
//!   home.rs                every path of a home
//!   liveness.rs            which processes run
//! ```
//!
//! Invariants: nothing outside `home.rs` makes a path of the home; every wait has a deadline.

pub use nido_confine as confine;

pub mod bake;
pub mod disk;
pub mod disk_quota;
pub mod error_sources;
pub mod guest;
pub mod home;
pub mod host;
pub mod liveness;
pub mod logs;
pub mod machine;
pub mod qemu;
pub mod secrets;
pub mod snapshot;
pub mod space_reserve;
pub mod template;
pub mod temporary_files;
