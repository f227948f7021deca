//! From an exec request to a running process: the user, the environment, the program's path, pipes or a terminal.
//!
//! Invariant: a failure names its cause (program, user, directory), and leaves no process and no descriptor behind.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nido_guest_agent::wire::{Exec, Fault, WindowSize};
use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use crate::agent::Agent;
use crate::passwd::{self, User};
use crate::reaper::ExitStatus;
use crate::refusal::Refusal;
use crate::scope::Scope;
use crate::sys::{self, Identity, Launch, LaunchError, Step};

const ROOT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const USER_PATH: &[u8] = b"/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin";

/// A command that runs, and the agent's ends of what it reads and writes.
pub struct RunningCommand {
    /// Its process, and the id of its process group and session.
    pub pid: Pid,
    /// Its input, unless that is `/dev/null`.
    pub stdin: Option<AsyncFd<OwnedFd>>,
    /// Its output, or its terminal.
    pub stdout: Option<Arc<AsyncFd<OwnedFd>>>,
    /// Its error output; none on a terminal.
    pub stderr: Option<Arc<AsyncFd<OwnedFd>>>,
    /// Its terminal.
    pub terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    /// Comes true when it has ended.
    pub ended: oneshot::Receiver<ExitStatus>,
}

/// The kernel's form of a window size.
pub fn winsize(size: WindowSize) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 }
}

/// Starts a command in `scope`. Blocks on the guest's files, so not for the runtime's thread.
///
/// # Errors
/// The failure for the host.
pub fn start(agent: &Agent, request: &Exec, scope: &mut Scope) -> Result<RunningCommand, Refusal> {
    check(request)?;
    let user = find_user(request.user.as_deref())?;
    let groups = passwd::groups(&user).map_err(|error| Refusal::from_io("/etc/group", &error))?;
    let environment = environment(&user, request);
    let search = environment.iter().find_map(|pair| pair.strip_prefix(b"PATH=")).unwrap_or_default();
    let (programs, argv) = program(&user, request, search);
    let directory = directory(&user, request);
    let ends = PipeEnds::open(request, user.uid)
        .map_err(|error| Refusal::from_io("cannot set up the command's input and output", &error))?;

    let strings = |list: Vec<Vec<u8>>| list.into_iter().map(c_string).collect::<Result<Vec<_>, _>>();
    let (programs, argv, environment) = (strings(programs)?, strings(argv)?, strings(environment)?);
    let identity = Identity { uid: user.uid, gid: user.gid, groups: &groups };
    let launch = Launch {
        programs: &programs,
        argv: &argv,
        environment: &environment,
        directory: &c_string(directory.as_os_str().as_bytes().to_vec())?,
        stdio: [ends.child_in.as_fd(), ends.child_out.as_fd(), ends.child_err.as_fd()],
        terminal: request.pty.is_some(),
        // An agent that is not root (only in tests) cannot become another user.
        identity: rustix::process::geteuid().is_root().then_some(identity),
        group: scope.members(),
        reset_oom_score: agent.resets_oom_score,
    };
    let (pid, ended) = agent.reaper.launch(&launch).map_err(|error| explain(&error, &launch, &directory))?;
    scope.set_main(pid);
    ends.into_running(pid, ended).map_err(|error| Refusal::from_io("cannot watch the command's output", &error))
}

/// Checks the parts of a request that do not depend on the guest.
///
/// # Errors
/// What breaks the protocol.
fn check(request: &Exec) -> Result<(), Refusal> {
    let invalid = |message: &str| Err(Refusal::new(Fault::Invalid, message));
    let holds_nul = |bytes: &[u8]| bytes.contains(&0);
    if request.login_shell != request.argv.is_empty() {
        return invalid("either a command or the login shell must be requested");
    }
    let strings = request.argv.iter().chain(&request.env).chain(&request.directory);
    if strings.into_iter().any(|bytes| holds_nul(bytes)) {
        return invalid("arguments, environment and directory cannot hold NUL");
    }
    if request.argv.first().is_some_and(|program| program.is_empty()) {
        return invalid("the program's name is empty");
    }
    if request.env.iter().any(|pair| pair.first() == Some(&b'=') || !pair.contains(&b'=')) {
        return invalid("an environment variable must be KEY=VALUE");
    }
    if matches!(request.pty, Some(WindowSize { rows: 0, .. } | WindowSize { columns: 0, .. })) {
        return invalid("a terminal needs rows and columns");
    }
    Ok(())
}

