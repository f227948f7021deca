//! `logs`: what the guest, QEMU or the supervisor has written.

use clap::ValueEnum;
use nido_api::name::VmName;
use nido_api::{LogRequest, LogSource};
use nido_server::sanitize::Sanitizer;

use super::Context;
use crate::exit::{Exit, Failure, Outcome};
use crate::output::json;
use crate::stdio::{self, Stream};

const EXAMPLES: &str = "\
Examples:
  nido logs web
  nido logs web -f --tail 20
  nido logs web --source qemu
  nido logs web --raw > console.log

Control characters are escaped; --raw writes the bytes unescaped. With --json each line is an
object {\"line\": …}.";

/// Longest line that JSON gives in one piece, in bytes.
const LINE_LIMIT: usize = 64 * 1024;

/// Show the logs of a VM
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Name of the VM
    name: VmName,
    /// Keep following the log until the VM is stopped
    #[arg(long, short)]
    follow: bool,
    /// Log to show [default: console]
    #[arg(long, value_name = "LOG")]
    source: Option<Source>,
    /// Number of lines to show, the last ones
    #[arg(long, short = 'n', value_name = "LINES")]
    tail: Option<usize>,
    /// Write the bytes unescaped
    #[arg(long, conflicts_with = "json")]
    raw: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Source {
    /// Guest's serial console
    Console,
    /// QEMU's output
    Qemu,
    /// Supervisor's log
    Supervisor,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let source = match self.source {
            None => LogSource::default(),
            Some(Source::Console) => LogSource::Console,
            Some(Source::Qemu) => LogSource::Qemu,
            Some(Source::Supervisor) => LogSource::Supervisor,
        };
        let nido = cx.nido().await?;
        let request = LogRequest { source, tail_lines: self.tail, follow: self.follow };
        let mut log = nido.logs(&self.name, request)?;
        let mut shape = match (self.raw, cx.output.json) {
            (true, _) => Shape::Raw,
            (_, true) => Shape::Json(Vec::new()),
            _ => Shape::Text(Sanitizer::default()),
        };
        while let Some(piece) = log.next().await {
            let piece = piece.inspect_err(|_| {
                let _ = shape.finish();
            })?;
            shape.show(&piece)?;
        }
        shape.finish()?;
        Ok(Exit::Success)
    }
}

/// How the bytes are shown.
enum Shape {
    Raw,
    Text(Sanitizer),
    /// The begun line.
    Json(Vec<u8>),
}

impl Shape {
    fn show(&mut self, piece: &[u8]) -> Result<(), Failure> {
        let shown = match self {
            Self::Raw => return Ok(stdio::write(Stream::Out, piece)?),
            Self::Text(sanitizer) => sanitizer.push(piece),
            Self::Json(begun) => {
                begun.extend_from_slice(piece);
                let mut out = String::new();
                while let Some(end) = begun.iter().take(LINE_LIMIT).position(|b| *b == b'\n') {
                    out.push_str(&object(&begun[..end]));
                    begun.drain(..=end);
                }
                while begun.len() > LINE_LIMIT {
                    out.push_str(&object(&begun[..LINE_LIMIT]));
                    begun.drain(..LINE_LIMIT);
                }
                out.into_bytes()
            }
        };
        Ok(stdio::write(Stream::Out, &shown)?)
    }

    fn finish(&mut self) -> Result<(), Failure> {
        let rest = match self {
            Self::Raw => return Ok(()),
            Self::Text(sanitizer) => sanitizer.finish(),
            Self::Json(begun) if begun.is_empty() => return Ok(()),
            Self::Json(begun) => object(&std::mem::take(begun)).into_bytes(),
        };
        Ok(stdio::write(Stream::Out, &rest)?)
    }
}

fn object(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    json(&serde_json::json!({ "line": text.trim_end_matches('\r') }), false) + "\n"
}
