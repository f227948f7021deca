//! Does KVM work here? Proven by running a guest, never believed because `/dev/kvm` opens.
//!
//! Hosts exist whose KVM opens, creates VMs and then interprets the guest's kernel at a thousandth of the speed, or
//! stops at common instructions. Such a verdict is `PresentUnusable` and has the reason. Invariant: the result comes within
//! the deadline whatever the kernel does; `Usable` is returned only after a guest program ran, right and quickly.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::fd::{FromRawFd as _, IntoRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use super::cache;
use super::kvm_vcpu::{self, RunFailure};

const DEVICE: &str = "/dev/kvm";
const CACHE_NAME: &str = "kvm.json";
/// Deadlines of the experiment, set-up included, one for each try. It takes about 10 ms, and half a second on a busy host whose
/// KVM is itself emulated. A host that is busier than that gets longer before nothing is concluded.
const DEADLINES: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(4)];
/// Ten thousand turns of a loop: microseconds where KVM works, 15 ms where the guest is interpreted.
const RUN_MAX: Duration = Duration::from_millis(2);
/// The quickest of so many runs counts, so that a busy host is not taken for a bad one.
const RUNS: u32 = 5;
/// How often a vCPU that does not come back is interrupted.
const KICK_INTERVAL: Duration = Duration::from_millis(5);
/// How often at most.
const KICKS: u32 = 4;

/// Whether KVM can be used, and if not, why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum KvmVerdict {
    /// There is no `/dev/kvm`.
    Absent,
    /// This user may not open it.
    NotPermitted,
    /// It opens and provably does not work; `reason` is one sentence.
    PresentUnusable {
        /// What went wrong.
        reason: String,
    },
    /// It is there, and nothing is proven: the experiment did not end in time, or the kernel was short of something. Never
    /// cached, and never a reason for emulation.
    Undecided {
        /// What kept the experiment from ending.
        reason: String,
    },
    /// A guest ran.
    Usable {
        /// How long the test program took, in microseconds.
        micros: u64,
    },
}

impl KvmVerdict {
    /// Why KVM cannot be used; `None` if it can.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        match self {
            Self::Usable { .. } => None,
            Self::Absent => Some("there is no /dev/kvm".into()),
            Self::NotPermitted => Some("this user may not open /dev/kvm".into()),
            Self::PresentUnusable { reason } | Self::Undecided { reason } => Some(reason.clone()),
        }
    }
}

/// What a verdict depends on: it is valid until the host boots again, the device changes or the user differs.
#[derive(PartialEq, Serialize, Deserialize)]
struct CacheKey {
    boot_id: String,
    uid: u32,
    device: (u64, u64),
    ctime: (i64, i64),
}

/// The verdict: remembered in `cache_dir` until the host's next boot, else by experiment. Blocks.
#[must_use]
pub fn probe(cache_dir: &Path) -> KvmVerdict {
    let device = match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(device) => device,
        Err(error) => return unopened(&error),
    };
    let key = cache_key(Path::new(DEVICE));
    if let Some(verdict) = key.as_ref().and_then(|key| cache::get(cache_dir, CACHE_NAME, key)) {
        return verdict;
    }
    let verdict = experiments(&device.into(), DEADLINES);
    if let (Some(key), KvmVerdict::Usable { .. } | KvmVerdict::PresentUnusable { .. }) = (&key, &verdict) {
        cache::put(cache_dir, CACHE_NAME, key, &verdict);
    }
    verdict
}

/// Runs the experiment again and caches its verdict: after a VM failed under KVM. The failure itself decides nothing, because
/// the guest may have caused it. Blocks.
#[must_use]
pub fn probe_again(cache_dir: &Path) -> KvmVerdict {
    invalidate(cache_dir);
    probe(cache_dir)
}

/// Removes the cached verdict, so that the next [`probe`] experiments again.
pub fn invalidate(cache_dir: &Path) {
    cache::invalidate(cache_dir, CACHE_NAME);
}

/// What gives this user the right to open the device.
#[must_use]
pub fn permission_hint() -> &'static str {
    let (gid, mode) = std::fs::metadata(DEVICE).map_or((0, 0), |device| (device.gid(), device.mode()));
    hint_for(gid, mode)
}

/// The device's own group helps only if it is a group made for this, and may read and write.
fn hint_for(gid: u32, mode: u32) -> &'static str {
    if gid != 0 && mode & 0o060 == 0o060 {
        return "adduser $USER $(stat -c %G /dev/kvm), then log in again";
    }
    "no group may use /dev/kvm; as root: groupadd --system --force kvm, chown root:kvm /dev/kvm, chmod 660 /dev/kvm (udev's rules do \
     this at boot), adduser $USER kvm; then log in again"
}

