//! Tokens of the servers: made, listed, revoked, checked.
//!
//! ```text
//!  nido_ID_SECRET      ID finds the row, SHA-256 of SECRET is compared with what it holds, in constant time
//! ```

use jiff::{SignedDuration, Timestamp};
use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;
use nido_api::{TokenCreated, TokenInfo, TokenList, TokenRequest, hex, moment};
use nido_files::random;
use nido_store::TokenRow;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::Nido;

/// What every token begins with, so that it is found where it does not belong.
const PREFIX: &str = "nido_";

impl Nido {
    /// Makes a token. The answer is the only place where it is ever whole.
    ///
    /// # Errors
    /// `token_exists`, `spec_invalid`.
    pub fn token_create(&self, request: &TokenRequest) -> Result<TokenCreated> {
        // The same rule as for every other name.
        if request.name.parse::<VmName>().is_err() {
            let words =
                format!("'{}' is not a valid token name: {}", request.name.escape_debug(), nido_api::name::RULE);
            return Err(Error::new(Code::SpecInvalid, words).hint("for example: ci"));
        }
        let created_at = moment::now();
        let too_long = || {
            Error::new(Code::SpecInvalid, "the validity of the token is too long")
                .hint("omit it for a token that does not expire")
        };
        let expires_at = request.expires_in_ms.map(|ms| {
            let life = SignedDuration::from_millis(i64::try_from(ms).map_err(|_| too_long())?);
            created_at.checked_add(life).map_err(|_| too_long())
        });
        let info = TokenInfo {
            id: random::id()?,
            name: request.name.clone(),
            scope: request.scope,
            only: request.only,
            created_at,
            expires_at: expires_at.transpose()?,
            limits: request.limits.clone(),
        };
        let secret = hex::encode(&random::bytes::<32>()?);
        let row = TokenRow { info: info.clone(), sha256: hex::encode(&Sha256::digest(&secret)) };
        self.store().insert_token(&row)?;
        Ok(TokenCreated { token: format!("{PREFIX}{}_{secret}", info.id), info })
    }

    /// All tokens, in order of name.
    ///
    /// # Errors
    /// Of the store.
    pub fn token_list(&self) -> Result<TokenList> {
        Ok(TokenList { tokens: self.store().tokens()? })
    }

    /// Revokes the token of that name or id, at once.
    ///
    /// # Errors
    /// `token_not_found`.
    pub fn token_revoke(&self, named: &str) -> Result<TokenInfo> {
        self.store().remove_token(named)
    }

    /// Whose token this is.
    ///
    /// # Errors
    /// `unauthorized`, whatever is wrong with it.
    pub fn token_check(&self, token: &str) -> Result<TokenInfo> {
        let unknown = || Error::new(Code::Unauthorized, "invalid or expired token");
        let (id, secret) = token.strip_prefix(PREFIX).and_then(|rest| rest.split_once('_')).ok_or_else(unknown)?;
        let row = self.store().token(id)?.ok_or_else(unknown)?;
        let same = hex::encode(&Sha256::digest(secret)).as_bytes().ct_eq(row.sha256.as_bytes());
        let expired = row.info.expires_at.is_some_and(|end| end <= Timestamp::now());
        if bool::from(same) && !expired { Ok(row.info) } else { Err(unknown()) }
    }

    /// Whether the token of that id, which was checked before, is still valid: for long-running responses.
    ///
    /// # Errors
    /// `unauthorized` if it was revoked or has expired meanwhile; those of the store.
    pub fn token_holds(&self, id: &str) -> Result<()> {
        let over = |how: &str| Error::new(Code::Unauthorized, format!("the token {how}"));
        let row = self.store().token(id)?.ok_or_else(|| over("was revoked"))?;
        let expired = row.info.expires_at.is_some_and(|end| end <= Timestamp::now());
        if expired { Err(over("has expired")) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nido::OpenOptions;
    use nido_api::{Limits, Scope, TokenAudience};

    #[test]
    fn a_token_is_valid_until_it_expires_or_is_revoked() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home");
        let nido = Nido::open_unreconciled(OpenOptions { home: Some(home), ..OpenOptions::default() }).unwrap();
        let request = TokenRequest {
            name: "ci".into(),
            scope: Scope::Run,
            only: None,
            expires_in_ms: None,
            limits: Limits::default(),
        };
        let made = nido.token_create(&request).unwrap();
        assert_eq!(nido.token_check(&made.token).unwrap().id, made.info.id);
        assert_eq!(nido.token_create(&request).unwrap_err().code(), Code::TokenExists);
        let limits = Limits { max_vms: Some(2), publish: Some(vec![]), ..Limits::default() };
        let narrow = TokenRequest { name: "agents".into(), only: Some(TokenAudience::Mcp), limits, ..request.clone() };
        let narrow = nido.token_create(&narrow).unwrap();
        let checked = nido.token_check(&narrow.token).unwrap();
        assert_eq!((checked.only, checked.limits.max_vms), (Some(TokenAudience::Mcp), Some(2)));
        assert_eq!(checked.limits.publish, Some(vec![]), "none is not any");
        let list = nido.token_list().unwrap().tokens;
        assert_eq!(list.iter().map(|token| token.only).collect::<Vec<_>>(), [Some(TokenAudience::Mcp), None]);
        assert_eq!(nido.token_revoke("agents").unwrap().only, Some(TokenAudience::Mcp));
        let flipped = if made.token.ends_with('0') { "1" } else { "0" };
        let forged = format!("{}{flipped}", &made.token[..made.token.len() - 1]);
        for bad in ["", "nido_", "nido__", &forged, &made.token[5..], &made.info.id] {
            assert_eq!(nido.token_check(bad).unwrap_err().code(), Code::Unauthorized, "{bad}");
        }
        let secret = made.token.rsplit('_').next().unwrap();
        assert!(!format!("{:?}", nido.token_list().unwrap()).contains(secret));
        nido.token_holds(&made.info.id).unwrap();
        nido.token_revoke("ci").unwrap();
        assert!(nido.token_check(&made.token).is_err());
        assert_eq!(nido.token_holds(&made.info.id).unwrap_err().code(), Code::Unauthorized);
        assert_eq!(nido.token_revoke("ci").unwrap_err().code(), Code::TokenNotFound);
        let short = TokenRequest { expires_in_ms: Some(0), ..request.clone() };
        let ended = nido.token_create(&short).unwrap();
        assert_eq!(nido.token_check(&ended.token).unwrap_err().code(), Code::Unauthorized);
        assert_eq!(nido.token_holds(&ended.info.id).unwrap_err().code(), Code::Unauthorized);
        // Under the same name a token is another one.
        nido.token_revoke("ci").unwrap();
        nido.token_create(&request).unwrap();
        assert_eq!(nido.token_holds(&made.info.id).unwrap_err().code(), Code::Unauthorized);
        for name in ["", "A b", "../x"] {
            let bad = TokenRequest { name: name.into(), ..request.clone() };
            assert_eq!(nido.token_create(&bad).unwrap_err().code(), Code::SpecInvalid);
        }
    }
}
