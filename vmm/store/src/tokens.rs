//! The table `tokens`: who may use the servers. Secrets are kept as hashes only.

use jiff::Timestamp;
use nido_api::error::{Code, Error, Hint, Result};
use nido_api::{TokenAudience, TokenInfo};
use rusqlite::{OptionalExtension, Row, params};

use super::{Store, decode, encode, fault, readable_rows};

const COLUMNS: &str = "id, name, sha256, scope, created_ms, expires_ms, only_for, limits";

/// A token as the store knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRow {
    /// The token, without its secret.
    pub info: TokenInfo,
    /// SHA-256 of its secret, in hexadecimal.
    pub sha256: String,
}

impl Store {
    /// Adds a token.
    ///
    /// # Errors
    /// `token_exists`.
    pub fn insert_token(&self, token: &TokenRow) -> Result<()> {
        let TokenInfo { id, name, scope, only, created_at, expires_at, limits } = &token.info;
        let only = only.map(TokenAudience::word);
        let expires = expires_at.map(Timestamp::as_millisecond);
        let row =
            params![id, name, token.sha256, scope.word(), created_at.as_millisecond(), expires, only, encode(limits)?];
        let insert = format!("INSERT INTO tokens ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)");
        let taken = || {
            Error::new(Code::TokenExists, format!("a token named '{name}' exists already"))
                .hint("choose another name")
                .or_hint(Hint::host(format!("revoke it: nido token revoke {name}")))
        };
        self.connection.execute(&insert, row).map(drop).map_err(|e| match e.sqlite_error_code() {
            Some(rusqlite::ErrorCode::ConstraintViolation) => taken(),
            _ => fault(e),
        })
    }

    /// All tokens, in order of name.
    ///
    /// # Errors
    /// Of the store.
    pub fn tokens(&self) -> Result<Vec<TokenInfo>> {
        let query = format!("SELECT {COLUMNS} FROM tokens ORDER BY name");
        let mut statement = self.connection.prepare(&query).map_err(fault)?;
        let rows = statement.query_map([], read).map_err(fault)?;
        readable_rows("tokens", rows.map(|row| row.map(|row| row.map(|row| row.info))))
    }

    /// The token of that id.
    ///
    /// # Errors
    /// Of the store.
    pub fn token(&self, id: &str) -> Result<Option<TokenRow>> {
        let query = format!("SELECT {COLUMNS} FROM tokens WHERE id = ?1");
        self.connection.query_row(&query, [id], read).optional().map_err(fault)?.transpose()
    }

    /// Removes the token of that name or id; what it was.
    ///
    /// # Errors
    /// `token_not_found`.
    pub fn remove_token(&self, named: &str) -> Result<TokenInfo> {
        let delete = format!("DELETE FROM tokens WHERE name = ?1 OR id = ?1 RETURNING {COLUMNS}");
        let gone = self.connection.query_row(&delete, [named], read).optional().map_err(fault)?.transpose()?;
        gone.map(|row| row.info).ok_or_else(|| {
            Error::new(Code::TokenNotFound, format!("there is no token '{}'", named.escape_debug()))
                .hint(Hint::host("list them: nido token list"))
        })
    }
}

fn read(row: &Row<'_>) -> rusqlite::Result<Result<TokenRow>> {
    let (scope, created, expires): (String, i64, Option<i64>) = (row.get(3)?, row.get(4)?, row.get(5)?);
    let time = |ms| Timestamp::from_millisecond(ms).map_err(|e| Error::internal(e.to_string()));
    let (id, name, sha256) = (row.get(0)?, row.get(1)?, row.get(2)?);
    let (only, limits): (Option<String>, Option<String>) = (row.get(6)?, row.get(7)?);
    let parsed = || -> Result<TokenRow> {
        let info = TokenInfo {
            id,
            name,
            scope: scope.parse()?,
            // An unknown word is an error: such a token must not be valid for everything.
            only: only.map(|word| word.parse()).transpose()?,
            created_at: time(created)?,
            expires_at: expires.map(time).transpose()?,
            limits: limits.map(|text| decode("limits", &text)).transpose()?.unwrap_or_default(),
        };
        Ok(TokenRow { info, sha256 })
    };
    Ok(parsed())
}
