//! Deadlines of waits for a guest.

use tokio::time::{Instant, timeout_at};

use super::error::GuestError;

/// Waits for `work`, but not longer than until `deadline`.
pub async fn in_time<T>(
    work: impl Future<Output = Result<T, GuestError>>,
    deadline: Instant,
    what: &'static str,
) -> Result<T, GuestError> {
    timeout_at(deadline, work).await.unwrap_or(Err(GuestError::Timeout { what }))
}
