//! The registry of operations: one entry for each, from which every front end derives what it knows of them.
//!
//! ```text
//!  id (audit log, policy, jobs)     scope, effect, confirmations
//!         │                               │
//!         ├── command   `nido snapshot create`            ─┐
//!         ├── tool      `vm_snapshot`                      ├─ what a front end does not have is absent
//!         └── route     POST /v1/vms/{name}/snapshots     ─┘
//! ```
//!
//! Invariants, each with a test here: ids are unique, and so are routes; an operation that may destroy something may ask for
//! confirmation; only an operation that is not a read runs as a job. Each front end has a test that it knows exactly the operations
//! that the registry gives it.

mod table;
#[cfg(test)]
mod tests;

pub use self::table::*;
use crate::{FrontEnd, Scope};

/// The `tool` of requests that were refused before they reached an operation.
pub const REFUSED_REQUEST: &str = "request";

/// What an operation does to what exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    Read,
    /// It adds or changes something.
    Write,
    /// It may destroy or replace something.
    Destroy,
}

/// Which calls of an operation a person confirms, unless a policy specifies otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfirmationScope {
    /// All.
    Any,
    /// Those on a VM that another caller has created.
    Foreign,
    /// Those on an ephemeral VM.
    Ephemeral,
    /// Those that replace a file of the host.
    Overwrite,
    /// Those after which a guest may reach more.
    Widen,
}

impl ConfirmationScope {
    /// The conditions that have a word of their own.
    pub const CONDITIONS: [Self; 4] = [Self::Foreign, Self::Ephemeral, Self::Overwrite, Self::Widen];

    /// The word in a policy, after `@`; none for all calls.
    #[must_use]
    pub const fn word(self) -> Option<&'static str> {
        match self {
            Self::Any => None,
            Self::Foreign => Some("foreign"),
            Self::Ephemeral => Some("ephemeral"),
            Self::Overwrite => Some("overwrite"),
            Self::Widen => Some("widen"),
        }
    }

    /// The same for a reader.
    #[must_use]
    pub const fn about(self) -> &'static str {
        match self {
            Self::Any => "every call",
            Self::Foreign => "on a VM of another caller",
            Self::Ephemeral => "on an ephemeral VM",
            Self::Overwrite => "if a file of the host is replaced",
            Self::Widen => "if the guest may reach more",
        }
    }
}

/// A method of HTTP that the REST API uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "they are the methods of RFC 9110")]
pub enum Method {
    Get,
    Post,
    Put,
    Delete,
}

impl Method {
    /// As in a request line.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Delete => "DELETE",
        }
    }
}

/// A route of the REST API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Its method.
    pub method: Method,
    /// Its path, with parameters in braces.
    pub path: &'static str,
    /// The `operationId` in the OpenAPI document.
    pub operation_id: &'static str,
}

/// An operation.
#[derive(Debug, PartialEq, Eq)]
pub struct Operation {
    /// Its name in the audit log, in policies and in jobs.
    pub id: &'static str,
    /// The kind of object that it is about.
    pub noun: &'static str,
    /// What it does to that.
    pub verb: &'static str,
    /// What it does, in one sentence.
    pub about: &'static str,
    /// The scope that a caller of a server needs.
    pub scope: Scope,
    /// What it does to what exists.
    pub effect: Effect,
    /// Whether it can take so long that the REST API offers it as a job (`Prefer: respond-async`).
    pub long_running: bool,
    /// Which of its calls a person confirms by default.
    pub confirmed: &'static [ConfirmationScope],
    /// Whether it is admitted on a full disk, because it gives space back.
    pub frees_space: bool,
    /// Whether its result is the output of a command in a guest.
    pub has_output: bool,
    /// Its command: the words after `nido`.
    pub command: Option<&'static str>,
    /// The MCP tool that does it.
    pub tool: Option<&'static str>,
    /// Its route in the REST API.
    pub route: Option<Route>,
}

impl Operation {
    /// Whether it changes nothing.
    #[must_use]
    pub const fn is_read(&self) -> bool {
        matches!(self.effect, Effect::Read)
    }

