//! The host whose clients are configured, and what is found there.
//!
//! Invariants: no file is read beyond [`FILE_MAX`], no directory beyond [`FILES_MAX`] names; a URL is never shown, because it may
//! hold a password.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nido_api::EgressRule;
use nido_api::egress::rule_for_url;

/// The longest file that is read, in bytes.
const FILE_MAX: u64 = 256 << 10;
/// The most files of one directory.
const FILES_MAX: usize = 256;
/// The most warnings about one preset.
const WARNINGS_MAX: usize = 16;

/// Where the configuration of clients is.
#[derive(Debug, Clone)]
pub struct Host {
    /// The root of its file system.
    pub root: PathBuf,
    /// The home directory of the user.
    pub user_home: Option<PathBuf>,
    /// The environment of the process.
    pub environment: BTreeMap<String, String>,
}

impl Host {
    /// The host of this process.
    #[must_use]
    pub fn of_process() -> Self {
        let environment: BTreeMap<_, _> =
            std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))).collect();
        let user_home = environment.get("HOME").filter(|home| home.starts_with('/')).map(PathBuf::from);
        Self { root: "/".into(), user_home, environment }
    }

    /// A variable that is set and not empty.
    pub(super) fn variable(&self, name: &str) -> Option<&str> {
        self.environment.get(name).map(String::as_str).filter(|value| !value.trim().is_empty())
    }

    /// A file of the system.
    pub(super) fn system(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// A file in the user's home directory.
    pub(super) fn user(&self, path: &str) -> Option<PathBuf> {
        self.user_home.as_ref().map(|home| home.join(path))
    }

    /// A file in the user's directory for configuration.
    pub(super) fn user_config(&self, path: &str) -> Option<PathBuf> {
        match self.variable("XDG_CONFIG_HOME").filter(|home| home.starts_with('/')) {
            Some(home) => Some(Path::new(home).join(path)),
            None => self.user(&format!(".config/{path}")),
        }
    }
}

/// What the configuration of a client names.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Rules for its servers.
    pub(super) rules: Vec<EgressRule>,
    /// What was read.
    pub(super) read: Vec<String>,
    /// What could not become a rule, and what else the user should know.
    pub(super) warnings: Vec<String>,
    /// Why the configuration cannot be used.
    pub(super) error: Option<String>,
}

impl Found {
    /// The text of a file, if there is one. One that cannot be read is an error of the preset: a mirror might be in it.
    pub(super) fn file(&mut self, path: &Path) -> Option<String> {
        match read_text(path) {
            Ok(text) => {
                self.read.extend(text.is_some().then(|| path.display().to_string()));
                text
            }
            Err(why) => {
                self.error.get_or_insert_with(|| format!("{}: {why}", path.display()));
                None
            }
        }
    }

    /// Files of a directory with one of these extensions, in the order of their names.
    pub(super) fn files(&mut self, directory: &Path, extensions: &[&str]) -> Vec<(PathBuf, String)> {
        match names_in(directory, extensions) {
            Ok(names) => {
                let paths = names.into_iter().map(|name| directory.join(name));
                paths.filter_map(|path| self.file(&path).map(|text| (path, text))).collect()
            }
            Err(why) => {
                self.error.get_or_insert_with(|| format!("{}: {why}", directory.display()));
                Vec::new()
            }
        }
    }

    /// A rule for the server of this URL.
    pub(super) fn url(&mut self, origin: &str, url: &str) {
        match rule_for_url(url) {
            Ok(rule) => self.rule(rule),
            Err(why) => self.warn(format!("a server in {origin} has no rule: {why}")),
        }
    }

    /// A rule.
    pub(super) fn rule(&mut self, rule: EgressRule) {
        if !self.rules.contains(&rule) {
            self.rules.push(rule);
        }
    }

    /// Rules of the client's defaults.
    pub(super) fn defaults(&mut self, rules: &[&str]) {
        for rule in rules.iter().filter_map(|rule| rule.parse().ok()) {
            self.rule(rule);
        }
    }

    pub(super) fn warn(&mut self, words: String) {
        if self.warnings.len() < WARNINGS_MAX && !self.warnings.contains(&words) {
            self.warnings.push(words);
        }
    }

    /// Whether a rule is for this name.
    pub(super) fn has_name(&self, name: &str) -> bool {
        name.parse().is_ok_and(|name| self.rules.iter().any(|rule| rule.matches_name(&name)))
    }
}

/// The text of a regular file; `None` if it does not exist. An error is why it cannot be read.
pub(super) fn read_text(path: &Path) -> Result<Option<String>, String> {
    // A named pipe would block.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
    let file: File = match file {
        Ok(file) => file,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        Err(e) => return Err(format!("it cannot be read: {e}")),
    };
    if !file.metadata().map_err(|e| e.to_string())?.is_file() {
        return Err("it is not a file".into());
    }
    let mut bytes = Vec::new();
    file.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(|e| format!("it cannot be read: {e}"))?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(format!("it is longer than {FILE_MAX} bytes"));
    }
    String::from_utf8(bytes).map(Some).map_err(|_| "it is not UTF-8".into())
}

/// Names in a directory with one of these extensions, sorted; none if there is no directory.
pub(super) fn names_in(directory: &Path, extensions: &[&str]) -> Result<Vec<String>, String> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound) => return Ok(Vec::new()),
        Err(e) => return Err(format!("it cannot be read: {e}")),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(|e| e.to_string())?.file_name();
        let Some(name) = name.to_str() else { continue };
        let extension = Path::new(name).extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if !name.starts_with('.') && extensions.contains(&extension) {
            names.push(name.to_owned());
        }
        if names.len() > FILES_MAX {
            return Err(format!("it has more than {FILES_MAX} files"));
        }
    }
    names.sort();
    Ok(names)
}
