//! The whole command line for every kind of machine, against `tests/golden/argv/*.txt` (one argument per line, a blank
//! line between parts). `NIDO_BLESS=1 cargo test -p nido-engine argv` rewrites the files; review the difference.

use std::collections::BTreeSet;
use std::path::PathBuf;

use nido_api::{AccelChoice, MachineChoice, NetChoice};

use super::argv::{Disk, Files, Memory, Part, devices, flatten, parts};
use crate::host::qemu::MINIMUM_VERSION;
use crate::host::{ConfinementSupport, HostFacts, KvmVerdict, Nesting, QemuFacts, QemuVersion, VsockVerdict};
use crate::machine::tests::qemu_facts;
use crate::machine::{Machine, MachineRequest, Transport, decide};

fn files(ephemeral: bool) -> Files {
    Files {
        vm_name: "web".into(),
        kernel: "/home/ada/nido, mine/blobs/sha256/aa".into(),
        initrd: "/home/ada/nido, mine/blobs/sha256/bb".into(),
        kernel_append: "nido.template=sandbox".into(),
        disk: Disk {
            overlay: "disk.qcow2".into(),
            bases: vec!["/home/ada/nido, mine/blobs/sha256/cc".into()],
            has_quota: false,
            ephemeral,
        },
        monitor_socket: "qmp.sock".into(),
        channel_socket: "channel.sock".into(),
        console_log: "console.log".into(),
        guest_config: "guest.cbor".into(),
        memory: Memory::Fresh,
        incoming: false,
    }
}

