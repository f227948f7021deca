//! The core API of nido: one method of [`Nido`] per operation. All front ends call these and nothing else.
//!
//! ```text
//!  front ends (cli, server, mcp)
//!        |
//!     nido.rs + nido/   one method per operation; execute.rs: attempt, confirmation, work, outcome
//!        |-- audit/       the audit log: who requested what, in a hash chain
//!        |-- policy/      which commands callers of a server may run; what a person must approve  [pure, but for reading it]
//!        |-- host_paths.rs files of the host that callers of a server may name
//!        |-- webhook/     messages about events: signed, retried
//!        v
//!     nido-supervisor, nido-store, nido-engine, nido-images
//! ```

pub mod audit;
pub mod host_paths;
mod nido;
pub mod policy;
mod presets;
pub mod webhook;

pub use nido_engine::template::renewal;
pub use nido_store::KeyState;
pub use nido_supervisor::SuperviseRequest;

pub use nido::execute;
pub use nido::{
    Adoption, EventFeed, ExecControl, ExecEvents, ForkSecrets, Intent, Lease, LogStream, Nido, OpenOptions,
    RUN_IDLE_MS, RebuildReport, RestoredRows, RestoredVm, SkippedDirectory, VmInProgress, Watch,
};