fn find_user(wanted: Option<&str>) -> Result<User, Refusal> {
    let own_id = rustix::process::geteuid().as_raw();
    let name = wanted.map_or_else(|| own_id.to_string(), str::to_owned);
    let user = passwd::find(&name).map_err(|error| Refusal::from_io("the guest's users and groups", &error))?;
    let user = user.ok_or_else(|| Refusal::new(Fault::NoUser, passwd::missing(&name)))?;
    if own_id != 0 && user.uid != own_id {
        return Err(Refusal::new(Fault::Denied, "the agent does not run as root and cannot become another user"));
    }
    Ok(user)
}

fn environment(user: &User, request: &Exec) -> Vec<Vec<u8>> {
    let pair = |key: &str, value: &[u8]| [key.as_bytes(), b"=", value].concat();
    let mut environment = vec![
        pair("PATH", if user.uid == 0 { ROOT_PATH } else { USER_PATH }),
        pair("HOME", user.home.as_os_str().as_bytes()),
        pair("USER", &user.name),
        pair("LOGNAME", &user.name),
        pair("SHELL", user.shell.as_os_str().as_bytes()),
        pair("LANG", b"C.UTF-8"),
    ];
    if request.pty.is_some() {
        environment.push(pair("TERM", terminal_type(request.term.as_deref(), user).as_bytes()));
    }
    for given in &request.env {
        let key_end = given.iter().position(|&byte| byte == b'=').map_or(given.len(), |at| at + 1);
        environment.retain(|known| !known.starts_with(&given[..key_end]));
        environment.push(given.to_vec());
    }
    environment
}

/// The terminal type of a guest that knows no better one.
const TERMINAL_TYPE: &str = "xterm-256color";

/// The terminal type for `TERM`: the host's where the guest has its description, else one that nearly all terminals obey.
fn terminal_type<'a>(given: Option<&'a str>, user: &User) -> &'a str {
    let own = user.home.join(".terminfo");
    let places = ["/etc/terminfo", "/lib/terminfo", "/usr/share/terminfo"].map(PathBuf::from);
    choose_terminal_type(given, &[&places[..], &[own]].concat())
}

fn choose_terminal_type<'a>(given: Option<&'a str>, places: &[PathBuf]) -> &'a str {
    let Some(given) = given.filter(|name| !name.is_empty() && !name.contains(['/', '\0'])) else {
        return TERMINAL_TYPE;
    };
    let first = given.as_bytes()[0];
    // Descriptions lie in directories that are named by the first letter, or by its number.
    let has = |place: &PathBuf| {
        let letters = [OsStr::from_bytes(&[first]).to_owned(), format!("{first:x}").into()];
        letters.iter().any(|letter| place.join(letter).join(given).is_file())
    };
    let knows_any = places.iter().any(|place| place.is_dir());
    if !knows_any || places.iter().any(has) { given } else { TERMINAL_TYPE }
}

/// The paths to try, and the arguments.
fn program(user: &User, request: &Exec, search: &[u8]) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    if request.login_shell {
        let shell = user.shell.as_os_str().as_bytes();
        let name = user.shell.file_name().unwrap_or(OsStr::new("sh")).as_bytes();
        return (vec![shell.to_vec()], vec![[b"-", name].concat()]);
    }
    let argv: Vec<Vec<u8>> = request.argv.iter().map(|argument| argument.to_vec()).collect();
    let name = argv.first().cloned().unwrap_or_default();
    if name.contains(&b'/') {
        return (vec![name], argv);
    }
    let directories = search.split(|&byte| byte == b':');
    let candidates = directories.map(|directory| match directory {
        [] => [b"./", &name[..]].concat(),
        directory => [directory, b"/", &name].concat(),
    });
    (candidates.collect(), argv)
}

