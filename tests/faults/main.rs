//! What a crash at any step of any operation leaves behind, on the real `nido` with a simulated QEMU.
//!
//! ```text
//!  rig.rs          a home with VMs that must stay as they are, and the failpoints of its processes
//!  check.rs        what has to hold after a crash: processes, files, locks, rows, ports, names
//!  operations.rs   the operations, and the effect that each of them acknowledges
//!  kills.rs        each operation, killed at each of its failpoints
//!  errors.rs       each operation, with a disk that is full at one of its writes
//!  random.rs       processes that are killed at random moments
//!  names.rs        every failpoint in the source is reached by an operation
//! ```
//!
//! The failpoints are those of `vmm/files/src/failpoint.rs`.

#![allow(missing_docs, clippy::unwrap_used)]

mod check;
mod errors;
mod kills;
mod names;
mod operations;
mod random;
mod rig;

#[path = "../support/mod.rs"]
#[allow(dead_code)]
mod support;
