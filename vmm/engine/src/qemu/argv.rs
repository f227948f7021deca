//! A decided machine becomes QEMU's command line, in named parts. Pure.
//!
//! Invariant: the list depends on nothing but the arguments of [`parts`]; each value that comes from outside passes
//! through [`escaped`], so no value can become another option. `tests/golden/argv/` shows the whole list for every
//! kind of machine.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use nido_guest_agent::config::FW_CFG_NAME;
use nido_guest_agent::wire::SERIAL_PORT;

use crate::home::{NETWORK_QEMU_SOCKET, NETWORK_SOCKET};
use crate::machine::{Accel, Machine, MachineType, Transport};

/// What belongs to one start of one VM. Paths are absolute or relative to the VM's directory.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// The VM's name, for process lists.
    pub vm_name: String,
    /// The kernel: an uncompressed ELF with a PVH entry.
    pub kernel: OsString,
    /// The initramfs.
    pub initrd: OsString,
    /// The template's own parameters for the kernel's command line; may be empty.
    pub kernel_append: String,
    /// The root disk.
    pub disk: Disk,
    /// QEMU listens here for the monitor.
    pub monitor_socket: OsString,
    /// QEMU dials here for the agent's port.
    pub channel_socket: OsString,
    /// The guest's serial console is appended here.
    pub console_log: OsString,
    /// The configuration that the guest reads at boot.
    pub guest_config: OsString,
    /// Where the guest's memory comes from.
    pub memory: Memory,
    /// The machine waits for a saved state, and is paused when it is loaded.
    pub incoming: bool,
}

/// Where a guest's memory comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Memory {
    /// From the system, empty.
    #[default]
    Fresh,
    /// A file that holds it, and keeps what the guest writes: for a guest that is to be saved.
    File(OsString),
    /// A file that is never written: what the guest changes is its own.
    Image {
        /// The file.
        path: OsString,
        /// QEMU can map a file privately that it has opened for reading only.
        read_only: bool,
    },
}

/// The root disk: a qcow2 overlay on frozen qcow2 layers.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    /// The VM's own layer.
    pub overlay: OsString,
    /// The layers below, opened read-only, the lowest first. They are named here, so the paths in the headers do not
    /// matter.
    pub bases: Vec<OsString>,
    /// Nothing of it needs to survive a crash of the host: flushes are skipped.
    pub ephemeral: bool,
    /// It has a quota: a write that does not fit is an error for the guest, not a reason to pause it.
    pub has_quota: bool,
}

/// Some arguments that belong together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// What they are about.
    pub name: &'static str,
    /// The arguments.
    pub args: Vec<OsString>,
}

/// The command line in parts, in the order QEMU gets them; the program's own name is not in it.
#[must_use]
pub fn parts(machine: &Machine, files: &Files) -> Vec<Part> {
    let mut parts = vec![
        identity(files),
        machine_part(machine, &files.memory),
        cpu(machine),
        sandbox(),
        console(files),
        monitor(files),
        channel(machine, files),
        disk(machine, &files.disk),
    ];
    parts.extend(machine.net.has_card().then(|| network(machine)));
    // "panic": how a guest's kernel reports a panic, before `panic=-1` makes it reset.
    parts.extend([rng(machine), fw_cfg(files), part("panic", ["-device", "pvpanic"]), kernel(machine, files)]);
    parts.extend(files.incoming.then(|| part("incoming", ["-incoming", "defer", "-S"])));
    parts
}

/// The name of the network card's backend.
pub const NET: &str = "net";
/// A disk of the host's that fails, or is full, pauses the guest: nothing is lost, and it can resume.
const ON_IO_ERROR: &str = ",werror=stop,rerror=stop";
/// The same for a disk with a quota: a full disk of the host's pauses the guest, another error of a write is the guest's.
const ON_IO_ERROR_WITH_QUOTA: &str = ",werror=enospc,rerror=stop";