/// Where to run. A user whose home directory does not exist (there are such, `nobody` among them) runs in `/`; a
/// directory that was asked for must exist.
fn directory(user: &User, request: &Exec) -> PathBuf {
    match &request.directory {
        Some(directory) => user.home.join(OsStr::from_bytes(directory)),
        None if user.home.is_dir() => user.home.clone(),
        None => "/".into(),
    }
}

fn c_string(bytes: Vec<u8>) -> Result<CString, Refusal> {
    CString::new(bytes).map_err(|_| Refusal::new(Fault::Invalid, "NUL in a string for the kernel"))
}

/// Maps a failed launch to its cause.
fn explain(failure: &LaunchError, launch: &Launch<'_>, directory: &Path) -> Refusal {
    let error = &failure.error;
    let name = launch.argv.first().map(|name| name.to_string_lossy()).unwrap_or_default();
    match failure.step {
        Step::Directory => Refusal::new(Fault::NoDirectory, format!("{}: {error}", directory.display())),
        Step::Program => {
            let is_there = launch.programs.iter().any(|program| {
                let path = directory.join(OsStr::from_bytes(program.as_bytes()));
                path.symlink_metadata().is_ok_and(|found| !found.is_dir())
            });
            match (error.kind(), is_there) {
                (io::ErrorKind::NotFound, false) => {
                    Refusal::new(Fault::CommandNotFound, format!("{name}: command not found"))
                }
                (io::ErrorKind::NotFound, true) => {
                    Refusal::new(Fault::CannotRun, format!("{name}: its interpreter or loader is not there"))
                }
                _ => Refusal::new(Fault::CannotRun, format!("{name}: {error}")),
            }
        }
        Step::Clone | Step::Setup | Step::Identity => {
            Refusal::new(Fault::Other, format!("cannot start a process: {failure}"))
        }
    }
}

/// Both ends of everything the command reads and writes.
struct PipeEnds {
    child_in: OwnedFd,
    child_out: OwnedFd,
    child_err: OwnedFd,
    stdin: Option<OwnedFd>,
    stdout: OwnedFd,
    stderr: Option<OwnedFd>,
    is_terminal: bool,
}

impl PipeEnds {
    /// Opens them for a user: programs open `/dev/stdout` and their terminal by name, which takes more than having them.
    fn open(request: &Exec, uid: u32) -> io::Result<Self> {
        let ends = match request.pty {
            Some(size) => Self::open_terminal(size)?,
            None => Self::open_pipes(request.stdin)?,
        };
        if uid != 0 && rustix::process::geteuid().is_root() {
            for end in [&ends.child_out, &ends.child_err].into_iter().chain(ends.stdin.as_ref()) {
                rustix::fs::fchown(end, Some(rustix::fs::Uid::from_raw(uid)), None)?;
            }
        }
        Ok(ends)
    }

    fn open_pipes(has_stdin: bool) -> io::Result<Self> {
        let (child_in, stdin) = if has_stdin {
            let (read, write) = io::pipe()?;
            (OwnedFd::from(read), Some(OwnedFd::from(write)))
        } else {
            (rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?, None)
        };
        let (stdout, child_out) = io::pipe()?;
        let (stderr, child_err) = io::pipe()?;
        Ok(Self {
            child_in,
            child_out: child_out.into(),
            child_err: child_err.into(),
            stdin,
            stdout: stdout.into(),
            stderr: Some(stderr.into()),
            is_terminal: false,
        })
    }

