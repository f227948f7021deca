//! Requests that are carried out once however often they are sent: for servers.

use super::Nido;
use crate::error::Result;
use crate::store::Known;

impl Nido {
    /// Whether a caller's request under this key may be carried out, or what is known of it. `run` is the server's own word
    /// for this run of it.
    ///
    /// # Errors
    /// Of the store.
    pub fn answer_begin(&self, caller: &str, key: &str, request: &str, run: &str) -> Result<Known> {
        self.store().begin_answer(caller, key, request, run)
    }

    /// Keeps the answer for a day; without one the request may be made again.
    ///
    /// # Errors
    /// Of the store.
    pub fn answer_end(&self, caller: &str, key: &str, answer: Option<&str>) -> Result<()> {
        self.store().end_answer(caller, key, answer)
    }
}
