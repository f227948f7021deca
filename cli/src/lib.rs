//! The servers, as a library of nido's own: its programs are the command line, and one of the tests that has to be served by the
//! very stack that is shipped.
//!
//! Invariant: nothing here knows of arguments, terminals or exit codes.

pub mod sanitize;
pub mod serve;
pub mod signals;