    fn open_terminal(size: WindowSize) -> io::Result<Self> {
        let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        rustix::pty::unlockpt(&master)?;
        rustix::termios::tcsetwinsize(&master, winsize(size))?;
        let slave =
            rustix::pty::ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        let (child_in, child_out) = (slave.try_clone()?, slave.try_clone()?);
        Ok(Self { child_in, child_out, child_err: slave, stdin: None, stdout: master, stderr: None, is_terminal: true })
    }

    /// Keeps the agent's ends, closes the command's.
    fn into_running(self, pid: Pid, ended: oneshot::Receiver<ExitStatus>) -> io::Result<RunningCommand> {
        let watch = |end: OwnedFd| {
            rustix::io::ioctl_fionbio(&end, true)?;
            sys::watch(end)
        };
        // A terminal is read and written through two descriptors, so that both directions are watched on their own.
        let (stdin, terminal) = match self.is_terminal {
            true => (Some(self.stdout.try_clone()?), Some(())),
            false => (self.stdin, None),
        };
        let stdin = stdin.map(watch).transpose()?;
        let stdout = Arc::new(watch(self.stdout)?);
        let stderr = self.stderr.map(watch).transpose()?.map(Arc::new);
        let terminal = terminal.map(|()| stdout.clone());
        Ok(RunningCommand { pid, stdin, stdout: Some(stdout), stderr, terminal, ended })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user() -> User {
        let (home, shell) = ("/home/user".into(), "/bin/bash".into());
        User { name: b"user".to_vec(), uid: 1000, gid: 1000, has_given_group: false, home, shell }
    }

    #[test]
    fn the_environment_given_wins_over_the_base() {
        let env = vec![b"PATH=/opt".to_vec().into(), b"A=b=c".to_vec().into()];
        let environment = environment(&user(), &Exec { env, ..Exec::default() });
        assert!(environment.contains(&b"PATH=/opt".to_vec()) && environment.contains(&b"A=b=c".to_vec()));
        assert!(environment.contains(&b"HOME=/home/user".to_vec()));
        assert_eq!(environment.iter().filter(|pair| pair.starts_with(b"PATH=")).count(), 1);
        assert!(!environment.iter().any(|pair| pair.starts_with(b"TERM=")));
    }

    #[test]
    fn a_terminal_type_that_the_guest_does_not_know_is_replaced() {
        let guest = tempfile::tempdir().unwrap();
        let places = [guest.path().join("none"), guest.path().join("terminfo")];
        let choose = |given| choose_terminal_type(given, &places);
        assert_eq!(choose(Some("xterm-ghostty")), "xterm-ghostty", "a guest without descriptions cannot tell");
        std::fs::create_dir_all(places[1].join("s")).unwrap();
        std::fs::create_dir_all(places[1].join("78")).unwrap();
        std::fs::write(places[1].join("s/screen"), "").unwrap();
        std::fs::write(places[1].join("78/xterm-new"), "").unwrap();
        for (given, wanted) in [("screen", "screen"), ("xterm-new", "xterm-new"), ("xterm-ghostty", TERMINAL_TYPE)] {
            assert_eq!(choose(Some(given)), wanted);
        }
        for odd in [None, Some(""), Some("../s/screen"), Some("é")] {
            assert_eq!(choose(odd), TERMINAL_TYPE);
        }
    }

    #[test]
    fn a_bare_name_is_searched_in_path() {
        let argv = vec![b"ls".to_vec().into()];
        let request = Exec { argv, ..Exec::default() };
        assert_eq!(program(&user(), &request, b"/a::/b").0, [&b"/a/ls"[..], b"./ls", b"/b/ls"]);
    }

    #[test]
    fn a_login_shell_gets_its_dash() {
        let request = Exec { login_shell: true, ..Exec::default() };
        assert_eq!(program(&user(), &request, b""), (vec![b"/bin/bash".to_vec()], vec![b"-bash".to_vec()]));
    }
}
