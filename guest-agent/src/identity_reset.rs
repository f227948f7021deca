//! Resets the identity of a guest that was loaded from saved memory.
//!
//! ```text
//! random numbers -> thaw -> clock -> host name -> network -> boot id
//!      -> (the disk is another VM's) machine id -> host keys -> hooks -> identity
//!      -> the saved configuration -> the token, and the end of all other sessions
//! ```
//!
//! It is quick because little code runs: under emulation an instruction costs most when it runs for the first time, and
//! after a load everything does. So there is no thread, files are written in place, and what can be made ready before the
//! save is made ready then ([`prepare`]).
//!
//! Random numbers come before everything derived from them, and before programs that wait for the disk resume. Invariant: if the
//! random numbers, the clock or the saved configuration (it holds the token) fail, the reset ends and the old token stays.
//! Whatever else cannot be done is a warning: a file of the guest's that cannot be written never keeps its owner out.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nido_guest_agent::wire::{ENTROPY_LEN, Fault, IdentityReset, TOKEN_LEN};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use crate::access::SessionId;
use crate::agent::Agent;
use crate::etc_files::{named, replace_file};
use crate::process_limit::ProcessLimit;
use crate::refusal::{Refusal, fault_of};
use crate::role::Role;
use crate::{hostname, identity, init, network, warnings};

const RUN: &str = "/run/nido";
const BOOT_ID: &str = "/run/nido/boot_id";
const KERNEL_BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const NANOS: i64 = 1_000_000_000;

/// Resets the guest's identity for the session `by`, which is then the only one. An agent that does not own its
/// machine leaves that alone and only changes its token.
///
/// # Errors
/// The order is malformed, or a step failed: its name is in the message.
pub async fn reset_identity(agent: &Arc<Agent>, reset: IdentityReset, by: SessionId) -> Result<(), Refusal> {
    let entropy = check(&reset).map_err(|message| Refusal::new(Fault::Invalid, message))?;
    let _only_one = agent.renewing.lock().await;
    if agent.role != Role::Visitor {
        step("the random numbers", reset_random(&entropy))?;
    }
    agent.freezer.thaw().await?;
    warnings::clear();
    let token = reset.token.to_vec();
    if agent.role != Role::Visitor {
        reset_machine(&reset)?;
        reset_disk(agent, &reset).await;
        if agent.role == Role::Service {
            step("the saved configuration", save_config(&reset))?;
        }
        if reset.disk_grown {
            init::grow_root_in_background();
        }
    }
    agent.scopes.process_limit().into_iter().for_each(ProcessLimit::reset_count);
    agent.access.replace(token, by);
    Ok(())
}

/// Whether an order can be carried out; gives its random bytes.
fn check(reset: &IdentityReset) -> Result<[u8; ENTROPY_LEN], String> {
    if reset.token.len() != TOKEN_LEN {
        return Err(format!("the token is not {TOKEN_LEN} bytes long"));
    }
    if reset.time_ns < 0 {
        return Err("the time is before 1970".into());
    }
    if !hostname::is_valid(&reset.hostname) {
        return Err(format!("{:?} cannot be a host name", reset.hostname));
    }
    if !identity::is_valid(&reset.identity) {
        return Err(format!("{:?} cannot be an identity", reset.identity));
    }
    reset.entropy.as_slice().try_into().map_err(|_| format!("there are not {ENTROPY_LEN} random bytes"))
}

/// Names the step that failed.
fn step<T>(name: &str, result: io::Result<T>) -> Result<T, Refusal> {
    result.map_err(|error| Refusal::new(fault_of(&error), format!("resetting {name}: {error}")))
}

/// The steps in the kernel's memory, and the name. None of them waits for anything but the guest's own disk.
fn reset_machine(reset: &IdentityReset) -> Result<(), Refusal> {
    step("the clock", set_clock(reset.time_ns))?;
    hostname::set(&reset.hostname);
    let network = network::set(reset.network.as_ref()).map_err(|error| ("the network", error));
    let boot_id = reset_boot_id().map_err(|error| ("the boot id", error));
    for (what, error) in [network, boot_id].into_iter().filter_map(Result::err) {
        warnings::warn(format!("{what} could not be reset: {error}"));
    }
    Ok(())
}

/// The steps on the disk, unless it is this VM's already. What of it cannot be done is a warning.
async fn reset_disk(agent: &Agent, reset: &IdentityReset) {
    let root = Path::new("/");
    if !identity::is_own(root, &reset.identity) {
        let parts = identity::Parts::All;
        identity::reset_disk(&agent.reaper, root, parts, &reset.hostname, &reset.identity).await;
    }
}

/// Prepares what every identity reset needs, before the guest is saved.
pub fn prepare(agent: &Agent) {
    if agent.role != Role::Visitor
        && let Err(error) = reset_boot_id()
    {
        warnings::warn(format!("the boot id could not be prepared: {error}"));
    }
}

/// Makes the kernel's random numbers differ from those of every twin, from the next one on.
fn reset_random(entropy: &[u8; ENTROPY_LEN]) -> io::Result<()> {
    let device = File::options().write(true).open("/dev/urandom").map_err(named("/dev/urandom"))?;
    crate::sys::seed_random(&device, entropy)
}

/// How far the clock may be behind the host's, and before it: a step back is worse for programs than a small difference.
const CLOCK_BEHIND_MAX_NS: i64 = 20_000_000;
const CLOCK_AHEAD_MAX_NS: i64 = NANOS / 2;

