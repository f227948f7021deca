//! Inputs that are derived from others by edits. Shrinking makes them shorter and the edits fewer.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::INPUT_MAX;

/// Numbers at limits, as parsers meet them: in one, two, four and eight bytes.
const LIMITS: [u64; 12] =
    [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, u64::MAX >> 1, u64::MAX];
/// Bytes that mean something in text formats.
const TOKENS: &[u8] = b"{}[]\",:\\\n\r\0-.eE0129nt= /";

#[derive(Debug, Clone)]
enum Edit {
    Flip(Index, u8),
    Set(Index, u8),
    Limit(Index, usize, u8, bool),
    Remove(Index, Index),
    Insert(Index, Vec<u8>),
    Repeat(Index, Index, u8),
    Cut(Index),
    Splice(Index, Index, Index),
}

fn edit() -> impl Strategy<Value = Edit> {
    let at = any::<Index>;
    let token = (0..TOKENS.len()).prop_map(|i| TOKENS[i]);
    prop_oneof![
        (at(), 0_u8..8).prop_map(|(i, bit)| Edit::Flip(i, 1 << bit)),
        (at(), prop_oneof![any::<u8>(), token]).prop_map(|(i, byte)| Edit::Set(i, byte)),
        (at(), 0..LIMITS.len(), 0_u8..4, any::<bool>()).prop_map(|(i, n, width, big)| Edit::Limit(i, n, width, big)),
        (at(), at()).prop_map(|(from, to)| Edit::Remove(from, to)),
        (at(), vec(any::<u8>(), 1..9)).prop_map(|(i, bytes)| Edit::Insert(i, bytes)),
        (at(), at(), 2_u8..40).prop_map(|(from, to, times)| Edit::Repeat(from, to, times)),
        at().prop_map(Edit::Cut),
        (at(), at(), at()).prop_map(|(seed, from, to)| Edit::Splice(seed, from, to)),
    ]
}

/// A range of at most `length` bytes within an input.
fn range(input: &[u8], from: &Index, to: &Index) -> std::ops::Range<usize> {
    let (a, b) = (from.index(input.len() + 1), to.index(input.len() + 1));
    a.min(b)..a.max(b)
}

fn apply(input: &mut Vec<u8>, edit: &Edit, seeds: &[Vec<u8>]) {
    match edit {
        Edit::Flip(..) | Edit::Set(..) | Edit::Limit(..) if input.is_empty() => {}
        Edit::Flip(i, mask) => {
            let at = i.index(input.len());
            input[at] ^= mask;
        }
        Edit::Set(i, byte) => {
            let at = i.index(input.len());
            input[at] = *byte;
        }
        Edit::Limit(i, number, width, big) => {
            let at = i.index(input.len());
            let width = 1_usize << width;
            let bytes = if *big {
                LIMITS[*number].to_be_bytes()[8 - width..].to_vec()
            } else {
                LIMITS[*number].to_le_bytes()[..width].to_vec()
            };
            let end = (at + width).min(input.len());
            input.splice(at..end, bytes);
        }
        Edit::Remove(from, to) => drop(input.drain(range(input, from, to))),
        Edit::Insert(i, bytes) => {
            let at = i.index(input.len() + 1);
            input.splice(at..at, bytes.iter().copied());
        }
        Edit::Repeat(from, to, times) => {
            let range = range(input, from, to);
            let part = input[range.clone()].repeat(usize::from(*times));
            input.splice(range, part);
        }
        Edit::Cut(i) => input.truncate(i.index(input.len() + 1)),
        Edit::Splice(seed, from, to) => {
            let other = &seeds[seed.index(seeds.len())];
            let part = other[range(other, from, to)].to_vec();
            let at = from.index(input.len() + 1);
            input.splice(at..at, part);
        }
    }
    input.truncate(INPUT_MAX);
}

/// One of the seeds after a few edits, or bytes without a pattern.
pub fn derived(seeds: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let edited = (any::<Index>(), vec(edit(), 1..8)).prop_map(move |(seed, edits)| {
        let mut input = seeds[seed.index(seeds.len())].clone();
        edits.iter().for_each(|edit| apply(&mut input, edit, &seeds));
        input
    });
    prop_oneof![15 => edited, 1 => vec(any::<u8>(), 0..200)]
}