fn cache_key(device: &Path) -> Option<CacheKey> {
    let meta = std::fs::metadata(device).ok()?;
    Some(CacheKey {
        boot_id: super::boot::boot_id()?,
        uid: rustix::process::geteuid().as_raw(),
        device: (meta.rdev(), meta.ino()),
        ctime: (meta.ctime(), meta.ctime_nsec()),
    })
}

fn unopened(error: &std::io::Error) -> KvmVerdict {
    match error.kind() {
        ErrorKind::NotFound => KvmVerdict::Absent,
        ErrorKind::PermissionDenied => KvmVerdict::NotPermitted,
        _ => judge(Err(RunFailure::from_errno(error.raw_os_error(), format!("cannot open {DEVICE}: {error}")))),
    }
}

/// Repeats an experiment that does not end within its deadline, with longer ones.
fn experiments(device: &OwnedFd, deadlines: impl IntoIterator<Item = Duration>) -> KvmVerdict {
    let mut longest = Duration::ZERO;
    for deadline in deadlines {
        let result = match device.try_clone() {
            Ok(device) => experiment(device, deadline),
            Err(error) => Some(Err(RunFailure::Undecided(format!("KVM could not be tested: {error}")))),
        };
        if let Some(result) = result {
            return judge(result);
        }
        longest = longest.max(deadline);
    }
    let reason = format!("KVM did not run the test program within {} ms; the host may be busy", longest.as_millis());
    KvmVerdict::Undecided { reason }
}

/// What a finished experiment proves.
fn judge(result: Result<Duration, RunFailure>) -> KvmVerdict {
    match result {
        Ok(best) if best <= RUN_MAX => {
            KvmVerdict::Usable { micros: u64::try_from(best.as_micros()).unwrap_or(u64::MAX) }
        }
        Ok(best) => {
            let ms = best.as_millis();
            let reason =
                format!("KVM interprets the guest instead of running it ({ms} ms for 10000 iterations of a loop)");
            KvmVerdict::PresentUnusable { reason }
        }
        Err(RunFailure::Unusable(reason)) => KvmVerdict::PresentUnusable { reason },
        Err(RunFailure::Undecided(reason)) => KvmVerdict::Undecided { reason },
    }
}

enum Message {
    Began(kick::Thread),
    Done(Result<Duration, RunFailure>),
}

/// Runs the test program on a thread of its own and gives it until the deadline; then interrupts it and gives up (`None`).
/// If the kernel does not release the thread even then, the thread is abandoned.
fn experiment(device: OwnedFd, deadline: Duration) -> Option<Result<Duration, RunFailure>> {
    let end = Instant::now() + deadline;
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let _ = sender.send(Message::Began(kick::this_thread()));
        // SAFETY: the descriptor was just opened on the KVM device and nothing else owns it.
        let kvm = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
        let _ = sender.send(Message::Done(kvm_vcpu::best_run(&kvm, RUNS, RUN_MAX / 10)));
    });
    let mut runner = None;
    loop {
        match receiver.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(Message::Began(thread)) => runner = Some(thread),
            Ok(Message::Done(result)) => return Some(result),
            Err(RecvTimeoutError::Disconnected) => {
                return Some(Err(RunFailure::Undecided("the test of KVM ended without a result".into())));
            }
            Err(RecvTimeoutError::Timeout) => break,
        }
    }
    let interrupted = |_: &u32| {
        runner.inspect(|thread| thread.interrupt());
        !matches!(receiver.recv_timeout(KICK_INTERVAL), Err(RecvTimeoutError::Timeout))
    };
    let _ = (0..KICKS).find(interrupted);
    None
}

/// Interrupting a system call of one thread.
mod kick {
    use std::sync::Once;

    /// A thread of this process.
    #[derive(Clone, Copy)]
    pub struct Thread(libc::pid_t);

