//! A machine that runs: its monitor, its console, its guest. One loop takes what happens, in order.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, ExitCode, ExitStatus};
use std::sync::mpsc::{self, Sender};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal, raise};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::migration::{self, Migration};
use crate::script::Script;
use crate::{Options, guest, keys, monitor};

/// What can happen.
pub enum Happening {
    /// A client has connected to the monitor.
    Connected(UnixStream),
    /// It has sent a file, for the message that comes next.
    File(File),
    /// It has sent a message.
    Line(String),
    /// It has gone.
    Disconnected,
    /// The agent has ended.
    AgentEnded(ExitStatus),
    /// SIGTERM.
    Terminated,
    /// A saved machine has arrived.
    Loaded(std::io::Result<Vec<u8>>),
    /// The save that is in progress comes to its end.
    SaveEnds,
    /// A time of the script has come.
    Alarm(Alarm),
}

#[derive(Clone, Copy)]
pub enum Alarm {
    Die,
    Signal(i32),
    Panic,
    Shutdown,
    IoError { no_space: bool },
}

/// Runs the machine to its end.
pub fn run(options: &Options, script: Script) -> ExitCode {
    if script.escape_stderr {
        eprintln!("\x1b]0;owned\x07\x1b[2J\x1b[31mred\x1b[0m");
    }
    let complaint = script.die_at_start.clone().or_else(|| missing_file(options));
    if let Some(complaint) = complaint {
        eprintln!("qemu-system-x86_64: {complaint}");
        return ExitCode::FAILURE;
    }
    match Machine::start(options, script) {
        Ok((mut machine, happenings)) => loop {
            // The sender of the signals' thread lives for ever, so this ends only by `ended`.
            let Ok(happening) = happenings.recv() else { return ExitCode::FAILURE };
            if let Some(code) = machine.take(happening) {
                guest::end_all();
                let _ = fs::remove_file(&machine.monitor_path);
                return code;
            }
        },
        Err(error) => {
            eprintln!("qemu-system-x86_64: {error}");
            guest::end_all();
            ExitCode::FAILURE
        }
    }
}

/// QEMU's complaint about the first file it cannot open.
fn missing_file(options: &Options) -> Option<String> {
    let disks = options.all("-blockdev").iter().flat_map(|value| keys(value));
    let disks = disks.filter_map(|key| key.strip_prefix("filename=").map(str::to_owned));
    let whole = ["-kernel", "-initrd"].iter().filter_map(|name| options.first(name).map(str::to_owned));
    let configs = options.all("-fw_cfg").iter().flat_map(|value| keys(value));
    let configs = configs.filter_map(|key| key.strip_prefix("file=").map(str::to_owned));
    disks.chain(whole).chain(configs).find_map(|file| {
        let error = File::open(&file).err()?;
        Some(format!("Could not open '{file}': {error}"))
    })
}

struct Machine {
    script: Script,
    monitor_path: String,
    client: Option<UnixStream>,
    negotiated: bool,
    running: bool,
    /// The disk's error that stopped it: whether it is full.
    io_error: Option<bool>,
    console: Option<File>,
    agent: Option<Pid>,
    /// Where the agent is started with what, while it is not yet.
    guest: Option<guest::Start>,
    migration: Migration,
    sender: Sender<Happening>,
}

impl Machine {
    fn start(options: &Options, script: Script) -> std::io::Result<(Self, mpsc::Receiver<Happening>)> {
        let (sender, happenings) = mpsc::channel();
        await_sigterm(sender.clone());
        let incoming = options.first("-incoming").is_some();
        migration::make_memory(options)?;
        let needed = |what: &str| std::io::Error::other(format!("the command line names no {what}"));
        let monitor_path = options.part("-chardev", "id=monitor", "path").ok_or_else(|| needed("monitor"))?;
        let channel = options.part("-chardev", "id=agent", "path");
        let config = options.part("-fw_cfg", "name=opt/nido/config", "file").ok_or_else(|| needed("configuration"))?;
        let console = options.part("-chardev", "id=console", "path").ok_or_else(|| needed("console"))?;
        if !script.never_listens {
            let _ = fs::remove_file(&monitor_path);
            monitor::listen(UnixListener::bind(&monitor_path)?, sender.clone());
        }
        let mut machine = Self {
            monitor_path,
            client: None,
            negotiated: false,
            running: !incoming,
            io_error: None,
            console: Some(OpenOptions::new().append(true).create(true).open(console)?),
            agent: None,
            guest: channel.map(|channel| guest::Start { channel, config: config.clone(), saved: None }),
            migration: Migration::new(incoming, config),
            sender,
            script,
        };
        machine.print("[    0.000000] Linux version 6.12 (fake)\n");
        if machine.script.escape_console {
            machine.print("\x1b]0;owned\x07\x1b[2J\x1b[31mred\x1b[0m\n");
        }
        let under_kvm = options.first("-accel").is_some_and(|accel| accel.starts_with("kvm"));
        let silent = machine.script.no_agent || machine.script.kvm_is_broken && under_kvm;
        if silent {
            machine.guest = None;
        }
        if !incoming {
            machine.start_guest()?;
        }
        machine.set_alarms(&machine.sender);
        Ok((machine, happenings))
    }

