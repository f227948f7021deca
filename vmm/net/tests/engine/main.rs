//! The engine with a guest that is a TCP/IP stack in this process, and servers on the host's loopback.
#![allow(clippy::unwrap_used, reason = "a test that cannot continue must stop")]

mod byte_limits;
mod guest;
mod hostile;
mod tcp;
mod udp;
