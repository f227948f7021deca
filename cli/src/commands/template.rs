//! `template`: what VMs are made from: listed, shown, built, exported, imported, deleted.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::time::Duration;

use clap::{Subcommand, ValueEnum};
use nido_api::error::{Code, Error};
use nido_api::name::{TemplateName, VmName};
use nido_api::operation as op;
use nido_api::redact::bytes;
use nido_api::{
    AllowEntry, BakeInfo, BakeRequest, BuildRequest, CaptureRequest, ExportRequest, ExportResult, ExportTarget,
    ImportRequest, ImportResult, ImportSource, KernelChoice, TemplateInfo,
};
use nido_server::sanitize::line;
use serde_json::json;

use super::Context;
use super::confirmation::Confirmation;
use super::vm_args::MachineArgs;
use crate::exit::{Exit, Failure, Outcome, until_signal};
use crate::output::{pairs, table};
use crate::parse::{self, show_bytes};
use crate::progress::Progress;

const EXAMPLES: &str = "\
Examples:
  nido template ls
  nido template build sandbox
  nido template build debian-12 --rebuild   with the newest packages
  nido template build sandbox --kernel slim with a kernel compiled for guests: boots faster
  nido template info sandbox
  nido template create mine --from web
  nido template create mine --from web --allow pypi.org   its VMs reach nothing else
  nido template bake sandbox --memory 2G --cpus 2   so that such VMs are forked
  nido template delete debian-12
  nido template export sandbox sandbox.nido
  nido template import sandbox.nido --name theirs
  nido template export sandbox - --no-memory | ssh host nido template import -

An existing template is not built again unless its recipe or nido's guest agent has changed. An
imported template is validated before it is used, but its VMs run the software that its author put
into it.";

/// How long an interrupted build, export or import may take to end its programs and remove its files.
const UNDO_LIMIT: Duration = Duration::from_secs(30);

/// Manage templates, from which VMs are created
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
    /// Build a template from its recipe
    Build {
        /// Name of the recipe: sandbox, debian-12 or kvm-host
        name: TemplateName,
        /// Download packages again even if nothing has changed
        #[arg(long)]
        rebuild: bool,
        /// Create no warm image: VMs boot
        #[arg(long)]
        no_bake: bool,
        /// Kernel of the template [default: unchanged; stock for a new template]
        #[arg(long, value_name = "KIND")]
        kernel: Option<Kernel>,
    },
    /// Create a template and its warm image from a VM's disk
    Create {
        /// Name of the new template
        name: TemplateName,
        /// The VM; a running one is paused for a moment
        #[arg(long, value_name = "VM")]
        from: VmName,
        /// Create no warm image: VMs boot
        #[arg(long)]
        no_bake: bool,
        /// Rule or @PRESET that covers rules of its VMs, which have net restricted or none; may be repeated; 'none' for no rule
        /// [default: as for the VM]
        #[arg(long, value_name = "RULE", value_parser = parse::allowed)]
        allow: Option<Vec<Option<AllowEntry>>>,
    },
    /// Save a booted guest, from which VMs are forked
    Bake {
        /// Name of the template
        name: TemplateName,
        /// Replace a warm image that matches
        #[arg(long)]
        again: bool,
        #[command(flatten)]
        machine: MachineArgs,
    },
    /// Write a template to one file
    Export(ExportArgs),
    /// Read a template from an exported file
    Import(ImportArgs),
    /// Delete a template that no VM uses
    Delete {
        /// Name of the template
        name: TemplateName,
        #[command(flatten)]
        confirmation: Confirmation,
    },
}

#[derive(Debug, clap::Args)]
struct ExportArgs {
    /// Name of the template
    name: TemplateName,
    /// File to write, readable by its owner only; - is standard output
    #[arg(value_hint = clap::ValueHint::FilePath)]
    file: OsString,
    /// Leave out warm images: smaller, but its VMs boot instead of being forked
    #[arg(long)]
    no_memory: bool,
    /// Compression level, from 1 (fast) to 19 (small)
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=19))]
    level: i32,
    /// Replace the file if it exists
    #[arg(long, short)]
    force: bool,
}

