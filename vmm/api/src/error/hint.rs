//! What a user can do about an error, as data. Each front end renders it with its own calls: a command, a request, a tool. Pure.
//!
//! Invariants: a hint for the servers names no command or option of the command line, unless it is for the operator of the host,
//! and says so; an error does not propose to a model to destroy something.

use std::fmt::Display;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::FrontEnd;
use crate::operation::{self, Method, Operation};

/// What can be done about an error: one of the alternatives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Hint {
    /// Advice that is true for every front end.
    Note {
        /// A clause without a full stop.
        text: String,
    },
    /// Another operation.
    Run(Call),
    /// What only a user of the host can do, for example at its command line.
    Host {
        /// A clause that begins with a verb in the imperative.
        text: String,
    },
    /// For users of the command line only: an option of the command, or what a nido without hints as data has written.
    CommandLine {
        /// A clause.
        text: String,
    },
    /// A kind that a newer nido has written.
    #[serde(other)]
    Unknown,
}

/// An operation with its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// The operation's id.
    pub op: String,
    /// What it is for; absent if the operation's name says so.
    #[serde(default)]
    pub purpose: Option<String>,
    /// Names and values, in the order of the command line.
    #[serde(default)]
    pub arguments: Vec<(String, String)>,
    /// Options.
    #[serde(default)]
    pub options: Vec<CallOption>,
}

/// An option of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallOption {
    /// On the command line, without dashes.
    pub flag: String,
    /// Its field in a request.
    pub field: String,
    /// The value of the field.
    pub value: Value,
}

impl Hint {
    /// Advice that is true for every front end.
    pub fn note(text: impl Into<String>) -> Self {
        let text = text.into();
        debug_assert!(!names_command_line(&text), "a hint for every front end names the command line: {text}");
        Self::Note { text }
    }

    /// What only a user of the host can do: a clause that begins with a verb in the imperative.
    pub fn host(text: impl Into<String>) -> Self {
        Self::Host { text: text.into() }
    }

    /// The disk that holds nido's home is full.
    #[must_use]
    pub fn home_full() -> Self {
        Self::host("free some space on the disk that holds nido's home, or use another home with --home")
    }

    /// For users of the command line only: an option of the command.
    pub fn command_line(text: impl Into<String>) -> Self {
        Self::CommandLine { text: text.into() }
    }

    /// Another operation.
    #[must_use]
    pub fn run(operation: &Operation) -> Self {
        Self::Run(Call { op: operation.id.into(), purpose: None, arguments: Vec::new(), options: Vec::new() })
    }

    /// Another operation on a VM.
    pub fn run_on(operation: &Operation, vm: &(impl Display + ?Sized)) -> Self {
        Self::run(operation).with("name", vm)
    }

    /// Says what the operation is for.
    #[must_use]
    pub fn to(mut self, purpose: &str) -> Self {
        if let Self::Run(call) = &mut self {
            call.purpose = Some(purpose.into());
        }
        self
    }

    /// Adds an argument of the operation, by its name in requests.
    #[must_use]
    pub fn with(mut self, name: &str, value: &(impl Display + ?Sized)) -> Self {
        if let Self::Run(call) = &mut self {
            call.arguments.push((name.into(), value.to_string()));
        }
        self
    }

    /// Adds an option of the operation: its flag on the command line without dashes, its field in requests, and the field's value.
    #[must_use]
    pub fn option(mut self, flag: &str, field: &str, value: impl Into<Value>) -> Self {
        if let Self::Run(call) = &mut self {
            call.options.push(CallOption { flag: flag.into(), field: field.into(), value: value.into() });
        }
        self
    }

    /// Adds `--force`.
    #[must_use]
    pub fn forced(self) -> Self {
        self.option("force", "force", true)
    }

    /// Adds the option with which a guest boots instead of being forked.
    #[must_use]
    pub fn cold(self) -> Self {
        self.option("cold", "path", "cold")
    }

