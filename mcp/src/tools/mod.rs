//! The tools, one file per noun. A tool parses its arguments into an operation; the operation checks whether it can be done, calls the
//! core and returns a result (tool_call.rs has the order).

mod brief;
mod command;
mod creation;
mod exec;
mod files;
mod forks;
#[cfg(test)]
mod golden;
mod jobs;
mod lifecycle;
mod logs;
mod network;
mod operation;
mod ports;
mod run;
mod snapshots;
mod templates;
mod vms;

use nido_api::PageRequest;
use nido_api::error::{Code, Error, Result};
use nido_core::policy::Policy;
use rmcp::model::{MetaObject, Tool as Described, ToolAnnotations};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// How many entries a page has if the caller does not say.
const PAGE: usize = 50;
/// The most that one may have; the schemas have it, too.
const PAGE_MAX: usize = 500;

/// The page that a tool is asked for.
fn page_request(limit: Option<usize>, cursor: Option<String>) -> Result<PageRequest> {
    let limit = limit.unwrap_or(PAGE);
    if !(1..=PAGE_MAX).contains(&limit) {
        return Err(Error::new(Code::SpecInvalid, format!("limit: it is 1 to {PAGE_MAX}")));
    }
    Ok(PageRequest { limit: Some(limit), cursor })
}

pub(crate) use self::brief::vm_list;
pub(crate) use self::operation::Operation;
pub(crate) use self::templates::template_list;
use crate::answer::plain;
use crate::app::Settings;
use crate::principal::Principal;
use crate::schema;

pub(crate) use creation::{DEFAULT_NET, spawn_request};

/// Every tool, in the order in which they are listed.
pub const ALL: [&Tool; 21] = [
    &vms::LS,
    &vms::INFO,
    &logs::LOGS,
    &run::RUN,
    &creation::SPAWN,
    &creation::CREATE,
    &lifecycle::START,
    &lifecycle::STOP,
    &vms::DELETE,
    &exec::EXEC,
    &files::UPLOAD,
    &files::DOWNLOAD,
    &ports::PORTS,
    &network::NETWORK,
    &forks::FORK,
    &snapshots::SNAPSHOT,
    &snapshots::RESTORE,
    &templates::LIST,
    &templates::CREATE,
    &jobs::GET,
    &jobs::CANCEL,
];

/// The key of a tool's `_meta` under which the annotations of the specification are.
const ANNOTATIONS: &str = "vmops/annotations";

/// One tool.
#[derive(Debug)]
pub struct Tool {
    /// The operation that it does; its name is that of the tool.
    pub op: &'static nido_api::operation::Operation,
    /// Its name for people.
    pub title: &'static str,
    /// What it does, when to use it and when not, what it changes, what comes next.
    pub about: &'static str,
    /// What a client may assume beside the operation's effect.
    pub hints: Hints,
    /// The schema of the arguments that it accepts.
    pub takes: fn() -> Value,
    /// Arguments that are accepted and not listed: few callers need them, and every model pays for what is listed.
    pub unlisted: &'static [&'static str],
    /// The schema of its result.
    pub gives: fn() -> Value,
    /// Parses its arguments.
    pub(crate) parse: fn(Value) -> Result<Box<dyn Operation>>,
}

/// What a client may assume. Advice: nothing that matters depends on it.
#[derive(Debug, Clone, Copy)]
pub struct Hints {
    /// Twice is the same as once.
    pub idempotent: bool,
    /// It may reach beyond this host.
    pub open_world: bool,
}

/// Of a tool that can be called again without harm, and stays on this host.
const REPEATABLE: Hints = Hints { idempotent: true, open_world: false };
/// Of a tool that does something each time, and stays on this host.
const SINGLE_USE_HINTS: Hints = Hints { idempotent: false, open_world: false };