#[derive(Debug, clap::Args)]
struct ImportArgs {
    /// File to read; - is standard input
    #[arg(value_hint = clap::ValueHint::FilePath)]
    file: OsString,
    /// Name of the template here [default: the exported one]
    #[arg(long)]
    name: Option<TemplateName>,
    /// Leave out warm images, for archives that you do not trust: QEMU itself loads their state
    #[arg(long)]
    no_memory: bool,
    /// Replace a different template of that name
    #[arg(long, short)]
    force: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kernel {
    /// Debian's, with all its modules
    Stock,
    /// Compiled from Debian's source for guests: boots in half the time, no modules
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
            Verb::Build { name, rebuild, no_bake, kernel } => {
                let kernel = kernel.map(|kernel| match kernel {
                    Kernel::Stock => KernelChoice::Stock,
                    Kernel::Slim => KernelChoice::Slim,
                });
                build(cx, &name, BuildRequest { rebuild, bake: !no_bake, kernel }).await
            }
            Verb::Create { name, from, no_bake, allow } => {
                let allow = allow.map(|entries| entries.into_iter().flatten().collect::<Vec<_>>());
                let arguments = json!({ "name": name, "from": from, "allow": allow });
                let nido = cx.nido().await?;
                let built = {
                    let mut progress = Progress::new(&cx.output, name.as_str());
                    let mut told = |step| progress.build(&step);
                    let request = CaptureRequest { bake: !no_bake, allow };
                    let made = until_signal(UNDO_LIMIT, nido.template_create(&name, &from, request, &mut told));
                    cx.audited(&nido, op::TEMPLATE_CREATE, arguments, made).await?
                };
                let size = show_bytes(built.template.size_bytes);
                let seconds = Duration::from_millis(built.duration_ms).as_secs_f64();
                cx.output.note(&format!("{name} was made of {from} in {seconds:.1} s ({size})"));
                cx.output.answer(&built, || format!("{name}\n"))?;
                Ok(Exit::Success)
            }
            Verb::Bake { name, again, machine } => bake(cx, &name, BakeRequest { again, ..machine.bake() }).await,
            Verb::Export(args) => export(cx, args).await,
            Verb::Import(args) => import(cx, args).await,
            Verb::Delete { name, confirmation } => {
                let nido = cx.nido().await?;
                if !confirmation.given(cx, &format!("delete the template {name}?")) {
                    return Ok(Exit::Failure);
                }
                let gone = nido.template_delete(&name);
                cx.audited(&nido, op::TEMPLATE_DELETE, json!({ "name": name }), gone).await?;
                cx.output.answer(&json!({ "deleted": name }), || format!("{name}\n"))?;
                Ok(Exit::Success)
            }
        }
    }
}

async fn list(cx: &Context) -> Outcome {
    let list = cx.nido().await?.template_list()?;
    list.damaged.iter().for_each(|damaged| cx.output.warn(damaged));
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
        let arguments = json!({ "name": name, "rebuild": request.rebuild });
        let built = until_signal(UNDO_LIMIT, nido.template_build(name, request, &mut told));
        cx.audited(&nido, op::TEMPLATE_BUILD, arguments, built).await?
    };
    cx.output.note(&if built.already_built {
        format!("{name} is up to date")
    } else {
        let size = show_bytes(built.template.size_bytes);
        format!("{name} was built in {:.1} s ({size})", Duration::from_millis(built.duration_ms).as_secs_f64())
    });
    cx.output.answer(&built, || format!("{name}\n"))?;
    Ok(Exit::Success)
}

async fn bake(cx: &Context, name: &TemplateName, request: BakeRequest) -> Outcome {
    let nido = cx.nido().await?;
    let baked = {
        let mut progress = Progress::new(&cx.output, name.as_str());
        let mut told = |stage| progress.start(stage);
        let mut arguments = json!(request);
        arguments["name"] = name.as_str().into();
        let baked = until_signal(Duration::ZERO, nido.template_bake(name, &request, &mut told));
        cx.audited(&nido, op::TEMPLATE_BAKE, arguments, baked).await?
    };
    cx.output.note(&if baked.already_baked {
        format!("{name} has been baked for {}", machine(&baked.bake))
    } else {
        let seconds = Duration::from_millis(baked.duration_ms).as_secs_f64();
        format!("{name} was baked for {} in {seconds:.1} s", machine(&baked.bake))
    });
    cx.output.answer(&baked, || format!("{name}\n"))?;
    Ok(Exit::Success)
}

/// The machine of a bake in a few words.
fn machine(bake: &BakeInfo) -> String {
    let BakeInfo { machine, accel, cpus, memory_mib, net, .. } = bake;
    format!("{machine}, {accel}, {cpus} CPU, {memory_mib} MiB, network {net}")
}

