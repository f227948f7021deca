//! The guest's name, in the kernel and in the files that programs read.
//!
//! Invariant: the hosts file keeps every line that is not about the guest itself.

use std::fs;
use std::io;
use std::path::Path;

use crate::etc::{PUBLIC, named, overwrite_file};

/// Longest name the kernel takes, in bytes.
const MAX_NAME: usize = 64;

/// Whether a name can be a host name: what goes into `/etc/hosts` must be one word.
pub fn is_valid(name: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(is_part)
}

/// Gives the guest its name. Costs little if it has it already.
///
/// # Errors
/// The kernel or the file system refuses.
pub fn set(name: &str) -> io::Result<()> {
    nix::unistd::sethostname(name).map_err(|error| named("setting the host name")(error.into()))?;
    overwrite_file(Path::new("/etc/hostname"), format!("{name}\n").as_bytes(), PUBLIC)
        .map_err(named("/etc/hostname"))?;
    let hosts = Path::new("/etc/hosts");
    let present = fs::read_to_string(hosts).unwrap_or_else(|_| "127.0.0.1\tlocalhost\n::1\tlocalhost\n".into());
    overwrite_file(hosts, own_hosts(&present, name).as_bytes(), PUBLIC).map_err(named("/etc/hosts"))
}

/// The hosts file with one line for the guest itself, as Debian writes it.
fn own_hosts(present: &str, name: &str) -> String {
    const OWN: &str = "127.0.1.1";
    let others = present.lines().filter(|line| line.split_whitespace().next() != Some(OWN));
    others.map(|line| format!("{line}\n")).collect::<String>() + &format!("{OWN}\t{name}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_is_in_its_own_hosts_file_once() {
        let first = own_hosts("127.0.0.1\tlocalhost\n", "web");
        assert_eq!(first, "127.0.0.1\tlocalhost\n127.0.1.1\tweb\n");
        assert_eq!(own_hosts(&first, "db"), "127.0.0.1\tlocalhost\n127.0.1.1\tdb\n");
    }

    #[test]
    fn a_name_is_one_word() {
        for good in ["web", "a.b-c_1", &"x".repeat(64)] {
            assert!(is_valid(good), "{good:?}");
        }
        for bad in ["", "a b", "a\nb", "a\tb", "ä", &"x".repeat(65)] {
            assert!(!is_valid(bad), "{bad:?}");
        }
    }
}
