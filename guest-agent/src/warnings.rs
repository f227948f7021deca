//! What the guest could not do for itself and runs without: a file of its own that cannot be written, a hook that failed.
//!
//! The host reads the list with every reply to a ping and shows it in `nido info`. Invariant: the list is bounded, whatever
//! the guest's files hold, and nothing in it ever ends a start.

use std::sync::{Mutex, MutexGuard, PoisonError};

use nido_guest_agent::wire::{MAX_WARNING, MAX_WARNINGS};

/// Where process 1 stores its warnings for the agent that runs as a service.
const SAVED: &str = "/run/nido/warnings";

static LIST: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn list() -> MutexGuard<'static, Vec<String>> {
    LIST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Prints a warning on the console and keeps it for the host.
pub fn warn(message: impl Into<String>) {
    let message = message.into();
    eprintln!("nido-guest-agent: warning: {message}");
    add(&mut list(), message);
}

/// Keeps a warning once, cut to a length that fits a reply.
fn add(list: &mut Vec<String>, mut message: String) {
    message.truncate(message.floor_char_boundary(MAX_WARNING));
    if list.len() < MAX_WARNINGS && !list.contains(&message) {
        list.push(message);
    }
}

/// All warnings since the start or the last identity reset.
pub fn all() -> Vec<String> {
    list().clone()
}

/// Clears them: the guest becomes another machine, which tries everything again.
pub fn clear() {
    list().clear();
}

/// Keeps them for the agent that runs as a service.
pub fn save() {
    let text: String = list().iter().map(|warning| warning.replace('\n', " ") + "\n").collect();
    if let Err(error) = std::fs::write(SAVED, text) {
        eprintln!("nido-guest-agent: {SAVED}: {error}");
    }
}

/// Reads what process 1 left.
pub fn load() {
    let text = std::fs::read_to_string(SAVED).unwrap_or_default();
    let mut list = list();
    text.lines().for_each(|line| add(&mut list, line.to_owned()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_bounded_and_holds_a_warning_once() {
        let mut list = Vec::new();
        for number in [1, 1, 2, 3] {
            add(&mut list, format!("{number}{}", "ä".repeat(MAX_WARNING)));
        }
        assert_eq!(list.len(), 3);
        assert!(list.iter().all(|warning| warning.len() <= MAX_WARNING));
        (0..100).for_each(|number| add(&mut list, number.to_string()));
        assert_eq!(list.len(), MAX_WARNINGS);
    }
}
