//! Opens a server: the settings are checked against the tools that there are, then its state is made.

use std::sync::Arc;

use nido_api::error::{Code, Error, Result};
use nido_core::Nido;
use nido_core::host_paths::DefaultPaths;
use nido_core::policy::Policy;

use crate::app::{App, Settings};
use crate::tools;

impl App {
    /// A server over this core. Files of the host are those below the policy's roots, or below `defaults` where it names none.
    ///
    /// # Errors
    /// `spec_invalid` of a policy that names a tool that there is not; of a root that cannot be opened.
    pub fn new(nido: Arc<Nido>, settings: Settings, defaults: &DefaultPaths) -> Result<Arc<Self>> {
        check_confirmed_tools(&settings.policy)?;
        Self::open(nido, settings, defaults)
    }
}

/// Whether every tool that the policy asks about is one.
fn check_confirmed_tools(policy: &Policy) -> Result<()> {
    let Some(unknown) = policy.confirm.tools().find(|tool| tools::find(tool).is_none()) else { return Ok(()) };
    let words = format!("the policy asks about '{unknown}', which is not a tool");
    Err(Error::new(Code::SpecInvalid, words).hint("docs/mcp.md has the names of the tools"))
}
