use proptest::prelude::*;

use super::*;
use crate::host::{ConfinementSupport, KvmModule};

/// A QEMU that can do everything, at the oldest version.
pub fn qemu_facts() -> QemuFacts {
    QemuFacts {
        path: "/usr/bin/qemu-system-x86_64".into(),
        version: MINIMUM_VERSION,
        package: String::new(),
        sha256: String::new(),
        microvm: true,
        pc: true,
        q35: true,
        accel_kvm: true,
        accel_tcg: true,
        sandbox: true,
        datagram_network: true,
        vhost_vsock_mmio: true,
        vhost_vsock_pci: true,
        reconnect_ms: false,
        memory_file_rom: false,
        file_migration: false,
    }
}

fn host(kvm: KvmVerdict) -> HostFacts {
    HostFacts {
        cpus: 4,
        memory_mib: 8192,
        memory_available_mib: 4096,
        tsc_khz: Some(2_300_000),
        cpu_model: String::new(),
        kvm,
        vsock: VsockVerdict::Absent,
        nesting: Nesting::Unknown,
        confinement: ConfinementSupport::full(),
        boot_id: String::new(),
        uid: 1000,
        gid: 1000,
    }
}

/// A machine of that size.
pub fn machine_of(memory_mib: u32, cpus: u32, tb_size_mib: Option<u32>) -> Machine {
    let request = MachineRequest { accel: AccelChoice::Tcg, ..request() };
    let machine = decide(&request, &host(KvmVerdict::Absent), &qemu_facts()).unwrap();
    Machine { memory_mib, cpus, tb_size_mib, ..machine }
}

fn request() -> MachineRequest {
    MachineRequest {
        cpus: 1,
        memory_mib: 512,
        disk_bytes: 1 << 30,
        machine: MachineChoice::Auto,
        accel: AccelChoice::Auto,
        net: NetChoice::Nat,
        nested: false,
        require_isolation: false,
        require_confinement: false,
        ran_under: None,
        cid: 3,
    }
}

const WORKS: KvmVerdict = KvmVerdict::Usable { micros: 9 };

/// A test of KVM that timed out on a busy host had `auto` run the VM without isolation.
#[test]
fn auto_does_not_fall_back_to_tcg_when_the_kvm_test_did_not_end() {
    let busy = host(KvmVerdict::Undecided { reason: "busy".into() });
    for accel in [AccelChoice::Auto, AccelChoice::Kvm] {
        let refusal = decide(&MachineRequest { accel, ..request() }, &busy, &qemu_facts()).unwrap_err();
        assert_eq!(refusal, Refusal::KvmUndecided { why: "busy".into() });
    }
    let tcg = decide(&MachineRequest { accel: AccelChoice::Tcg, ..request() }, &busy, &qemu_facts()).unwrap();
    assert_eq!(tcg.accel, Accel::Tcg);
    // A QEMU without KVM has nothing to find out.
    let emulator = QemuFacts { accel_kvm: false, ..qemu_facts() };
    assert_eq!(decide(&request(), &busy, &emulator).unwrap().accel, Accel::Tcg);
}

/// A VM that ran under KVM was started under TCG as soon as KVM was found wanting.
#[test]
fn a_vm_that_ran_under_kvm_runs_under_tcg_only_on_request() {
    let ran = MachineRequest { ran_under: Some(Accel::Kvm), ..request() };
    for verdict in
        [KvmVerdict::Absent, KvmVerdict::NotPermitted, KvmVerdict::PresentUnusable { reason: "it crawls".into() }]
    {
        let refusal = decide(&ran, &host(verdict.clone()), &qemu_facts()).unwrap_err();
        assert!(matches!(refusal, Refusal::IsolationLost { .. }), "{verdict:?}: {refusal}");
        let emulator = QemuFacts { accel_kvm: false, ..qemu_facts() };
        assert!(matches!(decide(&ran, &host(WORKS), &emulator), Err(Refusal::IsolationLost { .. })));
        let asked = MachineRequest { accel: AccelChoice::Tcg, ..ran.clone() };
        assert_eq!(decide(&asked, &host(verdict.clone()), &qemu_facts()).unwrap().accel, Accel::Tcg);
        let emulated = MachineRequest { ran_under: Some(Accel::Tcg), ..request() };
        assert_eq!(decide(&emulated, &host(verdict), &qemu_facts()).unwrap().accel, Accel::Tcg);
    }
    assert_eq!(decide(&ran, &host(WORKS), &qemu_facts()).unwrap().accel, Accel::Kvm);
}

