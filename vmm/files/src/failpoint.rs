//! Failpoints: places in nido at which a test kills the process, or lets a write fail as on a full disk.
//!
//! They exist only with the feature `failpoints`, which only tests enable and which no build with optimizations accepts.
//! Without it [`failpoint!`](crate::failpoint!) expands to nothing.
//!
//! ```text
//!  NIDO_FAILPOINTS=DIRECTORY, which background processes inherit, may hold
//!    plan      [ROLE@]NAME[:COUNT]=kill|error: what happens, the COUNT-th time that a process of that role gets there
//!    fired     the plan, once it was carried out
//!    reached   gets a line "ROLE PID NAME" for each failpoint that is reached, if it exists
//! ```
//!
//! The role is the hidden verb of a background process (`supervise`, `pool-fill`, …), else `command`. Invariant: a plan is carried
//! out once, so the process that recovers is not killed, too.

#[cfg(all(feature = "failpoints", not(debug_assertions)))]
compile_error!("the feature `failpoints` is for tests: a build with optimizations must not contain it");

/// Whether this is a build for tests, in which a script that stands for QEMU runs the guest agent on the host, unconfined.
pub const ENABLED: bool = cfg!(feature = "failpoints");

/// Whether a background process inherits this variable, because a failpoint is configured by it.
#[cfg(not(feature = "failpoints"))]
#[must_use]
pub const fn is_variable(_name: &std::ffi::OsStr) -> bool {
    false
}

/// Kills this process if a test wants that here.
#[cfg(not(feature = "failpoints"))]
#[macro_export]
macro_rules! failpoint {
    ($name:literal) => {{}};
    ($name:literal, io) => {
        ::std::io::Result::<()>::Ok(())
    };
}

/// `failpoint!("name")` kills this process if a test wants that here; `failpoint!("name", io)?` can fail as a write on a full
/// disk, too.
#[cfg(feature = "failpoints")]
#[macro_export]
macro_rules! failpoint {
    ($name:literal) => {{
        let _ = $crate::failpoint::reach($name);
    }};
    ($name:literal, io) => {
        $crate::failpoint::reach($name)
    };
}

#[cfg(feature = "failpoints")]
pub use enabled::{is_variable, reach};

#[cfg(feature = "failpoints")]
mod enabled {
    use std::ffi::OsStr;
    use std::fs::{self, File};
    use std::io::{self, Write as _};
    use std::path::{Path, PathBuf};
    use std::sync::{LazyLock, Mutex, PoisonError};

    use rustix::process::{Signal, getpid, kill_process};

    const VARIABLE: &str = "NIDO_FAILPOINTS";
    /// Verbs of background processes.
    const ROLES: [&str; 5] = ["supervise", "pool-fill", "deliver", "watch", "restart-by-policy"];
    const COMMAND: &str = "command";

    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub(super) enum Action {
        Kill,
        Error,
    }

    /// What a test wants to happen.
    #[derive(PartialEq, Eq, Debug)]
    pub(super) struct Plan<'a> {
        pub role: Option<&'a str>,
        pub name: &'a str,
        pub count: u32,
        pub action: Action,
    }

    impl<'a> Plan<'a> {
        pub fn parse(text: &'a str) -> Option<Self> {
            let (place, action) = text.lines().next()?.split_once('=')?;
            let action = match action {
                "kill" => Action::Kill,
                "error" => Action::Error,
                _ => return None,
            };
            let (role, name) = place.split_once('@').map_or((None, place), |(role, name)| (Some(role), name));
            let (name, count) = match name.split_once(':') {
                Some((name, count)) => (name, count.parse().ok()?),
                None => (name, 1),
            };
            Some(Self { role, name, count, action })
        }
    }

    static DIRECTORY: LazyLock<Option<PathBuf>> = LazyLock::new(|| Some(std::env::var_os(VARIABLE)?.into()));
    static ROLE: LazyLock<&str> = LazyLock::new(|| {
        let is_role = |role: &&str| std::env::args_os().any(|word| word == **role);
        ROLES.into_iter().find(is_role).unwrap_or(COMMAND)
    });
    /// The plan that this process has seen, and how often it came to its failpoint.
    static SEEN: Mutex<(String, u32)> = Mutex::new((String::new(), 0));

    /// Whether a background process inherits this variable, because failpoints are configured by it.
    #[must_use]
    pub fn is_variable(name: &OsStr) -> bool {
        name == VARIABLE
    }

    /// What happens at a failpoint: nothing, unless a test asked for it.
    ///
    /// # Errors
    /// `ENOSPC`, if the test wants that.
    pub fn reach(name: &str) -> io::Result<()> {
        let Some(directory) = &*DIRECTORY else { return Ok(()) };
        let _ = note(directory, name);
        let path = directory.join("plan");
        let Ok(text) = fs::read_to_string(&path) else { return Ok(()) };
        // A plan that cannot be read would make a test pass that tests nothing.
        let Some(plan) = Plan::parse(&text) else { std::process::abort() };
        if plan.name != name || plan.role.is_some_and(|role| role != *ROLE) || !is_due(&text, plan.count) {
            return Ok(());
        }
        // Of several processes one succeeds.
        if fs::rename(&path, directory.join("fired")).is_err() {
            return Ok(());
        }
        match plan.action {
            Action::Error => Err(rustix::io::Errno::NOSPC.into()),
            Action::Kill => {
                let _ = kill_process(getpid(), Signal::KILL);
                // The signal comes before anything else is done.
                loop {
                    std::thread::park();
                }
            }
        }
    }

    fn is_due(plan: &str, count: u32) -> bool {
        let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.0 != plan {
            *seen = (plan.to_owned(), 0);
        }
        seen.1 += 1;
        seen.1 == count
    }

    /// One write, so lines of several processes do not mix.
    fn note(directory: &Path, name: &str) -> io::Result<()> {
        let mut file = File::options().append(true).open(directory.join("reached"))?;
        file.write_all(format!("{} {} {name}\n", *ROLE, std::process::id()).as_bytes())
    }
}

#[cfg(all(test, feature = "failpoints"))]
mod tests {
    use super::enabled::{Action, Plan};

    #[test]
    fn a_plan_names_role_place_count_and_action() {
        let plan = |role, count, action| Plan { role, name: "create.row", count, action };
        assert_eq!(Plan::parse("create.row=kill\n"), Some(plan(None, 1, Action::Kill)));
        assert_eq!(Plan::parse("supervise@create.row:3=error"), Some(plan(Some("supervise"), 3, Action::Error)));
        for bad in ["create.row", "create.row=explode", "create.row:x=kill"] {
            assert_eq!(Plan::parse(bad), None, "{bad}");
        }
    }
}
