//! The only unsafe code of the agent: starting a process, and the few calls to the kernel that no crate wraps.
//!
//! A process is started as `posix_spawn` does it: the child shares the agent's memory and the launching thread sleeps
//! until the program is loaded. So a launch costs no copy of page tables (dear under emulation), and a failure comes
//! back through plain memory. Invariant: between `clone` and `execve` the child makes system calls and touches only
//! what was prepared for it; it allocates nothing, takes no lock and never returns.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nido_guest_agent::wire::ENTROPY_LEN;
use rustix::process::Pid;
use tokio::io::unix::AsyncFd;

/// Stack of the child before `execve`, in bytes.
const CHILD_STACK: usize = 32 * 1024;

/// What to start. All strings are ready for the kernel.
pub struct Launch<'a> {
    /// Paths of the program, tried in this order.
    pub programs: &'a [CString],
    /// Arguments, the program's name first.
    pub argv: &'a [CString],
    /// `KEY=VALUE`.
    pub environment: &'a [CString],
    /// Where it runs.
    pub directory: &'a CStr,
    /// Standard input, output and error; each 3 or above.
    pub stdio: [BorrowedFd<'a>; 3],
    /// Make standard input the controlling terminal.
    pub terminal: bool,
    /// The user it runs as; the agent's own if absent.
    pub identity: Option<Identity<'a>>,
    /// The list of members of its control group.
    pub group: Option<BorrowedFd<'a>>,
    /// Give it the neutral out-of-memory score, because the agent has another.
    pub reset_oom_score: bool,
}

/// The user that a process runs as.
#[derive(Clone, Copy)]
pub struct Identity<'a> {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// All groups.
    pub groups: &'a [u32],
}

/// Which step of a launch failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Making the process itself.
    Clone,
    /// Session, terminal or descriptors.
    Setup,
    /// Becoming the user.
    Identity,
    /// Entering the directory.
    Directory,
    /// Loading the program.
    Program,
}

/// Why a process was not started.
#[derive(Debug, thiserror::Error)]
#[error("{step:?}: {error}")]
pub struct LaunchError {
    /// Where it failed.
    pub step: Step,
    /// The kernel's error.
    pub error: io::Error,
}

/// Everything the child needs, in the kernel's format. It is in the frame of the launching thread, which waits meanwhile.
struct PreparedLaunch<'a> {
    launch: &'a Launch<'a>,
    argv: Vec<*const libc::c_char>,
    environment: Vec<*const libc::c_char>,
    failure: Option<(Step, i32)>,
}

/// Starts a process in a session and process group of its own, and waits until its program is loaded.
///
/// # Errors
/// See [`LaunchError`]. A process that failed between its making and its program has still to be reaped.
pub fn launch(launch: &Launch<'_>) -> Result<Pid, LaunchError> {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let mut prepared = PreparedLaunch {
        launch,
        argv: pointers(launch.argv),
        environment: pointers(launch.environment),
        failure: None,
    };
    let mut stack = vec![0u128; CHILD_STACK / 16];
    let top = stack.as_mut_ptr_range().end;
    let clone_error = |error| LaunchError { step: Step::Clone, error };
    // SAFETY: sigset_t is plain data, and both calls only read and write the sets given.
    let (all, mut old): (libc::sigset_t, libc::sigset_t) = unsafe {
        let mut all = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        (all, std::mem::zeroed())
    };
    // SAFETY: valid sets; no handler may run in the child while it shares our memory.
    let blocked = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old) };
    if blocked != 0 {
        return Err(clone_error(io::Error::from_raw_os_error(blocked)));
    }
    // SAFETY: `top` is the 16-byte aligned end of a stack of its own; `prepared` outlives the child's use of it,
    // because CLONE_VFORK suspends this thread until the child has loaded a program or exited.
    let pid = unsafe {
        libc::clone(
            child,
            top.cast(),
            libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD,
            (&raw mut prepared).cast::<libc::c_void>(),
        )
    };
    let error = io::Error::last_os_error();
    // SAFETY: restores the mask saved above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const old, std::ptr::null_mut()) };
    if let Some((step, errno)) = prepared.failure {
        return Err(LaunchError { step, error: io::Error::from_raw_os_error(errno) });
    }
    Pid::from_raw(pid).filter(|_| pid > 0).ok_or_else(|| clone_error(error))
}

