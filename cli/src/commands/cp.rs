//! `cp`: copies in either direction, depending on the side that names a VM.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;

use nido_api::error::{Code, Error, Hint};
use nido_api::name::VmName;
use nido_api::{CopyResult, DownloadRequest, DownloadTarget};
use nido_core::Nido;

use super::upload::UploadArgs;
use super::{Context, copy};
use crate::exit::{Failure, Outcome};
use crate::staging::Staging;

const EXAMPLES: &str = "\
Examples:
  nido cp site web:/srv/
  nido cp a.txt b.txt web:/tmp
  nido cp web:/var/log/app.log .
  cat key | nido cp - web:/root/key
  nido cp web:/srv/site - | tar -t          a directory as a tar archive
  tar -C site -c . | nido cp - web:/srv/    with a slash: unpacks a tar archive
  nido cp web:/etc/app.conf db:/etc/        from one VM to another

Each path is NAME:PATH, or a path of the host; write ./a:b for a host path with a colon. With
several sources the destination must be a directory. Files in a VM are replaced, files of the host
only with --force. A replaced file keeps its mode, owner, attributes and hard links. Devices,
pipes and sockets are never replaced; a device or pipe of the host is written to. Set-id bits are
not copied. Entries that cannot be read are skipped and listed, and the exit code is 1.";

/// Copy files between the host and VMs
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Sources, then the destination: PATH or NAME:PATH
    #[arg(required = true, num_args = 2.., value_name = "PATH", value_hint = clap::ValueHint::AnyPath)]
    paths: Vec<OsString>,
    /// Replace existing files of the host
    #[arg(long, short)]
    force: bool,
    #[command(flatten)]
    upload: UploadArgs,
}

/// The direction, derived from the arguments alone.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    Up { name: VmName, sources: Vec<OsString>, destination: OsString },
    Down { name: VmName, sources: Vec<OsString>, destination: OsString },
    Across { from: VmName, sources: Vec<OsString>, to: VmName, destination: OsString },
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let mut total = nothing();
        let mut to_stdout = false;
        match plan(self.paths.clone())? {
            Plan::Up { name, sources, destination } => {
                let nido = cx.nido().await?;
                for source in sources {
                    let request = self.upload.clone().request(source, destination.clone())?;
                    add(&mut total, copy::upload(cx, &nido, &name, request).await)?;
                }
            }
            Plan::Down { name, sources, destination } => {
                let nido = cx.nido().await?;
                to_stdout = copy::is_stdout(&destination);
                for source in sources {
                    let request = self.download(source, copy::target(destination.clone())?, self.force);
                    let done = copy::download(cx, &nido, &name, request).await;
                    add(&mut total, done.map(|done| copy::with_destination(&destination, done)))?;
                }
            }
            Plan::Across { from, sources, to, destination } => {
                let nido = cx.nido().await?;
                for source in sources {
                    let done = self.across(cx, &nido, (&from, source), (&to, destination.clone())).await;
                    add(&mut total, done)?;
                }
            }
        }
        copy::report(cx, &total, to_stdout)
    }

    fn download(&self, source: OsString, destination: DownloadTarget, overwrite: bool) -> DownloadRequest {
        let preserve = self.upload.preserve;
        DownloadRequest { source: copy::guest(source), destination, overwrite, preserve, max_bytes: None }
    }

    /// Copies from one VM to another, over a directory of this user's here.
    async fn across(
        &self,
        cx: &Context,
        nido: &Nido,
        (from, source): (&VmName, OsString),
        (to, destination): (&VmName, OsString),
    ) -> Result<CopyResult, Failure> {
        let staging = Staging::make()?;
        // A source without a name of its own, as `dir/.`, is copied as what is in it.
        let has_name = Path::new(&source).file_name().is_some() && !source.as_bytes().ends_with(b"/.");
        let place = if has_name { staging.path().to_owned() } else { staging.path().join("contents") };
        let request = self.download(source, DownloadTarget::Path(place.clone()), false);
        let down = copy::download(cx, nido, from, request).await?;
        let found = std::fs::read_dir(staging.path()).and_then(|mut entries| entries.next().transpose());
        let found = found.map_err(|e| Error::io_at("read", staging.path(), e))?;
        let Some(found) = found.map(|entry| entry.path()).filter(|_| has_name).or(Some(place.join("."))) else {
            return Err(Error::internal("the copy is missing at its destination").into());
        };
        let request = self.upload.clone().request(found.into(), destination)?;
        let mut up = copy::upload(cx, nido, to, request).await?;
        up.skipped += down.skipped;
        up.unreadable += down.unreadable;
        up.unreadable_entries.splice(..0, down.unreadable_entries);
        up.duration_ms += down.duration_ms;
        Ok(up)
    }
}

fn nothing() -> CopyResult {
    CopyResult {
        entries: 0,
        bytes: 0,
        skipped: 0,
        unreadable: 0,
        unreadable_entries: Vec::new(),
        path: String::new(),
        duration_ms: 0,
    }
}

fn add(total: &mut CopyResult, done: Result<CopyResult, Failure>) -> Result<(), Failure> {
    let done = done?;
    total.entries += done.entries;
    total.bytes += done.bytes;
    total.skipped += done.skipped;
    total.unreadable += done.unreadable;
    total.unreadable_entries.extend(done.unreadable_entries);
    total.duration_ms += done.duration_ms;
    total.path = done.path;
    Ok(())
}

fn plan(mut paths: Vec<OsString>) -> Result<Plan, Error> {
    let Some(mut destination) = paths.pop() else { return Err(unclear()) };
    if paths.len() > 1 {
        // A trailing slash requires a directory.
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
        (remote, Some(Some((name, _)))) => {
            let name = name.clone();
            let same =
                |side: Option<(VmName, OsString)>| side.filter(|(other, _)| *other == name).map(|(_, path)| path);
            let sources = sides.into_iter().map(same).collect::<Option<Vec<_>>>().ok_or_else(unclear)?;
            Ok(match remote {
                None => Plan::Down { name, sources, destination },
                Some((to, destination)) => Plan::Across { from: name, sources, to, destination },
            })
        }
        _ => Err(unclear()),
    }
}

fn unclear() -> Error {
    Error::new(
        Code::SpecInvalid,
        "all sources must be host paths or NAME:PATH of one VM, and the sources or the destination must be in a VM",
    )
    .hint(Hint::command_line(
        "for example: nido cp site web:/srv, nido cp web:/srv/site . or nido cp web:/etc/app.conf db:/etc/",
    ))
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
        let (from, to) = ("web".parse().unwrap(), "db".parse().unwrap());
        let across = Plan::Across { from, sources: vec!["/a".into()], to, destination: "/b".into() };
        assert_eq!(planned(&["web:/a", "db:/b"]).unwrap(), across);
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in [&["a", "b"][..], &["web:a", "db:b", "."], &["web:a", "b", "."], &["a"]] {
            assert_eq!(planned(bad).unwrap_err().code(), Code::SpecInvalid, "{bad:?}");
        }
    }
}