/// The arguments of all parts, one after the other.
#[must_use]
pub fn flatten(parts: Vec<Part>) -> Vec<OsString> {
    parts.into_iter().flat_map(|part| part.args).collect()
}

/// What a guest sees of its machine besides its size: the machine type and the devices, each with its switches, a line
/// each. A state that was saved with others cannot be loaded.
#[must_use]
pub fn devices(machine: &Machine) -> String {
    let transport = match machine.transport {
        // A clone gets an address of its own.
        Transport::Vsock { .. } => Transport::Vsock { cid: 3 },
        serial @ Transport::VirtioSerial { .. } => serial,
    };
    let args = flatten(parts(&Machine { transport, ..machine.clone() }, &Files::default()));
    let line = |pair: &[OsString]| {
        let value = pair[1].to_string_lossy();
        match pair[0].to_str()? {
            // What QEMU does about a host's error, the guest does not see: it is no part of the machine's shape.
            "-machine" | "-device" => Some(value.replace(ON_IO_ERROR, "") + "\n"),
            // The user network of QEMU has a state of its own, which no other backend can load.
            "-netdev" => Some(format!("netdev {}\n", value.split(',').next().unwrap_or_default())),
            _ => None,
        }
    };
    args.windows(2).filter_map(line).collect()
}

/// A value inside a `key=value,key=value` argument: QEMU ends it at a comma that is not doubled.
#[must_use]
pub fn escaped(value: &OsStr) -> OsString {
    let bytes = value.as_bytes().iter().flat_map(|b| std::iter::repeat_n(*b, if *b == b',' { 2 } else { 1 }));
    OsString::from_vec(bytes.collect())
}

/// The kernel's command line.
#[must_use]
pub fn kernel_command_line(machine: &Machine, template: &str) -> String {
    // A panic or a power-off ends QEMU (with -no-reboot). The self-tests of the crypto code cost half a second of
    // emulated time at every boot. A guest that does nothing shall cost nothing: no compaction of memory twice a second,
    // and no watchdog, which after a pause only ever finds that time has passed.
    let mut words = vec![
        "console=ttyS0 quiet reboot=t panic=-1 cryptomgr.notests nowatchdog sysctl.vm.compaction_proactiveness=0"
            .to_owned(),
    ];
    // A microvm's only other clock is the timer tick. On a busy host ticks come late, the kernel blames the counter and
    // would go by the ticks from then on; the counter is the host's own, so it is right.
    words.extend(machine.tsc_khz.map(|khz| format!("tsc_early_khz={khz} tsc=reliable")));
    // Emulated code is translated once per address: with random addresses every program starts four times as slowly.
    words.extend((machine.accel == Accel::Tcg).then(|| "norandmaps".to_owned()));
    words.extend((!template.is_empty()).then(|| template.to_owned()));
    words.join(" ")
}

fn part<const N: usize>(name: &'static str, args: [&str; N]) -> Part {
    Part { name, args: args.iter().map(Into::into).collect() }
}

/// `before` and the escaped value in one argument.
fn with_value(before: &str, value: &OsStr, after: &str) -> OsString {
    let mut arg = OsString::from(before);
    arg.push(escaped(value));
    arg.push(after);
    arg
}

/// The name of a virtio device on this machine's bus.
fn virtio(machine: &Machine, device: &str) -> String {
    let bus = if machine.machine == MachineType::Microvm { "device" } else { "pci" };
    format!("{device}-{bus}")
}

