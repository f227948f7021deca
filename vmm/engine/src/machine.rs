//! Derives the machine from a request and the host, or a refusal with its reason. Pure.
//!
//! ```text
//! MachineRequest + HostFacts + QemuFacts --decide--> Machine --qemu::argv--> argument list
//! ```
//!
//! Invariants: KVM is chosen only where it is proven to run; TCG is never chosen in silence (a warning stands in the
//! [`Machine`]), never where isolation is required, never for a VM that ran under KVM before unless its user requests it, and never
//! because a test of KVM did not end; a [`Machine`] holds only what the QEMU at hand can do.

use nido_api::{AccelChoice, HostLimits, MachineChoice, NetChoice};

use crate::host::qemu::{MINIMUM_VERSION, QemuFacts, QemuVersion};
use crate::host::{HostFacts, KvmVerdict, Nesting, OwnUser, VsockVerdict};
pub use nido_api::machine::{Accel, Machine, MachineType, Transport};

/// The least memory a VM can be given, in MiB: with 64 a stock Debian kernel ends in "System is deadlocked on memory",
/// with 96 it just comes up. How much a guest needs to be of use is its template's affair.
pub const MEMORY_MIB_MIN: u32 = 128;
/// The largest disk, in bytes (16 TiB: where ext4 with 4 KiB blocks ends).
pub const DISK_BYTES_MAX: u64 = 16 << 40;
/// The CIDs that a guest may have: below are the hypervisor's and the host's, above is "any".
pub const GUEST_CIDS: std::ops::RangeInclusive<u32> = 3..=u32::MAX - 1;
/// How much translated code QEMU keeps per VM under TCG, in MiB: so much at least and at most, of a VM that runs VMs itself,
/// and one part in how many of the guest's memory otherwise. It is room, which is filled as code is met; a guest that meets
/// more code than fits has all of it translated again.
const TB_SIZE_MIB: std::ops::RangeInclusive<u32> = 64..=1024;
const TB_SIZE_NESTED_MIB: u32 = 512;
const TB_SIZE_OF_MEMORY: u32 = 8;

/// What was seen with QEMU 7.2 of emulated hosts with two processors (`docs/decisions/0010`).
const NESTED_ON_ONE_CPU: &str = "VMs in an emulated VM are reliable with one CPU only: with more, the guest's kernel may panic when it \
     starts or ends one";

/// The part of a VM's specification that decides on its machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineRequest {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual size of the disk in bytes.
    pub disk_bytes: u64,
    /// Machine type requested.
    pub machine: MachineChoice,
    /// Accelerator requested.
    pub accel: AccelChoice,
    /// Network requested.
    pub net: NetChoice,
    /// Give the guest virtualization of its own.
    pub nested: bool,
    /// Refuse to run without hardware isolation.
    pub require_isolation: bool,
    /// Refuse to run unless all layers of QEMU's confinement are available.
    pub require_confinement: bool,
    /// What ran it at its last start. A VM that ran under KVM runs under TCG only if TCG is requested.
    pub ran_under: Option<Accel>,
    /// The CID reserved for this VM, used where the kernel offers vsock.
    pub cid: u32,
}

/// Why there is no machine for a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// KVM was requested and is not usable.
    #[error("KVM cannot be used: {why}")]
    KvmUnavailable {
        /// What is wrong with it.
        why: String,
    },
    /// KVM is there, and whether it works could not be found out.
    #[error("the test of KVM did not finish: {why}")]
    KvmUndecided {
        /// What kept the test from ending.
        why: String,
    },
    /// The VM ran with hardware isolation before, which is not available now.
    #[error("the VM has run with hardware isolation so far, and KVM cannot be used: {why}")]
    IsolationLost {
        /// Why there is none.
        why: String,
    },
    /// Isolation was requested and is not available.
    #[error("hardware isolation is required, and {why}")]
    IsolationRequired {
        /// Why there is none.
        why: String,
    },
    /// Confinement was requested, and a layer is not available.
    #[error("full confinement of QEMU is required, and this host lacks {missing}")]
    ConfinementRequired {
        /// The layers, with reasons.
        missing: String,
    },
    /// VMs inside the VM were requested, and the host's KVM does not allow them.
    #[error("the host does not allow nested VMs: the parameter `nested` of its module {module} is off")]
    NestingOff {
        /// The module.
        module: &'static str,
        /// What turns it on.
        remedy: String,
    },
    /// A value is out of its range.
    #[error("{field} {rule}")]
    SpecInvalid {
        /// The name of the field, as in the specification.
        field: &'static str,
        /// The rule it breaks.
        rule: String,
    },
    /// This QEMU is older than nido supports.
    #[error("QEMU {found} is too old: nido needs {MINIMUM_VERSION} or newer")]
    QemuTooOld {
        /// The version at hand.
        found: QemuVersion,
    },
    /// This QEMU was built without something that is needed.
    #[error("this QEMU was built without {what}")]
    QemuLacks {
        /// What it lacks.
        what: &'static str,
    },
}

