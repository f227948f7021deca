//! What a tool answers: a value, or a failure that says what to do next. Pure.

use nido_api::FrontEnd;
use nido_api::Job;
use nido_api::error::{Code, Error};
use nido_api::sanitize::{for_reader, is_harmful};
use rmcp::model::{CallToolResult, ContentBlock, Resource};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// A call that takes longer than a client waits: it continues as a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct JobReference {
    /// The job is running.
    #[schema(pattern = "^running$")]
    pub status: String,
    /// What to give to job_get and job_cancel.
    pub job_id: String,
    /// What to do next.
    pub next_step: String,
}

impl JobReference {
    /// For this job.
    pub fn new(job: &Job) -> Self {
        let next_step = "it is still running; call job_get with this job_id and wait_seconds until it has ended".into();
        Self { status: "running".into(), job_id: job.id.clone(), next_step }
    }
}

/// What a tool has done.
#[derive(Debug)]
pub struct ToolResult {
    /// The result, as its schema says.
    pub value: Value,
    /// The same for a reader, if that is not the value as JSON.
    pub text: Option<String>,
    /// A word about it for the audit log.
    pub word: String,
    /// Where there is more of it.
    pub links: Vec<Resource>,
}

impl ToolResult {
    /// An answer of which the audit log needs no more than that there was one.
    pub fn new(value: &impl Serialize) -> Result<Self, Error> {
        let mut value = serde_json::to_value(value).map_err(|e| Error::internal(e.to_string()))?;
        readable(&mut value);
        without_nulls(&mut value);
        Ok(Self { value, text: None, word: String::new(), links: Vec::new() })
    }

    /// The same, with a text for readers. It must not hold anything that a reader would not see.
    #[must_use]
    pub fn with_text(self, text: String) -> Self {
        Self { text: Some(text), ..self }
    }

    /// The same with notes for the caller.
    #[must_use]
    pub fn noted(mut self, notes: &[String]) -> Self {
        if let (Value::Object(fields), false) = (&mut self.value, notes.is_empty()) {
            fields.insert("notes".into(), json!(notes));
            if let Some(text) = &mut self.text {
                text.extend(notes.iter().map(|note| format!("\n[note: {note}]")));
            }
        }
        self
    }
}

/// A failure, as tools report it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ErrorResult {
    /// What went wrong.
    pub error: Failure,
}

/// What went wrong, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Failure {
    /// A stable word, for programs.
    pub code: String,
    /// One sentence.
    pub message: String,
    /// The state that the VM is in, where that is the reason.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(nullable = false)]
    pub state: Option<String>,
    /// What to do next.
    pub next_step: String,
    /// What else can be done about it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(nullable = false)]
    pub hint: Option<String>,
    /// The approval that makes it possible, once a person has given it: give it as approval_id.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(nullable = false)]
    pub approval_id: Option<String>,
    /// Last lines of the log that shows the reason. They may come from the guest.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub log_tail: Vec<String>,
    /// What was not as it should be, and did no harm.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub notes: Vec<String>,
}

impl ErrorResult {
    /// A failure of the core; `state` is that of the VM it was about.
    pub fn new(error: &Error, state: Option<String>) -> Self {
        let error = Failure {
            code: error.code().slug().into(),
            message: plain(error.message()),
            next_step: next_step(error.code()).into(),
            hint: error.hint_for(FrontEnd::Mcp).as_deref().map(plain),
            log_tail: error.log_lines().iter().map(|line| plain(line)).collect(),
            state,
            approval_id: None,
            notes: Vec::new(),
        };
        Self { error }
    }

    /// The same for a reader.
    fn text(&self) -> String {
        let Failure { code, message, state, next_step, hint, approval_id: _, log_tail, notes } = &self.error;
        let mut text = format!("{message} ({code})");
        if let Some(state) = state {
            text += &format!("\nState of the VM: {state}");
        }
        text += &format!("\nNext step: {next_step}");
        if let Some(hint) = hint {
            text += &format!("\nHint: {hint}");
        }
        if !log_tail.is_empty() {
            text += &format!("\nLast lines of the log:\n{}", log_tail.join("\n"));
        }
        for note in notes {
            text += &format!("\nNote: {note}");
        }
        text
    }
}

/// Removes the fields that have no value: a model pays for each.
fn without_nulls(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(without_nulls),
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(without_nulls);
        }
        _ => {}
    }
}

