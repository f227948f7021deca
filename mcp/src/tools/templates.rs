//! Templates: what VMs are made from.

use nido_api::error::Result;
use nido_api::name::{TemplateName, VmName};
use nido_api::{BuildResult, BuildStep, Scope, TemplateList};
use serde::{Deserialize, Serialize};

use super::page::{PageRequest, page};
use super::{ADDS, LOOKS, Tool, arguments};
use crate::answer::{ToolResult, plain};
use crate::call_context::CallContext;
use crate::schema;

pub const LIST: Tool = Tool {
    name: "template_list",
    title: "List templates",
    about: "Lists the templates that virtual machines are made from, by name, and the names of recipes from which the user can \
        build more (nido template build NAME). Use it before vm_spawn if it is not known which template fits. Changes \
        nothing. If next_cursor is in the answer, there are more: call again with cursor set to it.",
    hints: LOOKS,
    scope: Scope::Read,
    takes: schema::arguments::<List>,
    gives: schema::answer::<Page>,
    run: |call, given| Box::pin(async move { list(&call, arguments(given)?).await }),
};

/// Which templates are wanted.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
struct List {
    /// The most templates that are answered; 50 if absent.
    #[schema(minimum = 1, maximum = 500)]
    limit: Option<usize>,
    /// The next_cursor of an earlier answer: what comes after it.
    cursor: Option<String>,
}

/// Some templates.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct Page {
    #[serde(flatten)]
    list: TemplateList,
    /// There are more: give this as cursor.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    next_cursor: Option<String>,
}

async fn list(call: &CallContext, asked: List) -> Result<ToolResult> {
    let mut list = call.nido().await?.template_list()?;
    let wanted = PageRequest { limit: asked.limit, cursor: asked.cursor.as_deref() };
    let (templates, next_cursor) = page(list.templates, wanted, |one| one.name.as_str().to_owned())?;
    list.templates = templates;
    ToolResult::new(&Page { list, next_cursor })
}

pub const CREATE: Tool = Tool {
    name: "template_create",
    title: "Make a template of a VM",
    about: "Makes a template of a virtual machine: its disk as it is, with everything installed on it. Use it when several VMs \
        are to start from the same prepared disk. A VM that runs stands still for a moment and runs on. Unless no_bake is \
        set, a guest of it is booted once and saved, so that its VMs start quickly; that takes a minute or more. For going \
        back in one VM use vm_snapshot. If it is cancelled, nothing is left. Next: vm_spawn with template set to its name.",
    hints: ADDS,
    scope: Scope::Admin,
    takes: schema::arguments::<Create>,
    gives: schema::answer_or_job::<BuildResult>,
    run: |call, given| Box::pin(async move { Box::pin(create(&call, arguments(given)?)).await }),
};

/// Which template is to be made.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Create {
    /// Name of the template: 1 to 63 of a-z, 0-9 and '-'.
    name: TemplateName,
    /// Name of the VM whose disk it gets.
    from: VmName,
    /// Do not boot and save a guest of it: its VMs will boot, which takes longer.
    #[serde(default)]
    no_bake: bool,
}

async fn create(call: &CallContext, asked: Create) -> Result<ToolResult> {
    let mut tell = |step: BuildStep| {
        let (done, total) = (f64::from(step.index), f64::from(step.total));
        let done = done - 1.0 + f64::from(step.fraction.unwrap_or(0.0)).clamp(0.0, 1.0);
        call.progress.tell(done, Some(total), plain(&step.stage));
    };
    let work = call.nido().await?.template_create(&asked.name, &asked.from, !asked.no_bake, &mut tell);
    ToolResult::new(&call.unless_cancelled(Box::pin(work)).await?)
}
