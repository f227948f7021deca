//! nido as a child process: with a deadline, in a cleaned environment, its output kept.

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::Value;

use super::{DEADLINE, Home, until};

/// A nido that is about to be run.
pub struct Nido<'a> {
    home: &'a Home,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    input: Vec<u8>,
    directory: Option<std::path::PathBuf>,
    /// What a shell does before it becomes nido.
    before: Option<String>,
    plainly: bool,
}

impl<'a> Nido<'a> {
    pub(super) fn new(home: &'a Home, arguments: Vec<OsString>) -> Self {
        Self {
            home,
            arguments,
            environment: Vec::new(),
            input: Vec::new(),
            directory: None,
            before: None,
            plainly: false,
        }
    }

    /// One more argument.
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// One more variable of the environment.
    pub fn env(mut self, key: &str, value: impl Into<OsString>) -> Self {
        self.environment.push((key.into(), value.into()));
        self
    }

    /// What stands on its standard input.
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    /// Where it runs.
    pub fn in_directory(mut self, directory: impl Into<std::path::PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// A shell does this first, as `umask 077`.
    pub fn through(mut self, before: &str) -> Self {
        self.before = Some(before.into());
        self
    }

    /// Permission bits count, for root, too: it drops the capabilities that override them.
    pub fn plainly(mut self) -> Self {
        self.plainly = rustix::process::geteuid().is_root();
        self
    }

    /// The command, standard streams not yet set.
    pub(super) fn command(&self) -> Command {
        let nido = env!("CARGO_BIN_EXE_nido");
        let mut command = match (&self.before, self.plainly) {
            (None, false) => Command::new(nido),
            (None, true) => {
                let mut command = Command::new("setpriv");
                command.arg("--bounding-set=-dac_override,-dac_read_search").arg(nido);
                command
            }
            (Some(before), _) => {
                let mut command = Command::new("sh");
                command.args(["-c", &format!("{before}; exec \"$0\" \"$@\""), nido]);
                command
            }
        };
        command
            .args(&self.arguments)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", self.home.scratch(""))
            .env("NIDO_HOME", self.home.path())
            .env("NIDO_QEMU", self.home.qemu_path())
            .envs(self.environment.iter().cloned());
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        command
    }

    /// Runs it to its end.
    pub fn run(mut self) -> FinishedRun {
        let input = std::mem::take(&mut self.input);
        let mut live = self.start();
        let mut stdin = live.stdin.take().unwrap();
        // Written by a thread: nido may end, or wait, without reading it.
        std::thread::spawn(move || stdin.write_all(&input));
        live.wait()
    }

    /// Starts it; its standard input is open and empty.
    pub fn start(self) -> RunningNido {
        let mut command = self.command();
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (line_sender, lines) = mpsc::channel();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let stdout = std::thread::spawn(move || {
            let mut all = Vec::new();
            loop {
                let begin = all.len();
                match stdout.read_until(b'\n', &mut all) {
                    Ok(1..) => drop(line_sender.send(String::from_utf8_lossy(&all[begin..]).trim_end().to_owned())),
                    _ => return all,
                }
            }
        });
        let stderr = collect(child.stderr.take().unwrap());
        let what = format!("{:?}", self.arguments);
        RunningNido { stdin: child.stdin.take(), child, stdout, stderr, lines, what }
    }
}

fn collect(mut stream: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        all
    })
}

/// A nido that runs.
pub struct RunningNido {
    /// Its standard input; drop it to end that.
    pub stdin: Option<ChildStdin>,
    child: Child,
    stdout: JoinHandle<Vec<u8>>,
    stderr: JoinHandle<Vec<u8>>,
    lines: Receiver<String>,
    what: String,
}

impl RunningNido {
    /// Waits for the next line on its standard output.
    pub fn line(&self) -> String {
        self.lines.recv_timeout(DEADLINE).unwrap_or_else(|_| panic!("nido {} says nothing", self.what))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(pid(&self.child), signal).unwrap();
    }

    /// Polls until there is a result; it must not end meanwhile.
    pub fn until<T>(&mut self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        until(what, || {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "nido {} ended before {what}: {ended:?}", self.what);
            look()
        })
    }

    /// Kills it, whatever it is doing; it may have ended by itself.
    pub fn kill(&self) {
        let _ = kill_process(pid(&self.child), Signal::KILL);
    }

    /// Waits for its end, whatever that is: whether it was killed.
    pub fn end(self) -> bool {
        self.wait().status.code().is_none()
    }

    /// Its process id.
    #[allow(dead_code)] // not in every suite
    pub fn pid(&self) -> Pid {
        pid(&self.child)
    }

    /// Waits for its end, which may be a kill: whether it exited with 0.
    #[allow(dead_code)] // not in every suite
    pub fn succeeds(self) -> bool {
        self.wait().status.success()
    }

    /// Waits for its end.
    pub fn wait(mut self) -> FinishedRun {
        let status = wait(&mut self.child, &self.what);
        FinishedRun {
            status,
            stdout: self.stdout.join().unwrap(),
            stderr: String::from_utf8_lossy(&self.stderr.join().unwrap()).into_owned(),
            what: self.what,
        }
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// Waits for the end of a child; kills it and fails if that does not come.
fn wait(child: &mut Child, what: &str) -> ExitStatus {
    let pidfd = pidfd_open(pid(child), PidfdFlags::empty()).unwrap();
    let deadline = Instant::now() + DEADLINE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap(), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(1) => return child.wait().unwrap(),
            other => {
                let _ = child.kill();
                panic!("nido {what} does not end: {other:?}");
            }
        }
    }
}

/// A nido that has ended.
#[derive(Debug)]
pub struct FinishedRun {
    status: ExitStatus,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: String,
    what: String,
}

impl FinishedRun {
    /// Its exit code; a signal that killed nido itself fails the test.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| panic!("nido {} was killed: {:?}", self.what, self.status))
    }

    /// Expects an exit code.
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code(), code, "nido {}\nstdout: {}\nstderr: {}", self.what, self.lossy(), self.stderr);
        self
    }

    /// Expects that all went well.
    pub fn ok(self) -> Self {
        self.exits(0)
    }

    /// Its standard output as text.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    fn lossy(&self) -> String {
        String::from_utf8_lossy(&self.stdout[..self.stdout.len().min(2000)]).into_owned()
    }

    /// Its standard output as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.stdout).unwrap_or_else(|e| panic!("nido {}: {e}: {}", self.what, self.lossy()))
    }

    /// The error it reported as JSON on its standard error.
    pub fn problem(&self) -> Value {
        let line = self.stderr.lines().last().unwrap_or_default();
        serde_json::from_str(line).unwrap_or_else(|e| panic!("nido {}: {e}: {}", self.what, self.stderr))
    }

    /// Expects a failure with this error code and exit code, in JSON with a sentence.
    pub fn fails(self, exit: i32, code: &str) -> Value {
        let ran = self.exits(exit);
        let problem = ran.problem();
        assert_eq!(problem["code"], code, "{problem}");
        let detail = problem["detail"].as_str().unwrap();
        assert!(!detail.is_empty() && !detail.contains('\n'), "{problem}");
        problem
    }
}
