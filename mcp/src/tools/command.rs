//! A command in a VM, for `vm_exec` and `vm_run`: parsed, checked against the policy, run to its end, returned.

use std::time::Duration;

use jiff::Timestamp;
use nido_api::egress::Denial;
use nido_api::error::{Error, Result};
use nido_api::name::{TemplateName, VmName};
use nido_api::sanitize::{self, SHOWN_LIMIT, for_reader};
use nido_api::{ExecBody, ExecEvent, ExecExit, ExecRequest, ExecResult, Truncated, VmRef};
use nido_core::policy::{self, decide, decide_dangerous, decide_shell};
use nido_core::{ExecControl, ExecEvents};
use rmcp::model::Resource;
use serde::Serialize;
use serde_json::Value;
use tokio::time::Instant;

use super::arguments;
use crate::answer::ToolResult;
use crate::call_context::CallContext;
use crate::output_store::OutputBuffer;
use crate::{resource_uri, schema};

/// How often a client is notified that a silent command still runs.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(2);

/// How many refusals of the network are reported with a command.
const DENIALS_SHOWN: usize = 5;

/// Descriptions of a command's arguments.
pub const DESCRIPTIONS: [(&str, &str); 8] = [
    ("env", ""),
    ("directory", ""),
    ("stdin", ""),
    ("stdin_base64", ""),
    ("argv", "No shell."),
    ("command", "For sh -c."),
    ("user", "Default root."),
    ("timeout_seconds", "0: never."),
];

/// The schema of a command's result: text always; `altered` names the streams that differ from what was written.
pub fn result_schema() -> Value {
    let mut schema = schema::result_or_job::<CommandResult>();
    if let Some(fields) = schema["properties"].as_object_mut() {
        fields.retain(|field, _| !field.ends_with("_base64"));
    }
    schema
}

/// How a command ended.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct CommandResult {
    #[serde(flatten)]
    result: ExecResult,
    /// In which streams something invisible was removed, or bytes that are not text were replaced.
    altered: AlteredStreams,
    /// Resources that hold the streams that were cut.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    full_output: Vec<String>,
    /// If it failed: what the network refused, limits hit.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    denied: Vec<String>,
}

/// Which streams are not shown as they were written.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct AlteredStreams {
    stdout: bool,
    stderr: bool,
}

/// A command with its standard input.
#[derive(Debug)]
pub struct Command {
    request: ExecRequest,
    stdin: Vec<u8>,
    /// It was given as a line for a shell.
    is_shell: bool,
}

impl Command {
    /// A command of these arguments.
    pub fn parse(given: Value) -> Result<Self> {
        let body = arguments::<ExecBody>(given)?;
        let is_shell = body.command.is_some();
        let (request, stdin) = body.split()?;
        Ok(Self { request, stdin, is_shell })
    }

    /// Whether the policy allows the command in a VM of this name and template.
    pub fn check(&self, call: &CallContext, name: &VmName, template: &TemplateName) -> Result<()> {
        let policy = &call.app.settings().policy;
        let dangerous = decide_dangerous(policy, &self.request.argv, &self.stdin);
        let listed = || match self.is_shell {
            true => decide_shell(policy, name, template),
            false => decide(policy, name, template, &policy::Command::from(&self.request)),
        };
        dangerous.into_result().and_then(|()| listed().into_result()).map_err(|denial| {
            call.refused_because(denial.reason);
            Error::from(denial)
        })
    }

    /// Runs it to its end. Dropped, it kills the command.
    pub async fn run(self, call: &CallContext, vm: VmRef<'_>) -> Result<CommandOutput> {
        let (wants_stdin, stdin, since) = (self.request.stdin, self.stdin, Timestamp::now());
        let (control, mut events): (ExecControl, ExecEvents) = call.nido().await?.exec(vm, self.request).await?;
        if wants_stdin {
            tokio::spawn(async move {
                control.stdin(&stdin).await?;
                control.stdin_eof().await
            });
        }
        let (began, mut bytes) = (Instant::now(), 0);
        let [mut stdout, mut stderr] = [OutputBuffer::default(), OutputBuffer::default()];
        let mut still = tokio::time::interval_at(began + PROGRESS_INTERVAL, PROGRESS_INTERVAL);
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                now = still.tick() => {
                    let seconds = now.duration_since(began).as_secs_f64();
                    call.progress.report(seconds, None, format!("running for {seconds:.0} s; {bytes} bytes of output"));
                    continue;
                }
            };
            let (stream, piece) = match event {
                Some(Ok(ExecEvent::Exited(exit))) => {
                    let failed = exit.exit_code != Some(0);
                    let (denied, limits) = if failed { refusals(call, vm, since).await } else { Default::default() };
                    return Ok(CommandOutput { exit, stdout: stdout.bytes(), stderr: stderr.bytes(), denied, limits });
                }
                Some(Ok(ExecEvent::Started(_))) => continue,
                Some(Ok(ExecEvent::Stdout(piece))) => (&mut stdout, piece),
                Some(Ok(ExecEvent::Stderr(piece))) => (&mut stderr, piece),
                Some(Err(error)) => return Err(error),
                None => return Err(Error::internal("the command ended without an exit code")),
            };
            bytes += piece.len();
            stream.add(&piece);
        }
    }
}

