//! Tokens: who may use the servers, and for what.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Limits;
use crate::error::{Code, Error};

/// What a token is good for. Each holds what those before it hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Look: VMs, logs, events, templates, the host.
    Read,
    /// Make, use and delete VMs and snapshots: commands, files, ports.
    Run,
    /// Everything: templates, pools, webhooks, the audit log.
    Admin,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Self; 3] = [Self::Read, Self::Run, Self::Admin];

    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Run => "run",
            Self::Admin => "admin",
        }
    }
}

impl std::str::FromStr for Scope {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|scope| scope.word() == word).ok_or_else(|| {
            Error::new(Code::SpecInvalid, format!("there is no scope '{}'", word.escape_debug()))
                .hint("one of read, run, admin")
        })
    }
}

/// The one part of a server that a token is good for, where it is not good for all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Door {
    /// The MCP server, whose policy and questions the REST API does not know.
    Mcp,
}

impl Door {
    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Mcp => "mcp",
        }
    }

    /// The path behind which it is.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::Mcp => "/mcp",
        }
    }
}

impl std::str::FromStr for Door {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self, Error> {
        if word == Self::Mcp.word() {
            return Ok(Self::Mcp);
        }
        let words = format!("there is no part '{}' of a server", word.escape_debug());
        Err(Error::new(Code::SpecInvalid, words).hint("mcp, or leave it out for all of it"))
    }
}

/// A token that is to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// What it is called, in lists and in the audit log: 1 to 63 of `a-z 0-9 -`.
    #[schema(pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    pub name: String,
    /// What it is good for.
    pub scope: Scope,
    /// The one part of a server that it is good for; all of it if absent.
    #[serde(default)]
    pub only: Option<Door>,
    /// How long it is good, in milliseconds; for ever if absent.
    #[serde(default)]
    pub expires_in_ms: Option<u64>,
    /// What VMs may be that are made with it.
    #[serde(default)]
    pub limits: Limits,
}

/// What is told about a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TokenInfo {
    /// Its id: the part of it that is no secret.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What it is good for.
    pub scope: Scope,
    /// The one part of a server that it is good for, if it is not good for all of it.
    pub only: Option<Door>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it ends.
    pub expires_at: Option<Timestamp>,
    /// What VMs may be that are made with it.
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub limits: Limits,
}

/// A token that was made. Only this answer has it whole: what is kept is a hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TokenCreated {
    /// What is told about it.
    #[serde(flatten)]
    pub info: TokenInfo,
    /// The token, for the header `Authorization: Bearer`.
    pub token: String,
}

/// The answer of a list of tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TokenList {
    /// In order of name.
    pub tokens: Vec<TokenInfo>,
}
