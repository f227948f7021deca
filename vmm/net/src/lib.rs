//! The network of one VM: the host's end of its Ethernet link.

pub mod dns;
pub mod names;
pub mod peek;
