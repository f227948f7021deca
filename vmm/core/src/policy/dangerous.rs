//! Commands that obviously destroy a guest: refused unless a policy allows them. Pure.
//!
//! This is not a boundary. It prevents a model's mistakes, and spellings that are not listed pass: a hostile program reaches the
//! same with any interpreter. The boundary is the VM; a list of allowed commands defines what may be run.

use super::Denial;

/// The word in the audit log.
pub const DANGEROUS_COMMAND: &str = "dangerous_command";

/// Programs that run a line of shell behind `-c`, or from their standard input.
const SHELLS: [&str; 7] = ["sh", "bash", "dash", "ash", "zsh", "ksh", "busybox"];
/// Programs that run what is behind them, with their own options and assignments in between.
const WRAPPERS: [&str; 13] = [
    "sudo", "doas", "env", "nohup", "exec", "command", "nice", "ionice", "time", "timeout", "setsid", "busybox",
    "chroot",
];
/// How deep a shell in a shell is looked into.
const DEPTH: u8 = 4;

/// Whether a command, with what it reads from its standard input, is one of them.
///
/// # Errors
/// The denial.
pub fn check(argv: &[Vec<u8>], stdin: &[u8]) -> Result<(), Denial> {
    let words: Vec<String> = argv.iter().map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    let mut found = judge(&words, 0);
    if words.first().is_some_and(|program| SHELLS.contains(&base(program))) {
        found = found.or_else(|| script(&String::from_utf8_lossy(stdin), 0));
    }
    found.map_or(Ok(()), |what| {
        Err(Denial { reason: DANGEROUS_COMMAND, detail: format!("this would destroy the guest: {what}") })
    })
}

/// What a script does, command by command.
fn script(text: &str, depth: u8) -> Option<&'static str> {
    let dense: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    if dense.contains(":(){:|:&};:") {
        return Some("it starts processes without end");
    }
    commands(text).into_iter().find_map(|words| judge(&words, depth))
}

/// What one command does.
fn judge(words: &[String], depth: u8) -> Option<&'static str> {
    if words.windows(2).any(|pair| pair[0].ends_with('>') && is_disk(&pair[1])) {
        return Some("it writes over a disk");
    }
    let words = unwrapped(words);
    let (program, args) = words.split_first()?;
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match base(program) {
        shell if SHELLS.contains(&shell) && depth < DEPTH => {
            let at =
                args.iter().position(|arg| arg.starts_with('-') && !arg.starts_with("--") && arg.ends_with('c'))?;
            script(args.get(at + 1..)?.iter().find(|arg| **arg != "--")?, depth + 1)
        }
        "eval" if depth < DEPTH => script(&args.join(" "), depth + 1),
        "rm" => removes_everything(&args).then_some("it removes every file"),
        "find" => {
            let everywhere = args.iter().take_while(|arg| !arg.starts_with('-')).any(|arg| is_root(arg));
            let removes = args.iter().any(|arg| matches!(*arg, "-delete" | "rm" | "/bin/rm" | "/usr/bin/rm"));
            (everywhere && removes).then_some("it removes every file")
        }
        "dd" => args.iter().filter_map(|arg| arg.strip_prefix("of=")).any(is_disk).then_some("it writes over a disk"),
        "shred" | "wipefs" | "blkdiscard" | "mkswap" | "tee" | "sgdisk" => {
            args.iter().any(|arg| is_disk(arg)).then_some("it writes over a disk")
        }
        mkfs if mkfs.starts_with("mkfs") || mkfs == "mke2fs" => {
            args.iter().any(|arg| is_disk(arg)).then_some("it creates a file system on a disk")
        }
        "chmod" | "chown" => {
            let recursive = has_option(&args, 'R', "--recursive");
            (recursive && args.iter().any(|arg| is_root(arg))).then_some("it changes the owner or mode of every file")
        }
        "mv" => {
            let from = args.iter().filter(|arg| !arg.starts_with('-')).collect::<Vec<_>>();
            from.split_last()
                .is_some_and(|(_, from)| from.iter().any(|arg| is_root(arg)))
                .then_some("it moves every file away")
        }
        _ => None,
    }
}

