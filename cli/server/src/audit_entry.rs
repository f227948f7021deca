//! Entries of the audit log: a request's attempt, and who completes it. The middleware that opens them is `audit.rs`.

use std::sync::{Arc, Mutex, PoisonError};

use axum::http::{HeaderMap, header};
use nido_core::execute::{Attempt, Verdict};

/// The attempt of a request, which has no outcome yet.
#[derive(Debug, Clone)]
pub struct AuditTicket(Arc<Mutex<Option<Attempt>>>);

impl AuditTicket {
    /// The ticket of an attempt.
    pub fn new(attempt: Attempt) -> Self {
        Self(Arc::new(Mutex::new(Some(attempt))))
    }

    /// Takes the attempt over; the caller then completes it.
    pub fn take(&self) -> Option<Attempt> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Completes an attempt that this has not been done for yet.
pub fn end(attempt: Option<Attempt>, verdict: &Verdict) {
    if let Some(attempt) = attempt {
        attempt.end_or_log(verdict);
    }
}

/// The `User-Agent` header of a request.
pub fn user_agent(headers: &HeaderMap) -> Option<String> {
    let agent = headers.get(header::USER_AGENT)?;
    Some(String::from_utf8_lossy(agent.as_bytes()).into_owned())
}