/// Sets the clock of a guest whose CPUs were paused. An agent that does not own its machine leaves the clock alone.
///
/// # Errors
/// The time is before 1970, or the kernel refuses.
pub fn correct_clock(agent: &Agent, time_ns: i64) -> Result<(), Refusal> {
    if time_ns < 0 {
        return Err(Refusal::new(Fault::Invalid, "the time is before 1970"));
    }
    let now = clock_gettime(ClockId::Realtime);
    let now = now.tv_sec.saturating_mul(NANOS).saturating_add(now.tv_nsec);
    if agent.role == Role::Visitor || !is_wrong(now, time_ns) {
        return Ok(());
    }
    set_clock(time_ns).map_err(|error| Refusal::from_io("the clock", &error))
}

/// Whether a clock that shows `now` is to be set to `right`.
const fn is_wrong(now: i64, right: i64) -> bool {
    let behind = right.saturating_sub(now);
    behind > CLOCK_BEHIND_MAX_NS || behind < -CLOCK_AHEAD_MAX_NS
}

fn set_clock(time_ns: i64) -> io::Result<()> {
    let time = Timespec { tv_sec: time_ns.div_euclid(NANOS), tv_nsec: time_ns.rem_euclid(NANOS) };
    Ok(clock_settime(ClockId::Realtime, time)?)
}

/// Puts a fresh boot id where programs read the kernel's, which is a constant of the saved memory.
fn reset_boot_id() -> io::Result<()> {
    let line = uuid_line(identity::random_uuid()?);
    // In place, for what is mounted is the file itself; a new file gets its mode by being new.
    match File::options().write(true).open(BOOT_ID) {
        Ok(mut file) => io::Write::write_all(&mut file, line.as_bytes()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(RUN).map_err(named(RUN))?;
            replace_file(Path::new(BOOT_ID), line.as_bytes(), 0o444)
        }
        Err(error) => Err(error),
    }
    .map_err(named(BOOT_ID))?;
    if IS_MOUNTED.load(Ordering::Relaxed) {
        return Ok(());
    }
    let file = |path: &str| fs::metadata(path).map(|facts| (facts.dev(), facts.ino())).map_err(named(path));
    if file(BOOT_ID)? != file(KERNEL_BOOT_ID)? {
        rustix::mount::mount_bind(BOOT_ID, KERNEL_BOOT_ID).map_err(|error| named(KERNEL_BOOT_ID)(error.into()))?;
    }
    IS_MOUNTED.store(true, Ordering::Relaxed);
    Ok(())
}

/// The boot id lies over the kernel's.
static IS_MOUNTED: AtomicBool = AtomicBool::new(false);

/// A UUID as the kernel writes it.
fn uuid_line(uuid: u128) -> String {
    let hex = format!("{uuid:032x}");
    format!("{}-{}-{}-{}-{}\n", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Changes what an agent that is started again as a service would read: an older token must not come back.
fn save_config(reset: &IdentityReset) -> io::Result<()> {
    let mut config = crate::read_config(init::SAVED_CONFIG)?;
    config.token = reset.token.clone();
    config.hostname.clone_from(&reset.hostname);
    config.identity.clone_from(&reset.identity);
    config.network.clone_from(&reset.network);
    let bytes = minicbor::to_vec(&config).map_err(io::Error::other)?;
    replace_file(Path::new(init::SAVED_CONFIG), &bytes, 0o600)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reset() -> IdentityReset {
        IdentityReset {
            token: vec![1; TOKEN_LEN].into(),
            entropy: vec![2; ENTROPY_LEN].into(),
            time_ns: 0,
            hostname: "web".into(),
            identity: "0123abc".into(),
            network: None,
            disk_grown: false,
        }
    }

    #[test]
    fn an_incomplete_reset_is_refused() {
        assert_eq!(check(&reset()).unwrap(), [2; ENTROPY_LEN]);
        for bad in [
            IdentityReset { token: vec![1; TOKEN_LEN - 1].into(), ..reset() },
            IdentityReset { token: Vec::new().into(), ..reset() },
            IdentityReset { entropy: vec![2; ENTROPY_LEN + 1].into(), ..reset() },
            IdentityReset { entropy: Vec::new().into(), ..reset() },
            IdentityReset { time_ns: -1, ..reset() },
            IdentityReset { hostname: "a b".into(), ..reset() },
            IdentityReset { identity: String::new(), ..reset() },
            IdentityReset { identity: "../x".into(), ..reset() },
        ] {
            assert!(check(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_clock_steps_forward_readily_and_back_only_far() {
        let s = NANOS;
        assert!(is_wrong(100 * s, 145 * s));
        assert!(is_wrong(100 * s, 100 * s + CLOCK_BEHIND_MAX_NS + 1));
        assert!(!is_wrong(100 * s, 100 * s));
        assert!(!is_wrong(100 * s, 100 * s - s / 4));
        assert!(is_wrong(100 * s, 40 * s));
    }

    #[test]
    fn a_boot_id_has_the_kernels_format() {
        let line = uuid_line(0x0123_4567_89ab_4def_8123_4567_89ab_cdef);
        assert_eq!(line, "01234567-89ab-4def-8123-456789abcdef\n");
        assert_eq!(line.len(), fs::read(KERNEL_BOOT_ID).unwrap().len());
    }
}
