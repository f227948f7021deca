//! `audit receipt`, `audit verify-receipt`, `audit key`: what the audit log holds about one VM, for others to verify.

use std::path::PathBuf;

use nido_api::error::Error;
use nido_api::{AuditReceipt, ReceiptVerdict};
use nido_core::audit::checkpoint;
use nido_core::audit::receipt::{render, verify};
use serde_json::json;

use crate::context::Context;
use crate::exit::{Codes, Exit, Outcome};

/// What stands for standard output.
const STDOUT: &str = "-";

#[derive(Debug, clap::Args)]
pub struct ReceiptArgs {
    /// Name or id of the VM, which may be deleted
    vm: String,
    /// File to write, which must not exist; - is standard output
    #[arg(long, short, value_name = "FILE", default_value = STDOUT, value_hint = clap::ValueHint::FilePath)]
    output: PathBuf,
}

#[derive(Debug, clap::Args)]
pub struct VerifyArgs {
    /// The receipt
    #[arg(value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    file: PathBuf,
    /// Public key that must have signed it, as audit key prints it
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// Also verify that it contains the line of this checkpoint
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    against: Option<PathBuf>,
}

impl ReceiptArgs {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        let receipt = nido.audit_receipt(&self.vm, |text| cx.output.note(text))?;
        let text = render(&receipt)?;
        if self.output.as_os_str() == STDOUT {
            cx.output.data(&text)?;
        } else {
            checkpoint::write_text(&text, &self.output)?;
            let shown = nido_server::sanitize::line(&self.output.to_string_lossy());
            cx.output.answer(&summary(&receipt, &shown), || format!("{shown}\n"))?;
        }
        cx.output.note(&format!("signed with the key {}", receipt.public_key));
        Ok(Exit::Success)
    }
}

/// What is printed about a receipt that went to a file.
fn summary(receipt: &AuditReceipt, file: &str) -> serde_json::Value {
    let AuditReceipt { vm, public_key, time, .. } = receipt;
    json!({ "file": file, "vm_id": vm.id, "vm_name": vm.name, "time": time, "public_key": public_key })
}

impl VerifyArgs {
    pub fn run(self, cx: &Context) -> Outcome {
        let verified = || -> Result<ReceiptVerdict, Error> {
            let against = self.against.as_deref().map(checkpoint::read).transpose()?;
            verify::verify(&verify::read(&self.file)?, self.key.as_deref(), against.as_ref())
        };
        match verified() {
            Ok(verdict) => {
                cx.output.answer(&verdict, || proven(&verdict))?;
                Ok(Exit::Success)
            }
            Err(error) => {
                cx.output.error(&error);
                Ok(Exit::of_error(&error, Codes::Own))
            }
        }
    }
}

/// A verdict in sentences.
fn proven(verdict: &ReceiptVerdict) -> String {
    let ReceiptVerdict { vm, time, public_key, lines, hidden, checkpoint, not_proven, secrets, .. } = verdict;
    let mut text = format!(
        "the receipt of VM {} ({}) of {time:.0} is valid\nsigned with the key {public_key}\n\
         verified {lines} records of the VM, and the hashes of {hidden} others in between\n",
        vm.name, vm.id
    );
    for used in secrets {
        text.push_str(&format!("{} requests got the secret {}\n", used.requests, used.secret));
    }
    if let Some(seq) = checkpoint {
        text.push_str(&format!("line {seq} is the one that the checkpoint signs\n"));
    }
    not_proven.iter().for_each(|sentence| text.push_str(&format!("not proven: {sentence}\n")));
    text
}

/// Prints the public key.
pub async fn key(cx: &Context) -> Outcome {
    let key = cx.nido().await?.audit_key()?;
    cx.output.answer(&json!({ "public_key": key }), || format!("{key}\n"))?;
    Ok(Exit::Success)
}