    /// The calling thread, made interruptible, and by this alone.
    pub fn this_thread() -> Thread {
        static HANDLER: Once = Once::new();
        // SAFETY: the handler does nothing; the signal is one that nothing else here uses; no SA_RESTART, so that
        // the system call it meets returns EINTR.
        HANDLER.call_once(|| unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ignore as *const () as libc::sighandler_t;
            libc::sigaction(signal(), &raw const action, std::ptr::null_mut());
        });
        // SAFETY: the set lives in this frame; the mask is the calling thread's own.
        unsafe {
            let mut others: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut others);
            libc::sigdelset(&raw mut others, signal());
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const others, std::ptr::null_mut());
        }
        // SAFETY: reads the calling thread's id.
        Thread(unsafe { libc::gettid() })
    }

    impl Thread {
        /// Makes its current system call return; does nothing if it has ended.
        pub fn interrupt(self) {
            // SAFETY: sends a signal with an empty handler to a thread of this process; an ended thread gives ESRCH.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.0, signal()) };
        }
    }

    fn signal() -> libc::c_int {
        libc::SIGRTMIN() + 3
    }

    extern "C" fn ignore(_: libc::c_int) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_to_open_kvm_are_distinguished() {
        assert_eq!(unopened(&ErrorKind::NotFound.into()), KvmVerdict::Absent);
        assert_eq!(unopened(&ErrorKind::PermissionDenied.into()), KvmVerdict::NotPermitted);
        let broken = std::io::Error::from_raw_os_error(libc::ENODEV);
        assert!(matches!(unopened(&broken), KvmVerdict::PresentUnusable { .. }));
        for passing in [libc::EBUSY, libc::EMFILE, libc::ENFILE, libc::ENOMEM] {
            let error = std::io::Error::from_raw_os_error(passing);
            assert!(matches!(unopened(&error), KvmVerdict::Undecided { .. }), "{error}");
        }
    }

    #[test]
    fn a_descriptor_that_is_not_kvm_is_no_kvm() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(experiment(file.into(), DEADLINES[0]), Some(Err(RunFailure::Unusable(_)))));
    }

    #[test]
    fn a_thread_that_hangs_in_a_system_call_can_be_interrupted() {
        let (sender, receiver) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            sender.send(kick::this_thread()).unwrap();
            // SAFETY: waits for a signal, for ever if none comes.
            unsafe { libc::pause() }
        });
        let runner = receiver.recv().unwrap();
        while !thread.is_finished() {
            runner.interrupt();
            std::thread::yield_now();
        }
        assert_eq!(thread.join().unwrap(), -1);
    }

    #[test]
    fn only_a_quick_and_right_run_is_kvm() {
        assert_eq!(judge(Ok(Duration::from_micros(24))), KvmVerdict::Usable { micros: 24 });
        assert!(matches!(judge(Ok(Duration::from_millis(8))), KvmVerdict::PresentUnusable { .. }));
        assert_eq!(judge(Err(RunFailure::Unusable("no".into()))), KvmVerdict::PresentUnusable { reason: "no".into() });
        assert_eq!(judge(Err(RunFailure::Undecided("?".into()))), KvmVerdict::Undecided { reason: "?".into() });
    }

    /// A `/dev/kvm` of root's alone had the doctor advise to join the group root, which would not even have helped.
    #[test]
    fn only_a_group_that_may_use_the_device_is_advised() {
        assert!(hint_for(104, 0o20_660).contains("stat -c %G /dev/kvm"));
        for (gid, mode) in [(0, 0o20_600), (0, 0o20_660), (104, 0o20_600), (104, 0o20_640)] {
            let hint = hint_for(gid, mode);
            assert!(hint.contains("kvm /dev/kvm") && !hint.contains("stat"), "{gid} {mode:o}: {hint}");
        }
    }

    /// An experiment that timed out on a busy host counted as proof that KVM is unusable.
    #[test]
    fn an_experiment_that_times_out_proves_nothing() {
        // No experiment ends within no time; the device is never reached.
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(experiments(&file.into(), []), KvmVerdict::Undecided { .. }));
    }

    /// A guest that failed under KVM had a verdict written that its own host's experiment did not support.
    #[test]
    fn only_the_experiment_writes_a_verdict() {
        let dir = tempfile::tempdir().unwrap();
        let key = cache_key(Path::new(DEVICE));
        let forged = KvmVerdict::PresentUnusable { reason: "somebody said so".into() };
        if let Some(key) = &key {
            cache::put(dir.path(), CACHE_NAME, key, &forged);
        }
        let found = probe_again(dir.path());
        assert_ne!(found, forged);
        let cached = key.and_then(|key| cache::get::<_, KvmVerdict>(dir.path(), CACHE_NAME, &key));
        match found {
            KvmVerdict::Usable { .. } | KvmVerdict::PresentUnusable { .. } => assert_eq!(cached, Some(found)),
            KvmVerdict::Absent | KvmVerdict::NotPermitted | KvmVerdict::Undecided { .. } => assert_eq!(cached, None),
        }
    }

    /// Whatever this host is, asking twice gives the same answer, the second time from the cache.
    #[test]
    fn the_verdict_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let first = probe(dir.path());
        assert_eq!(probe(dir.path()), first);
    }
}
