//! What KVM shows its guests of this host's CPU, as a digest.
//!
//! A guest that was saved has chosen its code by these features. The CPU's name does not imply them: kernels, their command lines
//! (`clearcpuid=`, `tsx=off`, mitigations) and firmware switches take features away or add some.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

/// Leaves whose registers are features, on every CPU of the host the same. The others hold numbers of the queried CPU
/// (APIC ids, topology), clock rates, and texts.
const FEATURE_LEAVES: [u32; 9] = [0x1, 0x7, 0xd, 0x14, 0x19, 0x4000_0001, 0x8000_0001, 0x8000_0008, 0x8000_0021];

/// The digest, 16 hexadecimal digits; `None` if KVM does not report them.
pub fn digest() -> Option<String> {
    let kvm = Kvm::new().ok()?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).ok()?;
    let registers = kvm.get_msr_feature_index_list().map(|list| list.as_slice().to_vec()).unwrap_or_default();
    Some(digest_of(cpuid.as_slice(), registers))
}

fn digest_of(entries: &[kvm_cpuid_entry2], mut registers: Vec<u32>) -> String {
    let mut lines: Vec<String> =
        entries.iter().filter(|entry| FEATURE_LEAVES.contains(&entry.function)).map(line).collect();
    lines.sort();
    registers.sort_unstable();
    let text = format!("{}\n{registers:x?}", lines.join("\n"));
    nido_images::sha256(text.as_bytes())[..16].to_owned()
}

fn line(entry: &kvm_cpuid_entry2) -> String {
    let kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, .. } = *entry;
    match function {
        // The first register is the CPU's signature, which its name implies; the second holds the number of the CPU.
        0x1 => format!("{function:x} {ecx:x} {edx:x}"),
        // The size of the state that is switched on at the moment.
        0xd if index < 2 => format!("{function:x} {index:x} {eax:x} {ecx:x} {edx:x}"),
        // The number of cores.
        0x8000_0008 => format!("{function:x} {eax:x} {ebx:x}"),
        _ => format!("{function:x} {index:x} {eax:x} {ebx:x} {ecx:x} {edx:x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, ebx: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ebx, ecx, ..Default::default() }
    }

    /// A bake was loaded under a kernel that offers its guests other features of the same CPU.
    #[test]
    fn features_count_and_the_number_of_the_cpu_does_not() {
        let digest = |entries: &[kvm_cpuid_entry2]| digest_of(entries, vec![0x10a, 0x48]);
        let first = digest(&[entry(1, 0x0300_0800, 0xff), entry(7, 1, 2), entry(0xb, 0, 9)]);
        assert_eq!(first, digest(&[entry(7, 1, 2), entry(1, 0x0700_0800, 0xff), entry(0xb, 5, 1)]));
        assert_ne!(first, digest(&[entry(1, 0x0300_0800, 0xff), entry(7, 3, 2)]));
        assert_ne!(first, digest(&[entry(1, 0x0300_0800, 0xfe), entry(7, 1, 2)]));
        assert_ne!(first, digest_of(&[entry(1, 0x0300_0800, 0xff), entry(7, 1, 2)], vec![0x48]));
        assert_eq!(first.len(), 16);
    }
}
