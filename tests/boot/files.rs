//! Files and directories, both ways.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use rustix::process::Signal;

use crate::rig::{TestHome, Vm, eventually};

/// Everything that a copy keeps, of every entry.
const FACTS: [&str; 5] = [".", "-printf", "%P\\0%y %m %Ts %l\\0", "-type", "d,f,l"];

/// The facts of a tree, in order, as `find` sees them there.
fn sorted(mut facts: Vec<u8>) -> Vec<Vec<u8>> {
    facts.pop();
    let words: Vec<_> = facts.split(|&byte| byte == 0).map(<[u8]>::to_vec).collect();
    let mut entries: Vec<_> = words.chunks(2).map(|pair| pair.join(&b'\t')).collect();
    entries.sort();
    entries
}

fn facts_here(tree: &Path) -> Vec<Vec<u8>> {
    sorted(Command::new("find").args(FACTS).current_dir(tree).output().unwrap().stdout)
}

fn facts_there(vm: &Vm<'_>, tree: &str) -> Vec<Vec<u8>> {
    sorted(vm.home.nido(["exec", vm.name, "-w", tree, "--", "find"]).args(FACTS).ok().stdout)
}

fn set_mtime(path: &Path, age: u64) {
    let file = File::open(path).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000 + age)).unwrap();
}

fn odd_tree(at: &Path) {
    fs::create_dir_all(at.join("a dir/deeper/still")).unwrap();
    fs::create_dir(at.join("empty")).unwrap();
    let names: [&[u8]; 11] = [
        b"plain",
        b"with space",
        b"comma,name",
        b"new\nline",
        b"\xff\xfe not utf-8",
        b"-dash",
        b"..dots",
        b"*",
        b"\x1b[2J",
        "\u{fc}ber \u{1f600}".as_bytes(),
        &[b'n'; 255],
    ];
    for (age, name) in (0..).zip(names) {
        let path = at.join(OsStr::from_bytes(name));
        fs::write(&path, name.repeat(300)).unwrap();
        set_mtime(&path, age);
    }
    fs::write(at.join("nothing"), "").unwrap();
    fs::write(at.join("a dir/deeper/file"), "deep").unwrap();
    for (name, mode) in
        [("plain", 0o600), ("with space", 0o755), ("comma,name", 0o444), ("-dash", 0o640), ("empty", 0o711)]
    {
        fs::set_permissions(at.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    symlink("plain", at.join("link")).unwrap();
    symlink("/no/such/place", at.join("dangling")).unwrap();
    symlink("../outside", at.join("a dir/up")).unwrap();
    set_mtime(&at.join("a dir"), 77);
    set_mtime(&at.join("empty"), 78);
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn trees_keep_everything() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    let tree = home.user_dir().join("tree, with odd names");
    odd_tree(&tree);
    let facts = facts_here(&tree);
    assert!(facts.len() > 18, "{}", facts.len());

    let up = vm.nido("upload", &[text(&tree), "/srv/new, place"]).json();
    assert_eq!(up["entries"], facts.len());
    assert_eq!((&up["path"], &up["skipped"]), (&"/srv/new, place".into(), &0.into()));
    assert_eq!(facts_there(&vm, "/srv/new, place"), facts);
    // An existing directory takes it under its name.
    vm.nido("upload", &[text(&tree), "/srv"]).ok();
    assert_eq!(facts_there(&vm, "/srv/tree, with odd names"), facts);
    assert_eq!(vm.sh("find /srv ! -user root | wc -l").text(), "0");

    vm.nido("download", &["/srv/new, place", "back"]).ok();
    let back = home.user_dir().join("back");
    assert_eq!(facts_here(&back), facts);
    let same = Command::new("diff").args(["-r", "--no-dereference"]).args([&tree, &back]).output().unwrap();
    assert!(same.status.success(), "{}", String::from_utf8_lossy(&same.stdout));
    fs::create_dir(home.user_dir().join("into")).unwrap();
    vm.nido("download", &["/srv/new, place", "into"]).ok();
    assert_eq!(facts_here(&home.user_dir().join("into/new, place")), facts);

    // One by one, by names that look like flags or are no text.
    for name in [&b"-dash"[..], b"\xff\xfe not utf-8", b"new\nline"] {
        let guest = [b"/srv/new, place/", name].concat();
        let copy = home.user_dir().join("one");
        home.nido(["download", "web", "--force", "--"]).args([OsStr::from_bytes(&guest), copy.as_os_str()]).ok();
        assert_eq!(fs::read(&copy).unwrap(), name.repeat(300));
    }
    // What copies must not carry.
    let evil = home.user_dir().join("evil");
    fs::create_dir(&evil).unwrap();
    fs::write(evil.join("suid"), "x").unwrap();
    fs::set_permissions(evil.join("suid"), fs::Permissions::from_mode(0o6755)).unwrap();
    vm.nido("upload", &[text(&evil), "/srv/evil"]).ok();
    assert_eq!(vm.exec(["stat", "-c", "%a", "/srv/evil/suid"]).text(), "755");
    vm.sh("cd /srv/evil && mkfifo pipe && mknod device c 1 3 && chmod 7777 suid").ok();
    let down = vm.nido("download", &["/srv/evil", "evil-back"]).json();
    assert_eq!((&down["entries"], &down["skipped"]), (&2.into(), &2.into()));
    let mode = fs::metadata(home.user_dir().join("evil-back/suid")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o777 & !umask());
    vm.nido("download", &["--preserve", "/srv/evil", "evil-kept"]).ok();
    let mode = fs::metadata(home.user_dir().join("evil-kept/suid")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o777, "past the umask, and never set-user-id");
}

/// The umask of this process, which the programs that it starts have, too.
fn umask() -> u32 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("Umask:")).unwrap();
    u32::from_str_radix(line.trim(), 8).unwrap()
}

