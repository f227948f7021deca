//! How a VM ended, from everything that was seen: pure.

use nido_api::Failure;
use nido_api::state::{Fact, FailureCause, VmState, advance};
use nido_engine::qemu::QemuExit;

/// What was seen of the end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExitEvidence {
    /// QMP's word for why the machine shut down: `guest-shutdown`, `guest-reset`, `host-qmp-quit`, …
    pub shutdown_reason: Option<String>,
    /// The guest's kernel reported a panic.
    pub panicked: bool,
    /// The guest did not become ready in time, so the plug was pulled.
    pub late_after_ms: Option<u64>,
    /// The guest agent answered, and there can be no session with it; the cause, and why in a sentence.
    pub refused: Option<(FailureCause, String)>,
    /// It was loaded and could not be made a machine of its own; why.
    pub not_renewed: Option<String>,
    /// KVM gave up.
    pub kvm_error: bool,
    /// The disk that holds nido's home had no space left when QEMU ended.
    pub disk_full: bool,
    /// The limit of the VM's memory on the host, in bytes, if the kernel killed a process for it.
    pub memory_limit: Option<u64>,
    /// The last lines of QEMU's own output.
    pub qemu_tail: Vec<String>,
    /// The last lines of the guest's console.
    pub console_tail: Vec<String>,
}

impl ExitEvidence {
    /// Whether words on the console may be those of a kernel that panicked. Any program of the guest's can write them; a kernel that
    /// panics does not power off in order afterwards.
    #[must_use]
    pub fn may_have_panicked(&self) -> bool {
        self.shutdown_reason.as_deref() != Some("guest-shutdown")
    }
}

/// The state a VM ends in, and why if that is a failure. `state` is the one before QEMU ended.
#[must_use]
pub fn exit_cause(state: VmState, exit: QemuExit, seen: &ExitEvidence) -> (VmState, Option<Failure>) {
    if let Some((cause, message)) = guest_trouble(seen) {
        return (VmState::Failed, Some(Failure { cause, message, log_tail: seen.console_tail.clone() }));
    }
    // A guest that was stopped during its identity reset was stopped and did not fail.
    if let (Some(why), QemuExit::Code(0) | QemuExit::Unknown) = (&seen.not_renewed, exit)
        && state != VmState::Stopping
    {
        let message = format!("the guest's identity could not be reset: {why}");
        let failure = Failure { cause: FailureCause::RenewalFailed, message, log_tail: seen.console_tail.clone() };
        return (VmState::Failed, Some(failure));
    }
    let clean = match exit {
        QemuExit::Code(0) => true,
        // Not our child: only the monitor could have reported it.
        QemuExit::Unknown => seen.shutdown_reason.is_some(),
        QemuExit::Code(_) | QemuExit::Signal(_) => false,
    };
    let state = match (state, seen.shutdown_reason.as_deref()) {
        // A guest that restarts ends QEMU too; it ended as it wanted to.
        (VmState::Starting | VmState::Running | VmState::Paused, Some("guest-shutdown" | "guest-reset")) if clean => {
            advance(state, Fact::GuestShutdown)
        }
        _ => state,
    };
    let ended = advance(state, Fact::QemuExited { clean });
    let failure = (ended == VmState::Failed).then(|| {
        let (cause, message) = qemu_trouble(exit, seen);
        let log_tail = if seen.qemu_tail.is_empty() { seen.console_tail.clone() } else { seen.qemu_tail.clone() };
        Failure { cause, message, log_tail }
    });
    (ended, failure)
}

fn guest_trouble(seen: &ExitEvidence) -> Option<(FailureCause, String)> {
    if seen.panicked {
        return Some((FailureCause::GuestPanic, "the guest's kernel panicked".into()));
    }
    if seen.kvm_error {
        return Some((FailureCause::KvmInternalError, "KVM could not run the guest's instructions".into()));
    }
    if let Some(refused) = &seen.refused {
        return Some(refused.clone());
    }
    let late = seen.late_after_ms?;
    Some((FailureCause::GuestTimeout, format!("the guest agent did not reply within {:.1} s", late as f64 / 1000.0)))
}

