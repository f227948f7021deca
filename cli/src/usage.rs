//! From the arguments to a [`Cli`], or to a report of what is wrong with them.
//!
//! Invariant: a value that the core refuses (a name, a port) is reported with the core's own code, sentence and hint,
//! wherever it was noticed; and with `--json` a usage error is JSON too.

use std::error::Error as _;
use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{ColorChoice, CommandFactory as _, FromArgMatches as _};
use nido_api::error::{Code, Error, Hint};

use crate::commands::Cli;
use crate::exit::{Codes, Exit};
use crate::output::Output;

/// Parses the arguments of this process.
pub fn parse() -> Result<Cli, Exit> {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let matches = command(&arguments).try_get_matches_from(&arguments);
    matches.and_then(|matches| Cli::from_arg_matches(&matches)).map_err(|error| report(&error, &arguments))
}

/// The command line of nido. Making it takes time, so it is made where it is needed.
fn command(arguments: &[OsString]) -> clap::Command {
    let command = Cli::command();
    if has(arguments, "--no-color") { command.color(ColorChoice::Never) } else { command }
}

fn report(error: &clap::Error, arguments: &[OsString]) -> Exit {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return match error.print() {
            Ok(()) => Exit::Success,
            Err(error) => Exit::of_stdout(&error, Codes::Own),
        };
    }
    let output = Output::new(has(arguments, "--json"), false, has(arguments, "--no-color"));
    match error.source().and_then(|source| source.downcast_ref::<Error>()) {
        Some(error) => output.error(error),
        None if output.json => output.error(&in_json(error)),
        None => {
            let _ = error.print();
        }
    }
    if runs_a_command(command(arguments), arguments) { Exit::NidoFailed } else { Exit::Usage }
}

/// Whether a flag stands among nido's own arguments.
fn has(arguments: &[OsString], flag: &str) -> bool {
    arguments.iter().take_while(|argument| *argument != "--").any(|argument| argument == flag)
}

/// clap's report as an error: its first paragraph, the rest as hint.
fn in_json(error: &clap::Error) -> Error {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let (first, rest) = text.split_once("\n\n").unwrap_or((text, ""));
    let one_line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let error = Error::new(Code::SpecInvalid, one_line(first));
    if rest.is_empty() { error } else { error.hint(Hint::command_line(one_line(rest))) }
}

/// Whether the verb is one whose small exit codes belong to the guest's command.
fn runs_a_command(command: clap::Command, arguments: &[OsString]) -> bool {
    let matches = command.ignore_errors(true).try_get_matches_from(arguments);
    let verb = matches.ok().and_then(|matches| matches.subcommand_name().map(str::to_owned));
    matches!(verb.as_deref(), Some("exec" | "run" | "shell"))
}