#[test]
fn destinations_and_what_is_wrong_with_them() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    let here = home.user_dir();
    let file = here.join("a file");
    fs::write(&file, "one").unwrap();
    let up = |destination: &str| vm.nido("upload", &[text(&file), destination]);

    up("/root/new").ok();
    fs::write(&file, "two").unwrap();
    up("/root/new").ok();
    assert_eq!(vm.exec(["cat", "/root/new"]).text(), "two", "an upload replaces");
    up("/srv").ok();
    up("/srv/").ok();
    up("relative").ok();
    assert_eq!(vm.sh("cat '/srv/a file' /root/relative").text(), "twotwo");
    up("/srv/../srv/./x").ok();
    assert_eq!(vm.exec(["cat", "/srv/x"]).text(), "two");
    up("/no/such/dir/file").problem(1, "guest_not_found");
    vm.nido("upload", &["--parents", "--user", "user", text(&file), "/home/user/deep/er/file"]).ok();
    let owners = vm.exec(["stat", "-c", "%U %G", "/home/user/deep", "/home/user/deep/er/file"]).text();
    assert_eq!(owners, "user user\nuser user");
    vm.nido("upload", &["--user", "nobody-of-that-name", text(&file), "/tmp/x"]).problem(1, "user_not_found");
    vm.nido("upload", &["missing", "/tmp/x"]).problem(1, "path_not_found");
    vm.nido("upload", &[text(&here), "/root/new"]).run().expect_failure();
    assert_eq!(vm.exec(["cat", "/root/new"]).text(), "two", "a directory does not replace a file");

    // A file being written is not seen, and a link is followed to what it means.
    vm.sh("cd /root && ln -s new link").ok();
    fs::write(&file, "three").unwrap();
    up("/root/link").ok();
    assert_eq!(vm.sh("readlink /root/link; cat /root/new").text(), "new\nthree");

    // Out of the guest.
    let down = |flags: &[&str]| vm.nido("download", flags);
    down(&["/root/new", "got"]).ok();
    down(&["/root/new", "got"]).problem(1, "path_exists");
    vm.sh("echo four > /root/new").ok();
    down(&["/root/new", "got"]).problem(1, "path_exists");
    assert_eq!(fs::read_to_string(here.join("got")).unwrap(), "three", "and it is left as it was");
    down(&["--force", "/root/new", "got"]).ok();
    assert_eq!(fs::read_to_string(here.join("got")).unwrap(), "four\n");
    down(&["/no/such", "x"]).problem(1, "guest_not_found");
    down(&["/root/new", "no/such/x"]).problem(1, "path_not_found");
    assert!(!here.join("x").exists());
    // A directory to standard output is a tar archive.
    let archive = down(&["/etc/apt", "-"]).ok().stdout;
    assert_eq!(archive.get(257..262), Some(&b"ustar"[..]));

    // Standard streams.
    vm.nido("upload", &["-", "/root/in"]).stdin("from stdin\0\n").ok();
    assert_eq!(down(&["/root/in", "-"]).ok().stdout, b"from stdin\0\n");
    vm.nido("upload", &["-", "/root/in"]).stdin("").ok();
    assert_eq!(down(&["/root/in", "-"]).ok().stdout, b"");

    // cp: the side with a name is the guest.
    fs::write(here.join("second"), "2").unwrap();
    home.nido(["cp", "a file", "second", "web:/srv/both"]).run().expect_failure();
    vm.exec(["mkdir", "/srv/both"]).ok();
    home.nido(["cp", "a file", "second", "web:/srv/both"]).ok();
    assert_eq!(vm.sh("cat '/srv/both/a file' /srv/both/second").text(), "three2");
    fs::create_dir(here.join("out")).unwrap();
    home.nido(["cp", "web:/srv/both/a file", "web:/srv/both/second", "out"]).ok();
    assert_eq!(fs::read_to_string(here.join("out/second")).unwrap(), "2");
    home.nido(["cp", "web:/srv/both/second", "out"]).problem(1, "path_exists");
    home.nido(["cp", "--force", "web:/srv/both/second", "out"]).ok();
    home.nido(["cp", "a", "b"]).problem(2, "spec_invalid");
}

