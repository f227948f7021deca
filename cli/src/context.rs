//! What every verb is given: the output, how the core is opened, and the global flags that they are made of.

use std::path::PathBuf;

use clap::ArgAction;
use nido_api::error::Error;
use nido_api::{Caller, Grant, TokenInfo, VmInfo};
use nido_core::{Nido, OpenOptions};
use nido_server::ServerAddress;

use crate::exit::{Exit, Failure, Outcome};
use crate::output::Output;

/// Flags that every command takes, before or after it.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Directory of VMs and templates [env: NIDO_HOME; default: /var/lib/nido for root, else $XDG_DATA_HOME/nido]
    #[arg(long, global = true, value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    home: Option<PathBuf>,
    /// QEMU to use [env: NIDO_QEMU; default: qemu-system-x86_64 in PATH]
    #[arg(long, global = true, value_name = "FILE", value_hint = clap::ValueHint::ExecutablePath)]
    qemu: Option<PathBuf>,
    /// Print results as JSON on stdout, errors as JSON on stderr
    #[arg(long, global = true)]
    json: bool,
    /// Print no progress and no summary; lists print names only
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Log to stderr; twice for more
    #[arg(long, short, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// No colours [env: NO_COLOR]
    #[arg(long, global = true)]
    no_color: bool,
}

/// What every verb is given.
#[derive(Debug)]
pub struct Context {
    /// How to speak.
    pub output: Output,
    /// How nido is opened.
    pub options: OpenOptions,
}

impl Context {
    /// From the global flags, for a verb that gives space back or not.
    pub fn new(global: &Global, frees_space: bool) -> Self {
        let options =
            OpenOptions { home: global.home.clone(), qemu: global.qemu.clone(), supervisor: None, frees_space };
        Self { output: Output::new(global.json, global.quiet, global.no_color), options }
    }

    /// On whose behalf VMs are made: the user's, without limits.
    pub fn grant() -> Grant {
        Grant::unlimited(&Caller::command_line())
    }

    /// Opens the core.
    pub async fn nido(&self) -> Result<Nido, Error> {
        let nido = Nido::open(self.options.clone()).await?;
        if let Some(notice) = nido.notice() {
            self.output.warn(&notice);
        }
        Ok(nido)
    }

    /// The first line of a server: where it listens. On standard error what its clients need besides.
    pub fn listening(&self, listening: &ServerAddress, nido: &Nido) {
        // Standard error may be closed; serve anyway.
        let _ = self.output.answer(listening, || format!("{}\n", listening.address));
        if let Some(own) = &listening.tls {
            let made = if own.made { "created now" } else { "kept" };
            self.output.note(&format!(
                "certificate: {}, self-signed, {made}\nSHA-256 fingerprint: {}\nfor curl pass --cacert FILE, or --pinnedpubkey {} --insecure",
                own.certificate.display(),
                own.sha256,
                own.public_key_pin
            ));
        }
        let is_good = |token: &TokenInfo| token.expires_at.is_none_or(|end| end > jiff::Timestamp::now());
        let has_token = nido.token_list().is_ok_and(|list| list.tokens.iter().any(is_good));
        if listening.takes_tokens && !has_token {
            self.output.note(
                "no token is valid, so no client can use this server yet: nido token create --name NAME --scope run",
            );
        }
    }

    /// The answer of a verb that takes several names: one thing as it is, several under `key`. Standard output gets one JSON
    /// value in either case.
    pub fn answer_each<T: serde::Serialize>(
        &self,
        key: &str,
        all: &[T],
        human: impl Fn(&T) -> String,
    ) -> Result<(), Failure> {
        match all {
            [one] => self.output.answer(one, || human(one)),
            all => self.output.answer(&serde_json::json!({ key: all }), || all.iter().map(human).collect()),
        }
    }

    /// The answer of a verb that acted on one VM: its name, or all about it in JSON.
    pub fn acted(&self, vm: &VmInfo) -> Outcome {
        self.output.answer(vm, || format!("{}\n", vm.name))?;
        Ok(Exit::Success)
    }
}
