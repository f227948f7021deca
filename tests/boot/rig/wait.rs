//! Waiting for what must come true, with a deadline that a healthy machine never reaches.

use std::time::{Duration, Instant};

/// How long anything may take on a machine that is busy with other things.
pub const BOOT_TEST_TIMEOUT: Duration = Duration::from_secs(180);

/// Asks again and again until there is an answer, and fails if there is none in time.
#[track_caller]
pub fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + BOOT_TEST_TIMEOUT;
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what}: not within {BOOT_TEST_TIMEOUT:?}");
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}
