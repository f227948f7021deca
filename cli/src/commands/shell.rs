//! `shell`: the user's login shell on a terminal.

use nido_api::ExecRequest;
use nido_api::error::{Code, Error, Hint};
use nido_api::name::VmName;
use nido_api::operation as op;

use super::Context;
use super::exec::PlaceArgs;
use crate::exit::Outcome;
use crate::{audit, session, terminal};

const EXAMPLES: &str = "\
Examples:
  nido shell web
  nido shell web -u user -w /srv

The guest writes to your terminal directly, as with ssh: open a shell only in guests that you
trust that far.";

/// Open a shell in a VM
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Name of the VM
    name: VmName,
    #[command(flatten)]
    place: PlaceArgs,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        if cx.output.json {
            let error = Error::new(Code::SpecInvalid, "shell does not support --json");
            return Err(error.hint(Hint::command_line("use 'nido exec NAME --json -- CMD'")).into());
        }
        terminal::require(true, "a shell", "use nido exec for commands in scripts")?;
        let request = ExecRequest { stdin: true, ..self.place.request(true)? };
        let nido = cx.nido().await?;
        let arguments = audit::exec(&self.name, &request);
        let shell = session::run(&cx.output, &nido, &self.name, request, true);
        cx.audited_command(&nido, op::VM_SHELL, arguments, shell).await
    }
}
