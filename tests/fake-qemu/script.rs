//! What this QEMU is to do wrong.

use std::time::Duration;

/// The misbehaviour that is requested. Words that take a value are written `word:value`.
#[derive(Debug, Default)]
pub struct Script {
    /// `hang-probe`: when probed, it sends nothing and keeps running.
    pub hang_probe: bool,
    /// `not-qemu`: asked about itself, it talks nonsense and ends.
    pub not_qemu: bool,
    /// `old-version`: it reports version 6.2.
    pub old_version: bool,
    /// `lacks:sandbox`, `lacks:microvm`, `lacks:q35`, `lacks:pc`, `lacks:dgram`: it was built without that. `lacks:getfd`: the
    /// monitor does not know that command.
    pub lacks: Vec<String>,
    /// `die-at-start:MESSAGE`: it complains on its standard error and ends with code 1.
    pub die_at_start: Option<String>,
    /// `escape-stderr`: it writes terminal control sequences to its standard error.
    pub escape_stderr: bool,
    /// `escape-console`: the guest writes such to its console.
    pub escape_console: bool,
    /// `no-agent`: the guest runs and its agent never answers.
    pub no_agent: bool,
    /// `kvm-is-broken`: as with `no-agent`, but only under KVM.
    pub kvm_is_broken: bool,
    /// `never-listens`: there is no monitor.
    pub never_listens: bool,
    /// `no-greeting`: the monitor accepts connections and sends nothing.
    pub no_greeting: bool,
    /// `garbage-qmp`: the monitor greets and then talks nonsense.
    pub garbage_qmp: bool,
    /// `hang-qmp`: the monitor greets, negotiates, and answers nothing more.
    pub hang_qmp: bool,
    /// `unknown-event`: an event that no schema knows comes before every answer.
    pub unknown_event: bool,
    /// `die-after-ms:N`: it ends with code 1 so long after its start.
    pub die_after: Option<Duration>,
    /// `exit-signal:SIGNAL` or `exit-signal:SIGNAL@MS`: it is ended by that signal, at once or so long after its start.
    pub exit_signal: Option<(i32, Duration)>,
    /// `panic-after-ms:N`: the guest's kernel panics so long after the start.
    pub panic_after: Option<Duration>,
    /// `shutdown-after-ms:N`: the guest powers itself off so long after the start.
    pub shutdown_after: Option<Duration>,
    /// `crash-on-cont`: it aborts on `cont`.
    pub crash_on_cont: bool,
    /// `ignore-powerdown`: the guest does not care about the power button, nor its agent about being asked to power off.
    pub ignore_powerdown: bool,
    /// `overlook-powerdown`: the guest overlooks the power button when it is pressed for the first time.
    pub overlook_powerdown: bool,
    /// `disk-full-after-ms:N`: so long after the start the guest's write meets a full disk, and each one after a resume does, until
    /// there is a file `fake-space` in the VM's directory.
    pub disk_full_after: Option<Duration>,
    /// `io-error-after-ms:N`: the same with another error of the disk's.
    pub io_error_after: Option<Duration>,
    /// `ignore-quit`: neither the monitor's `quit` nor SIGTERM ends it.
    pub ignore_quit: bool,
    /// `migrates`: its state can be saved and loaded. A saved machine is what its agent was started with, its token above all.
    pub migrates: bool,
}

impl Script {
    /// Reads the words.
    ///
    /// # Errors
    /// The first word that means nothing.
    pub fn read(text: &str) -> Result<Self, String> {
        let mut script = Self::default();
        for word in text.split(';').map(str::trim).filter(|word| !word.is_empty()) {
            script.add(word).ok_or(word)?;
        }
        Ok(script)
    }

    fn add(&mut self, word: &str) -> Option<()> {
        let (name, value) = word.split_once(':').unwrap_or((word, ""));
        let ms = |text: &str| text.parse().ok().map(Duration::from_millis);
        match name {
            "hang-probe" => self.hang_probe = true,
            "not-qemu" => self.not_qemu = true,
            "old-version" => self.old_version = true,
            "lacks" => self.lacks.push(value.to_owned()),
            "die-at-start" => self.die_at_start = Some(value.to_owned()),
            "escape-stderr" => self.escape_stderr = true,
            "escape-console" => self.escape_console = true,
            "no-agent" => self.no_agent = true,
            "kvm-is-broken" => self.kvm_is_broken = true,
            "never-listens" => self.never_listens = true,
            "no-greeting" => self.no_greeting = true,
            "garbage-qmp" => self.garbage_qmp = true,
            "hang-qmp" => self.hang_qmp = true,
            "unknown-event" => self.unknown_event = true,
            "die-after-ms" => self.die_after = Some(ms(value)?),
            "exit-signal" => {
                let (signal, after) = value.split_once('@').unwrap_or((value, "0"));
                self.exit_signal = Some((signal.parse().ok()?, ms(after)?));
            }
            "panic-after-ms" => self.panic_after = Some(ms(value)?),
            "shutdown-after-ms" => self.shutdown_after = Some(ms(value)?),
            "crash-on-cont" => self.crash_on_cont = true,
            "ignore-powerdown" => self.ignore_powerdown = true,
            "overlook-powerdown" => self.overlook_powerdown = true,
            "disk-full-after-ms" => self.disk_full_after = Some(ms(value)?),
            "io-error-after-ms" => self.io_error_after = Some(ms(value)?),
            "ignore-quit" => self.ignore_quit = true,
            "migrates" => self.migrates = true,
            _ => return None,
        }
        Some(())
    }

    /// Whether the monitor does not know a command.
    pub fn is_missing(&self, command: &str) -> bool {
        self.lacks.iter().any(|lack| lack == command)
    }

    /// The version it pretends to be.
    pub fn version(&self) -> &'static str {
        if self.old_version { "6.2.0" } else { "7.2.0" }
    }

    /// The same as the monitor reports it.
    pub fn version_object(&self) -> serde_json::Value {
        let numbers: Vec<u32> = self.version().split('.').filter_map(|n| n.parse().ok()).collect();
        serde_json::json!({
            "qemu": { "major": numbers[0], "minor": numbers[1], "micro": numbers[2] },
            "package": "fake",
        })
    }
}
