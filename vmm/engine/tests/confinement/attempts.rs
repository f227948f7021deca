//! What an escaped QEMU attempts. Runs in QEMU's place, in the directory of its VM.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{Error, Result};
use std::net::TcpStream;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::path::Path;
use std::process::Command;

/// The name of the test that is no test: it is run in QEMU's place.
pub const PLAYER: &str = "attempts::escaped_qemu";
pub const ABSTRACT_SOCKET: &str = "nido-test-";

fn called(result: libc::c_long) -> Result<()> {
    if result == -1 { Err(Error::last_os_error()) } else { Ok(()) }
}

fn attempt(name: &str, result: Result<()>) {
    println!("\nattempt {name}: {}", result.map_or_else(|error| error.to_string(), |()| "done".into()));
}

fn write(path: &Path) -> Result<()> {
    OpenOptions::new().write(true).open(path).map(drop)
}

/// As an older QEMU opens the memory of a warm image.
fn open_both_ways(path: &Path) -> Result<()> {
    OpenOptions::new().read(true).write(true).open(path).map(drop)
}

#[test]
#[ignore = "is started by the other tests in QEMU's place"]
fn escaped_qemu() {
    let facts = fs::read_to_string("facts").unwrap();
    let mut lines = facts.lines();
    let host = Path::new(lines.next().unwrap());
    let address = lines.next().unwrap().to_owned();
    let supervisor: libc::pid_t = lines.next().unwrap().parse().unwrap();
    let abstract_name = lines.next().unwrap();

    attempt("read its disk", fs::read("disk.qcow2").map(drop));
    attempt("write its disk", open_both_ways(Path::new("disk.qcow2")));
    attempt("read a template", fs::read(host.join("blobs/root")).map(drop));
    attempt("write a memory image that an older qemu opens", open_both_ways(&host.join("blobs/memory")));
    attempt("truncate its disk", OpenOptions::new().write(true).truncate(true).open("disk.qcow2").map(drop));
    let _ = fs::remove_file("qemu/made.sock");
    attempt("make a socket in its directory", UnixDatagram::bind("qemu/made.sock").map(drop));
    attempt("connect to a socket in its directory", UnixStream::connect("qemu/channel.sock").map(drop));
    files_of_the_supervisor();

    attempt("read /etc/shadow", fs::read("/etc/shadow").map(drop));
    attempt("read the environment of the supervisor", fs::read(format!("/proc/{supervisor}/environ")).map(drop));
    attempt("read a file of root that its group may read", fs::read(host.join("home/of-group")).map(drop));
    attempt("write a file of root", write(&host.join("home/secret")));
    attempt("read the secret of the user", fs::read(host.join("home/secret")).map(drop));
    attempt("read the disk of another vm", fs::read(host.join("other-vm/disk.qcow2")).map(drop));
    attempt("read it by a relative name", fs::read("../other-vm/disk.qcow2").map(drop));
    attempt("write a template", write(&host.join("blobs/root")));
    attempt("list the home", fs::read_dir(host.join("home")).map(drop));
    attempt("run a program of the home", run(host));
    let _ = fs::remove_file("qemu/link");
    attempt("make a link in its directory", std::os::unix::fs::symlink("/etc", "qemu/link"));
    attempt("make a device", device());

    attempt("connect to 127.0.0.1", TcpStream::connect(address).map(drop));
    attempt("connect to a socket of the user", UnixStream::connect(host.join("home/socket")).map(drop));
    let abstract_address = SocketAddr::from_abstract_name(abstract_name).unwrap();
    attempt("connect to an abstract socket", UnixStream::connect_addr(&abstract_address).map(drop));
    calls(supervisor);
}

/// What else is in the VM's directory.
fn files_of_the_supervisor() {
    attempt("connect to the supervisor", UnixStream::connect("control.sock").map(drop));
    attempt("read the record of the vm", fs::read("vm.json").map(drop));
    attempt("write the record of the vm", write(Path::new("vm.json")));
    attempt("write the log of the supervisor", write(Path::new("supervisor.log")));
    attempt("write a snapshot", write(Path::new("snapshots/one/disk.qcow2")));
    attempt("make a file of the vm", File::create("made").map(drop));
    attempt("replace its disk", fs::copy("disk.qcow2", "other").and_then(|_| fs::rename("other", "disk.qcow2")));
}

fn calls(supervisor: libc::pid_t) {
    let nothing = std::ptr::null::<libc::c_char>();
    // SAFETY: plain system calls without memory, or on constant texts; what they open ends with this process.
    unsafe {
        attempt("signal itself", called(libc::raise(0).into()));
        attempt("open a raw socket", called(libc::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP).into()));
        attempt("signal the supervisor", called(libc::kill(supervisor, 0).into()));
        let pidfd = libc::syscall(libc::SYS_pidfd_open, supervisor, 0);
        let signalled = called(pidfd).and_then(|()| called(libc::syscall(libc::SYS_pidfd_send_signal, pidfd, 0, 0, 0)));
        attempt("signal the supervisor by its pidfd", signalled);
        attempt("trace the supervisor", called(libc::ptrace(libc::PTRACE_SEIZE, supervisor, 0, 0)));
        attempt("load a bpf program", called(libc::syscall(libc::SYS_bpf, 0, nothing, 0)));
        let uring = [0_u8; 120];
        attempt("use io_uring", called(libc::syscall(libc::SYS_io_uring_setup, 1, uring.as_ptr())));
        attempt("read keys", called(libc::syscall(libc::SYS_keyctl, 0, -3, 0)));
        let mounted = libc::mount(c"none".as_ptr(), c".".as_ptr(), c"tmpfs".as_ptr(), 0, nothing.cast());
        attempt("mount", called(mounted.into()));
        if mounted == 0 {
            libc::umount2(c".".as_ptr(), libc::MNT_DETACH);
        }
        // The last: it changes this process.
        attempt("make namespaces", called(libc::unshare(libc::CLONE_NEWUSER).into()));
    }
}

/// Executes a file that it has made itself.
fn run(host: &Path) -> Result<()> {
    let program = host.join("home/program");
    fs::copy("/bin/true", &program).and_then(|_| Command::new(&program).status()).map(drop)
}

fn device() -> Result<()> {
    let _ = fs::remove_file("qemu/null");
    let name = CString::new("qemu/null").unwrap();
    // SAFETY: the kernel reads a text.
    called(unsafe { libc::mknod(name.as_ptr(), libc::S_IFCHR | 0o600, libc::makedev(1, 3)) }.into())?;
    let opened = File::open("qemu/null").map(drop);
    let _ = fs::remove_file("qemu/null");
    opened
}