fn identity(files: &Files) -> Part {
    let mut part = part(
        "identity",
        ["-name", "", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-msg", "timestamp=on"],
    );
    part.args[1] = with_value("guest=", files.vm_name.as_ref(), ",debug-threads=on");
    part
}

fn machine_part(machine: &Machine, memory: &Memory) -> Part {
    let kind = match (machine.machine, machine.accel) {
        // Emulated, a timer interrupt can arrive before the kernel has set up the interrupt controller of old. The timer of
        // old is never stopped by the kernel, and would wake QEMU 36 times a second for nothing.
        (MachineType::Microvm, Accel::Tcg) => "microvm,acpi=on,rtc=on,pic=off,pit=off",
        (MachineType::Microvm, Accel::Kvm) => "microvm,acpi=on,rtc=on",
        (MachineType::Pc, _) => "pc,vmport=off,usb=off,smbus=off,sata=off,i8042=off",
        (MachineType::Q35, _) => "q35,vmport=off,usb=off,smbus=off,sata=off,i8042=off",
    };
    let mut kind = format!("{kind},mem-merge=off,dump-guest-core=off");
    // The name that the memory has without a file, so that a machine with one can load what a machine without has saved.
    let ram = if machine.machine == MachineType::Microvm { "microvm.ram" } else { "pc.ram" };
    let backend = memory_backend(machine, memory, ram);
    if backend.is_some() {
        kind = format!("{kind},memory-backend={ram}");
    }
    let accel = match machine.tb_size_mib {
        Some(mib) => format!("{},tb-size={mib}", machine.accel.name()),
        None => machine.accel.name().to_owned(),
    };
    let mut part = part("machine", ["-machine", &kind, "-accel", &accel]);
    part.args.extend(backend.into_iter().flat_map(|backend| ["-object".into(), backend]));
    part
}

fn memory_backend(machine: &Machine, memory: &Memory, ram: &str) -> Option<OsString> {
    let before = format!("memory-backend-file,id={ram},size={}M,mem-path=", machine.memory_mib);
    match memory {
        Memory::Fresh => None,
        Memory::File(path) => Some(with_value(&before, path, ",share=on")),
        Memory::Image { path, read_only: true } => Some(with_value(&before, path, ",share=off,readonly=on,rom=off")),
        Memory::Image { path, read_only: false } => Some(with_value(&before, path, ",share=off")),
    }
}

fn cpu(machine: &Machine) -> Part {
    let (smp, memory) = (format!("cpus={}", machine.cpus), format!("size={}M", machine.memory_mib));
    part("cpu and memory", ["-cpu", &machine.cpu_model, "-smp", &smp, "-m", &memory])
}

fn sandbox() -> Part {
    part("sandbox", ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"])
}

fn console(files: &Files) -> Part {
    let mut part = part("console", ["-chardev", "", "-serial", "chardev:console"]);
    part.args[1] = with_value("file,id=console,path=", &files.console_log, ",append=on");
    part
}

fn monitor(files: &Files) -> Part {
    let mut part = part("monitor", ["-chardev", "", "-mon", "chardev=monitor,mode=control"]);
    part.args[1] = with_value("socket,id=monitor,path=", &files.monitor_socket, ",server=on,wait=off");
    part
}

fn channel(machine: &Machine, files: &Files) -> Part {
    match machine.transport {
        Transport::Vsock { cid } => {
            let device = format!("{},guest-cid={cid}", virtio(machine, "vhost-vsock"));
            part("channel", ["-device", &device])
        }
        Transport::VirtioSerial { reconnect_ms } => {
            let reconnect = if reconnect_ms { ",reconnect-ms=100" } else { ",reconnect=1" };
            let bus = format!("{},max_ports=2", virtio(machine, "virtio-serial"));
            // Without an id QEMU does not report when the guest opens and closes it.
            let port = format!("virtserialport,id=agent-port,chardev=agent,name={SERIAL_PORT}");
            let mut part = part("channel", ["-chardev", "", "-device", &bus, "-device", &port]);
            let after = format!(",server=off{reconnect}");
            part.args[1] = with_value("socket,id=agent,path=", &files.channel_socket, &after);
            part
        }
    }
}

fn disk(machine: &Machine, disk: &Disk) -> Part {
    let flush = if disk.ephemeral { ",cache.no-flush=on" } else { "" };
    let on_error = if disk.has_quota { ON_IO_ERROR_WITH_QUOTA } else { ON_IO_ERROR };
    let device = format!("{},drive=disk{on_error}", virtio(machine, "virtio-blk"));
    let mut args: Vec<OsString> = Vec::new();
    let mut below = String::new();
    for (number, base) in disk.bases.iter().enumerate() {
        // The lowest is "base", the next "base1".
        let node = if number == 0 { "base".to_owned() } else { format!("base{number}") };
        let file = format!("driver=file,node-name={node}-file,filename=");
        let layer = format!("driver=qcow2,node-name={node},file={node}-file{below},read-only=on");
        let file = with_value(&file, base, ",read-only=on,aio=threads");
        args.extend(["-blockdev".into(), file, "-blockdev".into(), layer.into()]);
        below = format!(",backing={node}");
    }
    let overlay = format!("driver=qcow2,node-name=disk,file=disk-file{below},discard=unmap,detect-zeroes=unmap{flush}");
    let after = format!(",aio=threads,discard=unmap{flush}");
    let file = with_value("driver=file,node-name=disk-file,filename=", &disk.overlay, &after);
    args.extend(["-blockdev".into(), file, "-blockdev".into(), overlay.into(), "-device".into(), device.into()]);
    Part { name: "disk", args }
}

fn network(machine: &Machine) -> Part {
    // A PCI network card would bring a boot ROM along; the kernel is given, so nothing boots from the network.
    let rom = if machine.machine == MachineType::Microvm { "" } else { ",romfile=" };
    // Asked to announce itself, each guest that was loaded would spend its first milliseconds notifying a switch that is
    // not there where it has moved to.
    let device = format!("{},netdev={NET},guest_announce=off{rom}", virtio(machine, "virtio-net"));
    // Datagrams: with a stream, QEMU 7.2 waits for a supervisor that does not read, and the guest's processors with it.
    let backend = format!(
        "dgram,id={NET},local.type=unix,local.path={NETWORK_QEMU_SOCKET},remote.type=unix,remote.path={NETWORK_SOCKET}"
    );
    part("net", ["-netdev", &backend, "-device", &device])
}

fn rng(machine: &Machine) -> Part {
    let device = format!("{},rng=rng", virtio(machine, "virtio-rng"));
    part("rng", ["-object", "rng-builtin,id=rng", "-device", &device])
}

fn fw_cfg(files: &Files) -> Part {
    let mut part = part("fw_cfg", ["-fw_cfg", ""]);
    part.args[1] = with_value(&format!("name={FW_CFG_NAME},file="), &files.guest_config, "");
    part
}

fn kernel(machine: &Machine, files: &Files) -> Part {
    // These three are whole arguments: no comma is doubled in them.
    let append = kernel_command_line(machine, &files.kernel_append);
    let mut part = part("kernel", ["-kernel", "", "-initrd", "", "-append", &append]);
    part.args[1].clone_from(&files.kernel);
    part.args[3].clone_from(&files.initrd);
    part
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Splits as QEMU does: at single commas, doubled commas standing for one.
    fn qemu_values(arg: &[u8]) -> Vec<Vec<u8>> {
        let (mut values, mut value, mut rest) = (Vec::new(), Vec::new(), arg);
        while let Some((first, tail)) = rest.split_first() {
            rest = tail;
            match (first, tail.first()) {
                (b',', Some(b',')) => {
                    value.push(b',');
                    rest = &tail[1..];
                }
                (b',', _) => values.push(std::mem::take(&mut value)),
                _ => value.push(*first),
            }
        }
        values.push(value);
        values
    }

    proptest! {
        #[test]
        fn a_value_stays_one_value(bytes in proptest::collection::vec(prop_oneof![Just(b','), 1u8..], 0..40)) {
            let arg = with_value("file,path=", OsStr::from_bytes(&bytes), ",append=on");
            let values = qemu_values(arg.as_bytes());
            prop_assert_eq!(values.len(), 3);
            prop_assert_eq!(&values[1], &[b"path=".as_slice(), &bytes].concat());
        }
    }
}
