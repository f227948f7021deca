//! Saving and loading a machine, as far as nido sees it: a stream over a unix socket, and a memory image that is there.
//!
//! Invariant: what is saved is the configuration that the guest's agent works by, so a loaded guest has the token of the one that
//! was saved until its identity is reset.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use serde_json::{Value, json};

use crate::{Options, keys};

/// If there is a file of this name in the VM's directory, loading does not end.
const HANG: &str = "fake-hang";
/// The largest state that is loaded, in bytes.
const STATE_MAX: u64 = 1 << 20;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nothing was saved or loaded since it ran.
    None,
    /// It waits for a state.
    Incoming,
    Loaded,
    Failed,
    Saved,
}

/// What became of the machine's state.
pub struct Migration {
    phase: Phase,
    /// The file with the configuration of the guest.
    config: String,
    /// What was loaded, until the guest runs.
    loaded: Option<Vec<u8>>,
}

impl Migration {
    pub fn new(incoming: bool, config: String) -> Self {
        Self { phase: if incoming { Phase::Incoming } else { Phase::None }, config, loaded: None }
    }

    /// `migrate`.
    pub fn save(&mut self, uri: &Value) -> Value {
        let state = || match &self.loaded {
            Some(loaded) => Ok(loaded.clone()),
            None => fs::read(&self.config),
        };
        let sent = state().and_then(|state| UnixStream::connect(path(uri))?.write_all(&state));
        self.phase = if sent.is_ok() { Phase::Saved } else { Phase::Failed };
        json!({})
    }

    /// `migrate-incoming`; `done` is called when the state has arrived.
    pub fn load(&mut self, uri: &Value, done: impl FnOnce(io::Result<Vec<u8>>) + Send + 'static) -> Value {
        let listener = UnixListener::bind(path(uri));
        std::thread::spawn(move || {
            done(listener.and_then(|listener| {
                let mut state = Vec::new();
                listener.accept()?.0.take(STATE_MAX).read_to_end(&mut state)?;
                if Path::new(HANG).exists() {
                    eprintln!("fake-qemu: loading hangs");
                    loop {
                        std::thread::park();
                    }
                }
                Ok(state)
            }));
        });
        json!({})
    }

    /// A state has arrived: what the guest's agent is started with.
    pub fn loaded(&mut self, loaded: io::Result<Vec<u8>>) -> Option<Vec<u8>> {
        self.phase = if loaded.is_ok() { Phase::Loaded } else { Phase::Failed };
        self.loaded = loaded.ok();
        self.loaded.clone()
    }

    /// `query-migrate`.
    pub fn status(&self) -> Value {
        match self.phase {
            Phase::None => json!({}),
            Phase::Incoming => json!({ "status": "setup" }),
            Phase::Loaded | Phase::Saved => json!({ "status": "completed" }),
            Phase::Failed => json!({ "status": "failed", "error-desc": "the stream broke (fake)" }),
        }
    }

    /// What `query-status` returns for a machine that does not run.
    pub fn status_of_paused(&self) -> &'static str {
        match self.phase {
            Phase::Incoming => "inmigrate",
            Phase::Saved => "postmigrate",
            Phase::None | Phase::Loaded | Phase::Failed => "paused",
        }
    }

    /// The guest runs.
    pub fn resumed(&mut self) {
        (self.phase, self.loaded) = (Phase::None, None);
    }
}

fn path(uri: &Value) -> String {
    uri.as_str().and_then(|uri| uri.strip_prefix("unix:")).unwrap_or_default().to_owned()
}

/// Makes the file that holds the guest's memory, if it is to be in one and that is not there. Its content differs from others'.
pub fn make_memory(options: &Options) -> io::Result<()> {
    for object in options.all("-object").iter().map(|value| keys(value)) {
        let value = |name: &str| object.iter().find_map(|key| key.strip_prefix(name)?.strip_prefix('='));
        let Some(path) = value("mem-path") else { continue };
        let Ok(mut file) = File::create_new(path) else { continue };
        let mebibytes: u64 = value("size").and_then(|size| size.strip_suffix('M')?.parse().ok()).unwrap_or(1);
        file.write_all(
            format!("memory of process {} {:?}", std::process::id(), std::time::SystemTime::now()).as_bytes(),
        )?;
        file.set_len(mebibytes << 20)?;
    }
    Ok(())
}
