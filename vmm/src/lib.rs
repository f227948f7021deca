//! The core of nido: everything that starts, controls and forgets virtual machines.
//!
//! ```text
//!  faces (cli, mcp, rest)
//!        |
//!     nido.rs  Nido: one method per operation ---- api/ error.rs name.rs   what is asked and answered  [pure]
//!        |  \
//!        |   +-- store/      facts that processes agree on (SQLite)
//!        |   +-- home.rs     every path        lock.rs  who lives
//!        |   +-- audit/      who asked for what, in lines that hang together
//!        |   +-- host/ + machine.rs            what the host offers, what machine that makes  [machine.rs: pure]
//!        |
//!     supervisor/  one process per running VM: owns QEMU, carries sessions, keeps limits
//!        |   \
//!      qemu/   guest/   its command line, process and monitor; the client of the agent inside
//!
//!     policy/      which commands callers of a server may run; what a person must approve  [pure, but for reading it]
//!     roots.rs     files of the host that callers of a server may name
//!     webhook/     messages about events: signed, retried, delivered by a process that lives while there are some
//! ```
//!
//! Invariants: state.rs is the only place that knows which request is allowed when; nothing outside `home.rs` makes a path
//! of the home; every wait has a deadline.

pub mod api;
pub mod atomic_file;
pub mod audit;
pub mod bake;
pub mod context;
pub mod disk;
pub mod error;
mod error_sources;
pub mod guest;
mod hex;
pub mod home;
pub mod host;
pub mod lock;
mod logs;
pub mod machine;
pub mod moment;
pub mod name;
pub mod nido;
pub mod policy;
mod presence;
pub mod qemu;
pub mod random;
pub mod roots;
pub mod snapshot;
mod space_reserve;
pub mod state;
pub mod store;
pub mod supervisor;
pub mod text;
mod vm_record;
pub mod webhook;
