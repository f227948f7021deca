//! Reconciliation: the one place where what a killed process did not complete is found and repaired.
//!
//! ```text
//!  Inventory::take   what is there: rows, directories, locks, liveness files, builds, template parts     (reads)
//!  plan              what has to be done about it                                                        (pure)
//!  apply             each repair, after the VM is locked and its part of the plan has been made again    (writes)
//! ```
//!
//! Every command does it when it opens the home, a server before a request ([`Scope::Open`]); an operation that creates a VM finds
//! orphaned directories ([`Scope::Create`]); `doctor` checks everything, and with `--gc` repairs everything
//! ([`Scope::Everything`]). One VM is reconciled where a command finds that its supervisor is gone.
//!
//! Invariants: a repair is made under the lock of what it changes, from facts that were read under that lock. Nothing that holds a
//! disk or a snapshot is removed because a row is missing; it is reported, and `doctor --adopt` gives it a row again. A template
//! part is removed only if every owner is known and none of them names it.

mod adopt;
mod apply;
mod inventory;
mod parts;
mod plan;

pub use self::adopt::Adoption;
pub(super) use self::adopt::{insert_recovered, recovered_row};
pub(super) use self::apply::RemovalCounts;
pub(super) use self::inventory::Scope;
pub(super) use self::plan::{Finding, Plan, Repair, VmRepair};

#[cfg(test)]
mod tests;