/// Takes out of every text what a reader would not see: some of it is a guest's.
pub fn readable(value: &mut Value) {
    match value {
        Value::String(text) if text.chars().any(is_harmful) => *text = for_reader(text.as_bytes(), usize::MAX).text,
        Value::Array(items) => items.iter_mut().for_each(readable),
        Value::Object(fields) => {
            fields.values_mut().for_each(readable);
            if fields.keys().any(|key| key.chars().any(is_harmful)) {
                let whole = std::mem::take(fields).into_iter();
                fields.extend(whole.map(|(key, value)| (for_reader(key.as_bytes(), usize::MAX).text, value)));
            }
        }
        _ => {}
    }
}

/// One line without what hides, reorders or controls.
pub fn plain(text: &str) -> String {
    text.chars().map(|c| if c == '\t' { ' ' } else { c }).filter(|c| !is_harmful(*c)).collect()
}

/// Several lines without what a reader would not see.
pub fn readable_text(text: &str) -> String {
    for_reader(text.as_bytes(), usize::MAX).text
}

/// The result of a call.
pub fn result(outcome: Result<ToolResult, ErrorResult>) -> CallToolResult {
    match outcome {
        Ok(done) => {
            let mut result = CallToolResult::structured(done.value);
            if let Some(text) = done.text {
                result.content = vec![ContentBlock::text(text)];
            }
            result.content.extend(done.links.into_iter().map(ContentBlock::resource_link));
            result
        }
        Err(failed) => {
            let mut result = CallToolResult::structured_error(json!(failed));
            result.content = vec![ContentBlock::text(failed.text())];
            result
        }
    }
}