#[test]
fn a_full_guest_disk_keeps_the_old_file() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    vm.sh("mkdir /root/d && echo old > /root/d/file && sync").ok();
    vm.sh("fallocate -l $(( $(stat -f -c '%a * %S' /) - 8388608 )) /filler").ok();
    let big = home.user_dir().join("big");
    File::create(&big).unwrap().write_all(&vec![7; 64 << 20]).unwrap();
    let problem = vm.nido("upload", &[text(&big), "/root/d/file"]).problem(1, "disk_full");
    assert!(problem["detail"].as_str().unwrap().contains("web") || problem["hint"].is_string(), "{problem}");
    assert_eq!(vm.sh("ls -A /root/d; cat /root/d/file").text(), "file\nold");
    vm.exec(["rm", "/filler"]).ok();
    vm.nido("upload", &[text(&big), "/root/d/file"]).ok();
    assert_eq!(vm.exec(["stat", "-c", "%s", "/root/d/file"]).text(), (64 << 20).to_string());
}

#[test]
fn interrupted_copies_leave_nothing() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    vm.sh("mkdir /root/d && echo old > /root/d/file").ok();
    for signal in [Signal::INT, Signal::TERM, Signal::KILL] {
        let (running, mut keys) = vm.nido("upload", &["-", "/root/d/file"]).start();
        keys.write_all(&vec![1; 3 << 20]).unwrap();
        eventually("the half of a file", || vm.sh("test $(ls -A /root/d | wc -l) = 2").run().code.eq(&0).then_some(()));
        running.signal(signal);
        running.wait().expect(128 + signal.as_raw());
        eventually("the clearing up", || (vm.exec(["ls", "-A", "/root/d"]).text() == "file").then_some(()));
        assert_eq!(vm.exec(["cat", "/root/d/file"]).text(), "old");
        drop(keys);
    }
    // Out of the guest: what is no hole takes long enough.
    vm.sh("head -c 700M /dev/zero > /root/large").ok();
    let (running, _keys) = vm.nido("download", &["/root/large", "large"]).start();
    let here = home.user_dir();
    let begun = || fs::read_dir(&here).unwrap().flatten().any(|e| e.file_name().as_bytes().starts_with(b".nido-"));
    eventually("the half of a file here", || begun().then_some(()));
    running.signal(Signal::INT);
    running.wait().expect(130);
    let left: Vec<PathBuf> = fs::read_dir(&here).unwrap().flatten().map(|entry| entry.path()).collect();
    assert!(left.is_empty(), "{left:?}");
}

