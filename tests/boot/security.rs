//! What protects the host from the guest, and the guest from the host's other users.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;

use nido_engine::guest::{AgentAddress, Guest, GuestError};
use tokio::time::Instant;

use crate::rig::{BOOT_TEST_TIMEOUT, TestHome, eventually};

#[test]
fn files_and_processes_are_closed_to_others() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["-p", "7000"]);
    let dir = vm.dir();
    let qemu_dir = dir.join("qemu");
    // As root, QEMU's own user is in the group of what it uses. The directories above are closed to it.
    let of_qemu = if vm.info()["confinement"].to_string().contains("own-user") { 0o3770 } else { 0o700 };
    let above = [home.path(), home.path().join("vms"), dir.clone()].map(|directory| (directory, 0o700));
    for (directory, mode) in above.into_iter().chain([(qemu_dir.clone(), of_qemu)]) {
        assert_eq!(fs::metadata(&directory).unwrap().mode() & 0o7777, mode, "{}", directory.display());
    }
    let mut sockets = 0;
    for entry in fs::read_dir(&dir).unwrap().chain(fs::read_dir(&qemu_dir).unwrap()).flatten() {
        let meta = entry.metadata().unwrap();
        sockets += usize::from(meta.file_type().is_socket());
        let is_shared = of_qemu != 0o700 && meta.gid() != 0;
        let is_private = meta.mode() & 0o7777 == 0o600 || is_shared && meta.mode() & 0o7707 == 0o600;
        assert!(is_private || entry.path() == qemu_dir, "{:?}", entry.file_name());
    }
    assert!(sockets >= 4);

    let qemu = vm.qemu();
    assert_eq!(qemu.status("Seccomp").as_deref(), Some("2"));
    assert_eq!(qemu.status("NoNewPrivs").as_deref(), Some("1"));
    // The token is private: neither on a command line nor in an environment.
    let config = fs::read(dir.join("guest.cbor")).unwrap();
    let token = config.windows(34).find(|at| at.starts_with(b"\x58\x20")).expect("32 bytes of CBOR")[2..].to_vec();
    let hex: String = token.iter().map(|byte| format!("{byte:02x}")).collect();
    for process in home.processes() {
        for file in ["cmdline", "environ"] {
            let text = fs::read(format!("/proc/{}/{file}", process.pid)).unwrap();
            assert!(!text.windows(32).any(|at| at == token), "{file} of {}", process.name);
            assert!(!String::from_utf8_lossy(&text).contains(&hex), "{file} of {}", process.name);
        }
    }
    for log in ["qemu.log", "supervisor.log", "console.log"] {
        let text = fs::read(dir.join(log)).unwrap();
        assert!(!text.windows(32).any(|at| at == token) && !String::from_utf8_lossy(&text).contains(&hex), "{log}");
    }
    // A new life has a new one.
    vm.nido("restart", &[]).ok();
    assert!(!fs::read(dir.join("guest.cbor")).unwrap().windows(32).any(|at| at == token));
}

#[test]
fn a_wrong_token_is_refused() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    if vm.info()["agent"]["transport"] != "virtio-serial" {
        println!("kernel vsock: the address is known to the supervisor alone; see the nested suite");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for wrong in [vec![0; 32], vec![7; 32], vec![0; 31], Vec::new(), vec![0; 64]] {
        let guest = Guest::new(AgentAddress::Serial { dir: vm.dir(), socket: "agent.sock".into() }, wrong);
        let refused = runtime.block_on(async { guest.ping(Instant::now() + BOOT_TEST_TIMEOUT).await });
        assert!(matches!(refused, Err(GuestError::TokenRefused)), "{refused:?}");
    }
    // Nonsense ends that connection and no other.
    for nonsense in [&b"\xff\xff\xff\xff"[..], b"\x01\x00\x00\x01\xff", b"GET / HTTP/1.0\r\n\r\n", &[0; 4096]] {
        let mut stream = connect(&vm.dir(), "agent.sock");
        stream.write_all(nonsense).unwrap();
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut said = Vec::new();
        let _ = std::io::Read::read_to_end(&mut stream, &mut said);
        vm.exec(["true"]).ok();
    }
}

/// Socket addresses are short; the way through `/proc` always is.
fn connect(dir: &std::path::Path, name: &str) -> UnixStream {
    use std::os::fd::AsRawFd;
    let dir = fs::File::open(dir).unwrap();
    let stream = UnixStream::connect(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd())).unwrap();
    stream.set_read_timeout(Some(BOOT_TEST_TIMEOUT)).unwrap();
    stream
}

#[test]
fn the_monitor_cannot_start_programs() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    let (dir, qemu) = (vm.dir(), vm.qemu());
    let marker = home.user_dir().join("broken-out");
    // The monitor serves one client at a time; without its supervisor it is free.
    vm.kill_supervisor();
    let mut monitor = connect(&dir, "qemu/qmp.sock");
    let mut lines = BufReader::new(monitor.try_clone().unwrap()).lines();
    let mut next = || lines.next().and_then(Result::ok);
    assert!(next().unwrap().contains("\"QMP\""));
    monitor.write_all(b"{\"execute\": \"qmp_capabilities\"}\n").unwrap();
    assert!(next().unwrap().contains("\"return\""));
    let command = serde_json::json!({
        "execute": "migrate",
        "arguments": { "uri": format!("exec:touch {}", marker.display()) },
    });
    monitor.write_all(format!("{command}\n").as_bytes()).unwrap();
    // It is refused, or fails, or the sandbox ends QEMU for trying. What it must not do is succeed.
    let answer = next();
    if answer.as_deref().is_some_and(|answer| answer.contains("\"return\"")) {
        eventually("the end of the attempt", || {
            if !qemu.is_alive() {
                return Some(());
            }
            monitor.write_all(b"{\"execute\": \"query-migrate\"}\n").ok()?;
            let status = next()?;
            assert!(!status.contains("\"completed\""), "{status}");
            status.contains("\"failed\"").then_some(())
        });
    }
    assert!(!marker.exists());
    drop(monitor);
    // Whatever became of QEMU, nido knows it.
    let status = vm.status();
    assert!(["running", "failed"].contains(&status.as_str()), "{status}");
}