#[test]
fn proven_kvm_is_taken_without_a_warning() {
    let machine = decide(&request(), &host(WORKS), &qemu_facts()).unwrap();
    assert_eq!((machine.accel, machine.accel.isolation()), (Accel::Kvm, "hardware"));
    assert_eq!((machine.tb_size_mib, machine.tsc_khz), (None, None));
    assert_eq!(machine.warnings, Vec::<String>::new());
}

#[test]
fn translated_code_has_room_for_what_the_guest_will_run() {
    let room = |memory_mib, nested| {
        let request = MachineRequest { memory_mib, nested, accel: AccelChoice::Tcg, ..request() };
        let host = HostFacts { memory_mib: 1 << 20, memory_available_mib: 1 << 20, ..host(WORKS) };
        decide(&request, &host, &qemu_facts()).unwrap().tb_size_mib.unwrap()
    };
    assert_eq!([128, 512, 1024, 4096, 65_536].map(|memory_mib| room(memory_mib, false)), [64, 64, 128, 512, 1024]);
    assert_eq!([512, 4096, 8192].map(|memory_mib| room(memory_mib, true)), [512, 512, 1024]);
}

#[test]
fn vms_inside_a_vm_need_the_hosts_leave_under_kvm_only() {
    let off = HostFacts { nesting: Nesting::Off { module: KvmModule::KvmIntel }, ..host(WORKS) };
    let nested = MachineRequest { nested: true, ..request() };
    let refusal = decide(&nested, &off, &qemu_facts()).unwrap_err();
    let Refusal::NestingOff { module: "kvm_intel", remedy } = refusal else { panic!("{refusal:?}") };
    assert!(remedy.contains("nested=1"), "{remedy}");
    assert_eq!(decide(&request(), &off, &qemu_facts()).unwrap().cpu_model, "host,-vmx,-svm");
    assert_eq!(decide(&nested, &host(WORKS), &qemu_facts()).unwrap().cpu_model, "host");
    let two = MachineRequest { cpus: 2, ..nested.clone() };
    assert_eq!(decide(&two, &host(WORKS), &qemu_facts()).unwrap().warnings, Vec::<String>::new());
    let warns =
        |request| decide(&request, &off, &qemu_facts()).unwrap().warnings.contains(&NESTED_ON_ONE_CPU.to_owned());
    assert!(warns(MachineRequest { accel: AccelChoice::Tcg, ..two }));
    assert!(!warns(MachineRequest { accel: AccelChoice::Tcg, ..nested.clone() }));
    let emulated = MachineRequest { accel: AccelChoice::Tcg, ..nested };
    assert_eq!(decide(&emulated, &off, &qemu_facts()).unwrap().accel, Accel::Tcg);
}

#[test]
fn without_kvm_auto_warns_and_kvm_refuses() {
    let facts = host(KvmVerdict::PresentUnusable { reason: "it crawls".into() });
    let machine = decide(&request(), &facts, &qemu_facts()).unwrap();
    assert_eq!((machine.accel, machine.accel.isolation()), (Accel::Tcg, "emulation"));
    assert!(machine.warnings[0].contains("it crawls"));
    let kvm = MachineRequest { accel: AccelChoice::Kvm, ..request() };
    let refusal = decide(&kvm, &facts, &qemu_facts()).unwrap_err();
    assert_eq!(refusal, Refusal::KvmUnavailable { why: "it crawls".into() });
}

