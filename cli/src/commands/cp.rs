//! `cp`: copies in either direction, told apart by which side names a VM.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use nido_vmm::api::{CopyResult, DownloadRequest, DownloadTarget};
use nido_vmm::error::{Code, Error};
use nido_vmm::name::VmName;

use super::upload::UploadArgs;
use super::{Context, copy};
use crate::exit::{Failure, Outcome};

const EXAMPLES: &str = "\
Examples:
  nido cp site web:/srv/
  nido cp a.txt b.txt web:/tmp
  nido cp web:/var/log/app.log .
  cat key | nido cp - web:/root/key

One side is NAME:PATH, the other a path here; write ./a:b for a path here with a colon. With several sources
the destination must be a directory.";

/// Copy files between here and a VM
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Sources, then the destination: PATH or NAME:PATH
    #[arg(required = true, num_args = 2.., value_name = "PATH", value_hint = clap::ValueHint::AnyPath)]
    paths: Vec<OsString>,
    /// Replace what exists here (downloads)
    #[arg(long, short)]
    force: bool,
    #[command(flatten)]
    upload: UploadArgs,
}

/// Which way, told from the arguments alone.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    Up { name: VmName, sources: Vec<OsString>, destination: OsString },
    Down { name: VmName, sources: Vec<OsString>, destination: OsString },
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let mut total = CopyResult { entries: 0, bytes: 0, skipped: 0, path: String::new(), duration_ms: 0 };
        let mut to_stdout = false;
        match plan(self.paths)? {
            Plan::Up { name, sources, destination } => {
                let nido = cx.nido().await?;
                for source in sources {
                    let request = self.upload.clone().request(source, destination.clone())?;
                    add(&mut total, copy::upload(cx, &nido, &name, request).await)?;
                }
            }
            Plan::Down { name, sources, destination } => {
                let nido = cx.nido().await?;
                for source in sources {
                    let target = copy::target(destination.clone())?;
                    to_stdout = matches!(target, DownloadTarget::Stream(_));
                    let request = DownloadRequest {
                        source: copy::guest(source),
                        destination: target,
                        overwrite: self.force,
                        max_bytes: None,
                    };
                    add(&mut total, copy::download(cx, &nido, &name, request).await)?;
                }
            }
        }
        copy::report(cx, &total, to_stdout)
    }
}

fn add(total: &mut CopyResult, done: Result<CopyResult, Failure>) -> Result<(), Failure> {
    let done = done?;
    total.entries += done.entries;
    total.bytes += done.bytes;
    total.skipped += done.skipped;
    total.duration_ms += done.duration_ms;
    total.path = done.path;
    Ok(())
}

fn plan(mut paths: Vec<OsString>) -> Result<Plan, Error> {
    let Some(mut destination) = paths.pop() else { return Err(unclear()) };
    if paths.len() > 1 {
        // A trailing slash says that it must be a directory.
        let remote = split(&destination);
        let path = remote.as_ref().map_or(&destination, |(_, path)| path);
        if !path.as_bytes().ends_with(b"/") {
            destination.push("/");
        }
    }
    let sides: Vec<_> = paths.iter().map(split).collect();
    match (split(&destination), sides.first()) {
        (Some((name, destination)), _) if sides.iter().all(Option::is_none) => {
            Ok(Plan::Up { name, sources: paths, destination })
        }
        (None, Some(Some((name, _)))) => {
            let name = name.clone();
            let same =
                |side: Option<(VmName, OsString)>| side.filter(|(other, _)| *other == name).map(|(_, path)| path);
            let sources = sides.into_iter().map(same).collect::<Option<Vec<_>>>().ok_or_else(unclear)?;
            Ok(Plan::Down { name, sources, destination })
        }
        _ => Err(unclear()),
    }
}

fn unclear() -> Error {
    Error::new(Code::SpecInvalid, "one side of a copy must be NAME:PATH of one VM and the other a path here")
        .hint("for example: nido cp site web:/srv, or nido cp web:/srv/site .")
}

/// `NAME:PATH`, if that is what it is.
fn split(text: &OsString) -> Option<(VmName, OsString)> {
    let at = text.as_bytes().iter().position(|b| *b == b':')?;
    let name = std::str::from_utf8(&text.as_bytes()[..at]).ok()?.parse().ok()?;
    Some((name, OsString::from_vec(text.as_bytes()[at + 1..].to_vec())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(paths: &[&str]) -> Result<Plan, Error> {
        plan(paths.iter().map(Into::into).collect())
    }

    #[test]
    fn the_side_with_a_name_is_the_guest() {
        let name: VmName = "web".parse().unwrap();
        let up = Plan::Up { name: name.clone(), sources: vec!["a".into(), "./b:c".into()], destination: "/d/".into() };
        assert_eq!(planned(&["a", "./b:c", "web:/d"]).unwrap(), up);
        let down = Plan::Down { name: name.clone(), sources: vec!["/a:b".into()], destination: ".".into() };
        assert_eq!(planned(&["web:/a:b", "."]).unwrap(), down);
        let stdin = Plan::Up { name, sources: vec!["-".into()], destination: "x y".into() };
        assert_eq!(planned(&["-", "web:x y"]).unwrap(), stdin);
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in [&["a", "b"][..], &["web:a", "web:b"], &["web:a", "db:b", "."], &["web:a", "b", "."], &["a"]] {
            assert_eq!(planned(bad).unwrap_err().code(), Code::SpecInvalid, "{bad:?}");
        }
    }
}
