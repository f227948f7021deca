//! Runs one program of a build: its own process group, a deadline, output by the line into the log.
//! Invariant: when [`Session::run`] returns, or its thread unwinds, nothing of the process group is left running.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead as _, BufReader, PipeReader, Read as _, Seek as _, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use crate::error::ImageError;
use crate::progress::{Stage, printable};

/// How often a running program is looked at for the caller's wish to stop.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Lines of output an error carries.
const TAIL_LINES: usize = 12;
/// Longest line taken from a program; the rest counts as a new line.
const MAX_LINE_BYTES: u64 = 16 * 1024;
/// Most that goes into the log of one build. Programs that write more are drained, but not recorded.
const MAX_LOG_BYTES: u64 = 32 * 1024 * 1024;
/// Most standard output that is kept for the caller, in bytes.
const MAX_CAPTURED_BYTES: u64 = 512 * 1024 * 1024;

/// The log file of a build.
#[derive(Debug)]
pub struct BuildLog {
    path: PathBuf,
    file: File,
    written: u64,
}

impl BuildLog {
    /// Truncates the log in the already opened and locked `file`.
    pub(crate) fn new(path: PathBuf, file: File) -> Self {
        Self { path, file, written: 0 }
    }

    /// Appends a line. A log that cannot be written does not fail the build.
    pub(crate) fn line(&mut self, line: &str) {
        if self.written < MAX_LOG_BYTES {
            self.written += line.len() as u64 + 1;
            let _ = writeln!(self.file, "{line}");
        }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// Where programs of a build run: the log they share and the wish to stop.
pub struct Session<'a> {
    /// The log of the build.
    pub log: BuildLog,
    /// Set by the caller to stop the build.
    pub cancel: &'a AtomicBool,
}

/// Kills the process group of a child that has not been reaped.
struct Group(Child);

impl Group {
    fn kill(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            let group = rustix::process::Pid::from_child(&self.0);
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            let _ = self.0.wait();
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Session<'_> {
    /// Fails if the caller has cancelled.
    ///
    /// # Errors
    /// [`ImageError::Interrupted`].
    pub fn check_cancel(&self) -> Result<(), ImageError> {
        if self.cancel.load(Ordering::Relaxed) { Err(ImageError::Interrupted) } else { Ok(()) }
    }

    /// Runs a program to its end. Each line it writes, to either stream, goes to the log and to `on_line`.
    ///
    /// # Errors
    /// [`ImageError::Command`], [`ImageError::Deadline`], [`ImageError::Interrupted`], [`ImageError::DiskFull`], [`ImageError::Io`].
    pub fn run(
        &mut self,
        stage: Stage,
        command: Command,
        deadline: Duration,
        on_line: &mut dyn FnMut(&str),
    ) -> Result<(), ImageError> {
        self.follow(stage, command, deadline, None, on_line)
    }

    /// Runs a program and returns its standard output, at most 512 MiB. Its standard error goes to the log.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub fn capture(&mut self, stage: Stage, command: Command, deadline: Duration) -> Result<Vec<u8>, ImageError> {
        let program = program_name(&command);
        let failed = |error| ImageError::io("read the output of", Path::new(&program), error);
        let mut output = tempfile::tempfile().map_err(failed)?;
        let stdout = output.try_clone().map_err(failed)?;
        self.follow(stage, command, deadline, Some(stdout), &mut |_| {})?;
        let mut bytes = Vec::new();
        output.rewind().and_then(|()| output.take(MAX_CAPTURED_BYTES).read_to_end(&mut bytes)).map_err(failed)?;
        Ok(bytes)
    }

    fn follow(
        &mut self,
        stage: Stage,
        mut command: Command,
        deadline: Duration,
        stdout: Option<File>,
        on_line: &mut dyn FnMut(&str),
    ) -> Result<(), ImageError> {
        let program = program_name(&command);
        self.check_cancel()?;
        self.log.line(&format!("--- {stage}: {}", command_line(&command)));
        let failed = |error| ImageError::io("run", Path::new(&program), error);
        let (reader, writer) = std::io::pipe().map_err(failed)?;
        match stdout {
            Some(file) => command.stdout(file),
            None => command.stdout(writer.try_clone().map_err(failed)?),
        };
        command.stderr(writer).process_group(0);
        let mut group = Group(command.spawn().map_err(|error| failed(nido_confine::explained(error)))?);
        // The command holds the writing end of the pipe; without it the pipe ends with the programs.
        drop(command);

        let lines = read_lines(reader);
        let mut tail = Tail::default();
        let end = Instant::now() + deadline;
        loop {
            let next = lines.recv_timeout(POLL_INTERVAL);
            self.check_cancel()?;
            if Instant::now() >= end {
                let log = self.log.path().to_owned();
                return Err(ImageError::Deadline { stage, program, seconds: deadline.as_secs(), log });
            }
            match next {
                Ok(line) => {
                    self.log.line(&line);
                    on_line(&line);
                    tail.push(line);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => match group.0.try_wait().map_err(failed)? {
                    None => std::thread::sleep(POLL_INTERVAL),
                    Some(status) => return self.judge(stage, program, status, &tail),
                },
            }
        }
    }

    fn judge(&self, stage: Stage, program: String, status: ExitStatus, tail: &Tail) -> Result<(), ImageError> {
        if status.success() {
            return Ok(());
        }
        let log = self.log.path().to_owned();
        if tail.disk_full {
            return Err(ImageError::DiskFull { path: log });
        }
        let status = match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => "unknown status".to_owned(),
        };
        let tail = tail.lines.iter().map(|line| printable(line)).collect();
        Err(ImageError::Command { stage, program, status, tail, log })
    }
}

/// The last lines of a program, and whether any line reported a full disk.
#[derive(Default)]
struct Tail {
    lines: VecDeque<String>,
    disk_full: bool,
}

impl Tail {
    fn push(&mut self, line: String) {
        self.disk_full |= is_disk_full(&line);
        if self.lines.len() == TAIL_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }
}

/// Whether a line reports a full disk or quota.
fn is_disk_full(line: &str) -> bool {
    ["No space left on device", "Disk quota exceeded", "enough free space"].iter().any(|words| line.contains(words))
}

/// Reads lines in a thread of its own, which ends with the pipe. A slow receiver holds the program up, not the memory.
fn read_lines(reader: PipeReader) -> Receiver<String> {
    let (sender, receiver) = sync_channel(256);
    std::thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        while reader.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            line.clear();
            if sender.send(text).is_err() {
                break;
            }
        }
    });
    receiver
}

