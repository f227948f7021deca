//! Recipes: what a built-in template is made of. They are text inside the program (`images/recipes/`), parsed here.
//! Pure. Invariant: a recipe's hash covers every byte a build takes from it, and the format version.

use serde::Deserialize;

use crate::apt::is_package_name;
use crate::digest::sha256;
use crate::error::ImageError;
use crate::kernel::{BOOT_MODULES, KernelChoice};
use crate::manifest::{FORMAT, Init};
use crate::recipe_text::{COMMON, RecipeSource, SOURCES};
use crate::slim;

/// A parsed recipe.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// Its name, which is also the template's.
    pub name: &'static str,
    /// SHA-256 over all it consists of, with the stock kernel.
    pub sha256: String,
    /// The content of `recipe.toml`.
    pub spec: Spec,
    /// Shell script run with the root directory as `$1` after the packages are installed; may be empty.
    pub customize: &'static str,
    /// Files put into the root directory before `customize`: path without leading slash, content.
    pub files: &'static [(&'static str, &'static str)],
}

impl Recipe {
    /// SHA-256 over all a template with this kernel consists of.
    #[must_use]
    pub fn identity(&self, kernel: KernelChoice) -> String {
        match kernel {
            KernelChoice::Stock => self.sha256.clone(),
            KernelChoice::Slim => sha256(format!("{}\n{}\n", self.sha256, slim::recipe_sha256()).as_bytes()),
        }
    }
}

/// The content of a `recipe.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// One line for people.
    pub summary: String,
    /// Debian release, by code name.
    pub suite: String,
    /// Which packages mmdebstrap starts from.
    pub variant: String,
    /// Packages beside those.
    pub packages: Vec<String>,
    /// The program that is process 1 in the guest.
    pub init: Init,
    /// The ordinary user.
    pub user: String,
    /// Login shell of root and of the user.
    pub shell: String,
    /// Size of the root disk as the guest sees it, in MiB. A VM may request more.
    pub disk_mib: u64,
    /// The package that depends on the newest kernel image.
    pub kernel: String,
    /// Kernel command line every machine type needs.
    pub append: String,
}

/// What dpkg leaves out of the guest, now and when the user installs packages. The first is for the build only.
pub(crate) const DPKG_OPTIONS: [&str; 9] = [
    "force-unsafe-io",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/bug/*",
];

/// Finds a built-in recipe.
///
/// # Errors
/// [`ImageError::RecipeNotFound`], [`ImageError::RecipeInvalid`].
pub fn find(name: &str) -> Result<Recipe, ImageError> {
    let source = SOURCES
        .iter()
        .find(|source| source.name == name)
        .ok_or_else(|| ImageError::RecipeNotFound { name: crate::progress::printable(name) })?;
    let spec =
        parse(source.toml).map_err(|reason| ImageError::RecipeInvalid { name: source.name.to_owned(), reason })?;
    Ok(Recipe { name: source.name, sha256: hash(source), spec, customize: source.customize, files: source.files })
}

/// Parses a `recipe.toml`. Values that become arguments of programs are checked here, once.
fn parse(toml: &str) -> Result<Spec, String> {
    let spec: Spec = toml::from_str(toml).map_err(|error| error.to_string())?;
    let words = spec.packages.iter().chain([&spec.suite, &spec.variant, &spec.kernel, &spec.user]);
    if let Some(word) = words.into_iter().find(|word| !is_package_name(word)) {
        return Err(format!("{word:?} is not a plain name"));
    }
    if !(512..=1024 * 1024).contains(&spec.disk_mib) {
        return Err(format!("a disk of {} MiB is outside 512 MiB to 1 TiB", spec.disk_mib));
    }
    Ok(spec)
}

fn hash(source: &RecipeSource) -> String {
    let mut text = format!("nido template format {FORMAT}\n");
    let own = [("recipe.toml", source.toml), ("customize.sh", source.customize)];
    let common = [("kernel.sh", COMMON.kernel), ("files.sh", COMMON.files), ("finish.sh", COMMON.finish)];
    for (name, content) in own.iter().chain(&common).chain(source.files) {
        text.push_str(&format!("{name} {}\n{content}", content.len()));
    }
    text.push_str(&format!("{}\n{}\n", BOOT_MODULES.join(" "), DPKG_OPTIONS.join(" ")));
    sha256(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe_text::names;

    #[test]
    fn every_built_in_recipe_is_valid() {
        let hashes: std::collections::HashSet<_> = names().map(|name| find(name).unwrap().sha256).collect();
        assert_eq!(hashes.len(), names().count());
        assert_eq!(names().next(), Some("sandbox"));
    }

    #[test]
    fn every_built_in_name_is_a_template_name() {
        assert!(names().all(|name| crate::store::check_name(name).is_ok()));
    }

    #[test]
    fn another_kernel_makes_another_template() {
        let recipe = find("sandbox").unwrap();
        assert_eq!(recipe.identity(KernelChoice::Stock), recipe.sha256);
        assert_ne!(recipe.identity(KernelChoice::Slim), recipe.sha256);
    }

    #[test]
    fn an_unknown_recipe_is_named_in_the_error() {
        let error = find("windows").unwrap_err();
        assert!(error.to_string().contains("windows"));
        assert!(error.hint().unwrap().text(nido_api::FrontEnd::Cli).unwrap().contains("sandbox"));
    }

    #[test]
    fn a_package_that_is_an_option_is_refused() {
        let toml = SOURCES[0].toml.replacen("packages = [", "packages = [\"--hook-dir=/tmp\", ", 1);
        assert!(parse(&toml).unwrap_err().contains("--hook-dir"));
    }
}
