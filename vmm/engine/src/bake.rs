//! Selects the saved guest (bake, warm image) that a machine can continue from: pure.
//!
//! Invariant: a [`Bake`] is selected only if the guest in it cannot distinguish the new machine from the old one, and
//! only for exactly the QEMU that saved it. Every difference is reported in a sentence.

use nido_images::{Bake, BakedMachine, QemuId};

use crate::host::{HostFacts, QemuFacts};
use crate::machine::{Accel, Machine};
use crate::qemu::argv;

/// How far the host's time-stamp counter may have been measured differently, in parts per million. The guest's clock runs
/// off by as much.
const TSC_TOLERANCE_PPM: u64 = 200;

/// Why no bake fits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BakeMismatch {
    /// There is none for such a machine: the end of a sentence, with the difference.
    Missing(String),
    /// There is one for such a machine, and this host cannot load it.
    Mismatch(String),
}

impl BakeMismatch {
    /// The words of either.
    #[must_use]
    pub fn why(&self) -> &str {
        let (Self::Missing(why) | Self::Mismatch(why)) = self;
        why
    }
}

/// Everything of a machine that a guest may notice.
#[must_use]
pub fn shape(machine: &Machine, host: &HostFacts) -> BakedMachine {
    BakedMachine {
        machine: machine.machine.name().into(),
        accel: machine.accel.name().into(),
        cpu_model: machine.cpu_model.clone(),
        cpus: machine.cpus,
        memory_mib: machine.memory_mib,
        // The rules of a VM are not part of its hardware.
        net: machine.net.hardware().name().into(),
        transport: machine.transport.name().into(),
        tsc_khz: machine.tsc_khz,
        host_cpu: (machine.accel == Accel::Kvm).then(|| host.cpu_model.clone()),
        devices: nido_images::sha256(argv::devices(machine).as_bytes()),
    }
}

/// What identifies a QEMU.
#[must_use]
pub fn qemu_id(qemu: &QemuFacts) -> QemuId {
    let version =
        if qemu.package.is_empty() { qemu.version.to_string() } else { format!("{} ({})", qemu.version, qemu.package) };
    QemuId { version, sha256: qemu.sha256.clone() }
}

/// The bake that a machine of this shape continues from under this QEMU.
///
/// # Errors
/// What is in the way.
pub fn choose<'a>(bakes: &'a [Bake], wanted: &BakedMachine, qemu: &QemuId) -> Result<&'a Bake, BakeMismatch> {
    if bakes.is_empty() {
        return Err(BakeMismatch::Missing("the template has no warm image".into()));
    }
    let fitting: Vec<&Bake> = bakes.iter().filter(|bake| same_kind(&bake.machine, wanted)).collect();
    let Some(newest) = fitting.last() else {
        // Reports the difference from the closest bake.
        let closest = bakes.iter().map(|bake| differences(&bake.machine, wanted)).min_by_key(Vec::len);
        return Err(BakeMismatch::Missing(format!("no warm image has {}", closest.unwrap_or_default().join(" and "))));
    };
    let loadable = |bake: &&Bake| fits((&bake.machine, &bake.qemu), wanted, qemu).is_ok();
    match fitting.iter().copied().find(loadable) {
        Some(bake) => Ok(bake),
        None => Err(fits((&newest.machine, &newest.qemu), wanted, qemu)
            .err()
            .unwrap_or_else(|| BakeMismatch::Missing(String::new()))),
    }
}

/// Whether what one machine was saved as can be loaded into another of this shape under this QEMU.
///
/// # Errors
/// What is in the way.
pub fn fits(saved: (&BakedMachine, &QemuId), wanted: &BakedMachine, qemu: &QemuId) -> Result<(), BakeMismatch> {
    let (machine, by) = saved;
    let differences = differences(machine, wanted);
    if !differences.is_empty() {
        return Err(BakeMismatch::Missing(format!("it was not saved with {}", differences.join(" and "))));
    }
    if by.sha256 != qemu.sha256 {
        return Err(BakeMismatch::Mismatch(if by.version == qemu.version {
            format!("it was saved by another build of QEMU {}", qemu.version)
        } else {
            format!("it was saved by QEMU {}, and here is {}", by.version, qemu.version)
        }));
    }
    if machine.devices != wanted.devices {
        return Err(BakeMismatch::Mismatch(
            "it was saved by another nido version, whose machines have different devices".into(),
        ));
    }
    if clocks_agree(machine, wanted) {
        Ok(())
    } else {
        Err(BakeMismatch::Mismatch("it was saved on a host whose time-stamp counter has another frequency".into()))
    }
}

fn same_kind(bake: &BakedMachine, wanted: &BakedMachine) -> bool {
    differences(bake, wanted).is_empty()
}

