use super::*;

/// A program made of a shell script.
fn program(dir: &Path, script: &str) -> PathBuf {
    let path = dir.join("qemu");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

const GREETING: &str =
    r#"{"QMP":{"version":{"qemu":{"micro":4,"minor":1,"major":9},"package":"Debian"},"capabilities":[]}}"#;

const LAST: &str = r#"{"return":[],"id":"schema"}"#;

/// A QEMU that ended before it had written everything was remembered as one that can do nothing.
#[test]
fn answers_that_break_off_are_an_error_and_not_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let cut = &LAST[..LAST.len() / 2];
    let path = program(dir.path(), &format!("echo '{GREETING}'; printf '%s' '{cut}'"));
    assert!(matches!(probe(&path, dir.path()), Err(QemuProbeError::NotQemu { .. })));
    program(dir.path(), &format!("echo '{GREETING}'; echo '{LAST}'; exec sleep 1000"));
    probe(&path, dir.path()).unwrap();
}

#[test]
fn probed_capabilities_are_parsed() {
    let output = [
        GREETING,
        r#"{"return":{},"id":"capabilities"}"#,
        r#"{"return":[{"name":"microvm-machine"},{"name":"pc-q35-9.1-machine"},{"name":"generic-pc-machine"}],"id":"machines"}"#,
        r#"{"return":[{"name":"tcg-accel"},{"name":"accel"}],"id":"accels"}"#,
        r#"{"event":"NEWER","data":{}}"#,
        r#"{"return":[{"name":"vhost-vsock-device"}],"id":"virtio"}"#,
        r#"{"error":{"class":"GenericError","desc":"?"},"id":"pci"}"#,
        r#"{"return":[{"name":"rom"},{"name":"size"}],"id":"memory-file"}"#,
        r#"{"return":[{"option":"sandbox","parameters":[]}],"id":"options"}"#,
        r#"{"return":[{"meta-type":"enum","values":["dgram","hubport"]},{"meta-type":"enum","values":["socket","exec","file"]},
           {"meta-type":"object","members":[{"name":"telnet"},{"name":"reconnect-ms"}]}],"id":"schema"}"#,
    ];
    let output = output.map(|line| line.replace('\n', " ")).join("\r\n");
    let facts = parse(Path::new("/q"), output.as_bytes()).unwrap();
    assert_eq!(facts.version.to_string(), "9.1.4");
    assert!(facts.microvm && facts.q35 && facts.accel_tcg && facts.vhost_vsock_mmio && facts.memory_file_rom);
    assert!(facts.sandbox && facts.datagram_network && facts.file_migration && facts.reconnect_ms);
    assert!(!facts.pc && !facts.accel_kvm && !facts.vhost_vsock_pci);
}

#[test]
fn silence_and_nonsense_are_errors_within_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let hangs = program(dir.path(), "exec sleep 1000");
    assert!(matches!(
        probe_program(&hangs, Duration::from_millis(50)),
        Err(QemuProbeError::Hangs { timeout_ms: 50, .. })
    ));
    match probe_program(&program(dir.path(), "echo no such option >&2; exit 1"), PROBE_TIMEOUT) {
        Err(QemuProbeError::NotQemu { stderr_tail, .. }) => assert_eq!(stderr_tail, "no such option"),
        other => panic!("{other:?}"),
    }
    let path = dir.path().join("qemu");
    fs::write(&path, b"\x7fELF broken").unwrap();
    assert!(matches!(probe_program(&path, PROBE_TIMEOUT), Err(QemuProbeError::CannotRun { .. })));
}

#[test]
fn qemu_is_probed_once_until_it_changes() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let script = format!("echo x >> {}/asked; echo '{GREETING}'; echo '{LAST}'", dir.path().display());
    let path = program(dir.path(), &script);
    let asked = || fs::read(dir.path().join("asked")).unwrap().len() / 2;
    let first = probe(&path, &cache).unwrap();
    assert_eq!((probe(&path, &cache).unwrap(), asked()), (first, 1));
    program(dir.path(), &format!("{script}; :"));
    probe(&path, &cache).unwrap();
    assert_eq!(asked(), 2);
}

#[test]
fn qemu_is_found_by_its_configured_path_or_in_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = program(dir.path(), "");
    let search = std::env::join_paths([Path::new("relative"), dir.path()]).unwrap();
    assert_eq!(find_in(Some(&path), None).unwrap(), path);
    assert_eq!(find_in(Some(Path::new("qemu")), Some(&search)).unwrap(), path);
    let error = find_in(None, Some(&search)).unwrap_err();
    assert_eq!(error.to_string(), "QEMU was not found: no program qemu-system-x86_64 in PATH");
    let nowhere = dir.path().join("gone");
    assert!(find_in(Some(&nowhere), Some(&search)).is_err());
}
