//! Which sessions the agent accepts: the VM's token, and the sessions that were opened with it.
//!
//! Invariant: when the token is replaced, every session that an older one opened ends, but for the one that replaced
//! it. There is no moment in which a session is admitted by the old token and not ended.

use std::sync::atomic::{AtomicU64, Ordering};

use subtle::ConstantTimeEq as _;
use tokio::sync::watch;

/// The token, and its changes.
pub struct Access {
    grant: watch::Sender<Grant>,
    sessions: AtomicU64,
}

struct Grant {
    token: Vec<u8>,
    /// The session that brought this token; none for the first.
    brought_by: Option<SessionId>,
}

/// Identifies a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionId(u64);

/// Admission to one session.
#[derive(Debug)]
pub struct SessionAdmission {
    /// Which session this is.
    pub number: SessionId,
    changes: watch::Receiver<Grant>,
}

impl std::fmt::Debug for Grant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grant").field("brought_by", &self.brought_by).finish_non_exhaustive()
    }
}

impl Access {
    /// Access by a token.
    pub fn new(token: Vec<u8>) -> Self {
        Self { grant: watch::Sender::new(Grant { token, brought_by: None }), sessions: AtomicU64::new(0) }
    }

    /// Lets a session in, if it shows the token. Takes the same time however much of a wrong one is right.
    pub fn admit(&self, token: &[u8]) -> Option<SessionAdmission> {
        // Registered before looking, so that no change is missed.
        let mut changes = self.grant.subscribe();
        let is_right = bool::from(changes.borrow_and_update().token.as_slice().ct_eq(token));
        is_right.then(|| SessionAdmission { number: SessionId(self.sessions.fetch_add(1, Ordering::Relaxed)), changes })
    }

    /// Replaces the token and withdraws all passes but that of the session that does it.
    pub fn replace(&self, token: Vec<u8>, by: SessionId) {
        self.grant.send_replace(Grant { token, brought_by: Some(by) });
    }
}

impl SessionAdmission {
    /// Ready once another session has replaced the token. May be dropped and called again.
    pub async fn revoked(&mut self) {
        while self.changes.changed().await.is_ok() {
            if self.changes.borrow_and_update().brought_by != Some(self.number) {
                return;
            }
        }
        // The agent itself is at its end.
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[test]
    fn a_new_token_ends_every_session_but_the_one_that_brought_it() {
        let access = Access::new(b"old".to_vec());
        let (mut first, mut second) = (access.admit(b"old").unwrap(), access.admit(b"old").unwrap());
        assert!(access.admit(b"new").is_none());
        assert!(access.admit(b"").is_none());
        access.replace(b"new".to_vec(), second.number);
        assert!(first.revoked().now_or_never().is_some());
        assert!(second.revoked().now_or_never().is_none());
        assert!(access.admit(b"old").is_none());
        let mut third = access.admit(b"new").unwrap();
        assert!(third.revoked().now_or_never().is_none());
        access.replace(b"newer".to_vec(), third.number);
        assert!(second.revoked().now_or_never().is_some());
        assert!(third.revoked().now_or_never().is_none());
    }
}