fn removes_everything(args: &[&str]) -> bool {
    let recursive = has_option(args, 'r', "--recursive") || has_option(args, 'R', "--recursive");
    recursive && (args.contains(&"--no-preserve-root") || args.iter().any(|arg| is_root(arg)))
}

/// Whether an option is among the arguments: alone, or in a bundle.
fn has_option(args: &[&str], short: char, long: &str) -> bool {
    args.iter().any(|arg| {
        let long = arg.len() > 3 && arg.starts_with("--") && long.starts_with(arg);
        long || (arg.starts_with('-') && !arg.starts_with("--") && arg.contains(short))
    })
}

/// Whether a path is the root, or everything in it: `/`, `//`, `/.`, `/*`, `/usr/..`, `/{bin,etc}`.
fn is_root(path: &str) -> bool {
    let Some(below) = path.strip_prefix('/') else { return false };
    let mut parts: Vec<&str> = Vec::new();
    for part in below.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    match parts.as_slice() {
        [] => true,
        [one] => one.chars().all(|c| matches!(c, '*' | '.' | '?' | '[' | ']' | '!')) || one.starts_with('{'),
        _ => false,
    }
}

/// Whether a path is a disk or a part of one, and not one of its many namesakes.
fn is_disk(path: &str) -> bool {
    let Some(name) = path.strip_prefix("/dev/") else { return false };
    let name = name.trim_start_matches('/');
    ["vd", "sd", "hd", "xvd"]
        .iter()
        .any(|kind| name.strip_prefix(kind).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase())))
        || ["nvme", "mmcblk", "disk/", "mapper/", "root"].iter().any(|kind| name.starts_with(kind))
}

/// The program's own name.
fn base(program: &str) -> &str {
    program.rsplit('/').next().unwrap_or(program)
}

/// A command without what runs it, and without assignments.
fn unwrapped(mut words: &[String]) -> &[String] {
    loop {
        let Some((first, rest)) = words.split_first() else { return words };
        let is_keyword = matches!(first.as_str(), "!" | "{" | "then" | "do" | "else" | "if" | "while");
        let is_assignment = first
            .split_once('=')
            .is_some_and(|(name, _)| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'));
        // `busybox rm` runs rm; `busybox` by itself is a shell.
        if is_keyword || is_assignment {
            words = rest;
        } else if WRAPPERS.contains(&base(first)) {
            let option = |word: &&String| {
                word.starts_with('-') || word.bytes().all(|b| b.is_ascii_digit() || b == b'.' || b == b's')
            };
            words = &rest[rest.iter().take_while(option).count()..];
        } else {
            return words;
        }
    }
}

/// The commands of a script, as words. Quotes are taken off; what a shell would put in place of `$…` stays as it is.
fn commands(text: &str) -> Vec<Vec<String>> {
    let mut all = vec![Vec::new()];
    let (mut word, mut quote, mut begun) = (String::new(), None, false);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, quote) {
            (c, Some(q)) if c == q => quote = None,
            ('\\', None | Some('"')) => word.extend(chars.next().filter(|c| *c != '\n')),
            (c, Some(_)) => word.push(c),
            ('\'' | '"', None) => (quote, begun) = (Some(c), true),
            ('>', None) => {
                end(&mut all, &mut word, &mut begun);
                while chars.next_if(|c| matches!(c, '>' | '|' | '&')).is_some() {}
                push(&mut all, ">".into());
            }
            (';' | '&' | '|' | '\n' | '(' | ')' | '`', None) => {
                end(&mut all, &mut word, &mut begun);
                all.push(Vec::new());
            }
            ('#', None) if word.is_empty() && !begun => while chars.next_if(|c| *c != '\n').is_some() {},
            (c, None) if c.is_whitespace() => end(&mut all, &mut word, &mut begun),
            (c, None) => word.push(c),
        }
    }
    end(&mut all, &mut word, &mut begun);
    all
}