    /// Whether a text names a command or an option of the command line: it is no note then.
    #[must_use]
    pub fn names_command_line(text: &str) -> bool {
        names_command_line(text)
    }

    /// In the words of a front end; `None` if its users cannot do it.
    #[must_use]
    pub fn text(&self, front_end: FrontEnd) -> Option<String> {
        match (self, front_end) {
            (Self::Note { text }, _)
            | (Self::Host { text } | Self::CommandLine { text }, FrontEnd::Cli | FrontEnd::Host) => Some(text.clone()),
            (Self::Run(call), _) => call.text(front_end),
            (Self::Host { text }, FrontEnd::Mcp) => Some(format!("ask the user to {text}")),
            (Self::Host { text }, FrontEnd::Api) => Some(format!("ask the operator of the host to {text}")),
            (Self::CommandLine { .. } | Self::Unknown, _) => None,
        }
    }
}

impl From<&str> for Hint {
    fn from(text: &str) -> Self {
        Self::note(text)
    }
}

impl From<String> for Hint {
    fn from(text: String) -> Self {
        Self::note(text)
    }
}

/// The alternatives in the words of a front end.
pub(super) fn text(hints: &[Hint], front_end: FrontEnd) -> Option<String> {
    let texts: Vec<_> = hints.iter().filter_map(|hint| hint.text(front_end)).collect();
    if texts.is_empty() { None } else { Some(texts.join(", or: ")) }
}

impl Call {
    fn text(&self, front_end: FrontEnd) -> Option<String> {
        let operation = operation::find(&self.op)?;
        let call = match front_end {
            FrontEnd::Cli | FrontEnd::Host => self.command(operation)?,
            FrontEnd::Api => self.request(operation)?,
            // A person decides what is destroyed, and is asked by the tool, not told by an error.
            FrontEnd::Mcp if operation.is_destructive() => return None,
            // Tools have fewer options than commands and requests.
            FrontEnd::Mcp if !self.options.is_empty() => return None,
            FrontEnd::Mcp => {
                let tool = operation.tool?;
                let arguments = self.object(|_| true);
                if arguments.is_empty() { tool.to_owned() } else { format!("{tool} {}", Value::Object(arguments)) }
            }
        };
        Some(match &self.purpose {
            Some(purpose) => format!("{purpose}: {call}"),
            None => call,
        })
    }

    fn command(&self, operation: &Operation) -> Option<String> {
        let words = operation.command?.to_owned();
        let values = self.arguments.iter().map(|(_, value)| value.clone());
        let flags = self.options.iter().map(|option| format!("--{}", option.flag));
        Some([format!("nido {words}")].into_iter().chain(values).chain(flags).collect::<Vec<_>>().join(" "))
    }

    fn request(&self, operation: &Operation) -> Option<String> {
        let route = operation.route?;
        let place = |name: &str| format!("{{{name}}}");
        let path =
            self.arguments.iter().fold(route.path.to_owned(), |path, (name, value)| path.replace(&place(name), value));
        let rest = self.object(|name| !route.path.contains(&place(name)));
        let in_query = matches!(route.method, Method::Get | Method::Delete);
        let method = route.method.word();
        Some(if rest.is_empty() {
            format!("{method} {path}")
        } else if in_query {
            let pairs = rest.iter().map(|(name, value)| format!("{name}={}", plain(value)));
            format!("{method} {path}?{}", pairs.collect::<Vec<_>>().join("&"))
        } else {
            format!("{method} {path} {}", Value::Object(rest))
        })
    }

