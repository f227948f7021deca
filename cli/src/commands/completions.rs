//! `completions`: a shell's completion script.

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::{Cli, Context};
use crate::exit::{Exit, Outcome};

const EXAMPLES: &str = "\
Examples:
  nido completions bash > ~/.local/share/bash-completion/completions/nido
  nido completions zsh > ~/.zfunc/_nido
  nido completions fish > ~/.config/fish/completions/nido.fish";

/// Print a completion script for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The shell
    shell: Shell,
}

impl Args {
    pub fn run(self, cx: &Context) -> Outcome {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "nido", &mut script);
        cx.output.data(&String::from_utf8_lossy(&script))?;
        Ok(Exit::Success)
    }
}