#[test]
fn a_qemu_without_kvm_is_no_kvm() {
    let qemu = QemuFacts { accel_kvm: false, ..qemu_facts() };
    let machine = decide(&request(), &host(WORKS), &qemu).unwrap();
    assert_eq!(machine.accel, Accel::Tcg);
    assert_eq!(machine.warnings.len(), 1);
}

#[test]
fn an_old_or_crippled_qemu_is_refused() {
    let old = QemuVersion { major: 6, minor: 9, micro: 9 };
    let refusal = decide(&request(), &host(WORKS), &QemuFacts { version: old, ..qemu_facts() }).unwrap_err();
    assert_eq!(refusal.to_string(), "QEMU 6.9.9 is too old: nido needs 7.2.0 or newer");
    let unconfined = QemuFacts { sandbox: false, ..qemu_facts() };
    assert!(matches!(decide(&request(), &host(WORKS), &unconfined), Err(Refusal::QemuLacks { .. })));
    let no_datagrams = QemuFacts { datagram_network: false, ..qemu_facts() };
    assert!(decide(&request(), &host(WORKS), &no_datagrams).is_err());
    let offline = MachineRequest { net: NetChoice::None, ..request() };
    assert!(decide(&offline, &host(WORKS), &no_datagrams).is_ok());
}

/// A warm image or a clone of a pool that was made for `nat` continues as a restricted VM, and the other way round.
#[test]
fn restricted_and_nat_have_the_same_shape() {
    let shape_of = |net| {
        let host = host(WORKS);
        crate::bake::shape(&decide(&MachineRequest { net, ..request() }, &host, &qemu_facts()).unwrap(), &host)
    };
    assert_eq!(shape_of(NetChoice::Restricted), shape_of(NetChoice::Nat));
    assert_eq!(shape_of(NetChoice::Restricted).net, "nat");
    assert_ne!(shape_of(NetChoice::None), shape_of(NetChoice::Nat));
}

