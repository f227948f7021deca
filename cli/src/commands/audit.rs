//! `audit`: shows the audit log, verifies its hash chains, and signs checkpoints and receipts.

mod receipt;

use std::path::PathBuf;

use clap::Subcommand;
use jiff::Timestamp;
use nido_api::error::Error;
use nido_api::name::VmName;
use nido_api::{AuditFilter, AuditLog, AuditRecord, AuditVerdict};
use nido_core::audit::checkpoint;

use super::Context;
use crate::exit::{Codes, Exit, Outcome};
use crate::output::{json, table};
use crate::parse;

const EXAMPLES: &str = "\
Examples:
  nido audit show --tail 20
  nido audit show --since 2h --tool vm_exec --vm web
  nido audit show --result denied --json | jq '.records[].params'
  nido audit verify
  nido audit checkpoint -o checkpoint.json     store it where no user of this host can change it
  nido audit verify --against checkpoint.json
  nido audit receipt web -o receipt.json       also of a VM that is deleted
  nido audit verify-receipt receipt.json --key KEY     without the home

verify detects lines that were altered, removed, inserted or moved, and a log of writes that was
emptied or truncated. Only a checkpoint that is stored elsewhere detects that both the log and the
store were replaced.";

/// Show and verify the audit log
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show lines, the oldest first
    Show(ShowArgs),
    /// Verify the hash chains of both logs; exit 1 if one is broken
    Verify {
        /// Also verify that the log still contains the lines of this checkpoint
        #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
        against: Option<PathBuf>,
    },
    /// Sign the last line's number and chain
    Checkpoint {
        /// File to write, which must not exist [default: standard output]
        #[arg(long, short, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
        output: Option<PathBuf>,
    },
    /// Write a signed receipt of one VM
    Receipt(receipt::ReceiptArgs),
    /// Verify a receipt, also elsewhere; exit 1 if invalid
    VerifyReceipt(receipt::VerifyArgs),
    /// Print the public key of checkpoints and receipts
    Key,
}

#[derive(Debug, clap::Args)]
struct ShowArgs {
    /// Lines of this log: acts (writes and refused requests), reads or events [default: acts and reads]
    #[arg(long, value_name = "LOG", value_parser = log)]
    log: Option<AuditLog>,
    /// Lines since a time (2026-01-04T15:00:00Z) or of a period (2h)
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<Timestamp>,
    /// Lines of this operation, for example vm_exec
    #[arg(long, value_name = "TOOL")]
    tool: Option<String>,
    /// Lines of this caller, for example uid:1000
    #[arg(long, value_name = "ACTOR")]
    actor: Option<String>,
    /// Lines with this result: pending, success, error, denied or unknown
    #[arg(long, value_name = "RESULT")]
    result: Option<String>,
    /// Lines about this VM
    #[arg(long, value_name = "NAME")]
    vm: Option<VmName>,
    /// At most this many, the last ones
    #[arg(long, value_name = "N")]
    tail: Option<usize>,
}

fn log(word: &str) -> Result<AuditLog, String> {
    match word {
        "acts" => Ok(AuditLog::Acts),
        "reads" => Ok(AuditLog::Reads),
        "events" => Ok(AuditLog::Events),
        _ => Err("use acts, reads or events".into()),
    }
}

const HEAD: [&str; 8] = ["SEQ", "TIME", "FACE", "ACTOR", "TOOL", "RESULT", "REASON", "PARAMS"];

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        match self.verb {
            Verb::Show(args) => show(cx, args).await,
            Verb::Verify { against } => verify(cx, against).await,
            Verb::Checkpoint { output } => checkpoint(cx, output).await,
            Verb::Receipt(args) => args.run(cx).await,
            Verb::VerifyReceipt(args) => args.run(cx),
            Verb::Key => receipt::key(cx).await,
        }
    }
}

