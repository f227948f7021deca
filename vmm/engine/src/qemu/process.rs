//! QEMU's process: started so that it outlives nido, watched and signalled without ever trusting a process number.
//!
//! QEMU inherits exactly one descriptor besides its standard three: the VM's lock, taken before the fork. The kernel
//! frees the lock when the last holder is gone, whatever killed it. Invariant: who holds the lock *is* the VM; signals
//! go through a pidfd, so they reach this process or none.
#![allow(unsafe_code)]

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::child::{GroupToJoin, join, prepare};
use crate::confine::{Confinement, explained};
use crate::host::daemon::set_qemu_environment;

/// How to start QEMU.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The program.
    pub program: &'a Path,
    /// Its arguments, without the program's name.
    pub args: &'a [OsString],
    /// Its working directory: the VM's own.
    pub vm_dir: &'a Path,
    /// Where its standard output and error go; opened for appending.
    pub log: File,
    /// The VM's locked file (see [`nido_files::lock`]), which it inherits.
    pub lock: &'a File,
    /// What it may do on the host. Without one it may do what its user may, but gain no privileges.
    pub confinement: Option<Confinement>,
    /// How long a file that it writes may become; a write behind that fails.
    pub file_bytes: Option<u64>,
    /// The control group that it joins before it is executed.
    pub group: Option<GroupToJoin>,
}

/// How QEMU ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QemuExit {
    /// It ended itself.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
    /// It has ended; another process was its parent, so its exit status is unknown.
    Unknown,
}

/// A QEMU process, a child of this one or found again. Dropping this does not end QEMU.
#[derive(Debug)]
pub struct QemuProcess {
    pid: Pid,
    pidfd: OwnedFd,
    exit: OnceLock<QemuExit>,
}

impl QemuProcess {
    /// Starts QEMU in a session of its own, with new privileges ruled out, a cleaned environment, default signals, files
    /// made for the owner only, no core dumps. SIGTERM, SIGINT and SIGHUP are blocked: QEMU would end of them at once, without asking
    /// its guest; they are the supervisor's. That it was started does not mean that it keeps running.
    ///
    /// # Errors
    /// The program cannot be executed or the system has no room for it, or a layer of its confinement cannot be put in force.
    pub fn spawn(launch: Launch<'_>) -> io::Result<Self> {
        let lock_fd = launch.lock.as_raw_fd();
        let mut command = Command::new(launch.program);
        set_qemu_environment(&mut command);
        command
            .args(launch.args)
            .current_dir(launch.vm_dir)
            .stdin(Stdio::null())
            .stdout(launch.log.try_clone()?)
            .stderr(launch.log);
        let (mut confinement, file_bytes, group) = (launch.confinement, launch.file_bytes, launch.group);
        // SAFETY: `join` and `prepare` make system calls only; they neither allocate nor lock.
        unsafe {
            command.pre_exec(move || {
                group.as_ref().map_or(Ok(()), join)?;
                prepare(lock_fd, confinement.as_mut(), file_bytes)
            })
        };
        let mut child = command.spawn().map_err(explained)?;
        let pid = Pid::from_child(&child);
        // The child is not waited for yet, so its number cannot belong to another process.
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).inspect_err(|_| {
            // A QEMU that cannot be watched must not stay.
            let _ = child.kill().and_then(|()| child.wait());
        })?;
        Ok(Self { pid, pidfd, exit: OnceLock::new() })
    }

    /// The QEMU that listens on the other end of a connected socket (its monitor's). For a supervisor that comes after
    /// the one that started it.
    ///
    /// # Errors
    /// There is no such process any more.
    pub fn behind(socket: impl AsFd) -> io::Result<Self> {
        let pid = peer_pid(&socket)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        // Still connected, so the listener still ran when the pidfd was opened, and the number was still its own.
        let mut fds = [rustix::event::PollFd::new(&socket, rustix::event::PollFlags::empty())];
        rustix::event::poll(&mut fds, Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        if !fds[0].revents().is_empty() {
            return Err(io::ErrorKind::NotConnected.into());
        }
        Ok(Self { pid, pidfd, exit: OnceLock::new() })
    }

    /// The process of a pidfd that was inherited.
    ///
    /// # Errors
    /// It is no pidfd, or that process is gone and waited for.
    pub fn of_pidfd(pidfd: OwnedFd) -> io::Result<Self> {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
        let pid = info.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok()).and_then(Pid::from_raw);
        let pid = pid.ok_or(io::ErrorKind::NotFound)?;
        Ok(Self { pid, pidfd, exit: OnceLock::new() })
    }

    /// A copy of its pidfd, to be handed to another process.
    ///
    /// # Errors
    /// There are too many open files.
    pub fn pidfd(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }

    /// Its number, to be shown to people.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Waits until it is gone. May be called again, and by several at once.
    ///
    /// # Errors
    /// The system refused to watch it.
    pub async fn wait(&self) -> io::Result<QemuExit> {
        if let Some(exit) = self.exit.get() {
            return Ok(*exit);
        }
        let pidfd = self.pidfd.try_clone()?;
        // SAFETY: the descriptor is owned by the `AsyncFd`, which closes it only after it has left the reactor.
        let gone = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        let _ready = gone.readable().await?;
        Ok(self.collect())
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn exited(&self) -> Option<QemuExit> {
        let mut fds = [rustix::event::PollFd::new(&self.pidfd, rustix::event::PollFlags::IN)];
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        let gone = rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|n| n > 0);
        gone.then(|| self.collect())
    }

    /// Ends it (SIGKILL).
    ///
    /// # Errors
    /// Not permitted. A process that is gone is no error.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes the status of a process that is known to be gone.
    fn collect(&self) -> QemuExit {
        *self.exit.get_or_init(|| {
            let status = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
            let Ok(Some(status)) = status else { return QemuExit::Unknown };
            let code = status.exit_status().map(QemuExit::Code);
            code.or_else(|| status.terminating_signal().map(QemuExit::Signal)).unwrap_or(QemuExit::Unknown)
        })
    }
}

