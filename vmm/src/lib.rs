//! The core of nido: everything that starts, controls and forgets virtual machines.

pub mod api;
pub mod error;
pub mod guest;
pub mod host;
pub mod machine;
pub mod name;
pub mod nido;
pub mod qemu;
pub mod state;