/// What of `wanted` the bake does not have, in words. The clock is not among them: no user requests it.
fn differences(bake: &BakedMachine, wanted: &BakedMachine) -> Vec<String> {
    let mut words = Vec::new();
    let mut differ = |same: bool, word: String| words.extend((!same).then_some(word));
    differ(bake.machine == wanted.machine, format!("machine type {}", wanted.machine));
    differ(bake.accel == wanted.accel, format!("accelerator {}", wanted.accel));
    differ(bake.cpus == wanted.cpus, format!("{} CPUs", wanted.cpus));
    differ(bake.memory_mib == wanted.memory_mib, format!("{} MiB of memory", wanted.memory_mib));
    differ(bake.net == wanted.net, format!("network {}", wanted.net));
    differ(bake.transport == wanted.transport, format!("transport {}", wanted.transport));
    differ(bake.cpu_model == wanted.cpu_model || bake.accel != wanted.accel, format!("CPU {}", wanted.cpu_model));
    differ(bake.host_cpu == wanted.host_cpu || bake.accel != wanted.accel, "this host's CPU".into());
    words
}

fn clocks_agree(bake: &BakedMachine, wanted: &BakedMachine) -> bool {
    match (bake.tsc_khz, wanted.tsc_khz) {
        (None, None) => true,
        (Some(baked), Some(here)) => u64::from(baked.abs_diff(here)) * 1_000_000 <= u64::from(here) * TSC_TOLERANCE_PPM,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use nido_images::{Disk, Part};

    use super::*;

    fn machine() -> BakedMachine {
        BakedMachine {
            machine: "microvm".into(),
            accel: "tcg".into(),
            cpu_model: "max".into(),
            cpus: 1,
            memory_mib: 512,
            net: "nat".into(),
            transport: "virtio-serial".into(),
            tsc_khz: Some(2_300_000),
            host_cpu: None,
            devices: "d0".into(),
        }
    }

    fn qemu(version: &str, hash: &str) -> QemuId {
        QemuId { version: version.into(), sha256: hash.into() }
    }

    fn bake(machine: BakedMachine, qemu: QemuId) -> Bake {
        let part = || Part { sha256: String::new(), bytes: 0 };
        Bake {
            created_at: jiff::Timestamp::UNIX_EPOCH,
            machine,
            qemu,
            token: String::new(),
            memory: part(),
            state: part(),
            disk: Disk { file: part(), virtual_bytes: 0 },
        }
    }

    #[test]
    fn the_same_machine_and_qemu_fit() {
        let bakes = [
            bake(BakedMachine { memory_mib: 1024, ..machine() }, qemu("7.2", "a")),
            bake(BakedMachine { tsc_khz: Some(2_300_100), ..machine() }, qemu("7.2", "a")),
        ];
        assert_eq!(choose(&bakes, &machine(), &qemu("7.2", "a")).unwrap(), &bakes[1]);
    }

    #[test]
    fn missing_parts_are_named() {
        let why = |bakes: &[Bake], wanted| choose(bakes, &wanted, &qemu("7.2", "a")).unwrap_err();
        assert_eq!(why(&[], machine()), BakeMismatch::Missing("the template has no warm image".into()));
        let bakes = [bake(machine(), qemu("7.2", "a")), bake(BakedMachine { cpus: 2, ..machine() }, qemu("7.2", "a"))];
        let wanted = BakedMachine { cpus: 2, memory_mib: 1024, ..machine() };
        assert_eq!(why(&bakes, wanted), BakeMismatch::Missing("no warm image has 1024 MiB of memory".into()));
    }

    #[test]
    fn a_bake_of_another_host_is_a_mismatch() {
        let why = |bake: Bake| choose(&[bake], &machine(), &qemu("7.2", "a")).unwrap_err();
        let other = why(bake(machine(), qemu("10.0", "b")));
        assert_eq!(other, BakeMismatch::Mismatch("it was saved by QEMU 10.0, and here is 7.2".into()));
        assert!(
            matches!(why(bake(machine(), qemu("7.2", "b"))), BakeMismatch::Mismatch(why) if why.contains("another build"))
        );
        let fast = BakedMachine { tsc_khz: Some(2_400_000), ..machine() };
        assert!(matches!(why(bake(fast, qemu("7.2", "a"))), BakeMismatch::Mismatch(why) if why.contains("time-stamp")));
        let other_devices = BakedMachine { devices: String::new(), ..machine() };
        assert!(
            matches!(why(bake(other_devices, qemu("7.2", "a"))), BakeMismatch::Mismatch(why) if why.contains("devices"))
        );
        let clockless = BakedMachine { tsc_khz: None, ..machine() };
        assert!(matches!(why(bake(clockless, qemu("7.2", "a"))), BakeMismatch::Mismatch(_)));
    }
}
