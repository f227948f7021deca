//! `man`: the manual pages, one per verb.

use std::path::PathBuf;

use clap::CommandFactory as _;
use nido_api::error::Error;

use super::{Cli, Context};
use crate::exit::{Exit, Outcome};

const EXAMPLES: &str = "\
Examples:
  nido man ~/.local/share/man/man1";

/// Write manual pages into a directory
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The directory; created if missing
    #[arg(value_hint = clap::ValueHint::DirPath)]
    directory: PathBuf,
}

impl Args {
    pub fn run(self, cx: &Context) -> Outcome {
        std::fs::create_dir_all(&self.directory)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), &self.directory))
            .map_err(|error| Error::io(format!("cannot write to {}", self.directory.display()), error))?;
        cx.output.note(&format!("manual pages are in {}", self.directory.display()));
        Ok(Exit::Success)
    }
}