fn qemu_trouble(exit: QemuExit, seen: &ExitEvidence) -> (FailureCause, String) {
    let said = |word: &str| seen.qemu_tail.iter().any(|line| line.contains(word));
    if said("Cannot allocate memory") || said("cannot set up guest memory") {
        return (FailureCause::OutOfMemory, "the host does not have enough memory for the VM".into());
    }
    if said("No space left on device") {
        return (FailureCause::DiskFull, "the host's disk is full".into());
    }
    match exit {
        QemuExit::Signal(9) | QemuExit::Unknown if seen.memory_limit.is_some() => {
            let mib = seen.memory_limit.unwrap_or_default() >> 20;
            let words = format!("QEMU was killed: the VM's memory on the host was used up (limit {mib} MiB)");
            (FailureCause::OutOfMemory, words)
        }
        QemuExit::Signal(9) => (
            FailureCause::QemuSignal,
            "QEMU was killed (signal 9), possibly by the kernel's out-of-memory killer".into(),
        ),
        // A page of its memory image could not be had.
        QemuExit::Signal(7) if seen.disk_full => (
            FailureCause::DiskFull,
            "QEMU was killed by signal 7: the file system that holds the VM's memory image is full".into(),
        ),
        QemuExit::Signal(signal) => (FailureCause::QemuSignal, format!("QEMU was killed by signal {signal}")),
        QemuExit::Code(0) => (FailureCause::QemuError, "QEMU ended before the guest was up".into()),
        QemuExit::Code(code) => (FailureCause::QemuError, format!("QEMU ended with exit code {code}")),
        QemuExit::Unknown => (FailureCause::QemuError, "QEMU ended with an unknown exit status".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(reason: &str) -> ExitEvidence {
        ExitEvidence { shutdown_reason: Some(reason.into()), ..ExitEvidence::default() }
    }

    #[test]
    fn a_guest_that_powers_itself_off_has_stopped() {
        for exit in [QemuExit::Code(0), QemuExit::Unknown] {
            for reason in ["guest-shutdown", "guest-reset"] {
                assert_eq!(exit_cause(VmState::Running, exit, &seen(reason)), (VmState::Stopped, None));
            }
        }
    }

    #[test]
    fn a_requested_stop_is_never_a_failure() {
        for exit in [QemuExit::Code(0), QemuExit::Signal(9), QemuExit::Unknown] {
            assert_eq!(exit_cause(VmState::Stopping, exit, &ExitEvidence::default()), (VmState::Stopped, None));
        }
    }

    #[test]
    fn a_panic_is_a_failure_even_though_qemu_ended_well() {
        let panicked = ExitEvidence { panicked: true, ..seen("guest-reset") };
        let (state, failure) = exit_cause(VmState::Running, QemuExit::Code(0), &panicked);
        assert_eq!((state, failure.unwrap().cause), (VmState::Failed, FailureCause::GuestPanic));
    }

    /// A guest that wrote the words of a panic to its console and powered off was reported as failed.
    #[test]
    fn a_power_off_is_not_a_panic_whatever_the_console_shows() {
        assert!(!seen("guest-shutdown").may_have_panicked());
        assert!(seen("guest-reset").may_have_panicked());
        assert!(ExitEvidence::default().may_have_panicked());
    }

    #[test]
    fn exit_causes_are_distinguished() {
        let cause = |exit, tail: &str| {
            let seen = ExitEvidence { qemu_tail: vec![tail.into()], ..ExitEvidence::default() };
            exit_cause(VmState::Running, exit, &seen).1.unwrap().cause
        };
        assert_eq!(cause(QemuExit::Signal(9), ""), FailureCause::QemuSignal);
        assert_eq!(cause(QemuExit::Code(1), "oh"), FailureCause::QemuError);
        assert_eq!(
            cause(QemuExit::Code(1), "qemu: cannot set up guest memory 'ram': Cannot allocate memory"),
            FailureCause::OutOfMemory
        );
        assert_eq!(cause(QemuExit::Code(1), "write: No space left on device"), FailureCause::DiskFull);
    }

    #[test]
    fn a_qemu_that_used_up_its_memory_is_out_of_memory() {
        let seen = ExitEvidence { memory_limit: Some(1 << 30), ..ExitEvidence::default() };
        for exit in [QemuExit::Signal(9), QemuExit::Unknown] {
            let failure = exit_cause(VmState::Running, exit, &seen).1.unwrap();
            assert_eq!(failure.cause, FailureCause::OutOfMemory);
            assert!(failure.message.contains("limit 1024 MiB"), "{}", failure.message);
        }
    }

    /// A guest whose agent speaks another protocol was reported as one that did not answer within a minute, at once.
    #[test]
    fn a_guest_that_refuses_is_not_reported_as_late() {
        let words = "the guest agent speaks protocol version 9, this nido speaks 3";
        let refused =
            ExitEvidence { refused: Some((FailureCause::AgentVersion, words.into())), ..ExitEvidence::default() };
        let (state, failure) = exit_cause(VmState::Running, QemuExit::Code(0), &refused);
        let failure = failure.unwrap();
        assert_eq!(
            (state, failure.cause, failure.message.as_str()),
            (VmState::Failed, FailureCause::AgentVersion, words)
        );
    }

    #[test]
    fn a_late_guest_is_reported_with_its_timeout() {
        let late = ExitEvidence { late_after_ms: Some(1500), ..ExitEvidence::default() };
        let (_, failure) = exit_cause(VmState::Running, QemuExit::Code(0), &late);
        assert_eq!(failure.unwrap().message, "the guest agent did not reply within 1.5 s");
    }
}
