//! The guest's name, in the kernel and in the files that programs read.
//!
//! Invariant: the hosts file keeps every line that is not the agent's own, byte for byte, and a file that cannot be read or
//! written is a warning: the name in the kernel counts.

use std::io;
use std::path::Path;

use crate::etc_files::{PUBLIC, overwrite_file, read_file};
use crate::warnings::warn;

/// Longest name the kernel takes, in bytes.
const MAX_NAME: usize = 64;
/// The address of the guest's own line in the hosts file, as Debian writes it.
const OWN: &[u8] = b"127.0.1.1";
/// The hosts file for a guest that has none.
const NO_HOSTS: &[u8] = b"127.0.0.1\tlocalhost\n::1\tlocalhost\n";

/// Whether a name can be a host name: what goes into `/etc/hosts` must be one word.
pub fn is_valid(name: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(is_part)
}

/// Gives the guest its name. Costs little if it has it already. What cannot be done is a warning.
pub fn set(name: &str) {
    let former = rustix::system::uname().nodename().to_bytes().to_vec();
    if let Err(error) = nix::unistd::sethostname(name) {
        warn(format!("the kernel rejected the host name: {error}"));
    }
    write_files(Path::new("/"), name, former).into_iter().for_each(warn);
}

/// Writes the name into the files below `root`; gives what could not be done. `former` is the name up to now.
fn write_files(root: &Path, name: &str, former: Vec<u8>) -> Vec<String> {
    let (hostname, hosts) = (root.join("etc/hostname"), root.join("etc/hosts"));
    // A file that cannot be read contains no name: then the line of an earlier name stays, too.
    let listed = read_file(&hostname).map(|text| text.trim_ascii().to_vec()).unwrap_or_default();
    let names = [former, listed, name.as_bytes().to_vec()];
    let written = overwrite_file(&hostname, format!("{name}\n").as_bytes(), PUBLIC);
    let warning = |path: &Path| {
        let path = path.display().to_string();
        move |error: io::Error| format!("the host name is not in {path}: {error}")
    };
    let in_hosts = present_hosts(&hosts).and_then(|present| {
        let wanted = own_hosts(&present, name, &names);
        if wanted == present { Ok(()) } else { overwrite_file(&hosts, &wanted, PUBLIC) }
    });
    [written.map_err(warning(&hostname)), in_hosts.map_err(warning(&hosts))]
        .into_iter()
        .filter_map(Result::err)
        .collect()
}

/// The hosts file as it is. Only a missing one is created.
fn present_hosts(path: &Path) -> io::Result<Vec<u8>> {
    match read_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(NO_HOSTS.to_vec()),
        read => read,
    }
}

/// The hosts file with one line for the guest itself. Its own line is distinguished from the user's by its form: address, tab, one
/// of the guest's names, and nothing else. A line of the user's that has the name already serves as well.
fn own_hosts(present: &[u8], name: &str, names: &[Vec<u8>]) -> Vec<u8> {
    let own = [OWN, b"\t", name.as_bytes(), b"\n"].concat();
    let is_own = |line: &[u8]| {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let word = line.strip_prefix(OWN).and_then(|rest| rest.strip_prefix(b"\t"));
        word.is_some_and(|word| !word.is_empty() && names.iter().any(|name| name == word))
    };
    let mut is_there = present.split_inclusive(|&byte| byte == b'\n').any(|line| !is_own(line) && lists(line, name));
    let mut hosts = Vec::with_capacity(present.len() + own.len());
    for line in present.split_inclusive(|&byte| byte == b'\n') {
        match is_own(line) {
            false => hosts.extend_from_slice(line),
            true if is_there => {}
            true => {
                hosts.extend_from_slice(&own);
                is_there = true;
            }
        }
    }
    if !is_there {
        if hosts.last().is_some_and(|&byte| byte != b'\n') {
            hosts.push(b'\n');
        }
        hosts.extend_from_slice(&own);
    }
    hosts
}

