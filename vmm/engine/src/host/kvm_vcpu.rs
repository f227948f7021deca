//! One virtual machine of 2 MiB with one vCPU in 64-bit mode that runs a few instructions: the experiment behind
//! [`super::kvm`].
//!
//! Invariant: the guest's result is checked, so a KVM that only pretends to have run it is found out.

use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

const MEMORY_BYTES: usize = 2 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const CODE: u64 = 0x1_0000;
const ANSWER_PORT: u16 = 0x10;
/// `0x80 >> 3`, computed by the guest.
const ANSWER: u8 = 0x10;

/// The guest's program: a counted loop, one VEX-encoded instruction, the answer to a port.
#[rustfmt::skip]
const PROGRAM: &[u8] = &[
    0xb9, 0x10, 0x27, 0x00, 0x00,       // mov ecx, 10000
    0xff, 0xc9,                         // dec ecx
    0x75, 0xfc,                         // jnz -2
    0xb8, 0x80, 0x00, 0x00, 0x00,       // mov eax, 0x80
    0xb9, 0x03, 0x00, 0x00, 0x00,       // mov ecx, 3
    0xc4, 0xe2, 0x73, 0xf7, 0xc0,       // shrx eax, eax, ecx
    0xe6, ANSWER_PORT as u8,            // out ANSWER_PORT, al
    0xf4,                               // hlt
];
/// The same for a CPU without BMI2: `shr eax, cl` in the place of `shrx`.
const SHIFT_WITHOUT_VEX: [u8; 5] = [0xd3, 0xe8, 0x90, 0x90, 0x90];
const SHRX_AT: usize = 19;

/// Why there is no time of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunFailure {
    /// KVM cannot run guests; one sentence.
    Unusable(String),
    /// The kernel was short of something, or busy: another try may end otherwise. One sentence.
    Undecided(String),
}

impl RunFailure {
    /// What an error of the kernel's proves: some pass by themselves.
    pub fn from_errno(errno: Option<i32>, sentence: String) -> Self {
        match errno {
            Some(
                libc::EAGAIN | libc::EBUSY | libc::EINTR | libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOSPC,
            ) => Self::Undecided(sentence),
            _ => Self::Unusable(sentence),
        }
    }
}

/// Runs the program `tries` times (fewer if one run is under `good_enough`) and gives the quickest run.
///
/// # Errors
/// One sentence about the step that failed.
pub fn best_run(kvm: &Kvm, tries: u32, good_enough: Duration) -> Result<Duration, RunFailure> {
    let failed = |step: &'static str| {
        move |e: kvm_ioctls::Error| RunFailure::from_errno(Some(e.errno()), format!("KVM cannot {step}: {e}"))
    };
    if kvm.get_api_version() != 12 {
        let version = kvm.get_api_version();
        return Err(RunFailure::Unusable(format!("KVM has version {version} of its interface, not 12")));
    }
    let vm = kvm.create_vm().map_err(failed("create a VM"))?;
    let cpuid =
        kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(failed("report its CPU features"))?;
    let memory =
        memory(host_has_bmi2()).map_err(|e| RunFailure::Undecided(format!("no memory for the KVM test: {e}")))?;
    map(&vm, &memory).map_err(failed("give a VM memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("create a vCPU"))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("set the CPU features"))?;
    enter_long_mode(&vcpu).map_err(failed("set the vCPU's registers"))?;
    let mut best = Duration::MAX;
    for _ in 0..tries {
        best = best.min(run_once(&mut vcpu)?);
        if best <= good_enough {
            break;
        }
    }
    Ok(best)
}

/// Whether the CPU under this process runs `shrx`. A KVM that runs its guests on that CPU runs it too, whatever features it
/// reports to its guests; one that interprets them often does not.
fn host_has_bmi2() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("bmi2");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

fn memory(has_bmi2: bool) -> Result<GuestMemoryMmap<()>, String> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).map_err(|e| e.to_string())?;
    let mut program = PROGRAM.to_vec();
    if !has_bmi2 {
        program[SHRX_AT..SHRX_AT + SHIFT_WITHOUT_VEX.len()].copy_from_slice(&SHIFT_WITHOUT_VEX);
    }
    // Present and writable; the last level is one 2 MiB page.
    let tables = [(PML4, PDPT | 3), (PDPT, PAGE_DIRECTORY | 3), (PAGE_DIRECTORY, 0x83)];
    for (address, entry) in tables {
        memory.write_obj(entry, GuestAddress(address)).map_err(|e| e.to_string())?;
    }
    memory.write_slice(&program, GuestAddress(CODE)).map_err(|e| e.to_string())?;
    Ok(memory)
}

fn map(vm: &VmFd, memory: &GuestMemoryMmap<()>) -> Result<(), kvm_ioctls::Error> {
    let host = memory.get_host_address(GuestAddress(0)).map_err(|_| kvm_ioctls::Error::new(libc::EFAULT))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY_BYTES as u64,
        userspace_addr: host as u64,
    };
    // SAFETY: the region is the whole mapping of `memory`, which the caller keeps until the vCPU has run its last.
    unsafe { vm.set_user_memory_region(region) }
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let data = kvm_segment {
        limit: 0xffff_ffff,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        selector: 0x10,
        ..Default::default()
    };
    let code = kvm_segment { type_: 11, db: 0, l: 1, selector: 0x8, ..data };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr3 = PML4;
    sregs.cr4 = 1 << 5; // physical address extension
    sregs.cr0 = 0x8000_0011; // paging, extension type, protection
    sregs.efer = (1 << 8) | (1 << 10); // long mode enabled and active
    vcpu.set_sregs(&sregs)
}

/// One run. Its time is the shorter of the clock's and the thread's own: on a busy host the clock also counts other programs.
fn run_once(vcpu: &mut VcpuFd) -> Result<Duration, RunFailure> {
    let regs = kvm_regs { rip: CODE, rflags: 2, rsp: 0x8000, ..Default::default() };
    vcpu.set_regs(&regs)
        .map_err(|e| RunFailure::from_errno(Some(e.errno()), format!("KVM cannot set the vCPU's registers: {e}")))?;
    let (start, cpu_start) = (Instant::now(), thread_cpu_time());
    let exit = vcpu.run();
    let took = start.elapsed().min(thread_cpu_time().saturating_sub(cpu_start));
    let unusable = |sentence: &str| Err(RunFailure::Unusable(sentence.into()));
    match exit {
        Ok(VcpuExit::IoOut(ANSWER_PORT, [ANSWER])) => Ok(took),
        Ok(VcpuExit::IoOut(..)) => unusable("KVM is broken: the test program returned a wrong result"),
        Ok(VcpuExit::InternalError) => unusable("KVM cannot run ordinary instructions (KVM_EXIT_INTERNAL_ERROR)"),
        Ok(other) => unusable(&format!("KVM cannot run ordinary instructions ({other:?})")),
        Err(e) => Err(RunFailure::from_errno(Some(e.errno()), format!("KVM cannot run a vCPU: {e}"))),
    }
}

fn thread_cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(now).unwrap_or_default()
}
