//! Which calls a person confirms first, as data. Pure.
//!
//! ```text
//!  always    what the registry of operations gives (`Operation::confirmed`): vm_delete, vm_restore, vm_stop@ephemeral, …
//!  never     none
//!  a list    those: TOOL for every call of it, TOOL@CONDITION for some
//! ```
//!
//! Invariant: what a list does not name is not asked about, and what it names is.

use std::fmt;
use std::str::FromStr;

use nido_api::error::{Code, Error, Result};
use nido_api::operation;
pub use nido_api::operation::ConfirmationScope;
use serde::{Deserialize, Serialize};

/// Which calls a person confirms first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "TextValue", into = "TextValue")]
pub enum Confirm {
    /// What destroys, and what reaches into a VM that another caller has made.
    #[default]
    Always,
    /// None.
    Never,
    /// These.
    These(Vec<Question>),
}

/// Some calls of a tool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The tool.
    pub tool: String,
    /// Which of its calls.
    pub when: ConfirmationScope,
}

/// What is known of a call.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The tool.
    pub tool: &'a str,
    /// Another caller has made the VM.
    pub foreign: bool,
    /// The VM goes when it stops.
    pub ephemeral: bool,
    /// A file of the host is replaced.
    pub overwrites: bool,
    /// The guest may reach more.
    pub widens: bool,
}

/// Whether a condition applies to a call.
const fn applies(when: ConfirmationScope, facts: &Facts<'_>) -> bool {
    match when {
        ConfirmationScope::Any => true,
        ConfirmationScope::Foreign => facts.foreign,
        ConfirmationScope::Ephemeral => facts.ephemeral,
        ConfirmationScope::Overwrite => facts.overwrites,
        ConfirmationScope::Widen => facts.widens,
    }
}

impl Confirm {
    /// Whether some calls of this tool are asked about.
    #[must_use]
    pub fn concerns(&self, tool: &str) -> bool {
        self.conditions(tool).next().is_some()
    }

    /// Whether a call is asked about.
    #[must_use]
    pub fn requires_confirmation(&self, facts: &Facts<'_>) -> bool {
        self.conditions(facts.tool).any(|when| applies(when, facts))
    }

    /// The tools that are named.
    pub fn tools(&self) -> impl Iterator<Item = &str> {
        let these: &[Question] = if let Self::These(these) = self { these } else { &[] };
        these.iter().map(|question| question.tool.as_str())
    }

    fn conditions(&self, tool: &str) -> impl Iterator<Item = ConfirmationScope> {
        let usual = operation::find(tool).filter(|_| *self == Self::Always);
        let usual = usual.map_or(&[][..], |operation| operation.confirmed).iter().copied();
        let these: &[Question] = if let Self::These(these) = self { these } else { &[] };
        usual.chain(these.iter().filter(move |question| question.tool == tool).map(|question| question.when))
    }
}

/// Whether a call is among those that are asked about by default.
#[must_use]
pub fn is_usual(facts: &Facts<'_>) -> bool {
    Confirm::Always.requires_confirmation(facts)
}

/// As it is written.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum TextValue {
    Word(String),
    List(Vec<String>),
}

impl TryFrom<TextValue> for Confirm {
    type Error = Error;

    fn try_from(written: TextValue) -> Result<Self> {
        match written {
            TextValue::Word(word) => match word.as_str() {
                "always" => Ok(Self::Always),
                "never" => Ok(Self::Never),
                _ => Err(wrong(format!("'{}' is not `always`, `never` or a list of tools", word.escape_debug()))),
            },
            TextValue::List(list) => list.iter().map(|item| item.parse()).collect::<Result<_>>().map(Self::These),
        }
    }
}

impl From<Confirm> for TextValue {
    fn from(confirm: Confirm) -> Self {
        match confirm {
            Confirm::Always => Self::Word("always".into()),
            Confirm::Never => Self::Word("never".into()),
            Confirm::These(these) => Self::List(these.iter().map(ToString::to_string).collect()),
        }
    }
}

/// `always`, `never`, or tools with commas between them.
impl FromStr for Confirm {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "always" | "never" => TextValue::Word(text.into()).try_into(),
            list => TextValue::List(list.split(',').map(str::to_owned).collect()).try_into(),
        }
    }
}

