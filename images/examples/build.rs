//! Builds a template by hand: `cargo run -p nido-images --example build -- HOME RECIPE [--rebuild] [--slim]`.
//! Prints one line per change of stage or detail; a line on standard input, or its end with `--stdin`, stops the build.

use nido_api::FrontEnd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (Some(home), Some(recipe)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: build HOME RECIPE [--rebuild] [--slim] [--stdin]");
        return ExitCode::from(2);
    };
    let flags: Vec<String> = arguments.collect();
    let has = |flag: &str| flags.iter().any(|given| given == flag);
    let options = nido_images::BuildOptions {
        rebuild: has("--rebuild"),
        kernel: has("--slim").then_some(nido_images::KernelChoice::Slim),
    };
    let cancel = Arc::new(AtomicBool::new(false));
    if has("--stdin") {
        let cancel = Arc::clone(&cancel);
        std::thread::spawn(move || {
            let _ = std::io::stdin().read_line(&mut String::new());
            cancel.store(true, Ordering::Relaxed);
        });
    }
    let begin = std::time::Instant::now();
    let mut show = |progress: nido_images::BuildProgress| {
        let percent = progress.fraction.map(|fraction| format!(" {:.0} %", fraction * 100.0)).unwrap_or_default();
        let (index, total, stage) = (progress.index, progress.total, progress.stage);
        eprintln!("{:7.1} [{index}/{total}] {stage}: {}{percent}", begin.elapsed().as_secs_f32(), progress.detail);
    };
    match nido_images::build(&PathBuf::from(home), &recipe, &options, &mut show, &cancel) {
        Ok(outcome) => {
            eprintln!("up to date: {}, reused: {:?}", outcome.already_built, outcome.stages_reused);
            println!("{}", String::from_utf8_lossy(&outcome.manifest.to_json()));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(hint) = error.hint().and_then(|hint| hint.text(FrontEnd::Cli)) {
                eprintln!("hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}