fn digest(path: &Path) -> String {
    let out = Command::new("sha256sum").arg(path).output().unwrap().stdout;
    String::from_utf8(out).unwrap().split_whitespace().next().unwrap().to_owned()
}

#[test]
fn a_large_file_takes_no_more_memory_than_a_small_one() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    let mut peaks = Vec::new();
    let agent_peak = || -> u64 {
        let line = vm.exec(["grep", "VmHWM", "/proc/1/status"]).text();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    for mib in [1, 256] {
        let file = home.user_dir().join(format!("{mib}"));
        let mut random = File::open("/dev/urandom").unwrap();
        let mut chunk = vec![0; 1 << 20];
        random.read_exact(&mut chunk).unwrap();
        let mut out = File::create(&file).unwrap();
        for number in 0..mib {
            chunk[..4].copy_from_slice(&u32::to_le_bytes(number));
            out.write_all(&chunk).unwrap();
        }
        let up = vm.nido("upload", &[text(&file), "/root/file"]).ok();
        let there = vm.exec(["sha256sum", "/root/file"]).text();
        assert_eq!(there.split_whitespace().next().unwrap(), digest(&file));
        let down = vm.nido("download", &["/root/file", "--force", "back"]).ok();
        assert_eq!(digest(&home.user_dir().join("back")), digest(&file));
        peaks.push((up.peak_kib, down.peak_kib, agent_peak()));
    }
    let [small, large] = peaks[..] else { unreachable!() };
    println!("peak memory in KiB of upload, download and agent: 1 MiB {small:?}, 256 MiB {large:?}");
    // A copy of 1 MiB may have ended before its peak was read.
    let least = small.0.max(small.1);
    for (small, large) in [(least, large.0), (least, large.1), (small.2, large.2)] {
        assert!(large < small + 8 * 1024, "{small} KiB with 1 MiB became {large} KiB with 256 MiB");
    }
}

/// A request of HTTP/1.0, whose answer ends with its connection: its head and its body.
fn post(socket: &Path, head: &str, body: &[u8]) -> (String, Vec<u8>) {
    let mut stream = UnixStream::connect(socket).unwrap();
    let head = format!("{head}host: localhost\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
    let body = answer.split_off(end);
    (String::from_utf8(answer).unwrap(), body)
}

#[test]
fn a_directory_goes_over_http_as_an_archive_and_back() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    let (here, back) = (home.user_dir().join("here"), home.user_dir().join("back"));
    fs::create_dir(&back).unwrap();
    odd_tree(&here);
    let socket = home.user_dir().join("api.sock");
    let (server, _stdin) = home.nido(["api-server", "start", "--socket", text(&socket)]).start();
    eventually("the server", || socket.exists().then_some(()));
    let tar = |at: &Path| Command::new("tar").args(["-C", text(at), "-c", "."]).output().unwrap().stdout;
    let url = "/v1/vms/web/files?path=/srv/deep/tree&parents=true";
    let put = format!("PUT {url} HTTP/1.0\r\ncontent-type: application/x-tar\r\n");
    let (head, said) = post(&socket, &put, &tar(&here));
    assert!(head.starts_with("HTTP/1.0 200"), "{head}{}", String::from_utf8_lossy(&said));
    assert_eq!(facts_there(&vm, "/srv/deep/tree"), facts_here(&here));
    assert_eq!(vm.sh("find /srv ! -user root | wc -l").text(), "0");

    let get = "GET /v1/vms/web/files?path=/srv/deep/tree HTTP/1.0\r\naccept: application/x-tar\r\n";
    let (head, packed) = post(&socket, get, b"");
    assert!(head.starts_with("HTTP/1.0 200"), "{head}");
    let archive = home.user_dir().join("packed.tar");
    fs::write(&archive, packed).unwrap();
    assert!(Command::new("tar").args(["-C", text(&back), "-xpf", text(&archive)]).status().unwrap().success());
    assert_eq!(facts_here(&back), facts_here(&here));
    server.signal(Signal::TERM);
    server.wait().expect(0);
}
