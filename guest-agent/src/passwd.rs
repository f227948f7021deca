//! Users and groups from `/etc/passwd` and `/etc/group`, read directly: a static program has no name service.
//!
//! Invariant: a name that is not in the files does not exist; a number need not be in them.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::etc_files::read_file;

/// One user of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Login name.
    pub name: Vec<u8>,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// The group was named by the caller, and is the only one.
    pub has_given_group: bool,
    /// Home directory.
    pub home: PathBuf,
    /// Login shell.
    pub shell: PathBuf,
}

impl User {
    fn new(name: &[u8], uid: u32, gid: u32, home: PathBuf, shell: PathBuf) -> Self {
        Self { name: name.to_vec(), uid, gid, has_given_group: false, home, shell }
    }

    /// A user that only has a number.
    fn nameless(uid: u32) -> Self {
        Self::new(uid.to_string().as_bytes(), uid, 0, "/".into(), "/bin/sh".into())
    }

    /// Root, as it is where no file defines otherwise.
    fn root() -> Self {
        Self::new(b"root", 0, 0, "/root".into(), "/bin/sh".into())
    }
}

/// Finds a user as `docker exec --user` does: `USER`, `USER:GROUP` or `:GROUP`, each a name or a number. A number that is in
/// no file is valid, too, then with group 0 and the root directory as home. None if a name does not exist.
///
/// # Errors
/// A file is there and cannot be read.
pub fn find(wanted: &str) -> io::Result<Option<User>> {
    let (user, group) = split(wanted);
    let Some(mut found) = find_user(&read("/etc/passwd")?, user) else { return Ok(None) };
    if let Some(group) = group {
        let Some(gid) = find_group(&read("/etc/group")?, group) else { return Ok(None) };
        (found.gid, found.has_given_group) = (gid, true);
    }
    Ok(Some(found))
}

/// The error text for a user or group that was not found.
pub fn missing(wanted: &str) -> String {
    let (user, group) = split(wanted);
    let has_user = read("/etc/passwd").is_ok_and(|file| find_user(&file, user).is_some());
    match group {
        Some(group) if has_user => format!("there is no group '{group}' in the guest"),
        _ => format!("there is no user '{user}' in the guest"),
    }
}

/// Every group a user is in, its own first.
///
/// # Errors
/// The file is there and cannot be read.
pub fn groups(user: &User) -> io::Result<Vec<u32>> {
    if user.has_given_group {
        return Ok(vec![user.gid]);
    }
    let mut groups = parse_groups(&read("/etc/group")?, &user.name);
    groups.retain(|&gid| gid != user.gid);
    groups.insert(0, user.gid);
    Ok(groups)
}

/// The user, root if it is left out, and the group.
fn split(wanted: &str) -> (&str, Option<&str>) {
    match wanted.split_once(':') {
        Some(("", group)) => ("0", Some(group)),
        Some((user, group)) => (user, Some(group)),
        None => (wanted, None),
    }
}

fn find_user(file: &[u8], wanted: &str) -> Option<User> {
    let found = parse_user(file, wanted);
    let root = || matches!(wanted, "root" | "0").then(User::root);
    found.or_else(root).or_else(|| number(wanted.as_bytes()).map(User::nameless))
}

fn find_group(file: &[u8], wanted: &str) -> Option<u32> {
    let named = file.split(|&byte| byte == b'\n').find_map(|line| {
        let [name, _, gid, _] = fields(line)[..] else { return None };
        (!name.is_empty() && name == wanted.as_bytes()).then(|| number(gid))?
    });
    named.or_else(|| (wanted == "root").then_some(0)).or_else(|| number(wanted.as_bytes()))
}

fn read(path: &str) -> io::Result<Vec<u8>> {
    match read_file(Path::new(path)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read,
    }
}

fn fields(line: &[u8]) -> Vec<&[u8]> {
    line.split(|&byte| byte == b':').collect()
}

fn number(text: &[u8]) -> Option<u32> {
    let is_number = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    let number = is_number.then(|| std::str::from_utf8(text).ok()?.parse().ok())?;
    // To the kernel the largest number means "leave it as it is", which would be root.
    number.filter(|number| *number != u32::MAX)
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
        Some(User::new(name, uid, gid, path(home, "/"), path(shell, "/bin/sh")))
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
    fn users_and_groups_are_given_as_docker_takes_them() {
        // Only users of the file could be named, and no group at all.
        const GROUP: &[u8] = b"root:x:0:\nuser:x:1000:\nvideo:x:44:user\n";
        assert_eq!(split("user"), ("user", None));
        assert_eq!(split(":44"), ("0", Some("44")));
        assert_eq!(split("1000:video"), ("1000", Some("video")));
        let nobody = find_user(PASSWD, "12345").unwrap();
        assert_eq!((nobody.uid, nobody.gid, nobody.home.as_path()), (12345, 0, Path::new("/")));
        assert_eq!(find_user(PASSWD, "root").unwrap().home, Path::new("/root"));
        assert_eq!(find_user(b"", "0").unwrap(), User::root());
        for bad in ["", "nosuch", "-1", "+5", "4294967295", "4294967296", "1e3", "broken"] {
            assert_eq!(find_user(PASSWD, bad), None, "{bad}");
        }
        for (group, gid) in [("video", Some(44)), ("44", Some(44)), ("4711", Some(4711)), ("root", Some(0))] {
            assert_eq!(find_group(GROUP, group), gid);
        }
        for bad in ["", "nosuch", "-1", "4294967295"] {
            assert_eq!(find_group(GROUP, bad), None, "{bad}");
        }
        let one = User { has_given_group: true, gid: 44, ..User::root() };
        assert_eq!(groups(&one).unwrap(), [44]);
    }

    #[test]
    fn groups_are_those_that_list_the_user() {
        let file = b"root:x:0:\nsudo:x:27:other,user\nadm:x:4:users\nvideo:x:44:user";
        assert_eq!(parse_groups(file, b"user"), [27, 44]);
    }
}