    /// Whether it may destroy or replace something.
    #[must_use]
    pub const fn is_destructive(&self) -> bool {
        matches!(self.effect, Effect::Destroy)
    }

    /// Whether callers of this scope may use it.
    #[must_use]
    pub fn admits(&self, scope: Scope) -> bool {
        scope >= self.scope
    }

    /// Its `kind` in the REST API's operations.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        // Released before the registry; every other kind is the id.
        if self.id == VM_RUN.id { "run" } else { self.id }
    }

    /// How a user of a front end calls it; `None` where the front end does not have it.
    #[must_use]
    pub fn call(&self, face: FrontEnd) -> Option<String> {
        match face {
            FrontEnd::Cli | FrontEnd::Host => self.command.map(|words| format!("nido {words}")),
            FrontEnd::Mcp => self.tool.map(str::to_owned),
            FrontEnd::Api => self.route.map(|route| format!("{} {}", route.method.word(), route.path)),
        }
    }

    const fn new(effect: Effect, id: &'static str, noun: &'static str, verb: &'static str) -> Self {
        let scope = match effect {
            Effect::Read => Scope::Read,
            Effect::Write | Effect::Destroy => Scope::Run,
        };
        Self {
            id,
            noun,
            verb,
            about: "",
            scope,
            effect,
            long_running: false,
            confirmed: &[],
            frees_space: false,
            has_output: false,
            command: None,
            tool: None,
            route: None,
        }
    }

    const fn read(id: &'static str, noun: &'static str, verb: &'static str) -> Self {
        Self::new(Effect::Read, id, noun, verb)
    }

    const fn write(id: &'static str, noun: &'static str, verb: &'static str) -> Self {
        Self::new(Effect::Write, id, noun, verb)
    }

    const fn destroy(id: &'static str, noun: &'static str, verb: &'static str) -> Self {
        Self::new(Effect::Destroy, id, noun, verb)
    }

    const fn about(self, about: &'static str) -> Self {
        Self { about, ..self }
    }

    const fn admin(self) -> Self {
        Self { scope: Scope::Admin, ..self }
    }

    const fn scope(self, scope: Scope) -> Self {
        Self { scope, ..self }
    }

    const fn long_running(self) -> Self {
        Self { long_running: true, ..self }
    }

    const fn confirmed(self, confirmed: &'static [ConfirmationScope]) -> Self {
        Self { confirmed, ..self }
    }

    const fn frees_space(self) -> Self {
        Self { frees_space: true, ..self }
    }

    const fn has_output(self) -> Self {
        Self { has_output: true, ..self }
    }

    const fn command(self, words: &'static str) -> Self {
        Self { command: Some(words), ..self }
    }

    const fn tool(self, name: &'static str) -> Self {
        Self { tool: Some(name), ..self }
    }

    const fn route(self, method: Method, path: &'static str, operation_id: &'static str) -> Self {
        Self { route: Some(Route { method, path, operation_id }), ..self }
    }

    const fn get(self, path: &'static str, operation_id: &'static str) -> Self {
        self.route(Method::Get, path, operation_id)
    }

    const fn post(self, path: &'static str, operation_id: &'static str) -> Self {
        self.route(Method::Post, path, operation_id)
    }

    const fn put(self, path: &'static str, operation_id: &'static str) -> Self {
        self.route(Method::Put, path, operation_id)
    }

    const fn delete(self, path: &'static str, operation_id: &'static str) -> Self {
        self.route(Method::Delete, path, operation_id)
    }
}

/// The operation with this id.
#[must_use]
pub fn find(id: &str) -> Option<&'static Operation> {
    ALL.iter().copied().find(|operation| operation.id == id)
}

/// The operation of a route of the REST API.
#[must_use]
pub fn of_route(method: &str, path: &str) -> Option<&'static Operation> {
    let is_it = |route: &Route| route.method.word() == method && route.path == path;
    ALL.iter().copied().find(|operation| operation.route.as_ref().is_some_and(is_it))
}

/// The operation with this `operationId` in the OpenAPI document.
#[must_use]
pub fn of_operation_id(id: &str) -> Option<&'static Operation> {
    ALL.iter().copied().find(|operation| operation.route.is_some_and(|route| route.operation_id == id))
}
