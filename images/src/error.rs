//! What can go wrong with templates, worded for the user who must act: one sentence, and a hint where one helps.
//! Invariant: no text of a child process reaches a message unescaped.

use nido_api::error::Hint;
use nido_api::operation as op;
use std::io;
use std::path::{Path, PathBuf};

use crate::progress::Stage;
use crate::recipe_text;

/// Everything this crate fails with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// Something the build needs is not on this host.
    #[error("{tool} is not installed")]
    MissingTool {
        /// A description: `the program xz`.
        tool: String,
        /// The Debian packages that have it, separated by blanks.
        package: String,
    },
    /// This user may not make the user namespace a build without root needs.
    #[error("an ordinary user cannot build templates here: {needs}")]
    Unprivileged {
        /// What is missing.
        needs: String,
        /// What to do about it.
        remedy: String,
    },
    /// No built-in recipe has this name.
    #[error("there is no recipe named {name:?}")]
    RecipeNotFound {
        /// The requested name.
        name: String,
    },
    /// A recipe's text makes no sense.
    #[error("the recipe {name} is not valid: {reason}")]
    RecipeInvalid {
        /// Name of the recipe.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A template name that breaks the rule for names.
    #[error(
        "{name:?} is not a template name: use 1 to 63 of a-z, 0-9 and -, starting and ending with a letter or digit"
    )]
    NameInvalid {
        /// The name as given.
        name: String,
    },
    /// No template of this name has been built.
    #[error("there is no template named {name}")]
    TemplateNotFound {
        /// The requested name.
        name: String,
    },
    /// A template of this name exists, and is another one.
    #[error("a template named {name} exists already")]
    TemplateExists {
        /// Its name.
        name: String,
    },
    /// The template is not what it was when work on it began.
    #[error("template {name} was built again meanwhile")]
    TemplateChanged {
        /// Its name.
        name: String,
    },
    /// A manifest that cannot be understood.
    #[error("the manifest {} is not valid: {reason}", path.display())]
    ManifestInvalid {
        /// The manifest's path.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A part of a template is missing or differs from the manifest.
    #[error("the {part} of template {template} is damaged: {reason}")]
    Damaged {
        /// Name of the template.
        template: String,
        /// Which part.
        part: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A disk image that is not safe to use.
    #[error("the image {} is rejected: {reason}", path.display())]
    ImageRefused {
        /// The image's path.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// An archive that is not what this program would have written, or not safe to take in.
    #[error("the archive is rejected: {reason}")]
    ArchiveRefused {
        /// What is wrong with it.
        reason: String,
    },
    /// The agent inside an archive speaks another protocol than this program.
    #[error("the guest agent in the archive speaks protocol version {theirs}, this nido speaks {ours}")]
    AgentProtocol {
        /// The version in the archive.
        theirs: u16,
        /// The version of this program.
        ours: u16,
    },
    /// A template that no import would take.
    #[error("the template {name} cannot be exported: {reason}")]
    NotExportable {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// A file of the caller's that would have to be replaced.
    #[error("{} exists", path.display())]
    PathExists {
        /// Its path.
        path: PathBuf,
    },
    /// Templates cannot be built on this mount.
    #[error("templates cannot be built below {}: {reason}", path.display())]
    BuildDirectory {
        /// The mount.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// A path that cannot become a file.
    #[error("{} cannot be written: {reason}", path.display())]
    PathInvalid {
        /// The path.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// The kernel package is not what a guest can boot from.
    #[error("the kernel cannot be used: {reason}")]
    KernelInvalid {
        /// What is wrong.
        reason: String,
    },
    /// A program of the build failed.
    #[error("{program} failed ({status}) at the stage {stage:?}{}", last_line(tail))]
    Command {
        /// Where in the build.
        stage: Stage,
        /// Name of the program.
        program: String,
        /// A description of its exit status.
        status: String,
        /// The last lines it wrote, escaped.
        tail: Vec<String>,
        /// The whole log.
        log: PathBuf,
    },
    /// A program of the build did not end in time and was killed.
    #[error("{program} did not finish within {seconds} s at the stage {stage:?}")]
    Deadline {
        /// Where in the build.
        stage: Stage,
        /// Name of the program.
        program: String,
        /// The limit it passed.
        seconds: u64,
        /// The whole log.
        log: PathBuf,
    },
    /// The disk (or the quota) is full.
    #[error("no space left on the disk that holds {}", path.display())]
    DiskFull {
        /// A path on that disk.
        path: PathBuf,
    },
    /// The caller cancelled it.
    #[error("the work on the template was interrupted")]
    Interrupted,
    /// Anything else the operating system refuses.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

impl ImageError {
    /// Wraps an I/O error; a full disk becomes [`ImageError::DiskFull`].
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path: path.to_owned() },
            _ => Self::Io { action, path: path.to_owned(), source },
        }
    }

    /// What to do about it, where there is something.
    #[must_use]
    pub fn hint(&self) -> Option<Hint> {
        Some(match self {
            Self::MissingTool { package, .. } => Hint::host(format!("install it: apt-get install {package}")),
            Self::Unprivileged { remedy, .. } => Hint::host(remedy.clone()),
            Self::BuildDirectory { .. } => Hint::host(
                "keep the home on another file system (--home, NIDO_HOME), or mount this one without that option",
            ),
            Self::RecipeNotFound { .. } => {
                Hint::note(format!("the built-in recipes are {}", recipe_text::names().collect::<Vec<_>>().join(", ")))
            }
            Self::TemplateNotFound { name } if recipe_text::names().any(|known| known == name) => {
                Hint::run_on(op::TEMPLATE_BUILD, name).to("build it")
            }
            Self::Damaged { template, .. } => {
                Hint::run_on(op::TEMPLATE_BUILD, template).option("rebuild", "rebuild", true).to("build it again")
            }
            Self::Command { log, .. } | Self::Deadline { log, .. } => {
                Hint::host(format!("see the whole output in {}", log.display()))
            }
            Self::TemplateExists { .. } => {
                Hint::command_line("import it under another name with --name, or replace the existing one with --force")
            }
            Self::PathExists { .. } => Hint::command_line("replace it with --force"),
            Self::AgentProtocol { theirs, ours } if theirs > ours => Hint::note("import it with a newer nido"),
            Self::AgentProtocol { .. } => {
                Hint::note("build the template with this version of nido or a newer one, and export it again")
            }
            Self::ArchiveRefused { .. } => Hint::note("it was discarded; download it again, or contact its author"),
            Self::DiskFull { .. } => {
                Hint::host("free some space: a build needs about 1.5 GiB temporarily, an import as much as its parts")
            }
            _ => return None,
        })
    }
}

/// The line most likely to have the cause: apt's and mmdebstrap's errors start with `E: `.
fn last_line(tail: &[String]) -> String {
    tail.iter()
        .rfind(|line| line.starts_with("E: ") && !line.contains("hook failed"))
        .or(tail.last())
        .map_or_else(String::new, |line| format!(": {line}"))
}
