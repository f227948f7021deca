//! The guest agent that belongs to this build: the bytes `build.rs` produced, and their hash.

/// The statically linked guest agent, an x86-64 ELF file of at most 4 MiB.
pub const AGENT: &[u8] = include_bytes!(env!("NIDO_AGENT_FILE"));

/// Version of the protocol that [`AGENT`] speaks.
pub const AGENT_PROTOCOL: u16 = nido_guest_agent::wire::VERSION;

/// SHA-256 of [`AGENT`] in lower-case hexadecimal, computed when nido was built.
#[must_use]
pub const fn agent_sha256() -> &'static str {
    env!("NIDO_AGENT_SHA256")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_belongs_to_the_bytes() {
        assert_eq!(crate::digest::sha256(AGENT), agent_sha256());
    }

    #[test]
    fn the_agent_needs_no_dynamic_linker() {
        let program_headers = u64::from_le_bytes(AGENT[32..40].try_into().unwrap()) as usize;
        let size = usize::from(u16::from_le_bytes(AGENT[54..56].try_into().unwrap()));
        let count = usize::from(u16::from_le_bytes(AGENT[56..58].try_into().unwrap()));
        let interpreters = (0..count)
            .map(|index| &AGENT[program_headers + index * size..][..4])
            .filter(|kind| *kind == 3_u32.to_le_bytes())
            .count();
        assert_eq!(interpreters, 0, "PT_INTERP found");
    }
}
