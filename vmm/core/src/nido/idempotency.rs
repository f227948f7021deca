//! Requests that are carried out once however often they are sent: for servers.

use nido_api::error::Result;
use nido_engine::liveness::is_gone;
use nido_store::KeyState;

use super::Nido;

impl Nido {
    /// Whether this process may carry out a caller's request under this key, or what is known of it.
    ///
    /// # Errors
    /// Of the store.
    pub fn answer_begin(&self, caller: &str, key: &str, request: &str) -> Result<KeyState> {
        let (run, present) = (self.liveness_lock()?, self.home().present());
        self.store().begin_answer((caller, key), request, &run, |run| is_gone(&present, run))
    }

    /// Keeps the answer for a day; without one the request may be made again.
    ///
    /// # Errors
    /// `limit_exceeded` if the caller's answers would be too many bytes.
    pub fn answer_end(&self, caller: &str, key: &str, answer: Option<&str>) -> Result<()> {
        self.store().end_answer(caller, key, answer)
    }
}