fn end(all: &mut [Vec<String>], word: &mut String, begun: &mut bool) {
    if !word.is_empty() || std::mem::take(begun) {
        let word = std::mem::take(word);
        if let Some(last) = all.last_mut() {
            last.push(word);
        }
    }
}

fn push(all: &mut [Vec<String>], word: String) {
    if let Some(last) = all.last_mut() {
        last.push(word);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_shell(line: &str) -> Result<(), Denial> {
        check(&[b"sh".to_vec(), b"-c".to_vec(), line.as_bytes().to_vec()], &[])
    }

    // The specification shows `rm -rf /` as denied, reason dangerous_command; it was run.
    #[test]
    fn destructive_commands_are_refused_in_their_spellings() {
        for line in [
            "rm -rf /",
            "rm -rf --no-preserve-root / 2>/dev/null; echo $?",
            "rm -fr /*",
            "rm -r -f //",
            "rm --recursive --force /.",
            "sudo rm -Rf '/'",
            "cd /tmp && rm -rf \"/\"",
            "X=1 env -i A=b /bin/rm -rf /usr/..",
            "true; (rm -rf /)",
            "sh -c 'rm -rf /'",
            "bash -lc \"sh -c 'rm -rf /*'\"",
            "eval rm -rf /",
            "busybox rm -rf /",
            "timeout 5 rm -rf /",
            "r\\m -rf /",
            "find / -delete",
            "find / -type f -exec rm {} +",
            "mkfs.ext4 /dev/vda",
            "mkfs -t ext4 -F /dev/vda1",
            "dd if=/dev/zero of=/dev/vda bs=1M",
            "cat /dev/zero > /dev/vda",
            "cat /dev/zero>/dev/sda",
            "wipefs -a /dev/nvme0n1",
            "shred /dev/sda",
            "chmod -R 777 /",
            "chown -R nobody /",
            "mv /* /tmp",
            ":(){ :|:& };:",
            "# nothing\nrm -rf /",
            "if true; then rm -rf /; fi",
        ] {
            let denial = check_shell(line).expect_err(line);
            assert_eq!(denial.reason, "dangerous_command");
        }
        let argv = |words: &[&str]| words.iter().map(|word| word.as_bytes().to_vec()).collect::<Vec<_>>();
        for words in [&["rm", "-rf", "/"][..], &["/usr/bin/rm", "-r", "/"], &["sudo", "-n", "mkfs.xfs", "/dev/vdb"]] {
            check(&argv(words), &[]).expect_err("refused");
        }
        check(&argv(&["sh"]), b"rm -rf /\n").expect_err("by its standard input");
        check(&argv(&["bash", "-s"]), b"set -e\nrm -rf / --no-preserve-root").expect_err("by its standard input");
    }

    #[test]
    fn ordinary_commands_are_allowed() {
        for line in [
            "rm -rf /tmp/x /srv/build",
            "rm -rf ./*",
            "rm /",
            "rm -rf node_modules",
            "find / -name '*.log'",
            "find /tmp -delete",
            "echo 'rm -rf /'",
            "echo rm -rf /",
            "grep -r 'rm -rf /' .",
            "# rm -rf /",
            "dd if=/dev/vda of=/tmp/image",
            "mkfs.ext4 /tmp/image",
            "cat x > /dev/null 2>&1",
            "ls -R /",
            "tar -C / -rf /tmp/a.tar etc",
            "chmod -R u+w /srv",
            "mv /tmp/a /tmp/b",
            "apt-get install -y coreutils",
            "",
        ] {
            assert_eq!(check_shell(line), Ok(()), "{line}");
        }
        let cat = [b"cat".to_vec()];
        assert_eq!(check(&cat, b"rm -rf /"), Ok(()), "that is data");
    }
}
