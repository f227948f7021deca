//! `mcp-server install`: what a client has to know to start the MCP server, printed or put among what it knows already.
//!
//! Invariant: whatever else stands in a client's file stays as it is; a file that cannot be read as JSON is left alone.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use nido_api::error::{Code, Error, Hint, Result};
use nido_files::atomic_file::{Durability, PUBLIC, TemporaryFile};
use serde_json::{Map, Value, json};

use super::Context;
use crate::exit::{Exit, Outcome};

const EXAMPLES: &str = "\
Examples:
  nido mcp-server install --client claude-code
  nido mcp-server install --client claude-desktop --write
  nido mcp-server install --client cursor --write -- --read-only

Flags after -- are those of `nido mcp-server start`.";

/// Configure a client to use the MCP server
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Install {
    /// The client
    #[arg(long, value_enum)]
    client: Client,
    /// Write the client's file; its other settings are kept
    #[arg(long)]
    write: bool,
    /// The client's file [default: the client's own location]
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    file: Option<PathBuf>,
    /// Flags for `nido mcp-server start`
    #[arg(last = true, value_name = "FLAG")]
    flags: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Client {
    /// For this user
    ClaudeDesktop,
    /// For the project in this directory: .mcp.json
    ClaudeCode,
    /// For this user
    Cursor,
    /// For the project in this directory: .vscode/mcp.json
    Vscode,
}

impl Client {
    /// Under which name it keeps its servers.
    const fn key(self) -> &'static str {
        match self {
            Self::Vscode => "servers",
            _ => "mcpServers",
        }
    }

    /// Whether it requires the transport's name.
    const fn wants_type(self) -> bool {
        matches!(self, Self::ClaudeCode | Self::Vscode)
    }

    /// The directories that are searched.
    fn file(self) -> Result<PathBuf> {
        let of_user = |name: &str| {
            let home = std::env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
            home.map(|home| home.join(name)).ok_or_else(|| {
                Error::new(Code::PathNotFound, "HOME is not set")
                    .hint(Hint::command_line("--file names the client's file"))
            })
        };
        match self {
            Self::ClaudeDesktop => of_user(".config/Claude/claude_desktop_config.json"),
            Self::Cursor => of_user(".cursor/mcp.json"),
            Self::ClaudeCode => Ok(".mcp.json".into()),
            Self::Vscode => Ok(".vscode/mcp.json".into()),
        }
    }
}

impl Install {
    pub fn run(self, cx: &Context) -> Outcome {
        let file = self.file.clone().map_or_else(|| self.client.file(), Ok)?;
        let entry = self.entry(cx)?;
        if !self.write {
            let whole = merged(Value::Object(Map::new()), self.client, entry)?;
            cx.output.data(&(serde_json::to_string_pretty(&whole).unwrap_or_default() + "\n"))?;
            cx.output.note(&format!("add this to {}, or pass --write", file.display()));
            return Ok(Exit::Success);
        }
        let there = read(&file)?;
        let whole = merged(there, self.client, entry)?;
        write(&file, &(serde_json::to_string_pretty(&whole).unwrap_or_default() + "\n"))?;
        let path = file.display().to_string();
        cx.output.answer(&json!({ "file": path }), || format!("{path}\n"))?;
        Ok(Exit::Success)
    }

    /// How the server is started.
    fn entry(&self, cx: &Context) -> Result<Value> {
        let program = std::env::current_exe().map_err(|e| Error::io("cannot find nido's own program", e))?;
        let program = program.to_str().ok_or_else(|| Error::new(Code::PathInvalid, "the path of nido is not UTF-8"))?;
        let mut arguments = vec!["mcp-server".to_owned(), "start".into()];
        arguments.extend(self.flags.iter().cloned());
        let mut entry = Map::new();
        if self.client.wants_type() {
            entry.insert("type".into(), "stdio".into());
        }
        entry.insert("command".into(), program.into());
        entry.insert("args".into(), arguments.into());
        // A client does not start it from this shell.
        let named = |key: &str, flag: &Option<PathBuf>| {
            let value = flag.clone().or_else(|| std::env::var_os(key).filter(|v| !v.is_empty()).map(PathBuf::from));
            value.and_then(|path| std::path::absolute(path).ok()).map(|path| (key.to_owned(), path))
        };
        let home = named("NIDO_HOME", &cx.options.home).or_else(moved_home);
        let qemu = named("NIDO_QEMU", &cx.options.qemu).or_else(qemu_out_of_the_way);
        // Where the audit log is.
        let state = named("XDG_STATE_HOME", &None);
        let environment: Map<_, _> =
            [home, qemu, state].into_iter().flatten().map(|(key, path)| (key, path.to_string_lossy().into())).collect();
        if !environment.is_empty() {
            entry.insert("env".into(), environment.into());
        }
        Ok(entry.into())
    }
}

