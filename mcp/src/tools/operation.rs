//! What a tool's arguments become: an operation that can be checked before a person is asked about it, and then run.

use std::fmt::Debug;

use futures::future::BoxFuture;
use nido_api::error::Result;
use nido_api::name::VmName;

use crate::answer::ToolResult;
use crate::call_context::CallContext;

/// Parsed arguments of a tool, and what is done with them.
pub trait Operation: Debug + Send + Sync {
    /// The VM that it acts on; for one that creates a VM, its name.
    fn vm(&self) -> Option<&VmName> {
        None
    }

    /// Whether [`Self::vm`] is created by it, so that it may be missing before.
    fn creates_vm(&self) -> bool {
        false
    }

    /// Whether these arguments change nothing, although others of the tool do.
    fn only_reads(&self) -> bool {
        false
    }

    /// Whether it replaces a file of the host.
    fn overwrites(&self, _: &CallContext) -> bool {
        false
    }

    /// Whether the guest may reach more afterwards than its rules, and the limits of the caller, allow now.
    fn widens<'a>(&'a self, _: &'a CallContext) -> BoxFuture<'a, Result<bool>> {
        Box::pin(async { Ok(false) })
    }

    /// Fails if the operation would fail as things are, so that no confirmation is requested for an impossible operation.
    fn admit<'a>(&'a self, _: &'a CallContext) -> BoxFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// Does it.
    fn run(self: Box<Self>, call: CallContext) -> BoxFuture<'static, Result<ToolResult>>;
}