    /// Starts the agent, unless it runs.
    fn start_guest(&mut self) -> std::io::Result<()> {
        if let Some(start) = self.guest.take() {
            let agent = guest::start_agent(&start)?;
            self.agent = i32::try_from(agent.id()).ok().map(Pid::from_raw);
            await_end(agent, self.sender.clone());
        }
        Ok(())
    }

    fn set_alarms(&self, sender: &Sender<Happening>) {
        let script = &self.script;
        let alarms = [
            script.die_after.map(|after| (Alarm::Die, after)),
            script.exit_signal.map(|(signal, after)| (Alarm::Signal(signal), after)),
            script.panic_after.map(|after| (Alarm::Panic, after)),
            script.shutdown_after.map(|after| (Alarm::Shutdown, after)),
            script.disk_full_after.map(|after| (Alarm::IoError { no_space: true }, after)),
            script.io_error_after.map(|after| (Alarm::IoError { no_space: false }, after)),
        ];
        for (alarm, after) in alarms.into_iter().flatten() {
            ring_after(after, alarm, sender.clone());
        }
    }

    /// Takes what happened; `Some` is the end.
    fn take(&mut self, happening: Happening) -> Option<ExitCode> {
        match happening {
            Happening::Connected(stream) => {
                self.client = Some(stream);
                self.negotiated = false;
                if !self.script.no_greeting {
                    self.send_message(
                        &json!({ "QMP": { "version": self.script.version_object(), "capabilities": [] } }),
                    );
                }
                None
            }
            Happening::Disconnected => {
                self.client = None;
                self.migration.client_gone();
                None
            }
            Happening::File(file) => {
                self.migration.file_arrived(file);
                None
            }
            Happening::Line(line) => self.command(&line),
            Happening::Loaded(loaded) => {
                let saved = self.migration.loaded(loaded);
                if let Some(guest) = &mut self.guest {
                    guest.saved = saved;
                }
                None
            }
            Happening::SaveEnds => {
                if self.migration.save_ends() {
                    self.set_running(false);
                }
                None
            }
            Happening::AgentEnded(status) => {
                self.agent = None;
                // Asked to power off, the agent ends well; so does the guest.
                if status.success() && !self.script.ignore_powerdown { self.shut_down("guest-shutdown") } else { None }
            }
            Happening::Terminated if self.script.ignore_quit => None,
            Happening::Terminated => self.shut_down("host-signal"),
            Happening::Alarm(alarm) => self.alarm(alarm),
        }
    }

    fn alarm(&mut self, alarm: Alarm) -> Option<ExitCode> {
        match alarm {
            Alarm::Die => {
                eprintln!("qemu-system-x86_64: fake trouble");
                Some(ExitCode::FAILURE)
            }
            Alarm::Signal(signal) => die_of(signal),
            Alarm::Shutdown => self.shut_down("guest-shutdown"),
            Alarm::IoError { no_space } => {
                self.fail_io(no_space);
                None
            }
            Alarm::Panic => {
                self.print("[    1.000000] Kernel panic - not syncing: Fatal exception (fake)\n");
                self.event("GUEST_PANICKED", &json!({ "action": "poweroff" }));
                self.shut_down("guest-panic")
            }
        }
    }

