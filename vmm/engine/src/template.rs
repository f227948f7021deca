//! Hints about templates that are damaged or outdated.

use nido_api::error::Hint;
use nido_api::name::TemplateName;
use nido_api::operation as op;

/// How a template is created again.
#[must_use]
pub fn renewal(name: &TemplateName) -> Hint {
    if nido_images::recipe_names().any(|recipe| recipe == name.as_str()) {
        return Hint::run_on(op::TEMPLATE_BUILD, name);
    }
    Hint::host(format!(
        "run nido template delete {name}, and nido template create {name} --from a VM, or import it again"
    ))
}
