//! Tokens: who may use the servers, and for what.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Limits;
use crate::error::{Code, Error};

/// Scope of a token. Each scope includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Read VMs, logs, events, templates and the host.
    Read,
    /// Also create, use and delete VMs and snapshots: commands, files, ports.
    Run,
    /// Everything: also templates, pools, webhooks and the audit log.
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

/// The part of a server to which a token is restricted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum TokenAudience {
    /// The MCP server. The REST API has neither its policy nor its confirmations.
    Mcp,
}

impl TokenAudience {
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

impl std::str::FromStr for TokenAudience {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self, Error> {
        if word == Self::Mcp.word() {
            return Ok(Self::Mcp);
        }
        let words = format!("there is no part '{}' of a server", word.escape_debug());
        Err(Error::new(Code::SpecInvalid, words).hint("use mcp, or omit it"))
    }
}

/// A token to create.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// Its name in lists and in the audit log: 1 to 63 of `a-z 0-9 -`.
    #[schema(pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    pub name: String,
    /// Its scope.
    pub scope: Scope,
    /// The part of a server to which it is restricted; absent for all parts.
    #[serde(default)]
    pub only: Option<TokenAudience>,
    /// Its validity, in milliseconds; it does not expire if absent.
    #[serde(default)]
    pub expires_in_ms: Option<u64>,
    /// Limits on the VMs that are created with it.
    #[serde(default)]
    pub limits: Limits,
}

/// A token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TokenInfo {
    /// Its id, which is not secret.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its scope.
    pub scope: Scope,
    /// The part of a server to which it is restricted, if any.
    pub only: Option<TokenAudience>,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it expires.
    pub expires_at: Option<Timestamp>,
    /// Limits on the VMs that are created with it.
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub limits: Limits,
}

/// A new token. Only this response contains the secret; nido stores a hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TokenCreated {
    /// The token, without its secret.
    #[serde(flatten)]
    pub info: TokenInfo,
    /// The secret, for the header `Authorization: Bearer`.
    pub token: String,
}

/// A list of tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TokenList {
    /// In order of name.
    pub tokens: Vec<TokenInfo>,
}
