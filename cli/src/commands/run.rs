//! `run`: a VM for one command. Whatever happens, it is gone afterwards, unless `--keep` says otherwise.

use std::ffi::OsString;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use nido_vmm::api::{ExecRequest, StartRequest, UploadRequest, UploadSource, VmSpec};
use nido_vmm::error::{Code, Error};
use nido_vmm::name::VmName;
use nido_vmm::nido::Nido;

use super::exec::ExecArgs;
use super::spawn::{absent, spawn};
use super::vm_args::{PathArgs, VmArgs};
use super::{Context, copy};
use crate::exit::{Failure, Outcome};
use crate::{audit, parse, sanitize, session};

const EXAMPLES: &str = "\
Examples:
  nido run -- python3 -c 'print(6 * 7)'
  nido run --copy .:/work -w /work -- make test
  nido run -it -- bash
  nido run --net none --timeout 60s --copy job.py:/job.py -- python3 /job.py
  echo hello | nido run -i -- tr a-z A-Z

The exit code is the command's own, as with exec. The VM is deleted when the command has ended, also
after Ctrl-C or a failure. Should nido itself be killed, the VM stops and vanishes by itself a minute later.";

/// How long the VM outlives a nido that was killed, in milliseconds.
const IDLE_MS: u64 = 60_000;

/// Run a command in a VM of its own, then delete the VM
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    how: ExecArgs,
    /// Copy a file or directory into the VM before the command runs; may be repeated
    #[arg(long, value_name = "SRC:DST")]
    copy: Vec<OsString>,
    /// Keep the VM, and tell its name
    #[arg(long)]
    keep: bool,
    /// Kill the command and its children after so long, for example 60s
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
    timeout: Option<u64>,
    /// How long the guest may take to become ready [default: depends on the accelerator]
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
        let request = self.how.request(self.command, self.timeout, cx.output.json)?;
        let copies = self.copy.iter().map(upload).collect::<Result<Vec<_>, _>>()?;
        let name = fresh_name()?;
        let mut spec = self.vm.spec(name.clone());
        if !self.keep {
            spec.ephemeral = true;
            spec.idle_ms = spec.idle_ms.or(Some(IDLE_MS));
        }
        let nido = cx.nido().await?;
        let start = StartRequest { wait: true, timeout_ms: self.start_timeout, path: self.path.choice() };
        let mut arguments = audit::exec(&name, &request);
        arguments["template"] = spec.template.as_str().into();
        let job = Job { spec, start, copies, request, raw, keep: self.keep };
        cx.audited_command(&nido, "vm_run", arguments, job.run(cx, &nido)).await
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
        let outcome = async {
            copy_in(cx, nido, &name, self.copies).await?;
            session::run(&cx.output, nido, &name, self.request, self.raw).await
        };
        let outcome = outcome.await;
        if self.keep {
            cx.output.talk(&format!("{name} was kept"));
            return outcome;
        }
        let gone = absent(nido.delete(&name, true).await);
        if let (Ok(_), Err(error)) = (&outcome, gone) {
            // The command's exit code is worth more than ours.
            cx.output.error(&error);
        }
        outcome
    }
}

async fn copy_in(cx: &Context, nido: &Nido, name: &VmName, copies: Vec<UploadRequest>) -> Result<(), Failure> {
    for request in copies {
        copy::upload(cx, nido, name, request).await?;
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
        }),
        _ => {
            let shown = sanitize::line(&text.to_string_lossy());
            Err(Error::new(Code::SpecInvalid, format!("'{shown}' does not say what to copy and where to"))
                .hint("write SRC:DST, for example .:/work"))
        }
    }
}

/// `run-` and six random letters. The standard library seeds its hash tables from the system's random numbers.
fn fresh_name() -> Result<VmName, Error> {
    let mut number = RandomState::new().build_hasher().finish();
    let mut name = String::from("run-");
    for _ in 0..6 {
        name.push(char::from(b'a' + u8::try_from(number % 26).unwrap_or(0)));
        number /= 26;
    }
    name.parse()
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
    fn names_are_fresh() {
        assert_ne!(fresh_name().unwrap(), fresh_name().unwrap());
    }
}