/// Decides on a machine.
///
/// # Errors
/// The first reason found why there can be none.
pub fn decide(request: &MachineRequest, host: &HostFacts, qemu: &QemuFacts) -> Result<Machine, Refusal> {
    check_qemu(request, qemu)?;
    check_spec(request, host)?;
    if let (true, Some(missing)) = (request.require_confinement, host.confinement.shortfall()) {
        return Err(Refusal::ConfinementRequired { missing });
    }
    let mut warnings = Vec::new();
    let (accel, accel_reason) = accelerator(request, host, qemu, &mut warnings)?;
    if let (true, Accel::Kvm, Nesting::Off { module }) = (request.nested, accel, host.nesting) {
        return Err(Refusal::NestingOff { module: module.name(), remedy: module.turn_on() });
    }
    if request.nested && accel == Accel::Tcg && request.cpus > 1 {
        warnings.push(NESTED_ON_ONE_CPU.to_owned());
    }
    let tsc_khz = if accel == Accel::Tcg { host.tsc_khz } else { None };
    let (machine, machine_reason) = machine_type(request, accel, tsc_khz, qemu, &mut warnings)?;
    if u64::from(request.memory_mib) > host.memory_available_mib {
        warnings.push(format!(
            "the VM may use {} MiB of memory, and {} MiB are free on the host",
            request.memory_mib, host.memory_available_mib
        ));
    }
    warnings.extend(host.confinement.warning());
    Ok(Machine {
        machine,
        accel,
        cpu_model: cpu_model(accel, request.nested),
        cpus: request.cpus,
        memory_mib: request.memory_mib,
        net: request.net,
        transport: transport(request.cid, machine, host, qemu),
        tb_size_mib: (accel == Accel::Tcg).then(|| tb_size_mib(request.memory_mib, request.nested)),
        tsc_khz,
        confinement: host.confinement.layers(),
        own_user: host.confinement.own_user == OwnUser::Available,
        host_limits: HostLimits::default(),
        reason: format!("{machine_reason}; {accel_reason}"),
        warnings,
    })
}

fn tb_size_mib(memory_mib: u32, nested: bool) -> u32 {
    let least = if nested { TB_SIZE_NESTED_MIB } else { *TB_SIZE_MIB.start() };
    (memory_mib / TB_SIZE_OF_MEMORY).clamp(least, *TB_SIZE_MIB.end())
}

fn check_qemu(request: &MachineRequest, qemu: &QemuFacts) -> Result<(), Refusal> {
    if qemu.version < MINIMUM_VERSION {
        return Err(Refusal::QemuTooOld { found: qemu.version });
    }
    if !qemu.sandbox {
        return Err(Refusal::QemuLacks { what: "its own system call filter (-sandbox)" });
    }
    if request.net.has_card() && !qemu.datagram_network {
        return Err(Refusal::QemuLacks { what: "networking by datagrams (-netdev dgram)" });
    }
    Ok(())
}

fn check_spec(request: &MachineRequest, host: &HostFacts) -> Result<(), Refusal> {
    let refuse = |field, rule| Err(Refusal::SpecInvalid { field, rule });
    if !(1..=host.cpus.max(1)).contains(&request.cpus) {
        return refuse("cpus", format!("must be between 1 and {}, the host's own", host.cpus.max(1)));
    }
    if request.memory_mib < MEMORY_MIB_MIN || u64::from(request.memory_mib) > host.memory_mib {
        let rule = format!("must be between {MEMORY_MIB_MIN} and {} MiB, the host's own", host.memory_mib);
        return refuse("memory_mib", rule);
    }
    if request.disk_bytes == 0 || !request.disk_bytes.is_multiple_of(512) || request.disk_bytes > DISK_BYTES_MAX {
        return refuse("disk_bytes", "must be a multiple of 512 and at most 16 TiB".into());
    }
    if !GUEST_CIDS.contains(&request.cid) {
        return refuse("cid", format!("must be between {} and {}", GUEST_CIDS.start(), GUEST_CIDS.end()));
    }
    Ok(())
}