    fn command(&mut self, line: &str) -> Option<ExitCode> {
        let Ok(command) = serde_json::from_str::<Value>(line) else {
            self.send_message(&json!({ "error": { "class": "GenericError", "desc": "JSON parse error" } }));
            return None;
        };
        if self.script.hang_qmp && self.negotiated {
            return None;
        }
        if self.script.garbage_qmp {
            self.write("\x1b[2J this is no JSON\r\n");
            return None;
        }
        if self.script.unknown_event {
            self.event("QUANTUM_LEAP", &json!({ "far": true }));
        }
        let (name, id) = (command["execute"].as_str().unwrap_or_default().to_owned(), command["id"].clone());
        let (value, end) = match name.as_str() {
            "qmp_capabilities" => {
                self.negotiated = true;
                (json!({}), None)
            }
            "query-version" => (self.script.version_object(), None),
            "query-status" => {
                let status = match (self.running, self.io_error) {
                    (true, _) => "running",
                    (false, Some(_)) => "io-error",
                    (false, None) => self.migration.status_of_paused(),
                };
                (json!({ "running": self.running, "singlestep": false, "status": status }), None)
            }
            "stop" => (self.set_running(false), None),
            "cont" if self.script.crash_on_cont => return die_of(Signal::SIGABRT as i32),
            "cont" => {
                let failed = self.io_error.take();
                self.migration.resumed(&self.sender);
                if let Err(error) = self.start_guest() {
                    eprintln!("fake-qemu: {error}");
                }
                let done = self.set_running(true);
                // The write that failed is repeated first.
                if let Some(no_space) = failed.filter(|_| !std::path::Path::new("fake-space").exists()) {
                    self.fail_io(no_space);
                }
                (done, None)
            }
            name if self.script.migrates && migration::COMMANDS.contains(&name) && !self.script.is_missing(name) => {
                (self.migration.command(name, &command["arguments"], &self.sender), None)
            }
            "system_powerdown" => {
                self.event("POWERDOWN", &json!({}));
                let overlooked = std::mem::take(&mut self.script.overlook_powerdown) || self.script.ignore_powerdown;
                (json!({}), (!overlooked).then_some("guest-shutdown"))
            }
            "system_reset" => (json!({}), Some("host-qmp-system-reset")),
            "quit" => (json!({}), (!self.script.ignore_quit).then_some("host-qmp-quit")),
            _ => {
                let desc = format!("The command {name} has not been found");
                self.send_message(&json!({ "error": { "class": "CommandNotFound", "desc": desc }, "id": id }));
                return None;
            }
        };
        self.send_message(&json!({ "return": value, "id": id }));
        end.and_then(|reason| self.shut_down(reason))
    }

    fn fail_io(&mut self, no_space: bool) {
        self.io_error = Some(no_space);
        let reason = if no_space { "No space left on device" } else { "Input/output error" };
        let data = json!({
            "device": "", "node-name": "disk", "operation": "write", "action": "stop", "nospace": no_space, "reason": reason,
        });
        self.event("BLOCK_IO_ERROR", &data);
        self.set_running(false);
    }

    fn set_running(&mut self, running: bool) -> Value {
        if running != self.running {
            self.running = running;
            let (event, signal) = if running { ("RESUME", Signal::SIGCONT) } else { ("STOP", Signal::SIGSTOP) };
            if let Some(agent) = self.agent {
                guest::signal(agent, signal);
            }
            self.event(event, &json!({}));
        }
        json!({})
    }

    fn shut_down(&mut self, reason: &str) -> Option<ExitCode> {
        self.event("SHUTDOWN", &json!({ "guest": reason.starts_with("guest"), "reason": reason }));
        Some(ExitCode::SUCCESS)
    }

    fn event(&mut self, name: &str, data: &Value) {
        self.send_message(&json!({ "event": name, "data": data, "timestamp": { "seconds": 1, "microseconds": 0 } }));
    }

    fn send_message(&mut self, value: &Value) {
        self.write(&format!("{value}\r\n"));
    }

    fn write(&mut self, text: &str) {
        if let Some(client) = &mut self.client {
            let _ = client.write_all(text.as_bytes());
        }
    }

    fn print(&mut self, text: &str) {
        if let Some(console) = &mut self.console {
            let _ = console.write_all(text.as_bytes());
        }
    }
}

fn die_of(signal: i32) -> Option<ExitCode> {
    if let Ok(signal) = Signal::try_from(signal) {
        let _ = raise(signal);
    }
    Some(ExitCode::FAILURE)
}

fn await_end(mut agent: Child, sender: Sender<Happening>) {
    std::thread::spawn(move || {
        if let Ok(status) = agent.wait() {
            let _ = sender.send(Happening::AgentEnded(status));
        }
    });
}

/// SIGTERM becomes a happening. To be called before there are other threads.
fn await_sigterm(sender: Sender<Happening>) {
    // Blocked by the process that started it: as with QEMU, it never comes.
    if SigSet::thread_get_mask().is_ok_and(|blocked| blocked.contains(Signal::SIGTERM)) {
        return;
    }
    let mut terminate = SigSet::empty();
    terminate.add(Signal::SIGTERM);
    let _ = terminate.thread_block();
    std::thread::spawn(move || {
        while terminate.wait().is_ok() {
            let _ = sender.send(Happening::Terminated);
        }
    });
}

fn ring_after(after: Duration, alarm: Alarm, sender: Sender<Happening>) {
    std::thread::spawn(move || {
        std::thread::sleep(after);
        let _ = sender.send(Happening::Alarm(alarm));
    });
}