impl Tool {
    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.op.id
    }

    /// As clients see it.
    #[must_use]
    pub fn described(&self) -> Described {
        let object = |schema: Value| match schema {
            Value::Object(fields) => fields,
            _ => Map::new(),
        };
        let Hints { idempotent, open_world } = self.hints;
        let hints = ToolAnnotations::default()
            .read_only(self.op.is_read())
            .destructive(self.op.is_destructive())
            .idempotent(idempotent)
            .open_world(open_world);
        let words = MetaObject(object(json!({ ANNOTATIONS: self.words() })));
        Described::new(self.name(), self.about, object(schema::listed((self.takes)(), self.unlisted)))
            .with_title(self.title)
            .with_raw_output_schema(object((self.gives)()).into())
            .with_annotations(hints)
            .with_meta(words)
    }

    /// The annotations of nido's specification, which MCP does not know.
    fn words(&self) -> &'static [&'static str] {
        match self.name() {
            "vm_delete" | "vm_restore" => &["destructive", "confirmation_required"],
            "vm_spawn" | "vm_fork" | "template_create" => &["long_running"],
            "vm_exec" | "vm_run" => &["potentially_dangerous"],
            "job_cancel" => &["destructive"],
            _ => &["safe"],
        }
    }

    /// Arguments that its schema does not have and that are passed on: an approval, and those for which the tool reports why it does not
    /// have them.
    pub(crate) fn also_accepts(&self) -> Vec<&'static str> {
        let user_fields = creation::USER_FIELDS.map(|(name, _)| name);
        let explained: [&[&str]; 2] = match self.name() {
            "vm_spawn" => [&creation::SPAWN_ONLY_FIELDS, &user_fields],
            "vm_create" => [&creation::START_FIELDS, &user_fields],
            _ => [&[], &[]],
        };
        [&[APPROVAL_ID][..], explained[0], explained[1]].concat()
    }

    /// What is to be done, of arguments as they were read.
    pub(crate) fn operation(&self, mut arguments: Value) -> Result<Box<dyn Operation>> {
        if let Some(fields) = arguments.as_object_mut() {
            fields.remove(APPROVAL_ID);
        }
        (self.parse)(arguments)
    }

    /// Whether its argument is a command, which a policy may restrict.
    fn runs_commands(&self) -> bool {
        self.op.has_output
    }

    /// The same on a server with this policy: which commands may be run is no secret to a caller that has to choose one.
    pub(crate) fn described_under(&self, policy: &Policy) -> Described {
        let mut described = self.described();
        let Some(allowed) = policy.summary().filter(|_| self.runs_commands()) else { return described };
        let words = format!(
            "{} This server allows only these commands (* is any part of one word, ** are further words without options, -** \
             any further words): {}.",
            self.about,
            plain(&allowed)
        );
        described.description = Some(words.into());
        if policy.refuses_shell() {
            let mut schema = (*described.input_schema).clone();
            if let Some(Value::Object(properties)) = schema.get_mut("properties") {
                properties.remove("command");
            }
            described.input_schema = schema.into();
        }
        described
    }

    /// Why this caller may not use it here; the reason is a word for the audit log.
    pub(crate) fn refused(&self, settings: &Settings, principal: &Principal) -> Option<(&'static str, String)> {
        let name = self.name();
        if settings.policy.read_only && !self.op.is_read() {
            return Some(("read_only", format!("{name} changes something, and this server is read-only")));
        }
        let named = |list: &Vec<String>| list.iter().any(|one| one == name);
        if settings.exclude.iter().any(|one| one == name) || settings.tools.as_ref().is_some_and(|list| !named(list)) {
            return Some(("tool_not_offered", format!("this server does not offer {name}")));
        }
        if !self.op.admits(principal.scope) {
            return Some(("scope", format!("{name} takes a token of the scope {}", self.op.scope.word())));
        }
        None
    }
}

/// Whether this caller may use the tool of that name here. What resources and prompts show goes the same way.
pub(crate) fn is_offered(name: &str, settings: &Settings, principal: &Principal) -> bool {
    find(name).is_some_and(|tool| tool.refused(settings, principal).is_none())
}

/// The argument that every tool accepts: the approval of an earlier call.
pub(crate) const APPROVAL_ID: &str = "approval_id";

/// The parser of a tool whose arguments are this type.
fn parse<T: DeserializeOwned + Operation + 'static>(given: Value) -> Result<Box<dyn Operation>> {
    Ok(Box::new(arguments::<T>(given)?))
}

/// The tool of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Tool> {
    ALL.into_iter().find(|tool| tool.name() == name)
}

/// Arguments as a type; an error names the field.
pub(crate) fn arguments<T: DeserializeOwned>(arguments: Value) -> Result<T> {
    serde_path_to_error::deserialize(arguments).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." { String::new() } else { format!("{path}: ") };
        Error::new(Code::SpecInvalid, plain(&format!("{field}{}", error.into_inner())))
    })
}

/// One argument that stands by itself.
fn field<T: DeserializeOwned>(name: &str, value: Option<Value>) -> Result<T> {
    let value = value.ok_or_else(|| Error::new(Code::SpecInvalid, format!("{name}: it is missing")))?;
    serde_json::from_value(value).map_err(|error| Error::new(Code::SpecInvalid, plain(&format!("{name}: {error}"))))
}