fn accelerator(
    request: &MachineRequest,
    host: &HostFacts,
    qemu: &QemuFacts,
    warnings: &mut Vec<String>,
) -> Result<(Accel, String), Refusal> {
    let kvm_trouble = if qemu.accel_kvm { host.kvm.trouble() } else { Some("this QEMU was built without it".into()) };
    let no_isolation =
        |why: String| if request.require_isolation { Err(Refusal::IsolationRequired { why }) } else { Ok(()) };
    let undecided = qemu.accel_kvm && matches!(host.kvm, KvmVerdict::Undecided { .. });
    match (request.accel, kvm_trouble) {
        (AccelChoice::Auto, None) => Ok((Accel::Kvm, "kvm because its test succeeded".into())),
        (AccelChoice::Kvm, None) => Ok((Accel::Kvm, "kvm as requested".into())),
        (AccelChoice::Auto | AccelChoice::Kvm, Some(why)) if undecided => Err(Refusal::KvmUndecided { why }),
        (AccelChoice::Kvm, Some(why)) => Err(Refusal::KvmUnavailable { why }),
        (AccelChoice::Auto, Some(why)) if request.ran_under == Some(Accel::Kvm) => Err(Refusal::IsolationLost { why }),
        _ if !qemu.accel_tcg => Err(Refusal::QemuLacks { what: "software emulation (TCG)" }),
        (AccelChoice::Tcg, _) => {
            no_isolation("software emulation (TCG), which was requested, has none".into())?;
            warnings.push(format!("no hardware isolation: {TCG_WARNING}"));
            Ok((Accel::Tcg, "tcg as requested".into()))
        }
        (AccelChoice::Auto, Some(why)) => {
            no_isolation(format!("KVM cannot be used: {why}"))?;
            warnings.push(format!("no hardware isolation: KVM cannot be used ({why}); {TCG_WARNING}"));
            Ok((Accel::Tcg, format!("tcg because KVM cannot be used: {why}")))
        }
    }
}

const TCG_WARNING: &str = "the VM runs under software emulation (TCG), which is slow and not a security boundary";

fn machine_type(
    request: &MachineRequest,
    accel: Accel,
    tsc_khz: Option<u32>,
    qemu: &QemuFacts,
    warnings: &mut Vec<String>,
) -> Result<(MachineType, String), Refusal> {
    // Without a second clock an emulated microvm calibrates its time by luck.
    let clockless = accel == Accel::Tcg && tsc_khz.is_none();
    let asked = |machine: MachineType, has: bool, lacks: &'static str| {
        if has {
            Ok((machine, format!("{} as requested", machine.name())))
        } else {
            Err(Refusal::QemuLacks { what: lacks })
        }
    };
    match request.machine {
        MachineChoice::Microvm => {
            if clockless && qemu.microvm {
                warnings.push("the host has no stable time-stamp counter: an emulated microvm may hang at boot".into());
            }
            asked(MachineType::Microvm, qemu.microvm, "the machine type microvm")
        }
        MachineChoice::Pc => asked(MachineType::Pc, qemu.pc, "the machine type pc"),
        MachineChoice::Q35 => asked(MachineType::Q35, qemu.q35, "the machine type q35"),
        MachineChoice::Auto if qemu.microvm && !clockless => Ok((
            MachineType::Microvm,
            "microvm because it is the smallest machine that has everything this VM needs".into(),
        )),
        MachineChoice::Auto if qemu.q35 => {
            let why = if clockless { "the host has no stable time-stamp counter" } else { "this QEMU has no microvm" };
            Ok((MachineType::Q35, format!("q35 because {why}")))
        }
        MachineChoice::Auto => Err(Refusal::QemuLacks { what: "the machine types microvm and q35" }),
    }
}

/// Without `nested` the guest sees no virtualization extension. Under TCG the "fast string" features are off: they make
/// the guest copy memory with `rep movsb`, which TCG emulates byte by byte.
fn cpu_model(accel: Accel, nested: bool) -> String {
    let model = match accel {
        Accel::Kvm => "host",
        Accel::Tcg => "max,-erms,-fsrm",
    };
    if nested { model.into() } else { format!("{model},-vmx,-svm") }
}

fn transport(cid: u32, machine: MachineType, host: &HostFacts, qemu: &QemuFacts) -> Transport {
    let device = if machine == MachineType::Microvm { qemu.vhost_vsock_mmio } else { qemu.vhost_vsock_pci };
    if device && host.vsock == VsockVerdict::Usable {
        Transport::Vsock { cid }
    } else {
        Transport::VirtioSerial { reconnect_ms: qemu.reconnect_ms }
    }
}

#[cfg(test)]
pub(crate) mod tests;
