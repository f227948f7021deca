//! What every verb that serves agents prints before it serves: which files of the host they may name.

use std::path::Path;
use std::sync::Arc;

use nido_api::error::Error;
use nido_core::Nido;
use nido_core::host_paths::{DefaultPaths, Roots};
use nido_mcp::{App, Settings};

use super::Context;

/// A server for agents. Which files of the host they may name is printed, and what of it is hardly meant is warned of.
pub fn agents(cx: &Context, nido: Arc<Nido>, settings: Settings, defaults: &DefaultPaths) -> Result<Arc<App>, Error> {
    let kept = nido.home().root().to_owned();
    let app = App::new(nido, settings, defaults)?;
    let user = std::env::var_os("HOME").map(std::path::PathBuf::from);
    let paths = app.host_paths();
    for (roots, verb) in [(&paths.read, "read"), (&paths.write, "write")] {
        wide(roots, user.as_deref(), &kept).for_each(|what| cx.output.warn(&format!("agents may {verb} {what}")));
    }
    cx.output.note(&paths.summary());
    Ok(app)
}

/// Roots that contain more than files to exchange.
fn wide(roots: &Roots, user: Option<&Path>, kept: &Path) -> impl Iterator<Item = String> {
    let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let (user, kept) = (user.map(real), real(kept));
    roots
        .paths()
        .into_iter()
        .filter_map(move |root| {
            let (shown, root) = (root.display(), real(root));
            let holds = |other: &Path| other.starts_with(&root);
            if root.parent().is_none() {
                return Some(format!("every file of this host that the server may: the policy has the root {shown}"));
            }
            if user.as_deref().is_some_and(holds) {
                return Some(format!(
                    "all files of the user, keys and settings included: the policy has the root {shown}"
                ));
            }
            (holds(&kept) || (root.starts_with(&kept) && !root.ends_with("exchange")))
                .then(|| format!("nido's own files, VMs' disks and tokens included: the policy has the root {shown}"))
        })
        .collect::<Vec<_>>()
        .into_iter()
}
