//! Templates: what VMs are made from.

use futures::future::BoxFuture;
use nido_api::error::{Code, Error, Result};
use nido_api::name::{TemplateName, VmName};
use nido_api::operation as op;
use nido_api::{BuildResult, BuildStep, CaptureRequest, TemplateInfo, TemplateList};
use serde::{Deserialize, Serialize};

use super::{Operation, REPEATABLE, SINGLE_USE_HINTS, Tool, page_request, parse};
use crate::answer::{ToolResult, plain};
use crate::call_context::CallContext;
use crate::schema;

pub const LIST: Tool = Tool {
    op: op::TEMPLATE_LIST,
    title: "List templates",
    about: "Lists templates for new VMs, and recipes that the user can build.",
    hints: REPEATABLE,
    takes: schema::arguments::<List>,
    unlisted: &["limit"],
    gives: schema::result::<TemplateBriefs>,
    parse: parse::<List>,
};

/// Which templates are wanted.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
struct List {
    /// At most so many; default 50.
    #[schema(minimum = 1, maximum = 500)]
    limit: Option<usize>,
    /// A next_cursor.
    cursor: Option<String>,
}

/// Some templates.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct TemplateBriefs {
    templates: Vec<TemplateBrief>,
    /// Names of recipes that can be built.
    recipes: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    damaged: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_cursor: Option<String>,
}

/// What matters for choosing a template.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct TemplateBrief {
    name: TemplateName,
    init: String,
    kernel: String,
    disk_bytes: u64,
    created_at: String,
}

/// Templates as a list, and the cursor of the next page.
pub fn template_list(list: TemplateList, next_cursor: Option<String>) -> TemplateBriefs {
    let TemplateList { templates, damaged, recipes } = list;
    let brief = |one: TemplateInfo| TemplateBrief {
        name: one.name,
        init: one.init,
        kernel: one.kernel,
        disk_bytes: one.disk_bytes,
        created_at: format!("{:.0}", one.created_at),
    };
    TemplateBriefs { templates: templates.into_iter().map(brief).collect(), recipes, damaged, next_cursor }
}

impl Operation for List {
    fn run(self: Box<Self>, call: CallContext) -> BoxFuture<'static, Result<ToolResult>> {
        Box::pin(async move {
            let (list, next_cursor) = call.nido().await?.template_page(&page_request(self.limit, self.cursor)?)?;
            ToolResult::new(&template_list(list, next_cursor))
        })
    }
}

pub const CREATE: Tool = Tool {
    op: op::TEMPLATE_CREATE,
    title: "Create a template",
    about: "Creates a template from a VM's disk, for more VMs with its software. Next: vm_spawn.",
    hints: SINGLE_USE_HINTS,
    takes: schema::arguments::<Create>,
    unlisted: &[],
    gives: schema::result_or_job::<BuildResult>,
    parse: parse::<Create>,
};

/// Which template is created.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Create {
    name: TemplateName,
    /// A VM.
    from: VmName,
    /// Faster; its VMs start slowly.
    #[serde(default)]
    no_bake: bool,
}

impl Operation for Create {
    fn vm(&self) -> Option<&VmName> {
        Some(&self.from)
    }

    fn admit<'a>(&'a self, call: &'a CallContext) -> BoxFuture<'a, Result<()>> {
        Box::pin(async {
            match call.nido().await?.template_info(&self.name) {
                Ok(_) => Err(Error::new(Code::TemplateExists, format!("template '{}' exists already", self.name))),
                Err(error) if error.code() == Code::TemplateNotFound => Ok(()),
                Err(error) => Err(error),
            }
        })
    }

    fn run(self: Box<Self>, call: CallContext) -> BoxFuture<'static, Result<ToolResult>> {
        Box::pin(async move {
            let mut tell = |step: BuildStep| {
                let (done, total) = (f64::from(step.index), f64::from(step.total));
                let done = done - 1.0 + f64::from(step.fraction.unwrap_or(0.0)).clamp(0.0, 1.0);
                call.progress.report(done, Some(total), plain(&step.stage));
            };
            let request = CaptureRequest { bake: !self.no_bake, allow: None };
            let work = call.nido().await?.template_create(&self.name, &self.from, request, &mut tell);
            ToolResult::new(&call.unless_cancelled(Box::pin(work)).await?)
        })
    }
}
