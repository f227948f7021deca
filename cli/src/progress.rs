//! Progress on stderr: drawn on a terminal, printed line by line elsewhere, absent with `--quiet` and `--json`.
//!
//! Invariant: when a [`Progress`] is dropped, its drawing is gone from the screen.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use nido_api::{BuildStep, CopyProgress, StartStage, TransferStep};
use nido_server::sanitize::line;

use crate::output::Output;

/// How often the drawing moves.
const TICK: Duration = Duration::from_millis(100);
const SPINNER: &str = "{spinner} {msg} {elapsed}";
const COPY: &str = "{spinner} {msg} {binary_bytes} ({binary_bytes_per_sec})";
const COPY_PROGRESS_TEMPLATE: &str =
    "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} ({binary_bytes_per_sec}, {eta} left)";

/// Work that is under way.
#[derive(Debug)]
pub struct Progress<'a> {
    output: &'a Output,
    /// What is being worked on.
    subject: String,
    bar: Option<ProgressBar>,
    /// What was printed last, so that nothing is printed twice.
    last: Option<String>,
    /// The drawing counts bytes.
    counting: bool,
}

impl<'a> Progress<'a> {
    /// Begins to watch work on `subject`.
    pub fn new(output: &'a Output, subject: &str) -> Self {
        let bar = (output.shows_progress() && output.stderr_is_terminal).then(|| {
            let bar = ProgressBar::new_spinner().with_style(style(SPINNER)).with_message(line(subject));
            bar.enable_steady_tick(TICK);
            bar
        });
        Self { output, subject: line(subject), bar, last: None, counting: false }
    }

    /// A start has come so far.
    pub fn start(&mut self, stage: StartStage) {
        self.stage(match stage {
            StartStage::Preparing => "preparing disk and configuration",
            StartStage::Launching => "starting QEMU",
            StartStage::Booting => "booting",
            StartStage::Ready => "ready",
        });
    }

    /// A build has come so far. Without a terminal, only a new stage is printed.
    pub fn build(&mut self, step: &BuildStep) {
        let stage = format!("[{}/{}] {}", step.index, step.total, step.stage);
        match &self.bar {
            Some(bar) => {
                let percent = step.fraction.map(|f| format!(" {:.0}%", f * 100.0)).unwrap_or_default();
                bar.set_message(line(&format!("{}: {stage}{percent} {}", self.subject, step.detail)));
            }
            None => self.stage(&stage),
        }
    }

    /// A copy has come so far. Without a terminal, nothing is printed.
    pub fn copy(&mut self, progress: CopyProgress) {
        let Some(bar) = &self.bar else { return };
        if !self.counting {
            self.counting = true;
            bar.set_style(style(if progress.total_bytes.is_some() { COPY_PROGRESS_TEMPLATE } else { COPY }));
        }
        if let Some(total) = progress.total_bytes {
            bar.set_length(total);
        }
        bar.set_position(progress.bytes);
    }

    /// An export or import has come so far. Without a terminal, only a new stage is printed.
    pub fn travel(&mut self, step: &TransferStep) {
        let stage = format!("[{}/{}] {}", step.index, step.total, step.stage);
        self.stage(&stage);
        self.copy(CopyProgress { bytes: step.bytes, entries: 0, total_bytes: Some(step.total_bytes) });
    }

    fn stage(&mut self, stage: &str) {
        if self.last.as_deref() == Some(stage) {
            return;
        }
        let text = format!("{}: {stage}", self.subject);
        match &self.bar {
            Some(bar) => bar.set_message(line(&text)),
            None => self.output.note(&text),
        }
        self.last = Some(stage.to_owned());
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_parse() {
        for template in [SPINNER, COPY, COPY_PROGRESS_TEMPLATE] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }
}
