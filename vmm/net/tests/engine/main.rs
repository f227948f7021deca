//! The engine with a guest that is a TCP/IP stack in this process, and servers on the host's loopback.

mod guest;
mod hostile;
mod tcp;
mod udp;