/// Which tool helps, or who. No code is without: a model that is left alone with an error tries the same again.
const fn next_step(code: Code) -> &'static str {
    match code {
        Code::VmNotFound => "vm_ls lists the VMs there are; vm_spawn makes one",
        Code::VmExists => "choose another name, use the VM as it is, or vm_delete it first",
        Code::VmNotRunning => "vm_info shows its state; vm_start starts it, or resumes a paused one",
        Code::VmReplaced => "vm_info shows which VM has the name now; call again only if you want that one",
        Code::VmBusy => "vm_info shows its state; wait until that changes, or vm_stop it first",
        Code::NameInvalid | Code::SpecInvalid | Code::RequestInvalid => "correct that argument and call again",
        Code::TemplateNotFound => "template_list lists the templates there are",
        Code::TemplateExists => "choose another name for the template",
        Code::TemplateMismatch => {
            "leave path out (vm_spawn), or set disk_only (vm_restore); else report this to the user"
        }
        Code::TemplateBuildFailed => "the message gives the reason; check the VM with vm_exec, then call again",
        Code::SnapshotNotFound => "vm_info lists the snapshots; vm_snapshot takes one",
        Code::SnapshotDamaged => "restore another snapshot; report to the user that this one is damaged",
        Code::SnapshotExists => "choose another name for the snapshot",
        Code::CommandNotFound => "check the program's name; packages are installed with vm_exec",
        Code::CommandCannotRun => "check with vm_exec and ls -l whether the file is a program and may be executed",
        Code::PathExists => "choose another path, or ask to overwrite it",
        Code::PathInvalid => "check what is at that path (vm_exec with ls shows it in the VM), and choose another",
        Code::RequestInProgress | Code::CursorExpired => "wait a moment, list the current state, and call again",
        Code::GuestDenied => "the guest's own permissions forbid it: set user, or leave user out to act as root",
        Code::GuestBusy => "end what is in the way in the VM with vm_exec, then call again",
        Code::GuestInvalid => "correct the arguments and call again",
        Code::PathNotFound | Code::GuestNotFound | Code::DirectoryNotFound => {
            "check the path; vm_exec with ls lists what exists"
        }
        Code::UserNotFound => "leave user out to run as root",
        Code::AgentUnreachable | Code::Timeout => {
            "vm_info shows the state of the VM; try again, or vm_stop and vm_start it"
        }
        Code::AgentVersion => "vm_stop and vm_start it; if that does not help, vm_spawn a new one",
        Code::GuestFailed => "the log below gives the reason; vm_delete it and vm_spawn it again",
        Code::QemuFailed => "vm_info gives the reason; try again once, then report this to the user",
        Code::PortInUse => "choose another host port, or 0 for a free one",
        Code::ForwardNotFound => "vm_ports without publish and unpublish lists the published ports",
        Code::RuleNotFound => "vm_network without allow and deny lists the rules",
        Code::PortClosed => "start what shall listen there with vm_exec, then try again",
        Code::Interrupted => "it was cancelled: call again if it is still wanted; vm_info shows the state of the VM",
        Code::Denied => "this server does not allow it: report this to the user, do not try to get around it",
        Code::IsolationRequired => "this host has no KVM: leave require_isolation out, if the user agrees",
        Code::ConfinementRequired => {
            "this host cannot confine QEMU fully: leave require_confinement out, if the user agrees"
        }
        Code::QemuMissing | Code::QemuTooOld | Code::KvmUnavailable | Code::NestedUnavailable | Code::ToolMissing => {
            "the host lacks something: report this to the user, calling again does not help"
        }
        Code::ApprovalRequired => "explain to the user what you want to do and why, and follow the hint",
        Code::ApprovalNotFound | Code::ApprovalEnded => {
            "call again without approval_id, so that the user is asked again"
        }
        Code::JobNotFound => "jobs are visible only to the caller that started them; check the job_id",
        Code::RateLimited => "wait a second and call again",
        Code::LimitExceeded => {
            "ask for less at once, or remove what is not needed any more; the message names the limit"
        }
        Code::DiskFull => "the disk is full: vm_delete what is not needed, or report this to the user",
        Code::AuditFailed | Code::AuditBroken => {
            "nothing is done while it cannot be recorded: report this to the user, calling again does not help"
        }
        Code::PermissionDenied | Code::ReadOnly | Code::AddressInUse | Code::PathUnusable => {
            "the host does not allow it: choose another path or port, or report the message to the user"
        }
        Code::HostFailed => "the host reports a failure: try again once, then report the message to the user",
        Code::Internal => "it is a fault of nido or of the host: try again once, then report the message to the user",
        // What tools do not speak of.
        Code::TemplateInUse
        | Code::ArchiveInvalid
        | Code::Unauthorized
        | Code::SecretNotFound
        | Code::TokenNotFound
        | Code::TokenExists
        | Code::OperationNotFound
        | Code::AnswerTooLarge
        | Code::OutcomeUnknown
        | Code::RouteNotFound
        | Code::MethodNotAllowed
        | Code::RequestTimeout
        | Code::BodyTooLarge
        | Code::MediaTypeUnsupported
        | Code::WebhookInvalid
        | Code::WebhookNotFound
        | Code::StoreDamaged => "report the message to the user",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_of_an_answer_hides_anything() {
        let lines = json!({
            "failure": { "log_tail": ["\u{1b}[2Jpanic\u{202e}", "a\tb\n"] },
            "labels": { "\u{1b}[31mred\u{202e}": "\u{200b}x", "plain": "y" },
        });
        let done = ToolResult::new(&lines).unwrap();
        let shown = json!({ "failure": { "log_tail": ["panic", "a\tb\n"] }, "labels": { "red": "x", "plain": "y" } });
        assert_eq!(done.value, shown);
    }

    #[test]
    fn every_code_has_a_next_step_and_the_tools_in_it_are_there() {
        for code in Code::ALL {
            let step = next_step(*code);
            assert!(step.len() > 20, "{code:?}: {step}");
            let words = step.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            for word in words.filter(|word| ["vm_", "job_", "template_"].iter().any(|noun| word.starts_with(noun))) {
                if word == "job_id" {
                    continue;
                }
                assert!(crate::tools::find(word).is_some(), "{code:?}: {word} is no tool");
            }
        }
    }

    #[test]
    fn a_failure_says_what_to_do_as_text_and_as_data() {
        let error = Error::new(Code::VmNotRunning, "VM 'web' is stopped\u{1b}[2J")
            .hint(nido_api::error::Hint::run_on(nido_api::operation::VM_START, "web"));
        let result = result(Err(ErrorResult::new(&error, Some("stopped".into()))));
        assert_eq!(result.is_error, Some(true));
        let failure = &result.structured_content.unwrap()["error"];
        assert_eq!((&failure["code"], &failure["state"]), (&json!("vm_not_running"), &json!("stopped")));
        assert_eq!(failure["message"], "VM 'web' is stopped[2J");
        let text = serde_json::to_string(&result.content).unwrap();
        assert!(text.contains("vm_not_running") && text.contains("vm_start starts it"), "{text}");
    }
}
