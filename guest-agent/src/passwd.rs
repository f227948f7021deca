//! Users and groups from `/etc/passwd` and `/etc/group`, read directly: a static program has no name service.
//!
//! Invariant: a user that is not in the file does not exist.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Longest file that is read, in bytes.
const MAX_FILE: u64 = 4 * 1024 * 1024;

/// One user of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Login name.
    pub name: Vec<u8>,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Home directory.
    pub home: PathBuf,
    /// Login shell.
    pub shell: PathBuf,
}

impl User {
    /// Root, as it is where no file says otherwise.
    fn root() -> Self {
        Self { name: b"root".to_vec(), uid: 0, gid: 0, home: "/root".into(), shell: "/bin/sh".into() }
    }
}

/// Finds a user by name or numeric id.
///
/// # Errors
/// The file is there and cannot be read.
pub fn find(wanted: &str) -> io::Result<Option<User>> {
    let found = parse_user(&read("/etc/passwd")?, wanted);
    Ok(found.or_else(|| (wanted == "root" || wanted == "0").then(User::root)))
}

/// Every group a user is in, its own first.
///
/// # Errors
/// The file is there and cannot be read.
pub fn groups(user: &User) -> io::Result<Vec<u32>> {
    let mut groups = parse_groups(&read("/etc/group")?, &user.name);
    groups.retain(|&gid| gid != user.gid);
    groups.insert(0, user.gid);
    Ok(groups)
}

fn read(path: &str) -> io::Result<Vec<u8>> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    match std::fs::File::open(Path::new(path)) {
        Ok(file) => file.take(MAX_FILE).read_to_end(&mut bytes)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    Ok(bytes)
}

fn fields(line: &[u8]) -> Vec<&[u8]> {
    line.split(|&byte| byte == b':').collect()
}

fn number(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn parse_user(file: &[u8], wanted: &str) -> Option<User> {
    let wanted_id = number(wanted.as_bytes());
    file.split(|&byte| byte == b'\n').find_map(|line| {
        let [name, _, uid, gid, _, home, shell] = fields(line)[..] else { return None };
        let (uid, gid) = (number(uid)?, number(gid)?);
        if name != wanted.as_bytes() && wanted_id != Some(uid) {
            return None;
        }
        let path = |bytes: &[u8], absent: &str| match bytes {
            [] => PathBuf::from(absent),
            bytes => OsString::from_vec(bytes.to_vec()).into(),
        };
        Some(User { name: name.to_vec(), uid, gid, home: path(home, "/"), shell: path(shell, "/bin/sh") })
    })
}

fn parse_groups(file: &[u8], user: &[u8]) -> Vec<u32> {
    let lines = file.split(|&byte| byte == b'\n');
    lines
        .filter_map(|line| {
            let [_, _, gid, members] = fields(line)[..] else { return None };
            members.split(|&byte| byte == b',').any(|member| member == user).then(|| number(gid))?
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/bash\nbroken\nuser:x:1000:100:,,,:/home/user:\n";

    #[test]
    fn users_are_found_by_name_and_by_id() {
        let user = parse_user(PASSWD, "user").unwrap();
        assert_eq!((user.uid, user.gid, user.home.as_path()), (1000, 100, Path::new("/home/user")));
        assert_eq!(user.shell, Path::new("/bin/sh"));
        assert_eq!(parse_user(PASSWD, "1000"), Some(user));
        assert_eq!(parse_user(PASSWD, "broken"), None);
        assert_eq!(parse_user(PASSWD, ""), None);
    }

    #[test]
    fn groups_are_those_that_list_the_user() {
        let file = b"root:x:0:\nsudo:x:27:other,user\nadm:x:4:users\nvideo:x:44:user";
        assert_eq!(parse_groups(file, b"user"), [27, 44]);
    }
}