/// A command that has ended, and what it wrote.
#[derive(Debug)]
pub struct CommandOutput {
    exit: ExecExit,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    denied: Vec<String>,
    limits: Vec<String>,
}

/// What the VM's network refused and which limits the VM hit since a command began, in sentences: the likely reason why it failed.
async fn refusals(call: &CallContext, vm: VmRef<'_>, since: Timestamp) -> (Vec<String>, Vec<String>) {
    let Ok(nido) = call.nido().await else { return Default::default() };
    let Ok(info) = nido.info(vm).await else { return Default::default() };
    let hits = info.limits_hit.iter().filter(|hit| hit.at >= since);
    let limits = hits.map(|hit| sanitize::on_one_line(&hit.describe())).collect();
    let denials = info.network.into_iter().flat_map(|network| network.denials).filter(|denial| denial.last_at >= since);
    let sentence = |denial: Denial| {
        let rule = denial.rule.as_ref().map(|rule| format!("; the rule {rule} would allow it")).unwrap_or_default();
        sanitize::on_one_line(&format!("{} ({}{rule})", denial.what(), denial.reason.name()))
    };
    (denials.take(DENIALS_SHOWN).map(sentence).collect(), limits)
}

impl CommandOutput {
    /// The result of the call: both ends of each stream; the whole of a stream that is cut becomes a resource.
    pub fn result(self, call: &CallContext, vm: &VmName) -> Result<ToolResult> {
        let Self { exit, stdout, stderr, mut denied, limits } = self;
        let (out, err) = (for_reader(&stdout, SHOWN_LIMIT), for_reader(&stderr, SHOWN_LIMIT));
        let truncated = Truncated { stdout: out.truncated, stderr: err.truncated };
        let altered = AlteredStreams { stdout: out.altered, stderr: err.altered };
        let mut links = Vec::new();
        for (cut, word, bytes) in [(out.truncated, "output", stdout), (err.truncated, "errors", stderr)] {
            if cut {
                let title = format!("All {word} of a command in {vm}");
                links.push(resource_uri::output(&*call.app.outputs().keep(&call.who.actor, title, bytes)?));
            }
        }
        if !links.is_empty() {
            call.app.changes().output_kept();
        }
        let text = text(&out.text, &err.text, exit, &links, [&denied, &limits]);
        denied.extend(limits);
        let (stdout, stderr) = (Some(out.text), Some(err.text));
        let result = ExecResult { stdout, stdout_base64: None, stderr, stderr_base64: None, exit, truncated };
        let full_output = links.iter().map(|link| link.uri.clone()).collect();
        let done = ToolResult::new(&CommandResult { result, altered, full_output, denied })?.with_text(text);
        Ok(ToolResult { word: exit.word(), links, ..done })
    }
}

/// What a model reads: the output, then a status line. A guest can write such a line, too; the last one is nido's.
fn text(stdout: &str, stderr: &str, exit: ExecExit, links: &[Resource], [denied, limits]: [&[String]; 2]) -> String {
    let mut text = stdout.to_owned();
    let end_line = |text: &mut String| {
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
    };
    end_line(&mut text);
    if !stderr.is_empty() {
        text += "[stderr]\n";
        text += stderr;
        end_line(&mut text);
    }
    let how = match (exit.exit_code, exit.signal) {
        _ if exit.timed_out => "timed out, killed".to_owned(),
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    };
    text += &format!("[{how}, {} ms", exit.duration_ms);
    for link in links {
        text += &format!("; cut, whole: {}", link.uri);
    }
    if !denied.is_empty() {
        text += &format!("; the network refused: {}", denied.join(", "));
    }
    if !limits.is_empty() {
        text += &format!("; limits hit: {}", limits.join(", "));
    }
    text + "]"
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [&[String]; 2] = [&[], &[]];

    #[test]
    fn the_text_of_a_command_is_its_output_and_a_status_line() {
        let exit = |exit_code, signal, timed_out| ExecExit { exit_code, signal, timed_out, duration_ms: 12 };
        assert_eq!(
            text("out", "err\n", exit(Some(3), None, false), &[], NONE),
            "out\n[stderr]\nerr\n[exit code 3, 12 ms]"
        );
        assert_eq!(text("", "", exit(Some(0), None, false), &[], NONE), "[exit code 0, 12 ms]");
        assert_eq!(text("a\n", "", exit(None, Some(9), false), &[], NONE), "a\n[killed by signal 9, 12 ms]");
        assert_eq!(text("", "", exit(None, Some(9), true), &[], NONE), "[timed out, killed, 12 ms]");
        let denied = ["tcp to 1.1.1.1 port 443".to_owned()];
        let refused = text("", "", exit(Some(7), None, false), &[], [&denied, &[]]);
        assert_eq!(refused, "[exit code 7, 12 ms; the network refused: tcp to 1.1.1.1 port 443]");
        let limits = ["disk (limit 1 MiB): full".to_owned()];
        let limited = text("", "", exit(Some(7), None, false), &[], [&[], &limits]);
        assert_eq!(limited, "[exit code 7, 12 ms; limits hit: disk (limit 1 MiB): full]");
    }
}
