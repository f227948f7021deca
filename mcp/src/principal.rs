//! The caller of a request: who it is and what it may do.

use nido_api::{Caller, FrontEnd, Limits, Scope};
use rmcp::RoleServer;
use rmcp::service::RequestContext;

/// The authenticated caller.
#[derive(Debug, Clone)]
pub struct Principal {
    /// For the audit log: `uid:N` or `token:NAME#ID`.
    pub actor: String,
    /// What they may do.
    pub scope: Scope,
    /// The limits of the VMs that they create, in addition to the policy.
    pub limits: Limits,
}

impl Principal {
    /// The user who runs this program: the one at the other end of its standard input.
    #[must_use]
    pub fn own_user(scope: Scope) -> Self {
        Self { actor: format!("uid:{}", rustix::process::getuid().as_raw()), scope, limits: Limits::default() }
    }

    /// The caller for the audit log, with the name that its client gave itself.
    pub(crate) fn caller(&self, context: &RequestContext<RoleServer>) -> Caller {
        let agent = context.client_info().map(|client| client.name);
        Caller { face: FrontEnd::Mcp, actor: self.actor.clone(), agent }
    }
}