/// The program itself, behind the `setpriv … -- unshare … --` in front of it.
fn program_name(command: &Command) -> String {
    let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
    let own = words.iter().take(12).rposition(|word| word == "--").and_then(|at| words.get(at + 1));
    let name = || Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
    own.cloned().unwrap_or_else(name)
}

/// The command for the log: scripts are cut to their first line.
fn command_line(command: &Command) -> String {
    command.get_args().fold(command.get_program().to_string_lossy().into_owned(), |mut line, word| {
        line.push(' ');
        line.push_str(word.to_string_lossy().lines().next().unwrap_or(""));
        line
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_session<T>(cancel: &AtomicBool, test: impl FnOnce(&mut Session<'_>) -> T) -> (T, String) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let file = File::create(&path).unwrap();
        let mut session = Session { log: BuildLog::new(path.clone(), file), cancel };
        let result = test(&mut session);
        (result, std::fs::read_to_string(path).unwrap())
    }

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn both_streams_reach_the_log_and_the_listener() {
        let cancel = AtomicBool::new(false);
        let mut heard = Vec::new();
        let (result, log) = with_session(&cancel, |session| {
            session.run(Stage::Disk, shell("echo out; echo err >&2"), LONG, &mut |line| heard.push(line.to_owned()))
        });
        result.unwrap();
        heard.sort();
        assert_eq!(heard, ["err", "out"]);
        assert!(log.contains("--- disk: sh -c") && log.contains("\nerr\n"));
    }

    #[test]
    fn a_failure_carries_the_status_and_the_last_lines() {
        let cancel = AtomicBool::new(false);
        let script = "i=0; while [ $i -lt 40 ]; do i=$((i+1)); echo line $i; done; exit 3";
        let (result, _) = with_session(&cancel, |session| session.run(Stage::Disk, shell(script), LONG, &mut |_| {}));
        let Err(ImageError::Command { status, tail, .. }) = result else { panic!("{result:?}") };
        assert_eq!(status, "exit status 3");
        assert_eq!((tail.len(), tail.last().map(String::as_str)), (TAIL_LINES, Some("line 40")));
    }

    #[test]
    fn a_full_disk_is_distinguished_from_other_failures() {
        let cancel = AtomicBool::new(false);
        let script = "echo 'write: No space left on device'; exit 1";
        let (result, _) = with_session(&cancel, |session| session.run(Stage::Disk, shell(script), LONG, &mut |_| {}));
        assert!(matches!(result, Err(ImageError::DiskFull { .. })));
    }

    #[test]
    fn a_program_that_passes_its_deadline_is_killed_with_its_children() {
        let cancel = AtomicBool::new(false);
        let mut child = String::new();
        let (result, _) = with_session(&cancel, |session| {
            let script = "sleep 1000 & echo $!; wait";
            session.run(Stage::Disk, shell(script), Duration::from_millis(300), &mut |line| child = line.to_owned())
        });
        assert!(matches!(result, Err(ImageError::Deadline { .. })));
        assert_dead(&child);
    }

    #[test]
    fn cancelling_kills_the_whole_process_group() {
        let cancel = AtomicBool::new(false);
        let mut child = String::new();
        let (result, _) = with_session(&cancel, |session| {
            session.run(Stage::Disk, shell("sleep 1000 & echo $!; wait"), LONG, &mut |line| {
                child = line.to_owned();
                cancel.store(true, Ordering::Relaxed);
            })
        });
        assert!(matches!(result, Err(ImageError::Interrupted)));
        assert_dead(&child);
    }

    /// Waits until the process is gone, or a zombie that only its adopter has to reap.
    fn assert_dead(pid: &str) {
        assert!(!pid.is_empty());
        let end = Instant::now() + LONG;
        while std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
            assert!(Instant::now() < end, "process {pid} still runs");
            std::thread::yield_now();
        }
    }

    #[test]
    fn output_is_captured_apart_from_the_log() {
        let cancel = AtomicBool::new(false);
        let (bytes, log) = with_session(&cancel, |session| {
            session.capture(Stage::Kernel, shell("printf 'a\\000b'; echo talk >&2"), LONG)
        });
        assert_eq!(bytes.unwrap(), b"a\0b");
        assert!(log.contains("talk"));
    }
}