async fn show(cx: &Context, args: ShowArgs) -> Outcome {
    let ShowArgs { log, since, tool, actor, result, vm, tail } = args;
    let list = cx.nido().await?.audit_show(&AuditFilter {
        log,
        since,
        tool,
        actor,
        result,
        vm,
        tail,
        ..AuditFilter::default()
    })?;
    cx.output.answer(&list, || {
        if cx.output.quiet {
            return list.records.iter().map(|record| format!("{}\n", record.seq)).collect();
        }
        table(HEAD, list.records.iter().map(row))
    })?;
    if list.damaged > 0 {
        cx.output.warn(&format!("{} lines were not written by nido; see nido audit verify", list.damaged));
    }
    Ok(Exit::Success)
}

fn row(record: &AuditRecord) -> [String; 8] {
    let claims = record.agent.as_ref().map(|agent| format!(" (agent {agent}, not verified)")).unwrap_or_default();
    [
        record.seq.to_string(),
        format!("{:.0}", record.time),
        record.face.word().into(),
        format!("{}{claims}", record.actor),
        record.tool.clone(),
        record.result.clone(),
        record.reason.clone().unwrap_or_else(|| "-".into()),
        json(&record.params, false),
    ]
}

async fn verify(cx: &Context, against: Option<PathBuf>) -> Outcome {
    let against = against.as_deref().map(checkpoint::read).transpose()?;
    let verdict = cx.nido().await?.audit_verify(against.as_ref())?;
    if let Some(checkpoint) = &verdict.against {
        let own = if checkpoint.own_key { "the key of this log" } else { "NOT the key that this log has now" };
        cx.output.warn(&format!(
            "the signature was checked with the key in the checkpoint, {}, which is {own}: compare it with the one you wrote down",
            checkpoint.public_key
        ));
    }
    cx.output.answer(&verdict, || if verdict.ok { summary(&verdict) } else { String::new() })?;
    match verdict.error() {
        None => Ok(Exit::Success),
        Some(error) => {
            cx.output.error(&error);
            Ok(Exit::of_error(&error, Codes::Own))
        }
    }
}

/// A verdict without trouble, in sentences.
fn summary(verdict: &AuditVerdict) -> String {
    let reads = verdict.reads.iter().filter(|reads| reads.lines > 0);
    let reads: String =
        reads.map(|reads| format!("verified {} records of reads in {} files\n", reads.lines, reads.files)).collect();
    let events = verdict.events.iter().filter(|events| events.lines > 0);
    let events: String =
        events.map(|events| format!("verified {} events in {} files\n", events.lines, events.files)).collect();
    let (Some(first), Some(last)) = (verdict.first_seq, verdict.last_seq) else {
        return format!("the log is empty\n{reads}{events}");
    };
    let mut text =
        format!("verified {} records in {} files (seq {first}-{last})\n{reads}{events}", verdict.lines, verdict.files);
    if first > 1 {
        text.push_str(&format!("lines before number {first} are no longer kept\n"));
    }
    if verdict.half_line {
        text.push_str("the last line is incomplete because its writer was killed; the next writer removes it\n");
    }
    if let Some(checkpoint) = &verdict.against {
        text.push_str(&format!("line {} is the one that was signed at {:.0}\n", checkpoint.seq, checkpoint.time));
    }
    text
}

async fn checkpoint(cx: &Context, output: Option<PathBuf>) -> Outcome {
    let made = cx.nido().await?.audit_checkpoint()?;
    if let Some(path) = &output {
        checkpoint::write(&made, path)?;
    } else {
        cx.output.data(&(json(&made, !cx.output.json || cx.output.stdout_is_terminal) + "\n"))?;
    }
    cx.output.note(&format!("signed up to line {} with the key {}", made.seq, made.public_key));
    if let Some(path) = &output {
        cx.output.answer(&made, || format!("{}\n", nido_server::sanitize::line(&path.to_string_lossy())))?;
    }
    Ok(Exit::Success)
}

fn since(text: &str) -> Result<Timestamp, Error> {
    parse::moment(text, Timestamp::now())
}
