//! Entries of the audit log: a request's pending entry, and how it is completed. The middleware that opens them is `audit.rs`.

use std::sync::{Arc, Mutex, PoisonError};

use axum::http::{HeaderMap, header};
use nido_api::error::{Error, Result};
use nido_core::audit::{Audited, Ending};

/// The pending audit entry of a request.
#[derive(Debug, Clone)]
pub struct AuditTicket(Arc<Mutex<Option<Audited>>>);

impl AuditTicket {
    /// The ticket of a pending entry.
    pub fn new(audited: Audited) -> Self {
        Self(Arc::new(Mutex::new(Some(audited))))
    }

    /// Takes the entry over; the caller then completes it.
    pub fn take(&self) -> Option<Audited> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Completes an entry. The request has been carried out, so a failure to write goes to the server's own log only.
pub fn end(audited: Option<Audited>, ending: Ending, reason: &str) {
    if let Some(audited) = audited
        && let Err(error) = audited.end_as(ending, reason)
    {
        tracing::error!("{error}");
    }
}

/// Completes an entry with the result of an operation.
pub fn end_with<T>(audited: Option<Audited>, outcome: &Result<T>) {
    match outcome {
        Ok(_) => end(audited, Ending::Success, ""),
        Err(error) => end(audited, Ending::from(error), error.code().slug()),
    }
}

/// The `User-Agent` header of a request.
pub fn user_agent(headers: &HeaderMap) -> Option<String> {
    let agent = headers.get(header::USER_AGENT)?;
    Some(String::from_utf8_lossy(agent.as_bytes()).into_owned())
}

/// Writes to the audit log on a blocking thread: a write may wait for the disk or for another process.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| Error::internal(format!("writing the audit log failed: {e}")))?
}