/// The child's side of [`launch`].
extern "C" fn child(prepared: *mut libc::c_void) -> libc::c_int {
    // SAFETY: the pointer is the `PreparedLaunch` of the suspended launching thread, used by no other thread now.
    let prepared = unsafe { &mut *prepared.cast::<PreparedLaunch<'_>>() };
    prepared.failure = Some(become_program(prepared));
    // SAFETY: ends the child without running anything of the agent's.
    unsafe { libc::_exit(127) }
}

/// Does not return unless it failed.
fn become_program(prepared: &PreparedLaunch<'_>) -> (Step, i32) {
    let launch = prepared.launch;
    // SAFETY: system calls on prepared arguments only; raw calls where glibc's wrapper would involve other threads.
    unsafe {
        if libc::setsid() < 0 {
            return (Step::Setup, errno());
        }
        if let Some(group) = launch.group {
            // A process that cannot join is found by its ancestry.
            libc::write(group.as_raw_fd(), b"0".as_ptr().cast(), 1);
        }
        for (target, source) in (0..).zip(&launch.stdio) {
            if libc::dup2(source.as_raw_fd(), target) < 0 {
                return (Step::Setup, errno());
            }
        }
        // Whatever else is open, also what the agent itself inherited, is not for the program.
        if libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) < 0 {
            return (Step::Setup, errno());
        }
        if launch.terminal && libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
            return (Step::Setup, errno());
        }
        if launch.reset_oom_score && !reset_oom_score() {
            return (Step::Setup, errno());
        }
        if let Some(identity) = launch.identity {
            let (groups, count) = (identity.groups.as_ptr(), identity.groups.len());
            let (uid, gid) = (identity.uid, identity.gid);
            if libc::syscall(libc::SYS_setgroups, count, groups) < 0
                || libc::syscall(libc::SYS_setresgid, gid, gid, gid) < 0
                || libc::syscall(libc::SYS_setresuid, uid, uid, uid) < 0
            {
                return (Step::Identity, errno());
            }
        }
        if libc::chdir(launch.directory.as_ptr()) < 0 {
            return (Step::Directory, errno());
        }
        libc::umask(0o022);
        // Rust ignores SIGPIPE in the agent, and its parent may ignore more; programs expect defaults.
        for signal in 1..32 {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        // Of several failures the one that is not "not there" is the most specific.
        let mut said = libc::ENOENT;
        for program in launch.programs {
            libc::execve(program.as_ptr(), prepared.argv.as_ptr(), prepared.environment.as_ptr());
            match errno() {
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => said = libc::EACCES,
                other => return (Step::Program, other),
            }
        }
        (Step::Program, said)
    }
}

/// Gives the process the neutral score, so that the kernel ends commands before it ends the agent.
fn reset_oom_score() -> bool {
    // SAFETY: system calls on constant arguments.
    unsafe {
        let file = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        file >= 0 && libc::write(file, b"0".as_ptr().cast(), 1) == 1 && libc::close(file) == 0
    }
}

fn errno() -> i32 {
    // SAFETY: reads the calling thread's errno.
    unsafe { *libc::__errno_location() }
}

/// Lets the runtime watch a file.
///
/// # Errors
/// It cannot be watched.
pub fn watch(file: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` that the `AsyncFd` owns stays open and the same for as long as that lives.
    Ok(unsafe { AsyncFd::register(file) }?)
}

/// Keeps the allocator small and quick: one arena, and large buffers come from the heap and stay there for reuse
/// instead of being mapped and unmapped, page fault by page fault, for each chunk of a copy.
pub fn tune_allocator() {
    // SAFETY: sets tuning parameters before any thread exists.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 4 * 1024 * 1024);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 2 * 1024 * 1024);
    }
}

/// Gives memory that is free back to the kernel, after a busy time.
pub fn trim_allocator() {
    // SAFETY: no arguments that point anywhere.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Grows the ext4 file system that `root` is in to `blocks` of its own blocks, online.
///
/// # Errors
/// The kernel refuses.
pub fn resize_ext4(root: &File, blocks: u64) -> io::Result<()> {
    /// `_IOW('f', 16, __u64)`
    const EXT4_IOC_RESIZE_FS: libc::c_ulong = 0x4008_6610;
    // SAFETY: the request reads one u64 behind the pointer.
    let result = unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_RESIZE_FS, &raw const blocks) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Writes everything of the file system that `root` is in, and holds it still.
///
/// # Errors
/// The kernel refuses; `EBUSY` if it is frozen already.
pub fn freeze(root: &File) -> io::Result<()> {
    /// `_IOWR('X', 119, int)`
    const FIFREEZE: libc::c_ulong = 0xc004_5877;
    // SAFETY: the request takes no argument.
    let result = unsafe { libc::ioctl(root.as_raw_fd(), FIFREEZE, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Unfreezes the file system that contains `root`.
///
/// # Errors
/// The kernel refuses; `EINVAL` if it is not frozen.
pub fn thaw(root: &File) -> io::Result<()> {
    /// `_IOWR('X', 120, int)`
    const FITHAW: libc::c_ulong = 0xc004_5878;
    // SAFETY: the request takes no argument.
    let result = unsafe { libc::ioctl(root.as_raw_fd(), FITHAW, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Mixes secret random bytes into the kernel's pool, credits them in full, and makes its generator use them at once.
///
/// # Errors
/// The kernel refuses.
pub fn seed_random(device: &File, bytes: &[u8; ENTROPY_LEN]) -> io::Result<()> {
    /// `_IOW('R', 3, int[2])`
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    /// `_IO('R', 7)`
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    /// `struct rand_pool_info`.
    #[repr(C)]
    struct PoolInfo {
        entropy_bits: libc::c_int,
        length: libc::c_int,
        bytes: [u8; ENTROPY_LEN],
    }
    let info = PoolInfo { entropy_bits: 8 * ENTROPY_LEN as i32, length: ENTROPY_LEN as i32, bytes: *bytes };
    // SAFETY: the request reads the two numbers behind the pointer and as many bytes behind them as the second states.
    let added = unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const info) };
    if added < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the request takes no argument.
    let reseeded = unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG, 0) };
    if reseeded < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether the agent has an out-of-memory score that its children should not inherit.
pub fn has_oom_score() -> bool {
    let score = std::fs::read("/proc/self/oom_score_adj").unwrap_or_default();
    score.trim_ascii() != b"0" && !score.is_empty()
}
