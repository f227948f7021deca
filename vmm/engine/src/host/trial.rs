//! A confinement that is tried in a process that ends at once: whether this host allows it, and what that depends on.
#![allow(unsafe_code)]

use std::fs;
use std::os::fd::{AsRawFd as _, OwnedFd};

use serde::{Deserialize, Serialize};

use crate::confine::{Confinement, Step};

/// Switches of the kernel and of distributions that forbid user namespaces, or the rights in them.
const SWITCHES: [&str; 4] = [
    "/proc/sys/user/max_user_namespaces",
    "/proc/sys/kernel/unprivileged_userns_clone",
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
    "/proc/self/attr/current",
];

/// What the verdict on namespaces depends on.
#[derive(PartialEq, Serialize, Deserialize)]
pub(super) struct CacheKey {
    boot_id: String,
    uid: u32,
    /// The user namespace of this process.
    namespace: String,
    switches: Vec<String>,
}

/// The same of this process; `None` if the host cannot be told apart from the one before its last boot.
pub(super) fn cache_key() -> Option<CacheKey> {
    let switch = |path: &&str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    Some(CacheKey {
        boot_id: super::boot::boot_id()?,
        uid: rustix::process::geteuid().as_raw(),
        namespace: fs::read_link("/proc/self/ns/user").ok()?.to_string_lossy().into_owned(),
        switches: SWITCHES.iter().map(switch).collect(),
    })
}

/// What an attempt to enter namespaces has shown.
pub(super) struct Attempt {
    /// Why no process of this user can have namespaces of its own; `None` if it can.
    pub trouble: Option<String>,
    /// The host allows or forbids it. Otherwise the system was short of something, which passes.
    pub is_proof: bool,
}

/// Whether an error says that the host forbids namespaces or does not have what they need.
fn is_refusal(error: &std::io::Error) -> bool {
    [libc::EPERM, libc::EACCES, libc::ENOSYS, libc::EINVAL].map(Some).contains(&error.raw_os_error())
}

/// What the result of [`in_a_child`] shows.
pub(super) fn judge(result: std::io::Result<Option<(Step, std::io::Error)>>) -> Attempt {
    match result {
        Ok(None) => Attempt { trouble: None, is_proof: true },
        Ok(Some((step, error))) => {
            let trouble = format!("{}: {error}", step.name().to_string_lossy());
            Attempt { trouble: Some(trouble), is_proof: is_refusal(&error) }
        }
        Err(error) => Attempt { trouble: Some(format!("they could not be tried: {error}")), is_proof: false },
    }
}

/// Enters a confinement in a child that ends then. Returns what failed there.
pub(super) fn in_a_child(confinement: &mut Confinement) -> std::io::Result<Option<(Step, std::io::Error)>> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // SAFETY: the child makes system calls only, and ends without running anything of this program's.
    let pid = unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            if let Err(failure) = confinement.enter() {
                let failure = [failure.step as i32, failure.errno];
                libc::write(writer.as_raw_fd(), failure.as_ptr().cast(), size_of_val(&failure));
            }
            libc::_exit(0);
        }
        pid
    };
    if pid == -1 {
        return Err(std::io::Error::last_os_error());
    }
    drop(writer);
    let failure = read_failure(&reader);
    // SAFETY: waits for the child of this function, which nothing else waits for.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    failure
}

fn read_failure(reader: &OwnedFd) -> std::io::Result<Option<(Step, std::io::Error)>> {
    let mut bytes = [0; 8];
    let read = rustix::io::retry_on_intr(|| rustix::io::read(reader, &mut bytes))?;
    let word = |at: usize| i32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let step = Step::ALL.into_iter().find(|step| *step as i32 == word(0));
    Ok(step.filter(|_| read == bytes.len()).map(|step| (step, std::io::Error::from_raw_os_error(word(4)))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::confine::{Layer, Needs, plan};

    /// A host that was short of memory once would confine less until its next boot.
    #[test]
    fn only_a_refusal_is_cached() {
        let error = std::io::Error::from_raw_os_error;
        assert!(is_refusal(&error(libc::EPERM)) && is_refusal(&error(libc::ENOSYS)));
        assert!(
            ![libc::ENOMEM, libc::ENOSPC, libc::EAGAIN, libc::EMFILE, libc::ENFILE].map(error).iter().any(is_refusal)
        );
    }

    #[test]
    fn a_failure_names_its_step() {
        let plan = plan::plan(&Needs {
            program: "/no/such/program".into(),
            directory: "/no/such/directory".into(),
            own: vec!["/no/such/directory".into()],
            ..Needs::default()
        });
        let Ok(mut confinement) = Confinement::prepare(plan, &[Layer::Namespaces]) else { panic!("no root") };
        let (step, error) = in_a_child(&mut confinement).unwrap().unwrap();
        assert!([Step::Mount, Step::Unshare, Step::MapUser].contains(&step), "{step:?}: {error}");
    }
}
