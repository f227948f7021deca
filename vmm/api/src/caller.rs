//! The caller of an operation, and its front end.

use serde::{Deserialize, Serialize};

/// The front end that received a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = Face)]
pub enum FrontEnd {
    /// The MCP server.
    Mcp,
    /// The REST server.
    Api,
    /// The command line.
    Cli,
    /// None: nido itself records an event.
    Host,
}

impl FrontEnd {
    /// The word in a line.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Mcp => "MCP",
            Self::Api => "API",
            Self::Cli => "CLI",
            Self::Host => "HOST",
        }
    }

    /// The front end that a word in a line denotes.
    #[must_use]
    pub fn of_word(word: &str) -> Option<Self> {
        [Self::Mcp, Self::Api, Self::Cli, Self::Host].into_iter().find(|face| face.word() == word)
    }
}

/// On whose behalf something is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Which front end received the request.
    pub face: FrontEnd,
    /// Who really called: `uid:1000` by peer credentials, `token:ci#ID` by a token's name and id.
    pub actor: String,
    /// The client's own name for itself. A claim.
    pub agent: Option<String>,
}

impl Caller {
    /// The user of the command line: the real one, not the effective one.
    #[must_use]
    pub fn command_line() -> Self {
        let actor = format!("uid:{}", rustix::process::getuid().as_raw());
        Self { face: FrontEnd::Cli, actor, agent: None }
    }

    /// Who owns what this caller makes: a token wherever it was used, a user apart for each front end. What an agent makes on behalf of a
    /// user is not what that user has made.
    #[must_use]
    pub fn owner(&self) -> String {
        match self.actor.starts_with("token:") {
            true => self.actor.clone(),
            false => format!("{} {}", self.face.word(), self.actor),
        }
    }
}
