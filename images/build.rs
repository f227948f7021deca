//! Builds the guest agent and hands it to the library as bytes, so that a `nido` always carries the agent it was
//! built with. Invariant: the agent is the same whatever profile, wrapper or flags the outer build uses.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

const TARGET: &str = "x86_64-unknown-linux-gnu";
const MAX_BYTES: usize = 4 * 1024 * 1024;

/// Variables of the outer build that would change the agent, or confuse the inner cargo.
const FOREIGN_PREFIXES: [&str; 7] =
    ["CARGO_BUILD_", "CARGO_CFG_", "CARGO_FEATURE_", "CARGO_MANIFEST_", "CARGO_PKG_", "CARGO_TARGET_", "CLIPPY_"];
const FOREIGN: [&str; 17] = [
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_PRIMARY_PACKAGE",
    "DEBUG",
    "HOST",
    "LLVM_PROFILE_FILE",
    "NUM_JOBS",
    "OPT_LEVEL",
    "OUT_DIR",
    "PROFILE",
    "RUSTC",
    "RUSTC_LINKER",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTDOC",
    "RUSTFLAGS",
    "TARGET",
    "__CARGO_DEFAULT_LIB_METADATA",
];

fn main() {
    if let Err(reason) = run() {
        println!("cargo::error=the guest agent could not be built: {reason}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), String> {
    let here = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let workspace = here.parent().ok_or("the crate has no parent directory")?;
    for path in ["guest-agent/src", "guest-agent/Cargo.toml", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", workspace.join(path).display());
    }
    println!("cargo::rerun-if-changed=build.rs");

    let out_dir = PathBuf::from(variable("OUT_DIR")?);
    let agent_target = target_directory(&out_dir)?.join("agent-build");
    build_agent(workspace, &agent_target)?;

    let binary = agent_target.join(TARGET).join("agent").join("nido-guest-agent");
    let bytes = std::fs::read(&binary).map_err(|error| format!("{}: {error}", binary.display()))?;
    check(&bytes)?;
    let copy = out_dir.join("nido-guest-agent");
    std::fs::write(&copy, &bytes).map_err(|error| format!("{}: {error}", copy.display()))?;
    println!("cargo::rustc-env=NIDO_AGENT_FILE={}", copy.display());
    println!("cargo::rustc-env=NIDO_AGENT_SHA256={}", hex(&Sha256::digest(&bytes)));
    Ok(())
}

/// `<target>` out of `<target>/[<triple>/]<profile>/build/<package>-<hash>/out`.
fn target_directory(out_dir: &Path) -> Result<PathBuf, String> {
    let triple = variable("TARGET")?;
    let above_profile =
        out_dir.ancestors().nth(4).ok_or_else(|| format!("unexpected OUT_DIR {}", out_dir.display()))?;
    let target = if above_profile.ends_with(&triple) { above_profile.parent() } else { Some(above_profile) };
    target.map(Path::to_path_buf).ok_or_else(|| format!("unexpected OUT_DIR {}", out_dir.display()))
}

fn build_agent(workspace: &Path, target: &Path) -> Result<(), String> {
    let mut cargo = Command::new(variable("CARGO")?);
    for (name, _) in env::vars_os() {
        let Some(name) = name.to_str() else { continue };
        if FOREIGN.contains(&name) || FOREIGN_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
            cargo.env_remove(name);
        }
    }
    cargo
        .current_dir(workspace)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .args(["build", "--locked", "--package", "nido-guest-agent", "--bin", "nido-guest-agent"])
        .args(["--features", "agent", "--profile", "agent", "--target", TARGET, "--target-dir"])
        .arg(target);
    let output = cargo.output().map_err(|error| format!("cargo does not start: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    for line in String::from_utf8_lossy(&output.stderr).lines() {
        println!("cargo::warning={line}");
    }
    Err(format!("cargo ended with {}; its output is above", output.status))
}

fn check(bytes: &[u8]) -> Result<(), String> {
    if !bytes.starts_with(b"\x7fELF") {
        return Err("the result is not an ELF file".to_owned());
    }
    if bytes.len() > MAX_BYTES {
        return Err(format!("the result has {} bytes, more than the {MAX_BYTES} allowed", bytes.len()));
    }
    Ok(())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|_| format!("cargo did not set {name}"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
