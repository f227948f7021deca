//! One call of `nido`: its arguments, its streams, its end; never longer than the deadline.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use super::process::send;
use super::pty::Terminal;
use super::wait::BOOT_TEST_TIMEOUT;

/// A call that is being put together.
pub struct Call {
    command: Command,
    user: Option<u32>,
    stdin: Option<Vec<u8>>,
}

/// A call that is under way.
pub struct RunningCall {
    child: Child,
    shown: String,
    stdout: mpsc::Receiver<Vec<u8>>,
    stderr: mpsc::Receiver<Vec<u8>>,
    deadline: Instant,
}

/// A call that has ended.
#[derive(Debug)]
pub struct FinishedCall {
    /// The exit code; 128+n if signal n ended it.
    pub code: i32,
    pub stdout: Vec<u8>,
    pub stderr: String,
    /// The most memory it held in its own hands at any time, as it was last seen.
    pub peak_kib: u64,
    shown: String,
}

impl Call {
    /// `user` is the user it runs as; if absent, the one who runs the suite.
    pub fn new(mut command: Command, user: Option<u32>) -> Self {
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        Self { command, user, stdin: None }
    }

    /// Adds arguments behind those that are there.
    pub fn args(mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.command.args(arguments);
        self
    }

    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// What it reads from its standard input.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// Starts it on a terminal of so many rows and columns.
    pub fn on_terminal(self, rows: u16, columns: u16) -> Terminal {
        // A terminal passes its size to the session that it controls.
        let Self { command, .. } = self.behind(["setsid", "--ctty"]);
        Terminal::start(command, rows, columns)
    }

    /// Starts it. Its standard input is a pipe that closes when it is dropped.
    #[track_caller]
    pub fn start(mut self) -> (RunningCall, ChildStdin) {
        let shown = format!("{:?}", self.command);
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.command.spawn().unwrap_or_else(|error| panic!("{shown}: {error}"));
        let stdout = collect(child.stdout.take().unwrap());
        let stderr = collect(child.stderr.take().unwrap());
        let stdin = child.stdin.take().unwrap();
        (RunningCall { child, shown, stdout, stderr, deadline: Instant::now() + BOOT_TEST_TIMEOUT }, stdin)
    }

    /// Runs it to its end.
    #[track_caller]
    pub fn run(mut self) -> FinishedCall {
        let bytes = self.stdin.take().unwrap_or_default();
        let (running, mut stdin) = self.start();
        // A command that does not read its input ends the pipe; that is for the test to judge by its result.
        let feed = std::thread::spawn(move || stdin.write_all(&bytes));
        let done = running.wait();
        let _ = feed.join().unwrap();
        done
    }

    /// Runs it and expects success.
    #[track_caller]
    pub fn ok(self) -> FinishedCall {
        self.run().expect(0)
    }

    /// Runs it and gives what it printed, without the last line end.
    #[track_caller]
    pub fn text(self) -> String {
        self.ok().text()
    }

    /// Runs it with `--json` and gives its answer.
    #[track_caller]
    pub fn json(self) -> Value {
        self.args_first("--json").ok().json()
    }

    /// Runs it with `--json` and expects an error of this code as its last word; gives the problem object.
    #[track_caller]
    pub fn problem(self, exit: i32, code: &str) -> Value {
        let done = self.args_first("--json").run().expect(exit);
        let problem = done.stderr.lines().last().unwrap_or_else(|| panic!("{}: said nothing", done.shown));
        let problem: Value = serde_json::from_str(problem).unwrap();
        assert_eq!(problem["code"], code, "{problem:#}");
        let detail = problem["detail"].as_str().unwrap();
        assert!(!detail.is_empty() && !detail.contains('\n') && !detail.ends_with('.'), "one sentence: {detail:?}");
        assert!(problem["title"].is_string() && problem["status"].is_u64() && problem["type"].is_string());
        // `delete` answers with those it has deleted nevertheless.
        let answer = String::from_utf8_lossy(&done.stdout);
        assert!(["", "{\"vms\":[]}\n"].contains(&&*answer), "an error is no answer: {answer:?}");
        problem
    }

    /// `nido` takes its global flags before the verb, where no command of the guest can be meant.
    fn args_first(self, flag: &str) -> Self {
        let mut words = vec![self.command.get_program().to_owned(), flag.into()];
        words.extend(self.command.get_args().map(OsStr::to_owned));
        self.with_words(&words)
    }

