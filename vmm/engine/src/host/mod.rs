//! What this host offers: QEMU, KVM, vsock, room.
//!
//! Everything is found out by asking or by running, never by believing that a path exists. Answers that cost more
//! than a file system call are cached under `$NIDO_HOME/cache/` with the facts they rest on as their key.
//! Invariant: a cached answer is used only while every part of its key is unchanged.
#![allow(unsafe_code)]

mod boot;
mod cache;
pub mod confinement;
pub mod control_group;
pub mod daemon;
pub mod delegation;
pub mod facts;
pub mod kvm;
mod kvm_features;
mod kvm_vcpu;
pub mod limits;
mod own_user;
pub mod qemu;
pub mod scope;
mod trial;
mod tsc;
pub mod vm_processes;
pub mod vsock;

pub use confinement::{ConfinementSupport, OwnUser};
pub use control_group::ControlGroup;
pub use facts::{HostFacts, KvmModule, Nesting};
pub use kvm::KvmVerdict;
pub use qemu::{QemuFacts, QemuProbeError, QemuVersion};
pub use vsock::VsockVerdict;
