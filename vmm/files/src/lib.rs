//! How nido writes files so that neither a kill nor a power cut loses anything, and how its processes exclude each other.
//!
//! ```text
//!   lock.rs          liveness: locks that can be tested without being taken (OFD)
//!   flock.rs         work on templates: locks that can be shared (flock(2))
//!   atomic_file.rs   files that are replaced as a whole, with a stated durability
//!   private_dir.rs   directories and sockets that only their owner can use
//!   layout.rs        the names of what is in a home
//!   random.rs        ids, names and secrets
//!   failpoint.rs     places at which tests kill a process; not in a normal build
//! ```
//!
//! Invariant: every process of nido uses these, so two of them never disagree about a lock's kind or a temporary file's name.

pub mod atomic_file;
pub mod failpoint;
pub mod flock;
pub mod layout;
pub mod lock;
pub mod private_dir;
pub mod random;
