//! `template`: what VMs are made from: listed, shown, built, deleted.

use std::time::Duration;

use clap::{Subcommand, ValueEnum};
use nido_vmm::api::{BuildRequest, KernelChoice, TemplateInfo};
use nido_vmm::name::TemplateName;

use super::Context;
use crate::exit::{Exit, Outcome};
use crate::output::{pairs, table};
use crate::parse::show_bytes;
use crate::progress::Progress;
use crate::signals::until_signal;

const EXAMPLES: &str = "\
Examples:
  nido template ls
  nido template build sandbox
  nido template build debian-12 --rebuild   with the newest packages
  nido template build sandbox --kernel slim with a kernel compiled for guests: boots faster
  nido template info sandbox
  nido template delete debian-12

A template that stands ready is not built again unless its recipe or nido's guest agent has changed.";

/// How long an interrupted build may take to end its programs and remove its files.
const UNDO_LIMIT: Duration = Duration::from_secs(30);

/// List, build and delete what VMs are made from
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List templates, and recipes that can be built
    #[command(visible_alias = "list")]
    Ls,
    /// Show everything about a template
    Info {
        /// Name of the template
        name: TemplateName,
    },
    /// Build a template from the recipe of that name
    Build {
        /// Name of the recipe: sandbox or debian-12
        name: TemplateName,
        /// Fetch packages anew even if nothing has changed
        #[arg(long)]
        rebuild: bool,
        /// Its kernel [default: the one it has; stock for a new template]
        #[arg(long, value_name = "KIND")]
        kernel: Option<Kernel>,
    },
    /// Delete a template that no VM uses
    Delete {
        /// Name of the template
        name: TemplateName,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kernel {
    /// Debian's own, with all its modules
    Stock,
    /// Compiled from Debian's source with what guests need: boots in half the time, no modules
    Slim,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        match self.verb {
            Verb::Ls => list(cx).await,
            Verb::Info { name } => {
                let template = cx.nido().await?.template_info(&name)?;
                cx.output.answer(&template, || pairs(&facts(&template)))?;
                Ok(Exit::Success)
            }
            Verb::Build { name, rebuild, kernel } => {
                let kernel = kernel.map(|kernel| match kernel {
                    Kernel::Stock => KernelChoice::Stock,
                    Kernel::Slim => KernelChoice::Slim,
                });
                build(cx, &name, BuildRequest { rebuild, kernel }).await
            }
            Verb::Delete { name } => {
                let nido = cx.nido().await?;
                nido.template_delete(&name)?;
                cx.output.answer(&serde_json::json!({ "deleted": name }), || format!("{name}\n"))?;
                Ok(Exit::Success)
            }
        }
    }
}

async fn list(cx: &Context) -> Outcome {
    let list = cx.nido().await?.template_list()?;
    cx.output.answer(&list, || {
        if cx.output.quiet {
            return list.templates.iter().map(|template| format!("{}\n", template.name)).collect();
        }
        let ready = list.templates.iter().map(|template| {
            [
                template.name.to_string(),
                if template.agent_current { "ready" } else { "outdated" }.into(),
                template.kernel.clone(),
                show_bytes(template.size_bytes),
                show_bytes(template.disk_bytes),
                format!("{:.0}", template.created_at),
            ]
        });
        let unbuilt = list.recipes.iter().filter(|recipe| list.templates.iter().all(|t| t.name.as_str() != *recipe));
        let dash = || String::from("-");
        let unbuilt = unbuilt.map(|recipe| [recipe.clone(), "not built".into(), dash(), dash(), dash(), dash()]);
        table(["NAME", "STATUS", "KERNEL", "SIZE", "DISK", "CREATED"], ready.chain(unbuilt))
    })?;
    Ok(Exit::Success)
}

async fn build(cx: &Context, name: &TemplateName, request: BuildRequest) -> Outcome {
    let nido = cx.nido().await?;
    let built = {
        let mut progress = Progress::new(&cx.output, name.as_str());
        let mut told = |step| progress.build(&step);
        until_signal(UNDO_LIMIT, nido.template_build(name, request, &mut told)).await?
    };
    cx.output.talk(&if built.already_built {
        format!("{name} is up to date")
    } else {
        let size = show_bytes(built.template.size_bytes);
        format!("{name} was built in {:.1} s ({size})", Duration::from_millis(built.duration_ms).as_secs_f64())
    });
    cx.output.answer(&built, || format!("{name}\n"))?;
    Ok(Exit::Success)
}

fn facts(template: &TemplateInfo) -> Vec<(&'static str, String)> {
    let agent = if template.agent_current { "of this nido" } else { "of another nido; build the template again" };
    let users = if template.used_by.is_empty() { "no VM".into() } else { template.used_by.join(", ") };
    vec![
        ("name", template.name.to_string()),
        ("recipe", template.recipe.clone()),
        ("digest", template.digest.clone()),
        ("init", template.init.clone()),
        ("kernel", template.kernel.clone()),
        ("agent", agent.into()),
        ("size", show_bytes(template.size_bytes)),
        ("disk", show_bytes(template.disk_bytes)),
        ("created", format!("{:.0}", template.created_at)),
        ("used by", users),
    ]
}
