//! A program that stands in for QEMU in tests: it takes nido's real command line, speaks the monitor's protocol, runs the
//! real agent as an ordinary process on the host, and misbehaves on request.
//!
//! nido starts QEMU with a cleaned environment, so tests name a script as QEMU that sets what this program reads:
//!
//! ```sh
//! #!/bin/sh
//! FAKE_QEMU='ignore-powerdown;unknown-event' FAKE_QEMU_AGENT=/…/nido-guest-agent exec /…/fake-qemu "$@"
//! ```
//!
//! `FAKE_QEMU` is a list of [`script::Script`]'s words with `;` between them. Invariant: nothing outlives this program:
//! the agent gets the kernel's signal when this process ends, and what the agent has started is ended before an
//! orderly exit.

mod guest;
mod machine;
mod migration;
mod monitor;
mod probe;
mod script;

use std::collections::HashMap;
use std::process::ExitCode;

use script::Script;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|first| first == guest::RUN_AGENT) {
        return guest::become_agent(&args[1..]);
    }
    let script = match Script::read(&std::env::var("FAKE_QEMU").unwrap_or_default()) {
        Ok(script) => script,
        Err(word) => {
            eprintln!("fake-qemu: FAKE_QEMU has the unknown word '{word}'");
            return ExitCode::from(2);
        }
    };
    if args.iter().any(|arg| arg == "--version" || arg == "-version") {
        println!("QEMU emulator version {} (fake)", script.version());
        return ExitCode::SUCCESS;
    }
    let options = Options::read(&args);
    if options.first("-machine") == Some("none") {
        return probe::answer(&script);
    }
    machine::run(&options, script)
}

/// A command line, by option.
pub struct Options(HashMap<String, Vec<String>>);

impl Options {
    /// Every word that begins with a dash is an option; the word after it, if it is not an option, is its value.
    fn read(args: &[String]) -> Self {
        let mut options: HashMap<String, Vec<String>> = HashMap::new();
        let mut rest = args.iter().peekable();
        while let Some(name) = rest.next() {
            let value = rest.next_if(|next| !next.starts_with('-')).cloned().unwrap_or_default();
            options.entry(name.clone()).or_default().push(value);
        }
        Self(options)
    }

    /// All values of one option.
    pub fn all(&self, name: &str) -> &[String] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// The first value of one option.
    pub fn first(&self, name: &str) -> Option<&str> {
        self.all(name).first().map(String::as_str)
    }

    /// `wanted` in the value of `name` that holds all of `with`, e.g. `path` of the `-chardev` with `id=monitor`.
    pub fn part(&self, name: &str, with: &str, wanted: &str) -> Option<String> {
        self.all(name)
            .iter()
            .map(|value| keys(value))
            .find(|keys| keys.iter().any(|key| key == with))
            .and_then(|keys| keys.iter().find_map(|key| key.strip_prefix(wanted)?.strip_prefix('=').map(str::to_owned)))
    }
}

/// The parts between single commas; a doubled comma stands for one.
pub fn keys(value: &str) -> Vec<String> {
    value.replace(",,", "\0").split(',').map(|part| part.replace('\0', ",")).collect()
}
