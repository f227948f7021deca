//! Saving and loading a machine, as far as nido sees it: a stream over a unix socket, or a file that the client sent, and a memory
//! image that is there.
//!
//! ```text
//!  migrate fd: --> active --query-migrate, or once its client has gone: cont--> completed: the machine is paused
//!                    \--migrate_cancel--> cancelled
//! ```
//!
//! Invariants: what is saved is the configuration that the guest's agent works by, so a loaded guest has the token of the one that
//! was saved until its identity is reset. As with QEMU, a save to a file continues when its client has gone, and pauses the
//! machine at its end: at the worst moment, when a user has just resumed it.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::Sender;

use serde_json::{Value, json};

use crate::machine::Happening;
use crate::{Options, keys};

/// The commands that a machine which can be saved knows.
pub const COMMANDS: [&str; 9] = [
    "block_resize",
    "getfd",
    "migrate",
    "migrate-incoming",
    "migrate-set-capabilities",
    "migrate-set-parameters",
    "migrate_cancel",
    "query-migrate",
    "set_link",
];
/// If there is a file of this name in the VM's directory, loading does not end.
const HANG: &str = "fake-hang";
/// The largest state that is loaded, in bytes.
const STATE_MAX: u64 = 1 << 20;

enum Phase {
    /// Nothing was saved or loaded since it ran.
    None,
    /// It waits for a state.
    Incoming,
    Loaded,
    Failed,
    /// A state is being written to a file.
    Saving(Save),
    Cancelled,
    Saved,
}

struct Save {
    file: File,
    state: Vec<u8>,
    /// The client that began it has gone.
    abandoned: bool,
}

/// What became of the machine's state.
pub struct Migration {
    phase: Phase,
    /// The file with the configuration of the guest.
    config: String,
    /// What was loaded, until the guest runs.
    loaded: Option<Vec<u8>>,
    /// The file that the client sent last.
    file: Option<File>,
}

impl Migration {
    pub fn new(incoming: bool, config: String) -> Self {
        Self { phase: if incoming { Phase::Incoming } else { Phase::None }, config, loaded: None, file: None }
    }

    /// Carries out one of [`COMMANDS`]; what happens later is sent.
    pub fn command(&mut self, name: &str, arguments: &Value, sender: &Sender<Happening>) -> Value {
        let uri = arguments["uri"].as_str().unwrap_or_default();
        match name {
            "migrate" => self.phase = self.save(uri).unwrap_or(Phase::Failed),
            "migrate-incoming" => load(path(uri), sender.clone()),
            "migrate_cancel" if matches!(self.phase, Phase::Saving(_)) => self.phase = Phase::Cancelled,
            "query-migrate" => {
                if matches!(self.phase, Phase::Saving(Save { abandoned: false, .. })) {
                    let _ = sender.send(Happening::SaveEnds);
                }
                return self.status();
            }
            _ => {}
        }
        json!({})
    }

    fn save(&mut self, uri: &str) -> io::Result<Phase> {
        let state = match &self.loaded {
            Some(loaded) => loaded.clone(),
            None => fs::read(&self.config)?,
        };
        if uri.starts_with("fd:") {
            let file = self.file.take().ok_or_else(|| io::Error::other("no file was sent"))?;
            return Ok(Phase::Saving(Save { file, state, abandoned: false }));
        }
        UnixStream::connect(path(uri))?.write_all(&state)?;
        Ok(Phase::Saved)
    }

    /// The client has sent a file.
    pub fn file_arrived(&mut self, file: File) {
        self.file = Some(file);
    }

    /// The client has gone.
    pub fn client_gone(&mut self) {
        self.file = None;
        if let Phase::Saving(save) = &mut self.phase {
            save.abandoned = true;
        }
    }

    /// The save in progress comes to its end. Whether it is complete: then the machine is to be paused.
    pub fn save_ends(&mut self) -> bool {
        let Phase::Saving(save) = &mut self.phase else { return false };
        let written = save.file.write_all(&save.state);
        self.phase = if written.is_ok() { Phase::Saved } else { Phase::Failed };
        written.is_ok()
    }

    /// A state has arrived: what the guest's agent is started with.
    pub fn loaded(&mut self, loaded: io::Result<Vec<u8>>) -> Option<Vec<u8>> {
        self.phase = if loaded.is_ok() { Phase::Loaded } else { Phase::Failed };
        self.loaded = loaded.ok();
        self.loaded.clone()
    }

    /// `query-migrate`.
    fn status(&self) -> Value {
        match self.phase {
            Phase::None => json!({}),
            Phase::Incoming => json!({ "status": "setup" }),
            Phase::Saving(_) => json!({ "status": "active" }),
            Phase::Loaded | Phase::Saved => json!({ "status": "completed" }),
            Phase::Cancelled => json!({ "status": "cancelled" }),
            Phase::Failed => json!({ "status": "failed", "error-desc": "the stream broke (fake)" }),
        }
    }

    /// What `query-status` returns for a machine that does not run.
    pub fn status_of_paused(&self) -> &'static str {
        match self.phase {
            Phase::Incoming => "inmigrate",
            Phase::Saved => "postmigrate",
            Phase::None | Phase::Loaded | Phase::Failed | Phase::Saving(_) | Phase::Cancelled => "paused",
        }
    }

    /// The guest runs.
    pub fn resumed(&mut self, sender: &Sender<Happening>) {
        self.loaded = None;
        if matches!(self.phase, Phase::Saving(_)) {
            let _ = sender.send(Happening::SaveEnds);
        } else {
            self.phase = Phase::None;
        }
    }
}

/// Takes a state from a client; it is sent when it has arrived.
fn load(path: String, sender: Sender<Happening>) {
    let listener = UnixListener::bind(path);
    std::thread::spawn(move || {
        let loaded = listener.and_then(|listener| {
            let mut state = Vec::new();
            listener.accept()?.0.take(STATE_MAX).read_to_end(&mut state)?;
            if Path::new(HANG).exists() {
                eprintln!("fake-qemu: loading hangs");
                loop {
                    std::thread::park();
                }
            }
            Ok(state)
        });
        let _ = sender.send(Happening::Loaded(loaded));
    });
}

fn path(uri: &str) -> String {
    uri.strip_prefix("unix:").unwrap_or_default().to_owned()
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
