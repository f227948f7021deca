//! What a server lets its callers do: which commands, which paths of the host, what a person must approve. Pure, but for
//! reading the file. Its format: `docs/policy.md`.
//!
//! ```text
//!  [vm.NAME] has rules for commands?  else [template.NAME]?  else [[allow]]?  else every command is allowed
//! ```
//!
//! Invariant: a list that is active allows what one of its rules allows in full, and nothing else. The few commands that are refused without
//! a list (`dangerous.rs`) are no boundary, and what a list allows is never decided by matching inside shell text.

mod confirm;
mod dangerous;
mod rule;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use confirm::{Confirm, ConfirmationScope, Facts, Question, is_usual};
pub use dangerous::DANGEROUS_COMMAND;
use nido_api::error::{Code, Error, Hint, Result};
use nido_api::name::{TemplateName, VmName};
use nido_api::sanitize::head;
use nido_api::{ExecRequest, Limits};
pub use rule::{Arg, ArgumentPart, Program, Rule, Variable};

use self::rule::Mismatch;

/// The word in the audit log for a command that no rule allows.
pub const NOT_IN_ALLOWLIST: &str = "not_in_allowlist";
/// The word for a file that may not be put into a VM for which there is a list.
pub const UPLOAD_NOT_ALLOWED: &str = "upload_not_allowed";
/// The longest file that is read, in bytes.
const FILE_MAX: u64 = 1 << 20;
/// How many rules are shown to a caller that must choose a command.
const RULES_SHOWN: usize = 20;
/// How much of a program's name a refusal shows, in bytes.
const SHOWN_MAX: usize = 80;

/// What a server lets its callers do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// What a person confirms first.
    pub confirm: Confirm,
    /// Whether commands that obviously destroy a guest are refused; they are if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deny_dangerous: Option<bool>,
    /// Whether callers may only look.
    pub read_only: bool,
    /// Directories of the host that files may be read from and written to; the server's defaults if absent, none if empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub roots: Option<Vec<PathBuf>>,
    /// Directories of the host that files may be read from, instead of `roots`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_roots: Option<Vec<PathBuf>>,
    /// Directories of the host that files may be written to, instead of `roots`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_roots: Option<Vec<PathBuf>>,
    /// What VMs may be.
    #[serde(skip_serializing_if = "Limits::is_none")]
    pub limits: Limits,
    /// The commands that may be run; all if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    allow: Option<Vec<Rule>>,
    /// Whether files may be put into a VM although the list above counts for it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    upload: bool,
    /// What is different for VMs of a template.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    template: BTreeMap<TemplateName, Section>,
    /// What is different for a VM.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    vm: BTreeMap<VmName, Section>,
}

/// What is different for some VMs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Section {
    /// Every command is allowed here.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    unrestricted: bool,
    /// The commands that are allowed here, instead of those that are elsewhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    allow: Option<Vec<Rule>>,
    /// Whether files may be put into a VM although that list counts for it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    upload: bool,
}

/// What of a command is judged.
#[derive(Debug, Clone, Copy)]
pub struct Command<'a> {
    /// Program and arguments. Empty: a login shell.
    pub argv: &'a [Vec<u8>],
    /// Variables that the caller sets: `KEY=VALUE`.
    pub env: &'a [Vec<u8>],
    /// Who it runs as; root if absent.
    pub user: Option<&'a str>,
}

impl<'a> From<&'a ExecRequest> for Command<'a> {
    fn from(request: &'a ExecRequest) -> Self {
        Self { argv: &request.argv, env: &request.env, user: request.user.as_deref() }
    }
}

/// What is decided about a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It may run.
    Allowed,
    /// It may not.
    Denied(Denial),
}

/// Why a command may not run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    /// A word for the audit log.
    pub reason: &'static str,
    /// A sentence. What the caller sent is escaped in it.
    pub detail: String,
}

impl Verdict {
    /// The same as a result.
    ///
    /// # Errors
    /// The denial.
    pub fn into_result(self) -> Result<(), Denial> {
        match self {
            Self::Allowed => Ok(()),
            Self::Denied(denial) => Err(denial),
        }
    }
}

impl From<Denial> for Error {
    fn from(denial: Denial) -> Self {
        Self::new(Code::Denied, denial.detail)
            .hint("the policy of this server restricts commands; do not work around it, ask the user")
    }
}

