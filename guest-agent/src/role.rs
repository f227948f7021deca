//! The part that the agent plays in its machine.

/// What the agent is in its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The guest's first process.
    Init,
    /// A service of the guest's.
    Service,
    /// An ordinary process that leaves the machine alone.
    Visitor,
}
