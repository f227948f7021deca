//! `run`: a VM for one command. The VM is always deleted afterwards, unless `--keep` is given.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use nido_api::error::{Code, Error, Hint};
use nido_api::name::VmName;
use nido_api::operation as op;
use nido_api::{ExecRequest, ExecResult, StartRequest, UploadRequest, UploadSource, VmInfo, VmRef, VmSpec};
use nido_core::{Nido, RUN_IDLE_MS};
use nido_server::sanitize;

use super::exec::ExecArgs;
use super::spawn::{absent, spawn};
use super::vm_args::{PathArgs, VmArgs};
use super::{Context, copy};
use crate::exit::{Exit, Failure, Outcome};
use crate::{audit, parse, session};

const EXAMPLES: &str = "\
Examples:
  nido run -- python3 -c 'print(6 * 7)'
  nido run --copy .:/work -w /work -- python3 -m unittest
  nido run -it -- bash
  nido run --net none --timeout 60s --copy job.py:/job.py -- python3 /job.py
  echo hello | nido run -i -- tr a-z A-Z

The exit code is the command's, as with exec. The VM is deleted when the command has ended, also
after Ctrl-C or a failure. If nido is killed, the VM stops and is deleted a minute later.";

/// Run a command in a new VM, then delete it
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    how: ExecArgs,
    /// Copy a file or directory into the VM before the command runs, for the command's user; may be repeated
    #[arg(long, value_name = "SRC:DST")]
    copy: Vec<OsString>,
    /// Keep the VM, and print its name on stderr; with --json print {vm, exec}
    #[arg(long)]
    keep: bool,
    /// Kill the command and its children after this time, for example 60s
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
    timeout: Option<u64>,
    /// Time limit for the guest to become ready [default: depends on the accelerator]
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
    start_timeout: Option<u64>,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    command: Vec<OsString>,
    #[command(flatten)]
    path: PathArgs,
    #[command(flatten)]
    vm: VmArgs,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let raw = self.how.raw();
        refuse_volume(self.command.first())?;
        let request = self.how.request(self.command, self.timeout, cx.output.json)?;
        let copy = |text| Ok(UploadRequest { user: request.user.clone(), ..upload(text)? });
        let copies = self.copy.iter().map(copy).collect::<Result<Vec<_>, Error>>()?;
        let name = nido_files::random::vm_name("run")?;
        let nido = cx.nido().await?;
        let mut spec = self.vm.spec(&nido, name.clone());
        if !self.keep {
            spec.ephemeral = true;
            spec.idle_ms = spec.idle_ms.or(Some(RUN_IDLE_MS));
        }
        let start = StartRequest { wait: true, timeout_ms: self.start_timeout, path: self.path.choice(), accel: None };
        let mut arguments = audit::exec(&name, &request);
        arguments["template"] = spec.template.as_str().into();
        let job = Job { spec, start, copies, request, raw, keep: self.keep };
        cx.audited_command(&nido, op::VM_RUN, arguments, job.run(cx, &nido)).await
    }
}

/// What is done between the attempt and its outcome.
struct Job {
    spec: VmSpec,
    start: StartRequest,
    copies: Vec<UploadRequest>,
    request: ExecRequest,
    raw: bool,
    keep: bool,
}

impl Job {
    async fn run(self, cx: &Context, nido: &Nido) -> Outcome {
        let name = self.spec.name.clone();
        let vm = Box::pin(spawn(cx, nido, self.spec, self.start)).await?;
        vm.warnings.iter().for_each(|warning| cx.output.warn(warning));
        let id = vm.id.clone();
        let outcome = async {
            copy_in(cx, nido, &name, self.copies).await?;
            if self.keep && cx.output.json {
                kept(cx, nido, vm, self.request).await
            } else {
                session::run(&cx.output, nido, &name, self.request, self.raw).await
            }
        };
        let outcome = outcome.await;
        if self.keep {
            // The only place where its name stands: not even --quiet may swallow it.
            cx.output.note_result(&format!("{name} was kept"));
            return outcome;
        }
        let outcome = outcome.map_err(without_vm);
        let gone = absent(nido.delete(VmRef { name: &name, id: Some(&id) }, true).await);
        if let (Ok(_), Err(error)) = (&outcome, gone) {
            // The command's exit code is worth more than ours.
            cx.output.error(&error);
        }
        outcome
    }
}

