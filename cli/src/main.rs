//! The command line of nido: parse, call one method of the core, render. Nothing else.
//!
//! Invariant: every way out of a verb passes through here and becomes one of the codes of [`exit`].

// Comments of arguments are help texts, where square brackets mark what may be left out.
#![allow(rustdoc::broken_intra_doc_links)]

mod audit;
mod commands;
mod context;
mod exit;
mod output;
mod parse;
mod progress;
mod session;
mod staging;
mod stdio;
mod terminal;
mod usage;

use std::process::ExitCode;
use std::time::Duration;

use nido_api::error::Error;
use nido_engine::host::daemon;

use crate::commands::Cli;
use crate::context::Context;
use crate::exit::{Codes, Exit, Failure, Outcome};
use crate::output::Output;

fn main() -> ExitCode {
    match usage::parse() {
        Ok(cli) => run(cli).into(),
        Err(exit) => exit.into(),
    }
}

fn run(cli: Cli) -> Exit {
    daemon::keep_descriptors();
    let begun = if cli.verb.stays() { daemon::begin() } else { Ok(()) };
    let context = Context::new(&cli.global, cli.verb.frees_space());
    let codes = cli.verb.codes();
    if let Err(error) = begun {
        let error = Error::io("cannot close inherited file descriptors", error);
        return report_outcome(&context.output, codes, Err(error.into()));
    }
    if let Err(error) = daemon::check_open_files() {
        let hint = format!("allow at least {} open files: ulimit -n 1024", daemon::OPEN_FILES_MIN);
        return report_outcome(&context.output, codes, Err(Error::io("cannot start", error).hint(hint).into()));
    }
    commands::start_log(&cli);
    let mut runtime = if cli.verb.serves() {
        daemon::raise_open_files();
        tokio::runtime::Builder::new_multi_thread()
    } else {
        tokio::runtime::Builder::new_current_thread()
    };
    let runtime = match runtime.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let error = Error::io("cannot start the runtime", error);
            return report_outcome(&context.output, codes, Err(error.into()));
        }
    };
    let outcome = runtime.block_on(cli.verb.run(&context));
    // Only interrupted work may have something to undo; a thread that still reads stdin must not hold nido up.
    runtime.shutdown_timeout(match outcome {
        Err(Failure::Interrupted { undo, .. }) => undo,
        _ => Duration::ZERO,
    });
    report_outcome(&context.output, codes, outcome)
}

/// Reports the error and selects the exit code.
fn report_outcome(output: &Output, codes: Codes, outcome: Outcome) -> Exit {
    match outcome {
        Ok(exit) => exit,
        Err(Failure::Nido(error)) => {
            output.error(&error);
            Exit::of_error(&error, codes)
        }
        Err(Failure::Stdout(error)) => {
            if error.kind() != std::io::ErrorKind::BrokenPipe {
                let exit = Exit::of_stdout(&error, codes);
                let is_full = error.kind() == std::io::ErrorKind::StorageFull;
                let told = Error::io("cannot write to standard output", error);
                // The core's hint is about nido's own disk.
                output.error(&if is_full { told.hint("free some space where the output is written to") } else { told });
                return exit;
            }
            Exit::of_stdout(&error, codes)
        }
        Err(Failure::Interrupted { signal, .. }) => Exit::Signal(signal),
    }
}
