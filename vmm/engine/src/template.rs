//! Hints about templates that are damaged or outdated.

use nido_api::name::TemplateName;

/// The command that creates a template again.
#[must_use]
pub fn renewal_command(name: &TemplateName) -> String {
    if nido_images::recipe_names().any(|recipe| recipe == name.as_str()) {
        return format!("nido template build {name}");
    }
    format!("nido template delete {name}, and nido template create {name} --from a VM, or import it again")
}