/// Whether a line gives the guest's own address this name.
fn lists(line: &[u8], name: &str) -> bool {
    let text = line.split(|&byte| byte == b'#').next().unwrap_or_default();
    let mut words = text.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    words.next() == Some(OWN) && words.any(|word| word == name.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn hosts(present: &[u8], name: &str, former: &str) -> Vec<u8> {
        own_hosts(present, name, &[former.into(), name.into()])
    }

    #[test]
    fn the_guest_is_in_its_own_hosts_file_once() {
        let first = hosts(b"127.0.0.1\tlocalhost\n", "web", "vm");
        assert_eq!(first, b"127.0.0.1\tlocalhost\n127.0.1.1\tweb\n");
        assert_eq!(hosts(&first, "db", "web"), b"127.0.0.1\tlocalhost\n127.0.1.1\tdb\n");
        assert_eq!(hosts(&first, "web", "web"), first);
        assert_eq!(hosts(b"", "web", "vm"), b"127.0.1.1\tweb\n");
        let between = b"127.0.1.1\tvm\n::1\tlocalhost\n127.0.1.1\tvm\n";
        assert_eq!(hosts(between, "web", "vm"), b"127.0.1.1\tweb\n::1\tlocalhost\n");
    }

    #[test]
    fn every_line_of_the_users_stays_as_it_is() {
        // A byte that is not UTF-8 emptied the file, and aliases of 127.0.1.1 were dropped.
        let users = b"# caf\xe9\r\n10.0.0.5\tdb # caf\xe9\n127.0.1.1\tweb.example web\n\n  127.0.1.1 x\n127.0.1.1\tother\n\tend";
        let after = hosts(users, "a", "b");
        assert_eq!(after, [&users[..], b"\n127.0.1.1\ta\n"].concat());
        assert_eq!(hosts(&after, "c", "a"), [&users[..], b"\n127.0.1.1\tc\n"].concat());
        // The user's own line for the name is as good.
        assert_eq!(hosts(users, "web", "b"), users);
        assert_eq!(hosts(b"127.0.1.1 b # a\n", "a", "x"), b"127.0.1.1 b # a\n127.0.1.1\ta\n");
    }

    #[test]
    fn files_that_cannot_be_written_are_warnings_and_stay_as_they_are() {
        // A hosts file that the agent could not write kept the VM from ever starting again.
        let root = tempfile::tempdir().unwrap();
        let etc = root.path().join("etc");
        fs::create_dir_all(etc.join("hosts/in-the-way")).unwrap();
        let warnings = write_files(root.path(), "web", b"vm".to_vec());
        assert_eq!(fs::read(etc.join("hostname")).unwrap(), b"web\n");
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("etc/hosts: not a regular file"), "{warnings:?}");
        assert_eq!(fs::read_dir(&etc).unwrap().count(), 2);

        fs::remove_dir_all(etc.join("hosts")).unwrap();
        assert_eq!(write_files(root.path(), "web", b"vm".to_vec()), Vec::<String>::new());
        assert_eq!(fs::read(etc.join("hosts")).unwrap(), [NO_HOSTS, b"127.0.1.1\tweb\n"].concat());

        fs::remove_dir_all(&etc).unwrap();
        assert_eq!(write_files(root.path(), "web", b"vm".to_vec()).len(), 2);
    }

    #[test]
    fn the_previous_name_is_read_from_its_file() {
        // At a cold boot the kernel has no name yet.
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("etc")).unwrap();
        fs::write(root.path().join("etc/hostname"), "vm\n").unwrap();
        fs::write(root.path().join("etc/hosts"), "127.0.0.1\tlocalhost\n127.0.1.1\tvm\n::1\tlocalhost\n").unwrap();
        assert_eq!(write_files(root.path(), "web", b"(none)".to_vec()), Vec::<String>::new());
        let wanted = "127.0.0.1\tlocalhost\n127.0.1.1\tweb\n::1\tlocalhost\n";
        assert_eq!(fs::read_to_string(root.path().join("etc/hosts")).unwrap(), wanted);
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
