//! What the tests stand on: homes, calls of `nido`, terminals, processes, waiting.

mod call;
mod home;
mod process;
mod pty;
mod wait;

pub use call::{Done, Running};
pub use home::{TestHome, Vm, Who};
pub use process::{Process, send};
pub use wait::{PATIENCE, eventually};
