//! What users are told about templates that are damaged or old.

use nido_api::name::TemplateName;

/// The command that makes a template anew.
#[must_use]
pub fn renewal_command(name: &TemplateName) -> String {
    if nido_images::recipe_names().any(|recipe| recipe == name.as_str()) {
        return format!("nido template build {name}");
    }
    format!("nido template delete {name}, and nido template create {name} --from a VM, or import it again")
}