impl FromStr for Question {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (tool, when) = match text.split_once('@') {
            None => (text, ConfirmationScope::Any),
            Some((tool, word)) => {
                let known = ConfirmationScope::CONDITIONS.into_iter().find(|known| known.word() == Some(word));
                let known = known.ok_or_else(|| {
                    wrong(format!("'{}' is not `foreign`, `ephemeral`, `overwrite` or `widen`", word.escape_debug()))
                })?;
                (tool, known)
            }
        };
        if tool.is_empty() || !tool.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') {
            return Err(wrong(format!(
                "'{}' is not a tool: `always`, `never`, or names of tools",
                tool.escape_debug()
            )));
        }
        Ok(Self { tool: tool.into(), when })
    }
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.when.word() {
            Some(word) => write!(f, "{}@{word}", self.tool),
            None => f.write_str(&self.tool),
        }
    }
}

fn wrong(words: String) -> Error {
    Error::new(Code::SpecInvalid, words)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Facts<'_> = Facts { tool: "vm_exec", foreign: false, ephemeral: true, overwrites: false, widens: false };

    // Commands in a VM that another caller had created, and files over those of the host, could not require confirmation at all.
    #[test]
    fn any_tool_can_require_confirmation_and_access_to_others_vms_does_by_default() {
        let requires_confirmation =
            |confirm: &str, facts: Facts<'_>| confirm.parse::<Confirm>().unwrap().requires_confirmation(&facts);
        let foreign = Facts { foreign: true, ..OWN };
        assert_eq!(
            [
                requires_confirmation("always", OWN),
                requires_confirmation("always", foreign),
                requires_confirmation("never", foreign)
            ],
            [false, true, false]
        );
        assert_eq!(
            [
                requires_confirmation("vm_exec", OWN),
                requires_confirmation("vm_exec@foreign", OWN),
                requires_confirmation("vm_exec@foreign", foreign)
            ],
            [true, false, true]
        );
        let spawn = Facts { tool: "vm_spawn", ..OWN };
        assert_eq!(
            [requires_confirmation("always", spawn), requires_confirmation("vm_delete,vm_spawn", spawn)],
            [false, true]
        );
        let delete = Facts { tool: "vm_delete", ..OWN };
        assert_eq!(
            [requires_confirmation("always", delete), requires_confirmation("vm_exec", delete)],
            [true, false],
            "a list is exactly that"
        );
        let network = Facts { tool: "vm_network", ..OWN };
        assert_eq!(
            [
                requires_confirmation("always", network),
                requires_confirmation("always", Facts { widens: true, ..network }),
                requires_confirmation("vm_network@widen", network)
            ],
            [false, true, false]
        );
        let write = Facts { tool: "vm_download", overwrites: true, ..OWN };
        assert!(
            requires_confirmation("always", write)
                && !requires_confirmation("always", Facts { overwrites: false, ..write })
        );
    }

    #[test]
    fn default_confirmations_are_in_the_registry() {
        let of = |tool: &str| Confirm::Always.conditions(tool).collect::<Vec<_>>();
        for (tool, when) in [
            ("vm_delete", ConfirmationScope::Any),
            ("vm_restore", ConfirmationScope::Any),
            ("vm_stop", ConfirmationScope::Ephemeral),
            ("vm_exec", ConfirmationScope::Foreign),
            ("vm_upload", ConfirmationScope::Foreign),
            ("vm_ports", ConfirmationScope::Foreign),
            ("vm_fork", ConfirmationScope::Foreign),
            ("vm_download", ConfirmationScope::Overwrite),
        ] {
            assert_eq!(of(tool), [when], "{tool}");
        }
        assert_eq!(of("vm_network"), [ConfirmationScope::Foreign, ConfirmationScope::Widen]);
        let asked = operation::ALL.iter().filter_map(|one| one.tool).filter(|tool| Confirm::Always.concerns(tool));
        assert_eq!(asked.collect::<std::collections::BTreeSet<_>>().len(), 9, "of the tools, no other");
    }

    #[test]
    fn invalid_tool_lists_are_refused() {
        for wrong in ["", "always,never!", "vm_exec@", "vm_exec@mine", "VM_EXEC", "vm_exec,,vm_stop", "yes@foreign@x"] {
            assert_eq!(wrong.parse::<Confirm>().unwrap_err().code(), Code::SpecInvalid, "{wrong}");
        }
        let list: Confirm = "vm_exec@foreign,vm_spawn".parse().unwrap();
        let json = serde_json::to_value(&list).unwrap();
        assert_eq!(json, serde_json::json!(["vm_exec@foreign", "vm_spawn"]));
        assert_eq!(serde_json::from_value::<Confirm>(json).unwrap(), list);
    }
}