    /// Arguments and options as fields of a JSON object.
    fn object(&self, wanted: impl Fn(&str) -> bool) -> Map<String, Value> {
        let arguments = self.arguments.iter().filter(|(name, _)| wanted(name));
        let arguments = arguments.map(|(name, value)| (name.clone(), json!(value)));
        arguments.chain(self.options.iter().map(|option| (option.field.clone(), option.value.clone()))).collect()
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Whether a text names a command or an option of the command line.
fn names_command_line(text: &str) -> bool {
    let names_option = text.split_whitespace().any(|word| {
        let word = word.trim_matches(|c: char| !(c.is_ascii_alphanumeric() || c == '-'));
        word.len() > 2 && word.starts_with("--")
    });
    let commands = || operation::ALL.iter().filter_map(|operation| operation.command);
    let names_command = text.split("nido ").skip(1).any(|rest| {
        let verb = rest.split(|c: char| !(c.is_ascii_lowercase() || c == '-')).next().unwrap_or_default();
        commands().any(|command| command.split(' ').next() == Some(verb))
    });
    names_option || names_command
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operation as op;

    fn all(hint: &Hint) -> [Option<String>; 3] {
        [FrontEnd::Cli, FrontEnd::Api, FrontEnd::Mcp].map(|front_end| hint.text(front_end))
    }

    fn texts(cli: &str, api: &str, mcp: Option<&str>) -> [Option<String>; 3] {
        [Some(cli.into()), Some(api.into()), mcp.map(str::to_owned)]
    }

    #[test]
    fn a_call_is_rendered_as_command_request_and_tool() {
        assert_eq!(
            all(&Hint::run_on(op::VM_START, "web")),
            texts("nido start web", "POST /v1/vms/web/start", Some(r#"vm_start {"name":"web"}"#))
        );
        assert_eq!(
            all(&Hint::run_on(op::VM_START, "web").cold().to("boot it")),
            texts("boot it: nido start web --cold", r#"boot it: POST /v1/vms/web/start {"path":"cold"}"#, None)
        );
        assert_eq!(
            all(&Hint::run(op::VM_LS).to("list VMs")),
            texts("list VMs: nido ls", "list VMs: GET /v1/vms", Some("list VMs: vm_ls"))
        );
    }

    // Over MCP errors taught the way around the question: `nido delete --force web`.
    #[test]
    fn no_error_proposes_to_a_model_to_destroy_something() {
        assert_eq!(
            all(&Hint::run_on(op::VM_DELETE, "web").forced()),
            texts("nido delete web --force", "DELETE /v1/vms/web?force=true", None)
        );
        for operation in op::ALL.iter().filter(|operation| operation.is_destructive()) {
            assert_eq!(Hint::run(operation).text(FrontEnd::Mcp), None, "{}", operation.id);
        }
    }

    #[test]
    fn hints_for_the_host_are_addressed_to_its_user_or_operator() {
        assert_eq!(
            all(&Hint::host("run nido approve apr_1")),
            texts(
                "run nido approve apr_1",
                "ask the operator of the host to run nido approve apr_1",
                Some("ask the user to run nido approve apr_1")
            )
        );
    }

    #[test]
    fn an_operation_that_a_front_end_lacks_is_left_out() {
        let hints = [Hint::note("choose another name"), Hint::run_on(op::VM_PAUSE, "web")];
        assert_eq!(text(&hints, FrontEnd::Mcp).as_deref(), Some("choose another name"));
        assert_eq!(text(&hints, FrontEnd::Cli).as_deref(), Some("choose another name, or: nido pause web"));
        assert_eq!(text(&hints[..0], FrontEnd::Cli), None);
    }

    #[test]
    fn commands_and_options_in_a_note_are_found() {
        for text in
            ["run nido stop web", "leave --disk out", "list them with nido forward ls web", "nido delete --force"]
        {
            assert!(names_command_line(text), "{text}");
        }
        for text in
            ["choose another name", "use the nido version that wrote it", "a - b", "free some space (ulimit -n)"]
        {
            assert!(!names_command_line(text), "{text}");
        }
    }

    #[test]
    fn hints_of_a_newer_nido_are_left_out() {
        let hint: Hint = serde_json::from_str(r#"{"kind":"song","text":"la"}"#).unwrap();
        assert_eq!(all(&hint), [None, None, None]);
    }
}
