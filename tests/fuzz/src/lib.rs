//! Fuzzing of parsers of hostile input, as ordinary tests: a parser runs on inputs that are derived from valid ones (seeds), until
//! a time is over. An input that fails is shrunk and stored below `target/fuzz`; as a file in `tests/fuzz/corpus/NAME` it is run
//! first from then on.
//!
//! ```text
//!  corpus and seeds ── each as it is ──> check        edits: bytes flipped, replaced, removed, inserted, repeated, truncated,
//!        └── a few edits, parts of another seed ──> check         numbers at their limits
//! ```
//!
//! `NIDO_FUZZ_SECONDS` is the time for each parser; `NIDO_FUZZ_SEED` the random seed, which is fixed unless that is given
//! (`scripts/fuzz` gives both).

mod edits;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

/// How long one parser is tested, unless `NIDO_FUZZ_SECONDS` is set, in seconds.
const SECONDS: u64 = 2;
/// How many inputs are tried between two checks of the clock.
const CASES: u32 = 256;
/// The longest input, in bytes.
pub const INPUT_MAX: usize = 1 << 16;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().and_then(|text| text.parse().ok())
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Inputs that failed once, or are worth keeping.
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(root().join("tests/fuzz/corpus").join(name)).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths.iter().filter_map(|path| fs::read(path).ok()).collect()
}

/// Runs `check` on each seed and file of the corpus, and then on inputs that are derived from them. `check` panics if the parser
/// does something wrong.
///
/// # Panics
/// With the shrunk input, if `check` panics.
pub fn fuzz(name: &str, seeds: &[Vec<u8>], check: impl Fn(&[u8])) {
    assert!(!seeds.is_empty(), "fuzzing of {name} needs a valid input to begin with");
    let mut all = corpus(name);
    all.extend_from_slice(seeds);
    all.iter().for_each(|input| check(input));

    let seed = number("NIDO_FUZZ_SEED").unwrap_or(1);
    let limit = Duration::from_secs(number("NIDO_FUZZ_SECONDS").unwrap_or(SECONDS));
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
    let mut seeds = TestRunner::new_with_rng(config.clone(), TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let strategy = edits::derived(all);
    let (began, mut tried) = (Instant::now(), 0_u64);
    while began.elapsed() < limit {
        // A runner stops when it has run its number of cases: each batch needs a new one.
        let mut runner = TestRunner::new_with_rng(config.clone(), seeds.new_rng());
        let outcome = runner.run(&strategy, |input| {
            check(&input);
            Ok::<_, TestCaseError>(())
        });
        if let Err(TestError::Fail(why, input)) = outcome {
            let path = keep(name, &input);
            panic!("{name} fails on {} bytes (NIDO_FUZZ_SEED={seed}): {why}\nkept in {path}", input.len());
        }
        assert!(outcome.is_ok(), "{name}: {outcome:?}");
        tried += u64::from(CASES);
    }
    println!("fuzz {name}: {tried} inputs, NIDO_FUZZ_SEED={seed}");
}

/// Stores an input that failed, and returns where.
fn keep(name: &str, input: &[u8]) -> String {
    let directory = root().join("target/fuzz").join(name);
    let sum = input
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    let path = directory.join(format!("{sum:016x}"));
    match fs::create_dir_all(&directory).and_then(|()| fs::write(&path, input)) {
        Ok(()) => format!("{}; copy it to tests/fuzz/corpus/{name}", path.display()),
        Err(error) => format!("no file ({error}): {input:?}"),
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn a_parser_that_trusts_a_length_is_found_and_the_input_is_shrunk() {
        let parse = |input: &[u8]| {
            if let [b'L', length, rest @ ..] = input {
                assert!(rest.len() >= usize::from(*length), "out of bounds");
            }
        };
        let found = catch_unwind(AssertUnwindSafe(|| fuzz("self-test", &[b"L\x03abc".to_vec()], parse)));
        let why = found.unwrap_err().downcast_ref::<String>().cloned().unwrap_or_default();
        assert!(why.contains("out of bounds") && why.contains("fails on"), "{why}");
        let bytes: usize = why.split_whitespace().find_map(|word| word.parse().ok()).unwrap_or(usize::MAX);
        assert!(bytes <= 5, "not shrunk: {why}");
    }
}