/// The process that listens (or connected, or made the pair) at the other end of a Unix socket.
///
/// # Errors
/// Not a Unix socket, or the peer is in a PID namespace that this process cannot see.
pub fn peer_pid(socket: impl AsFd) -> io::Result<Pid> {
    use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
    Pid::from_raw(getsockopt(&socket, PeerCredentials)?.pid()).ok_or_else(|| io::ErrorKind::NotFound.into())
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::{BufRead as _, BufReader, Read as _, Write as _};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::time::Duration;

    use super::*;
    use nido_files::lock::{HeldLock, is_held};

    const DIR: &str = "NIDO_TEST_LOCK_DIR";

    fn run(dir: &Path, program: &str, args: &[&str]) -> QemuProcess {
        let lock = HeldLock::try_take(&dir.join("vm.lock")).unwrap().unwrap();
        let log = OpenOptions::new().append(true).create(true).open(dir.join("qemu.log")).unwrap();
        let args: Vec<OsString> = args.iter().map(Into::into).collect();
        QemuProcess::spawn(Launch {
            program: program.as_ref(),
            args: &args,
            vm_dir: dir,
            log,
            lock: lock.file(),
            confinement: None,
            file_bytes: None,
            group: None,
        })
        .unwrap()
    }

    async fn ended(process: &QemuProcess) -> QemuExit {
        tokio::time::timeout(Duration::from_secs(30), process.wait()).await.unwrap().unwrap()
    }

    /// A process that another test forks at this moment may have a copy of the descriptor until it executes its program.
    async fn is_freed(lock: &Path) -> bool {
        HeldLock::take(lock, std::time::Instant::now() + Duration::from_secs(30)).await.unwrap().is_some()
    }

    fn shell(script: &str) -> (tempfile::TempDir, QemuProcess) {
        let dir = tempfile::tempdir().unwrap();
        let process = run(dir.path(), "/bin/sh", &["-c", script]);
        (dir, process)
    }

    #[tokio::test]
    async fn it_inherits_the_lock_and_nothing_else() {
        let opened_before = File::open("/dev/null").unwrap();
        // SAFETY: makes a descriptor of this test inheritable.
        assert_ne!(unsafe { libc::fcntl(opened_before.as_raw_fd(), libc::F_SETFD, 0) }, -1);
        let script = "ls -l /proc/$$/fd; umask; pwd; echo home=$NIDO_HOME; ulimit -c; exec cat /proc/self/status";
        let (dir, process) = shell(script);
        assert_eq!(ended(&process).await, QemuExit::Code(0));
        assert_eq!(ended(&process).await, QemuExit::Code(0), "a second wait knows it too");
        let log = std::fs::read_to_string(dir.path().join("qemu.log")).unwrap();
        let fds: Vec<_> = log.lines().filter_map(|l| l.split_once(" -> ")).map(|(_, target)| target).collect();
        assert_eq!(fds.len(), 4, "{log}");
        assert_eq!(fds.iter().filter(|t| t.ends_with("/vm.lock")).count(), 1, "{log}");
        let none = "0000000000000000";
        let ignored = format!("SigIgn:\t{none}");
        for line in ["0177", dir.path().to_str().unwrap(), "home=", "0", "NoNewPrivs:\t1", &ignored] {
            assert!(log.lines().any(|l| l == line), "{line}: {log}");
        }
    }

    /// SIGTERM to every process, as at the host's shutdown, ended QEMU before its guest could power off.
    #[tokio::test]
    async fn the_signals_that_ask_for_an_end_are_blocked() {
        let dir = tempfile::tempdir().unwrap();
        // No shell: some begin with a signal mask of their own.
        let process = run(dir.path(), "/bin/cat", &["/proc/self/status"]);
        assert_eq!(ended(&process).await, QemuExit::Code(0));
        let log = std::fs::read_to_string(dir.path().join("qemu.log")).unwrap();
        assert!(log.lines().any(|line| line == "SigBlk:\t0000000000004003"), "{log}");
    }

    #[tokio::test]
    async fn the_exit_status_is_reported() {
        assert_eq!(ended(&shell("exit 7").1).await, QemuExit::Code(7));
        assert_eq!(ended(&shell("kill -6 $$").1).await, QemuExit::Signal(6));
        let (dir, process) = shell("exec sleep 100");
        assert_eq!(process.exited(), None);
        assert!(is_held(&dir.path().join("vm.lock")));
        process.kill().unwrap();
        assert_eq!(ended(&process).await, QemuExit::Signal(9));
        assert_eq!(process.exited(), Some(QemuExit::Signal(9)));
        assert!(is_freed(&dir.path().join("vm.lock")).await);
        process.kill().unwrap();
    }

    /// A file that grew behind its limit would end QEMU by SIGXFSZ.
    #[tokio::test]
    async fn a_write_behind_the_limit_of_files_fails_and_the_process_continues() {
        let dir = tempfile::tempdir().unwrap();
        let lock = HeldLock::try_take(&dir.path().join("vm.lock")).unwrap().unwrap();
        let log = OpenOptions::new().append(true).create(true).open(dir.path().join("qemu.log")).unwrap();
        let script = "dd if=/dev/zero of=disk bs=1024 count=100; echo dd: $?; ulimit -f";
        let process = QemuProcess::spawn(Launch {
            program: "/bin/sh".as_ref(),
            args: &["-c".into(), script.into()],
            vm_dir: dir.path(),
            log,
            lock: lock.file(),
            confinement: None,
            file_bytes: Some(8 << 10),
            group: None,
        })
        .unwrap();
        assert_eq!(ended(&process).await, QemuExit::Code(0));
        let log = std::fs::read_to_string(dir.path().join("qemu.log")).unwrap();
        assert!(log.contains("dd: 1"), "{log}");
        assert_eq!(std::fs::metadata(dir.path().join("disk")).unwrap().len(), 8 << 10);
    }

    /// What runs outside of its control group has no limits.
    #[tokio::test]
    async fn it_joins_its_group_before_it_is_executed() {
        let dir = tempfile::tempdir().unwrap();
        let launch = |members: File, is_required: bool| {
            let lock = HeldLock::try_take(&dir.path().join("vm.lock")).unwrap().unwrap();
            let log = OpenOptions::new().append(true).create(true).open(dir.path().join("qemu.log")).unwrap();
            QemuProcess::spawn(Launch {
                program: "/bin/sh".as_ref(),
                args: &["-c".into(), "cat members; ls -l /proc/$$/fd".into()],
                vm_dir: dir.path(),
                log,
                lock: lock.file(),
                confinement: None,
                file_bytes: None,
                group: Some(GroupToJoin { members, is_required }),
            })
        };
        let members = File::create(dir.path().join("members")).unwrap();
        assert_eq!(ended(&launch(members, true).unwrap()).await, QemuExit::Code(0));
        let log = std::fs::read_to_string(dir.path().join("qemu.log")).unwrap();
        assert!(log.starts_with('0') && !log.contains("/members"), "{log}");
        let full = || OpenOptions::new().write(true).open("/dev/full").unwrap();
        assert_eq!(launch(full(), true).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
        assert_eq!(ended(&launch(full(), false).unwrap()).await, QemuExit::Code(0));
    }

    #[test]
    fn the_listener_is_found_behind_its_socket() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let socket = UnixStream::connect(dir.path().join("s")).unwrap();
        assert_eq!(QemuProcess::behind(&socket).unwrap().pid(), i32::try_from(std::process::id()).unwrap());
        drop(listener);
        // Its end shows once no process that was forked meanwhile has a copy.
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let _ = (&socket).read(&mut [0]);
        assert!(QemuProcess::behind(&socket).is_err());
    }

    /// The supervisor of the next test, in a process of its own: starts a child, prints its number, waits to be killed.
    fn run_as_supervisor(dir: &Path) {
        let process = run(dir, "/bin/sh", &["-c", "exec sleep 100"]);
        println!("\nchild {}", process.pid());
        io::stdout().flush().unwrap();
        let _ = io::stdin().read_line(&mut String::new());
    }

    #[tokio::test]
    async fn the_lock_outlives_a_supervisor_that_is_killed() {
        if let Some(dir) = std::env::var_os(DIR) {
            return run_as_supervisor(Path::new(&dir));
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.lock");
        let mut supervisor = Command::new(std::env::current_exe().unwrap())
            .args(["the_lock_outlives_a_supervisor_that_is_killed", "--nocapture"])
            .env(DIR, dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(supervisor.stdout.take().unwrap()).lines().map_while(Result::ok);
        let pid = lines.filter_map(|l| l.strip_prefix("child ")?.parse().ok()).next().unwrap();
        let pid = Pid::from_raw(pid).unwrap();
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        supervisor.kill().unwrap();
        supervisor.wait().unwrap();
        assert!(is_held(&path), "QEMU holds the lock on");
        let orphan = QemuProcess { pid, pidfd, exit: OnceLock::new() };
        orphan.kill().unwrap();
        assert_eq!(ended(&orphan).await, QemuExit::Unknown);
        assert!(is_freed(&path).await);
    }
}
