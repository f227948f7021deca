//! The question before something is destroyed.
//!
//! Invariant: it is asked where a person can answer, on a terminal, and nowhere else; `--yes` answers it beforehand.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};

use nido_api::error::{Code, Error, Hint};
use nido_server::sanitize::line;

use super::Context;

/// Do not ask for confirmation
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Confirmation {
    /// Do not ask for confirmation
    #[arg(long, short)]
    pub yes: bool,
}

impl Confirmation {
    /// Whether it may be done. `question` ends in a question mark.
    pub fn given(self, cx: &Context, question: &str) -> bool {
        self.yes || !has_terminal(cx) || confirmed_by_user(cx, question)
    }

    /// The same for what a program must not do by mistake: without a terminal it takes `--yes`.
    ///
    /// # Errors
    /// `approval_required` if there is neither.
    pub fn required(self, cx: &Context, verb: &str, what: &str) -> Result<bool, Error> {
        if self.yes {
            return Ok(true);
        }
        if !has_terminal(cx) {
            let words = format!("nido {verb} asks for confirmation, and there is no terminal to ask on");
            return Err(Error::new(Code::ApprovalRequired, words).hint(Hint::command_line("pass --yes to confirm")));
        }
        Ok(confirmed_by_user(cx, &format!("{verb} {what}?")))
    }
}

fn has_terminal(cx: &Context) -> bool {
    io::stdin().is_terminal() && cx.output.stderr_is_terminal
}

fn confirmed_by_user(cx: &Context, question: &str) -> bool {
    let yes = prompt(cx, question);
    if !yes {
        cx.output.note("nothing was changed");
    }
    yes
}

fn prompt(cx: &Context, question: &str) -> bool {
    let mut stderr = io::stderr().lock();
    let written = if cx.output.json {
        writeln!(stderr, "{}", serde_json::json!({ "question": question, "answers": ["y", "n"] }))
    } else {
        write!(stderr, "{} [y/N] ", line(question))
    };
    let mut answer = String::new();
    written.and_then(|()| stderr.flush()).is_ok()
        && io::stdin().lock().read_line(&mut answer).is_ok()
        && matches!(answer.trim(), "y" | "Y" | "yes" | "Yes")
}