/// Whether a command may be run in a VM.
#[must_use]
pub fn decide(policy: &Policy, vm: &VmName, template: &TemplateName, command: &Command<'_>) -> Verdict {
    let Some(rules) = policy.rules(vm, template) else { return Verdict::Allowed };
    let Some(program) = command.argv.first() else {
        return denied("a login shell is not in the list of allowed commands");
    };
    let mut nearest = Mismatch::Program;
    for rule in rules {
        match rule.check(command) {
            Ok(()) => return Verdict::Allowed,
            Err(miss) => nearest = nearest.max(miss),
        }
    }
    let program = String::from_utf8_lossy(program);
    let program = head(&program, SHOWN_MAX).escape_debug();
    denied(match nearest {
        Mismatch::Program => format!("'{program}' is not in the list of allowed commands, spelled like this"),
        Mismatch::Arguments => format!("'{program}' is allowed, but not with these arguments"),
        Mismatch::User => format!("'{program}' is allowed, but not as this user"),
        Mismatch::Environment => format!("'{program}' is allowed, but not with these variables"),
    })
}

/// Whether a command, with its standard input, does not obviously destroy a guest.
#[must_use]
pub fn decide_dangerous(policy: &Policy, argv: &[Vec<u8>], stdin: &[u8]) -> Verdict {
    if policy.deny_dangerous == Some(false) {
        return Verdict::Allowed;
    }
    dangerous::check(argv, stdin).map_or_else(Verdict::Denied, |()| Verdict::Allowed)
}

/// Whether a line of shell may be run in a VM: only where every command may.
#[must_use]
pub fn decide_shell(policy: &Policy, vm: &VmName, template: &TemplateName) -> Verdict {
    match policy.rules(vm, template) {
        None => Verdict::Allowed,
        Some(_) => denied(
            "commands are restricted to a list, which cannot be applied to a shell line: send program and arguments",
        ),
    }
}

/// Whether a file may be put into a VM. A caller that can write files as root can replace the programs on a list.
#[must_use]
pub fn decide_upload(policy: &Policy, vm: &VmName, template: &TemplateName) -> Verdict {
    match policy.list(vm, template) {
        None | Some((_, true)) => Verdict::Allowed,
        Some((_, false)) => Verdict::Denied(Denial {
            reason: UPLOAD_NOT_ALLOWED,
            detail: "commands are restricted to a list for this VM, and a file could replace one of them".into(),
        }),
    }
}

/// Whether a VM may be copied under another name. The same list has to apply to the copy: it has what is in the VM.
#[must_use]
pub fn decide_fork(policy: &Policy, vm: &VmName, template: &TemplateName, copy: &VmName) -> Verdict {
    match policy.list(vm, template) == policy.list(copy, template) {
        true => Verdict::Allowed,
        false => denied(format!("other commands are allowed in a VM named '{copy}' than in '{vm}'")),
    }
}

fn denied(detail: impl Into<String>) -> Verdict {
    Verdict::Denied(Denial { reason: NOT_IN_ALLOWLIST, detail: detail.into() })
}

impl Policy {
    /// Reads a policy from a file that no other user may write.
    ///
    /// # Errors
    /// `path_not_found`, `denied` if others may write it, `spec_invalid` with the line that is wrong.
    pub fn load(path: &Path) -> Result<Self> {
        let shown = path.display();
        let unreadable = |e: std::io::Error| match e.kind() {
            std::io::ErrorKind::NotFound => Error::new(Code::PathNotFound, format!("there is no policy at {shown}")),
            _ => Error::io(format!("cannot read the policy {shown}"), e),
        };
        let file = File::open(path).map_err(unreadable)?;
        let meta = file.metadata().map_err(unreadable)?;
        let mine = [0, rustix::process::geteuid().as_raw()].contains(&meta.uid());
        if !mine || meta.mode() & 0o022 != 0 {
            return Err(Error::new(Code::Denied, format!("other users can write the policy {shown}"))
                .hint(Hint::host("run chmod go-w on it; it must belong to you or to root")));
        }
        let mut text = String::new();
        file.take(FILE_MAX + 1).read_to_string(&mut text).map_err(unreadable)?;
        if text.len() as u64 > FILE_MAX {
            return Err(Error::new(Code::SpecInvalid, format!("the policy {shown} is longer than {FILE_MAX} bytes")));
        }
        Self::parse(&text).map_err(|e| {
            let wrong = Error::new(e.code(), format!("the policy {shown} is not valid: {}", e.message()));
            wrong.hint(Hint::host("see docs/policy.md for the format"))
        })
    }