/// nido's home, if a client that starts it with another environment would not find it.
fn moved_home() -> Option<(String, PathBuf)> {
    std::env::var_os("XDG_DATA_HOME").filter(|value| !value.is_empty())?;
    Some(("NIDO_HOME".into(), nido_engine::home::Home::default_root().ok()?))
}

/// The default search path of desktop clients.
const SYSTEM_DIRECTORIES: [&str; 3] = ["/usr/local/bin", "/usr/bin", "/bin"];
/// What QEMU is called.
const QEMU: &str = "qemu-system-x86_64";

/// The QEMU that is used here, if it is found only because of this shell's `PATH`.
fn qemu_out_of_the_way() -> Option<(String, PathBuf)> {
    let path = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&path).map(|place| place.join(QEMU)).find(|program| program.is_file())?;
    if SYSTEM_DIRECTORIES.iter().any(|place| found.parent() == Some(Path::new(place))) {
        return None;
    }
    Some(("NIDO_QEMU".into(), std::path::absolute(found).ok()?))
}

/// What a client knows, and how to start nido. Pure.
fn merged(mut there: Value, client: Client, entry: Value) -> Result<Value> {
    let not_it = |what: &str| {
        let words = format!("{what} of the client's file is not an object");
        Error::new(Code::SpecInvalid, words).hint(Hint::command_line("fix it, or select another file with --file"))
    };
    let servers = there.as_object_mut().ok_or_else(|| not_it("the whole"))?;
    let servers = servers.entry(client.key()).or_insert_with(|| json!({}));
    let servers = servers.as_object_mut().ok_or_else(|| not_it(client.key()))?;
    servers.insert("nido".into(), entry);
    Ok(there)
}

fn read(file: &Path) -> Result<Value> {
    let shown = file.display();
    match std::fs::read_to_string(file) {
        Ok(text) if text.trim().is_empty() => Ok(json!({})),
        Ok(text) => serde_json::from_str(&text).map_err(|e| {
            let words = format!("{shown} is not valid JSON: {e}");
            Error::new(Code::SpecInvalid, words)
                .hint(Hint::command_line("run without --write to print the entry, and add it by hand"))
        }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(json!({})),
        Err(e) => Err(Error::io(format!("cannot read {shown}"), e)),
    }
}

/// In one step: a client that reads it meanwhile sees the old or the new.
fn write(file: &Path, text: &str) -> Result<()> {
    let broken = |e: std::io::Error| Error::io(format!("cannot write {}", file.display()), e);
    // What is a link stays one.
    let file = std::fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    let directory = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory).map_err(broken)?;
    let written = || {
        let mut temporary = TemporaryFile::beside(&file, PUBLIC)?;
        if let Ok(meta) = std::fs::metadata(&file) {
            temporary.file().set_permissions(meta.permissions())?;
        }
        temporary.file().write_all(text.as_bytes())?;
        temporary.replace(&file, Durability::PowerCut)
    };
    written().map_err(broken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_settings_of_a_client_stay() {
        let there = json!({"theme": "dark", "mcpServers": {"other": {"command": "x"}, "nido": {"command": "old"}}});
        let now = merged(there, Client::Cursor, json!({"command": "new"})).unwrap();
        let wanted = json!({"theme": "dark", "mcpServers": {"other": {"command": "x"}, "nido": {"command": "new"}}});
        assert_eq!(now, wanted);
        assert_eq!(merged(json!({}), Client::Vscode, json!(1)).unwrap(), json!({"servers": {"nido": 1}}));
        for wrong in [json!([]), json!({"mcpServers": 1})] {
            assert_eq!(merged(wrong, Client::Cursor, json!(1)).unwrap_err().code(), Code::SpecInvalid);
        }
    }
}