#[test]
fn values_out_of_range_name_their_field() {
    let cases = [
        ("cpus", MachineRequest { cpus: 0, ..request() }),
        ("cpus", MachineRequest { cpus: 5, ..request() }),
        ("memory_mib", MachineRequest { memory_mib: 127, ..request() }),
        ("memory_mib", MachineRequest { memory_mib: 8193, ..request() }),
        ("disk_bytes", MachineRequest { disk_bytes: 0, ..request() }),
        ("disk_bytes", MachineRequest { disk_bytes: 513, ..request() }),
        ("disk_bytes", MachineRequest { disk_bytes: DISK_BYTES_MAX + 512, ..request() }),
        ("cid", MachineRequest { cid: 2, ..request() }),
        ("cid", MachineRequest { cid: u32::MAX, ..request() }),
    ];
    for (expected, request) in cases {
        match decide(&request, &host(WORKS), &qemu_facts()) {
            Err(Refusal::SpecInvalid { field, .. }) => assert_eq!(field, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
}

#[test]
fn vsock_needs_the_host_and_the_device() {
    let facts = HostFacts { vsock: VsockVerdict::Usable, ..host(WORKS) };
    let with = decide(&request(), &facts, &qemu_facts()).unwrap();
    assert_eq!(with.transport, Transport::Vsock { cid: 3 });
    let qemu = QemuFacts { vhost_vsock_mmio: false, ..qemu_facts() };
    assert_eq!(decide(&request(), &facts, &qemu).unwrap().transport.name(), "virtio-serial");
    let pci = MachineRequest { machine: MachineChoice::Q35, ..request() };
    assert_eq!(decide(&pci, &facts, &qemu).unwrap().transport.name(), "vsock");
}

#[test]
fn an_emulated_microvm_wants_a_steady_counter() {
    let clockless = HostFacts { tsc_khz: None, ..host(KvmVerdict::Absent) };
    assert_eq!(decide(&request(), &clockless, &qemu_facts()).unwrap().machine, MachineType::Q35);
    let asked = MachineRequest { machine: MachineChoice::Microvm, ..request() };
    let machine = decide(&asked, &clockless, &qemu_facts()).unwrap();
    assert_eq!((machine.machine, machine.warnings.len()), (MachineType::Microvm, 2));
}

#[test]
fn more_memory_than_free_is_a_warning() {
    let machine = decide(&MachineRequest { memory_mib: 5000, ..request() }, &host(WORKS), &qemu_facts()).unwrap();
    assert!(machine.warnings[0].contains("4096 MiB"));
}

prop_compose! {
    fn any_request()(
        machine in prop::sample::select(vec![MachineChoice::Auto, MachineChoice::Microvm, MachineChoice::Pc, MachineChoice::Q35]),
        accel in prop::sample::select(vec![AccelChoice::Auto, AccelChoice::Kvm, AccelChoice::Tcg]),
        nested: bool,
        require_isolation: bool,
    ) -> MachineRequest {
        MachineRequest { machine, accel, nested, require_isolation, ..request() }
    }
}

proptest! {
    #[test]
    fn emulation_is_never_silent_and_never_where_isolation_is_required(
        request in any_request(), works: bool, built_in: bool, microvm: bool,
    ) {
        let facts = host(if works { WORKS } else { KvmVerdict::Absent });
        let qemu = QemuFacts { accel_kvm: built_in, microvm, ..qemu_facts() };
        if let Ok(machine) = decide(&request, &facts, &qemu) {
            let emulated = machine.accel == Accel::Tcg;
            prop_assert!(!(emulated && request.require_isolation));
            prop_assert_eq!(emulated, machine.warnings.iter().any(|w| w.starts_with("no hardware isolation")));
            prop_assert!(emulated || (works && built_in));
            prop_assert!(machine.machine != MachineType::Microvm || microvm);
            prop_assert!(request.nested || machine.cpu_model.ends_with(",-vmx,-svm"));
        }
    }
}

#[test]
fn a_missing_layer_is_a_warning_unless_confinement_is_required() {
    let confinement = ConfinementSupport { landlock: 0, ..ConfinementSupport::full() };
    let less = HostFacts { confinement, ..host(WORKS) };
    let machine = decide(&request(), &less, &qemu_facts()).unwrap();
    assert!(!machine.confinement.contains(&nido_api::machine::Layer::Landlock));
    assert!(machine.warnings.iter().any(|warning| warning.contains("confined without landlock")), "{machine:?}");
    let strict = MachineRequest { require_confinement: true, ..request() };
    let refused = decide(&strict, &less, &qemu_facts()).unwrap_err();
    assert!(matches!(refused, Refusal::ConfinementRequired { .. }), "{refused}");
    assert!(decide(&strict, &host(WORKS), &qemu_facts()).unwrap().warnings.is_empty());
}

#[test]
fn a_user_of_its_own_is_required_of_root_only() {
    use crate::host::OwnUser;
    let of = |own_user| HostFacts {
        confinement: ConfinementSupport { own_user, ..ConfinementSupport::full() },
        ..host(WORKS)
    };
    let strict = MachineRequest { require_confinement: true, ..request() };
    for (own_user, has_one) in [(OwnUser::NotRoot, false), (OwnUser::Available, true)] {
        let machine = decide(&strict, &of(own_user), &qemu_facts()).unwrap();
        assert_eq!(machine.own_user, has_one);
        assert_eq!(machine.confinement_names().contains(&"own-user".to_owned()), has_one);
        let stored = serde_json::to_value(&machine).unwrap();
        // Earlier versions read the list.
        assert_eq!((stored["confinement"].as_array().unwrap().len(), stored.get("own_user").is_some()), (4, has_one));
    }
    let less = of(OwnUser::Unavailable("root has no CAP_SETUID".into()));
    let machine = decide(&request(), &less, &qemu_facts()).unwrap();
    assert!(
        machine.warnings.iter().any(|warning| warning.contains("own-user (root has no CAP_SETUID)")),
        "{machine:?}"
    );
    assert!(matches!(decide(&strict, &less, &qemu_facts()), Err(Refusal::ConfinementRequired { .. })));
}