    /// The same with another program in front.
    pub fn behind<const N: usize>(self, wrapper: [&str; N]) -> Self {
        let mut words: Vec<OsString> = wrapper.iter().map(Into::into).collect();
        words.push(self.command.get_program().to_owned());
        words.extend(self.command.get_args().map(OsStr::to_owned));
        self.with_words(&words)
    }

    fn with_words(mut self, words: &[OsString]) -> Self {
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).env_clear().current_dir(self.command.get_current_dir().expect("a home's calls"));
        command.envs(self.command.get_envs().filter_map(|(key, value)| Some((key, value?))));
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        self.command = command;
        self
    }
}

/// Reads a stream in the background, but not much further than the reader.
fn collect(mut stream: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (done, whole) = mpsc::sync_channel(16);
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            if done.send(buffer[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    whole
}

impl RunningCall {
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        send(self.pid(), signal);
    }

    /// Reads its standard output until it holds `wanted`; gives what was read.
    #[track_caller]
    pub fn read_until(&self, wanted: &str) -> String {
        let mut text = String::new();
        while !text.contains(wanted) {
            let left = self.deadline.saturating_duration_since(Instant::now());
            match self.stdout.recv_timeout(left) {
                Ok(piece) => text.push_str(&String::from_utf8_lossy(&piece)),
                Err(_) => panic!("{}: no {wanted:?} in {text:?}\nstderr: {}", self.shown, drain(&self.stderr)),
            }
        }
        text
    }

    /// Waits for its end. Everything it printed after [`Self::read_until`] is in the answer.
    #[track_caller]
    pub fn wait(mut self) -> FinishedCall {
        let (mut stdout, mut stderr, mut peak_kib) = (Vec::new(), Vec::new(), 0);
        while Instant::now() < self.deadline {
            // The kernel's own high-water mark: looking rarely misses little. A process that has ended has none.
            peak_kib = peak_memory_kib(self.pid()).unwrap_or(peak_kib);
            // Its streams end when it does, and nothing that it leaves behind may hold them open.
            match self.stdout.recv_timeout(Duration::from_millis(20)) {
                Ok(piece) => stdout.extend(piece),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    let left = self.deadline.saturating_duration_since(Instant::now());
                    if let Ok(piece) = self.stderr.recv_timeout(left.min(Duration::from_millis(20))) {
                        stderr.extend(piece);
                        continue;
                    }
                    if let Some(status) = self.child.try_wait().unwrap() {
                        stderr.extend(self.stderr.iter().flatten());
                        let stderr = String::from_utf8_lossy(&stderr).into_owned();
                        return FinishedCall { code: code(status), stdout, stderr, peak_kib, shown: self.shown };
                    }
                }
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let told = drain(&self.stderr);
        panic!("{}: not within its limit\nstdout: {:?}\nstderr: {told}", self.shown, String::from_utf8_lossy(&stdout));
    }
}

fn peak_memory_kib(pid: i32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

/// What is there, and what comes right behind it.
fn drain(stream: &mpsc::Receiver<Vec<u8>>) -> String {
    let pieces = std::iter::from_fn(|| stream.recv_timeout(Duration::from_millis(500)).ok());
    String::from_utf8_lossy(&pieces.take(64).flatten().collect::<Vec<_>>()).into_owned()
}

fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

impl FinishedCall {
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(
            self.code,
            code,
            "exit code of {}\nstdout: {}\nstderr: {}",
            self.shown,
            String::from_utf8_lossy(&self.stdout[..self.stdout.len().min(4000)]),
            self.stderr
        );
        self
    }

    /// It failed, with the reason.
    #[track_caller]
    pub fn expect_failure(&self) {
        assert!([1, 2].contains(&self.code) && !self.stderr.is_empty(), "{} ended with {}", self.shown, self.code);
    }

    #[track_caller]
    pub fn text(&self) -> String {
        let text = std::str::from_utf8(&self.stdout).expect("text");
        text.strip_suffix('\n').unwrap_or(text).to_owned()
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|error| panic!("{}: {error}: {:?}", self.shown, String::from_utf8_lossy(&self.stdout)))
    }
}