async fn export(cx: &Context, args: ExportArgs) -> Outcome {
    let ExportArgs { name, file, no_memory, level, force } = args;
    let told = bytes(file.as_bytes());
    let target = if file != "-" {
        ExportTarget::Path(file.into())
    } else if cx.output.stdout_is_terminal {
        return Err(Error::new(Code::SpecInvalid, "an archive cannot be written to a terminal")
            .hint("name a file, or send standard output to a file or a pipe")
            .into());
    } else {
        ExportTarget::Stream(File::from(io::stdout().as_fd().try_clone_to_owned()?))
    };
    let nido = cx.nido().await?;
    let arguments = json!({ "name": name, "file": told, "force": force });
    let request = ExportRequest { target, overwrite: force, memory: !no_memory, level };
    let done = {
        let mut progress = Progress::new(&cx.output, name.as_str());
        let mut told = |step| progress.travel(&step);
        let exported = until_signal(UNDO_LIMIT, nido.template_export(&name, request, &mut told));
        cx.audited(&nido, op::TEMPLATE_EXPORT, arguments, async { exported.await.map_err(reader_gone) }).await?
    };
    cx.output.note(&exported(&done));
    if let Some(path) = &done.path {
        cx.output.answer(&done, || format!("{}\n", line(path)))?;
    }
    Ok(Exit::Success)
}

fn exported(done: &ExportResult) -> String {
    let seconds = Duration::from_millis(done.duration_ms).as_secs_f64();
    let bakes = match done.bakes {
        0 => String::new(),
        1 => ", 1 saved guest".into(),
        count => format!(", {count} saved guests"),
    };
    let (data, archive) = (show_bytes(done.data_bytes), show_bytes(done.archive_bytes));
    format!("{} was exported in {seconds:.1} s: {data} in {archive}{bakes}", done.template)
}

/// An archive that the reader of a pipe does not read to its end is no error.
fn reader_gone(failure: Failure) -> Failure {
    let Failure::Nido(error) = &failure else { return failure };
    let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(error);
    while let Some(error) = cause {
        if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
            return Failure::Stdout(io::ErrorKind::BrokenPipe.into());
        }
        cause = error.source();
    }
    failure
}

async fn import(cx: &Context, args: ImportArgs) -> Outcome {
    let ImportArgs { file, name, no_memory, force } = args;
    let subject = name.as_ref().map_or("importing", TemplateName::as_str).to_owned();
    let arguments = json!({ "file": bytes(file.as_bytes()), "name": name, "force": force });
    let source = if file == "-" {
        ImportSource::Stream(File::from(io::stdin().as_fd().try_clone_to_owned()?))
    } else {
        ImportSource::Path(file.into())
    };
    let nido = cx.nido().await?;
    let done = {
        let mut progress = Progress::new(&cx.output, &subject);
        let mut told = |step| progress.travel(&step);
        let request = ImportRequest { source, name, force, memory: !no_memory };
        let imported = until_signal(UNDO_LIMIT, nido.template_import(request, &mut told));
        cx.audited(&nido, op::TEMPLATE_IMPORT, arguments, imported).await?
    };
    if !cx.output.json {
        done.warnings.iter().for_each(|warning| cx.output.warn(warning));
    }
    cx.output.note(&imported(&done));
    cx.output.answer(&done, || format!("{}\n", done.template.name))?;
    Ok(Exit::Success)
}

fn imported(done: &ImportResult) -> String {
    let name = &done.template.name;
    if done.already_present {
        return format!("{name} existed already");
    }
    let size = show_bytes(done.template.size_bytes);
    format!("{name} was imported in {:.1} s ({size})", Duration::from_millis(done.duration_ms).as_secs_f64())
}

fn facts(template: &TemplateInfo) -> Vec<(&'static str, String)> {
    let agent = match template.agent_current {
        true => "of this nido".into(),
        false => format!(
            "of another nido; {}",
            nido_core::renewal(&template.name).text(nido_api::FrontEnd::Cli).unwrap_or_default()
        ),
    };
    let bakes: Vec<_> = template.bakes.iter().map(machine).collect();
    let allow = match template.allow.as_deref() {
        None => "no bound".to_owned(),
        Some([]) => "nothing".to_owned(),
        Some(rules) => rules.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
    };
    let users = if template.used_by.is_empty() { "no VM".into() } else { template.used_by.join(", ") };
    vec![
        ("name", template.name.to_string()),
        ("recipe", template.recipe.clone()),
        ("digest", template.digest.clone()),
        ("init", template.init.clone()),
        ("kernel", template.kernel.clone()),
        ("agent", agent),
        ("size", show_bytes(template.size_bytes)),
        ("disk", show_bytes(template.disk_bytes)),
        ("created", format!("{:.0}", template.created_at)),
        ("used by", users),
        ("allow", allow),
        ("forks on", if bakes.is_empty() { "none; see nido template bake --help".into() } else { bakes.join("; ") }),
    ]
}
