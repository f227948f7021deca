//! Trees as tar archives: what HTTP clients have a program for.
//!
//! ```text
//!  unpack.rs   archive -> entries of the agent's protocol       pack.rs   entries -> archive
//!                 └────────────── head.rs, pax.rs: blocks of 512 bytes, records of text: pure ──────────────┘
//! ```
//!
//! Written here and not taken from the `tar` crate, because an archive is hostile: that crate reads long names and PAX
//! records into memory whatever length they claim, cuts off what does not fit a number, and knows no PAX value with a
//! line end. What two readers could understand differently is refused here.
//!
//! Invariant: memory does not depend on an archive's size, entries or claims (of symlinks that a guest sends eight bytes each are
//! kept), and nothing of it touches this host's disk.

mod head;
mod pack;
mod pax;
mod unpack;

pub(super) use self::unpack::{Archive, Member, MemberKind};

/// Length of a block, in bytes: everything in an archive is a whole number of them.
const BLOCK: usize = 512;
/// Longest path of an entry and longest target of a symlink, in bytes: what one system call takes.
const MAX_PATH: usize = 4095;

/// How many bytes stand behind so many to make whole blocks.
const fn padding(bytes: u64) -> u64 {
    bytes.wrapping_neg() % BLOCK as u64
}