    /// A policy from its text.
    ///
    /// # Errors
    /// `spec_invalid`.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |words: String| Error::new(Code::SpecInvalid, words);
        let policy: Self = toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            wrong(format!("line {line}: {}", e.message().replace('\n', " ")))
        })?;
        for (kind, name, section) in policy.sections() {
            if section.unrestricted && section.allow.is_some() {
                return Err(wrong(format!("[{kind}.{name}] has both a list and 'unrestricted'")));
            }
            if section.upload && section.allow.is_none() {
                return Err(wrong(format!("[{kind}.{name}] has 'upload' but no list of commands")));
            }
        }
        if policy.upload && policy.allow.is_none() {
            return Err(wrong(
                "'upload' requires a list of commands; without a list, uploads are not restricted".into(),
            ));
        }
        let roots = [&policy.roots, &policy.read_roots, &policy.write_roots];
        if let Some(root) = roots.into_iter().flatten().flatten().find(|root| !root.is_absolute()) {
            return Err(wrong(format!("the root '{}' is not an absolute path", root.display())));
        }
        let lists = policy.sections().filter_map(|(_, _, section)| section.allow.as_ref()).chain(&policy.allow);
        lists.flatten().try_for_each(|rule| rule.clone().checked().map(drop))?;
        Ok(policy)
    }

    /// The allowed commands, for a caller that must choose one; `None` if everything may. Short, and the same for every VM.
    #[must_use]
    pub fn summary(&self) -> Option<String> {
        let own = |section: &Section| section.allow.is_some() || section.unrestricted;
        let differ = self.sections().any(|(_, _, section)| own(section));
        let listed = |rules: &[Rule]| {
            let mut shown: Vec<_> = rules.iter().take(RULES_SHOWN).map(ToString::to_string).collect();
            let more = rules.len() - shown.len();
            shown.extend((more > 0).then(|| format!("and {more} more")));
            if shown.is_empty() { "none".to_owned() } else { shown.join("; ") }
        };
        let general = self.allow.as_deref().map(listed);
        let sections = self.sections().filter_map(|(kind, name, section)| {
            let rules = match (&section.allow, section.unrestricted) {
                (Some(rules), _) => listed(rules),
                (None, true) => "everything".to_owned(),
                (None, false) => return None,
            };
            let of = if kind == "vm" { "in the VM" } else { "in VMs of the template" };
            Some(format!("{of} {name}: {rules}"))
        });
        let sections: Vec<_> = sections.take(RULES_SHOWN).collect();
        match (general, differ) {
            (None, false) => None,
            (general, _) => Some(general.into_iter().chain(sections).collect::<Vec<_>>().join(". And ")),
        }
    }

    /// Whether a line of shell is refused in every VM.
    #[must_use]
    pub fn refuses_shell(&self) -> bool {
        self.allow.is_some() && self.sections().all(|(_, _, section)| !section.unrestricted)
    }

    /// The directories that files may be read from; `None` if the policy does not define them.
    #[must_use]
    pub fn readable_roots(&self) -> Option<&[PathBuf]> {
        self.read_roots.as_deref().or(self.roots.as_deref())
    }

    /// The directories that files may be written to; `None` if the policy does not define them.
    #[must_use]
    pub fn writable_roots(&self) -> Option<&[PathBuf]> {
        self.write_roots.as_deref().or(self.roots.as_deref())
    }

    fn sections(&self) -> impl Iterator<Item = (&'static str, &str, &Section)> {
        let templates = self.template.iter().map(|(name, section)| ("template", name.as_str(), section));
        templates.chain(self.vm.iter().map(|(name, section)| ("vm", name.as_str(), section)))
    }

    /// The same as a file has it.
    #[must_use]
    pub fn to_toml(&self) -> String {
        // Strings, lists and tables with string keys: they always serialize.
        toml::to_string(self).unwrap_or_else(|e| format!("# {e}\n"))
    }

    /// Adds a rule for all VMs without a section. From then on there is a list.
    pub fn allow(&mut self, rule: Rule) {
        self.allow.get_or_insert_default().push(rule);
    }

    /// The list that counts for a VM: the most specific one, alone. `None`: every command is allowed.
    #[must_use]
    pub fn rules(&self, vm: &VmName, template: &TemplateName) -> Option<&[Rule]> {
        self.list(vm, template).map(|(rules, _)| rules)
    }

    /// The same, and whether files may be put there.
    fn list(&self, vm: &VmName, template: &TemplateName) -> Option<(&[Rule], bool)> {
        let sections = [self.vm.get(vm), self.template.get(template)];
        for section in sections.into_iter().flatten() {
            match (&section.allow, section.unrestricted) {
                (Some(rules), _) => return Some((rules, section.upload)),
                (None, true) => return None,
                (None, false) => {}
            }
        }
        self.allow.as_deref().map(|rules| (rules, self.upload))
    }
}

#[cfg(test)]
mod tests;
