//! What the tests stand on: homes, calls of `nido`, terminals, processes, waiting.

mod call;
mod home;
mod namespaces;
mod process;
mod pty;
mod wait;

pub use call::{Call, FinishedCall, RunningCall};
pub use home::{TestHome, UserAccount, Vm};
pub use namespaces::{Namespaces, reasons, show};
pub use process::{Process, send};
pub use wait::{BOOT_TEST_TIMEOUT, eventually};
