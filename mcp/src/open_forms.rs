//! The forms that clients without `initialize` show their users, until they are answered or expire.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use nido_api::APPROVAL_LIFETIME;
use nido_api::error::Result;
use nido_files::random::id as random_id;

/// Forms that are open. What an answer has to bring back is nowhere to be seen but in the form, so that an approval's id, which
/// is printed for people, is no answer.
#[derive(Debug, Default)]
pub struct OpenForms(Mutex<HashMap<String, (String, Instant)>>);

impl OpenForms {
    /// The secret of the form about this approval.
    pub fn open(&self, approval: &str) -> Result<String> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, (_, at)| at.elapsed() < APPROVAL_LIFETIME);
        if let Some((secret, _)) = open.get(approval) {
            return Ok(secret.clone());
        }
        let secret = format!("{}{}", random_id()?, random_id()?);
        open.insert(approval.into(), (secret.clone(), Instant::now()));
        Ok(secret)
    }

    /// The approval that the form with this secret is about.
    pub fn approval_of(&self, secret: &str) -> Option<String> {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.iter().find(|(_, (known, _))| known == secret).map(|(approval, _)| approval.clone())
    }
}