/// A QEMU as its version has it, and its word in a golden file's name.
fn qemus() -> [(&'static str, QemuFacts); 2] {
    let newer = QemuVersion { major: 10, minor: 0, ..MINIMUM_VERSION };
    let newer =
        QemuFacts { version: newer, reconnect_ms: true, memory_file_rom: true, file_migration: true, ..qemu_facts() };
    [("", qemu_facts()), ("-qemu-10", newer)]
}

fn machine(kind: MachineChoice, accel: AccelChoice, vsock: VsockVerdict) -> Machine {
    machine_on(&qemu_facts(), kind, accel, vsock, false)
}

/// A machine, for tests of other modules.
pub(super) fn microvm() -> Machine {
    machine(MachineChoice::Microvm, AccelChoice::Tcg, VsockVerdict::Absent)
}

fn machine_on(qemu: &QemuFacts, kind: MachineChoice, accel: AccelChoice, vsock: VsockVerdict, nested: bool) -> Machine {
    let request = MachineRequest {
        cpus: 2,
        memory_mib: 512,
        disk_bytes: 4 << 30,
        machine: kind,
        accel,
        net: NetChoice::Nat,
        nested,
        require_isolation: false,
        require_confinement: false,
        ran_under: None,
        cid: 4711,
    };
    let host = HostFacts {
        cpus: 2,
        memory_mib: 8192,
        memory_available_mib: 4096,
        tsc_khz: Some(2_300_000),
        cpu_model: String::new(),
        kvm: KvmVerdict::Usable { micros: 20 },
        vsock,
        nesting: Nesting::On,
        confinement: ConfinementSupport::full(),
        boot_id: String::new(),
        uid: 1000,
        gid: 1000,
    };
    decide(&request, &host, qemu).unwrap()
}

fn every_machine() -> Vec<(String, Machine)> {
    let mut all = Vec::new();
    for kind in [MachineChoice::Microvm, MachineChoice::Pc, MachineChoice::Q35] {
        for accel in [AccelChoice::Kvm, AccelChoice::Tcg] {
            for vsock in [VsockVerdict::Usable, VsockVerdict::Absent] {
                let machine = machine(kind, accel, vsock);
                let name = format!("{}-{}-{}", machine.machine.name(), machine.accel.name(), machine.transport.name());
                all.push((name, machine));
            }
        }
    }
    all
}

/// Every machine under every QEMU booted; without VMs of its own also booted to be saved, and forked.
fn every_start() -> Vec<(String, Machine, Files)> {
    let mut all = Vec::new();
    for (suffix, qemu) in qemus() {
        let read_only = qemu.memory_file_rom;
        for kind in [MachineChoice::Microvm, MachineChoice::Pc, MachineChoice::Q35] {
            for accel in [AccelChoice::Kvm, AccelChoice::Tcg] {
                for vsock in [VsockVerdict::Usable, VsockVerdict::Absent] {
                    let name = |machine: &Machine| {
                        let words = [machine.machine.name(), machine.accel.name(), machine.transport.name()];
                        format!("{}{suffix}", words.join("-"))
                    };
                    let plain = machine_on(&qemu, kind, accel, vsock.clone(), false);
                    let nested = machine_on(&qemu, kind, accel, vsock, true);
                    all.push((format!("{}-nested", name(&nested)), nested, files(false)));
                    all.push((format!("{}-bake", name(&plain)), plain.clone(), baked()));
                    all.push((format!("{}-fork", name(&plain)), plain.clone(), forked(read_only)));
                    all.push((name(&plain), plain, files(false)));
                }
            }
        }
    }
    all
}

fn baked() -> Files {
    Files { memory: Memory::File("memory.img".into()), ..files(true) }
}

fn forked(read_only: bool) -> Files {
    let memory = Memory::Image { path: "/home/ada/nido, mine/blobs/sha256/dd".into(), read_only };
    let mut files = Files { memory, incoming: true, ..files(false) };
    files.disk.bases.push("/home/ada/nido, mine/blobs/sha256/ee".into());
    files
}

fn rendered(parts: &[Part]) -> String {
    let block = |part: &Part| {
        let args: Vec<_> = part.args.iter().map(|a| a.to_str().unwrap()).collect();
        format!("# {}\n{}\n", part.name, args.join("\n"))
    };
    parts.iter().map(block).collect::<Vec<_>>().join("\n")
}

#[test]
fn command_lines_are_the_golden_ones() {
    let dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/argv"));
    let mut names = BTreeSet::new();
    for (name, machine, files) in every_start() {
        let path = dir.join(format!("{name}.txt"));
        let now = rendered(&parts(&machine, &files));
        if std::env::var_os("NIDO_BLESS").is_some() {
            std::fs::write(&path, &now).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(now, golden, "{name}: the command line changed; NIDO_BLESS=1 writes the golden files anew");
        names.insert(path);
    }
    let there: BTreeSet<_> = std::fs::read_dir(&dir).unwrap().map(|e| dir.join(e.unwrap().file_name())).collect();
    assert_eq!(there, names, "golden files without a machine");
}

#[test]
fn a_microvm_has_room_for_its_devices() {
    for (name, machine) in every_machine().into_iter().filter(|(name, _)| name.starts_with("microvm")) {
        let args = flatten(parts(&machine, &files(false)));
        let on_virtio_mmio = |arg: &str| arg.split(',').next().is_some_and(|d| d.len() > 7 && d.ends_with("-device"));
        let count = args.iter().filter(|a| on_virtio_mmio(a.to_str().unwrap())).count();
        assert!((1..=8).contains(&count), "{name}: {count}");
    }
}

#[test]
fn an_ephemeral_disk_skips_flushes_on_both_its_layers() {
    let (_, machine) = every_machine().remove(0);
    let count = |ephemeral| {
        let args = flatten(parts(&machine, &files(ephemeral)));
        args.iter().filter(|a| a.to_str().unwrap().contains("cache.no-flush=on")).count()
    };
    assert_eq!((count(false), count(true)), (0, 2));
}

#[test]
fn a_newer_qemu_redials_sooner() {
    let (_, mut machine) = every_machine().remove(1);
    let redials = |machine: &Machine| {
        let args = flatten(parts(machine, &files(false)));
        args.iter().any(|a| a.to_str().unwrap().contains("reconnect-ms="))
    };
    assert!(!redials(&machine));
    machine.transport = Transport::VirtioSerial { reconnect_ms: true };
    assert!(redials(&machine));
}

#[test]
fn the_device_digest_covers_devices_but_not_the_address() {
    let of = |kind, vsock| machine(kind, AccelChoice::Tcg, vsock);
    let here = of(MachineChoice::Microvm, VsockVerdict::Usable);
    let elsewhere = Machine { transport: Transport::Vsock { cid: 99 }, memory_mib: 1024, ..here.clone() };
    assert_eq!(devices(&here), devices(&elsewhere));
    let lines: Vec<_> = devices(&here).lines().map(str::to_owned).collect();
    assert!(lines[0].starts_with("microvm,") && lines.contains(&"virtio-rng-device,rng=rng".to_owned()), "{lines:?}");
    assert!(lines.contains(&"vhost-vsock-device,guest-cid=3".to_owned()), "{lines:?}");
    assert_ne!(devices(&here), devices(&of(MachineChoice::Microvm, VsockVerdict::Absent)));
    assert_ne!(devices(&here), devices(&of(MachineChoice::Pc, VsockVerdict::Usable)));
    assert_ne!(devices(&here), devices(&Machine { net: NetChoice::None, ..here.clone() }));
    assert_eq!(devices(&here), devices(&Machine { net: NetChoice::Restricted, ..here.clone() }));
}

#[test]
fn a_disk_with_a_quota_reports_errors_of_writes_to_the_guest() {
    let (_, machine) = every_machine().remove(0);
    let mut files = files(false);
    let has = |files: &Files, word| flatten(parts(&machine, files)).iter().any(|a| a.to_str().unwrap().contains(word));
    assert!(has(&files, ",werror=stop"));
    files.disk.has_quota = true;
    assert!(has(&files, ",werror=enospc") && !has(&files, ",werror=stop"));
}
