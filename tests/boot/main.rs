//! The boot suite: the real `nido`, real QEMU, real guests from both templates. What needs no guest is tested in
//! `tests/functional` with a program that stands in for QEMU.
//!
//! | variable | what it is |
//! |---|---|
//! | `NIDO_TEST_KVM` | set where KVM works: a test fails if a VM of its home had to do without |
//! | `NIDO_TEST_HOME` | a home in which the templates `sandbox` and `debian-12` stand ready; only read, never changed |
//! | `NIDO_BIN` | the `nido` under test; the one that cargo has built if absent |
//!
//! Each test has a home of its own with the templates' parts linked into it, so tests share nothing and run in any order.
//!
//! Invariant: a test ends with every VM of its home deleted by `nido`, no process left that works there, and no file in
//! `vms/`; the home's guard (`rig/home.rs`) checks that and fails the test otherwise.

#![allow(clippy::unwrap_used)]

mod boots;
mod bypass;
mod contention;
mod core;
mod endings;
mod exec;
mod failures;
mod files;
mod forks;
mod forwards;
mod hostile;
mod interrupts;
mod json;
mod lifecycle;
mod limits;
mod names;
mod network;
mod own_user;
mod pool;
mod presets;
mod rig;
mod run;
mod secrets;
mod security;
mod snapshots;
mod soak;
mod spawn;
mod supervisors;
mod template_rules;
mod template_transfer;
mod terminal;
