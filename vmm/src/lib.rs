//! The core of nido: everything that starts, controls and forgets virtual machines.