/// The command in a VM that stays: in JSON, both are the answer.
async fn kept(cx: &Context, nido: &Nido, vm: VmInfo, request: ExecRequest) -> Outcome {
    match session::collect(&cx.output, nido, &vm.name, request).await? {
        Ok(exec) => {
            let exit = Exit::of_command(&exec.exit);
            cx.output.answer(&KeptRun { vm, exec }, String::new)?;
            Ok(exit)
        }
        Err(exit) => Ok(exit),
    }
}

/// What `run --keep --json` prints; as the REST API's `/v1/runs`.
#[derive(serde::Serialize)]
struct KeptRun {
    vm: VmInfo,
    exec: ExecResult,
}

/// An error about a VM that is deleted by the time it is read: a hint to look at the VM would lead nowhere.
fn without_vm(failure: Failure) -> Failure {
    match failure {
        Failure::Nido(error) if error.code() == Code::AgentUnreachable => {
            let again = Error::new(error.code(), error.message()).log_tail(error.log_lines().to_vec());
            again
                .hint(Hint::command_line("the VM is deleted; keep it with --keep, then use nido info and nido logs"))
                .into()
        }
        other => other,
    }
}

/// Refuses an argument like a volume of `docker run -v`: here -v is --verbose, and the volume would be the command.
fn refuse_volume(program: Option<&OsString>) -> Result<(), Error> {
    let Some(text) = program.map(|program| program.as_bytes()) else { return Ok(()) };
    let Some(at) = text.windows(2).position(|pair| pair == b":/") else { return Ok(()) };
    let source = &text[..at];
    let is_path =
        source == b"." || source == b".." || [&b"./"[..], b"../", b"/", b"~"].iter().any(|p| source.starts_with(p));
    if !is_path {
        return Ok(());
    }
    let shown = sanitize::line(&String::from_utf8_lossy(text));
    Err(Error::new(Code::SpecInvalid, format!("'{shown}' has the form SRC:DST and is not a command"))
        .hint(Hint::command_line(format!("did you mean --copy {shown}? -v is --verbose"))))
}

async fn copy_in(cx: &Context, nido: &Nido, name: &VmName, copies: Vec<UploadRequest>) -> Result<(), Failure> {
    for request in copies {
        let done = copy::upload(cx, nido, name, request).await?;
        if let Some(first) = done.unreadable_entries.first() {
            // The command would work on less than it was given.
            let (path, reason) = (sanitize::line(&first.path), sanitize::line(&first.reason));
            let what = format!("{} entries could not be read, the first is {path}: {reason}", done.unreadable);
            return Err(Error::new(Code::PermissionDenied, what)
                .hint(Hint::command_line("exclude them from --copy, or make them readable"))
                .into());
        }
    }
    Ok(())
}

/// `SRC:DST`, split at the last colon.
fn upload(text: &OsString) -> Result<UploadRequest, Error> {
    let bytes = text.as_bytes();
    match bytes.iter().rposition(|b| *b == b':') {
        Some(at) if at > 0 && at + 1 < bytes.len() => Ok(UploadRequest {
            source: UploadSource::Path(OsString::from_vec(bytes[..at].to_vec()).into()),
            destination: bytes[at + 1..].to_vec(),
            user: None,
            parents: true,
            preserve: false,
            set_mode: false,
        }),
        _ => {
            let shown = sanitize::line(&text.to_string_lossy());
            Err(Error::new(Code::SpecInvalid, format!("'{shown}' is not SRC:DST"))
                .hint("write SRC:DST, for example .:/work"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_split_at_its_last_colon() {
        let request = upload(&"a:b:/c d".into()).unwrap();
        assert!(matches!(request.source, UploadSource::Path(path) if path.as_os_str() == "a:b"));
        assert_eq!(request.destination, b"/c d");
        for bad in ["", "a", ":/b", "a:"] {
            assert_eq!(upload(&bad.into()).unwrap_err().code(), Code::SpecInvalid, "{bad}");
        }
    }

    #[test]
    fn a_volume_is_not_taken_for_a_command() {
        for volume in [".:/x", "./a:/x", "/a b:/x", "~/x:/y", "..:/x:/y"] {
            let refused = refuse_volume(Some(&volume.into())).unwrap_err();
            assert!(refused.hint_for(nido_api::FrontEnd::Cli).unwrap().contains("--copy"), "{volume}");
        }
        for command in ["true", "./a", "/bin/a:b", "http://x", "a:/b", ":/x"] {
            refuse_volume(Some(&command.into())).unwrap();
        }
    }
}
