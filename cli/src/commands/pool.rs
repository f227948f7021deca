//! `pool`: clones of a template that wait, loaded and paused, for the next `spawn` or `run`.

use clap::Subcommand;
use nido_api::name::TemplateName;
use nido_api::operation as op;
use nido_api::{POOL_MAX, PoolInfo, PoolRequest};
use nido_server::sanitize::line;

use super::Context;
use super::vm_args::MachineArgs;
use crate::exit::{Exit, Outcome};
use crate::output::table;
use crate::parse::show_bytes;

const EXAMPLES: &str = "\
Examples:
  nido pool set sandbox 4
  nido pool set sandbox 2 --memory 2G      the template must have been baked for such a machine
  nido pool ls
  nido run -- true                         takes a clone; another is created in the background
  nido pool set sandbox 0

A waiting clone uses memory, but no CPU time, and has an identity of its own. The command that
takes it sets its name, the time, a new token and new random numbers.";

/// Keep VMs of a template ready
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Set how many clones of a template wait; 0 ends the pool
    Set {
        /// Name of the template
        template: TemplateName,
        /// Number of clones, at most 100
        #[arg(value_name = "N", value_parser = clap::value_parser!(u32).range(0..=i64::from(POOL_MAX)))]
        wanted: u32,
        #[command(flatten)]
        machine: MachineArgs,
    },
    /// List pools, and how full they are
    #[command(visible_alias = "list")]
    Ls,
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        match self.verb {
            Verb::Set { template, wanted, machine } => {
                let request = PoolRequest::of(wanted, &machine.bake());
                let mut arguments = serde_json::json!(request);
                arguments["name"] = template.as_str().into();
                let pool = cx.audited(&nido, op::POOL_SET, arguments, nido.pool_set(&template, &request)).await?;
                cx.output.note(&match wanted {
                    0 => format!("{template} no longer has this pool"),
                    _ => format!("{} of {wanted} clones of {template} wait; see nido pool ls", pool.ready),
                });
                cx.output.answer(&pool, || format!("{template}\n"))?;
            }
            Verb::Ls => {
                let list = nido.pool_list().await?;
                cx.output.answer(&list, || {
                    if cx.output.quiet {
                        return list.pools.iter().map(|pool| format!("{}\n", pool.template)).collect();
                    }
                    table(["TEMPLATE", "MACHINE", "WANTED", "READY", "FILLING"], list.pools.iter().map(row))
                })?;
                if !cx.output.json {
                    for pool in &list.pools {
                        pool.trouble.iter().for_each(|why| cx.output.warn(&line(why)));
                    }
                }
            }
        }
        Ok(Exit::Success)
    }
}

fn row(pool: &PoolInfo) -> [String; 5] {
    [
        pool.template.to_string(),
        machine(pool),
        pool.wanted.to_string(),
        pool.ready.to_string(),
        pool.filling.to_string(),
    ]
}

/// The machine in a few words; what nido decides by itself is left out.
fn machine(pool: &PoolInfo) -> String {
    let kind = &pool.kind;
    let asked = [kind.machine.name(), kind.accel.name()].into_iter().filter(|word| *word != "auto").map(str::to_owned);
    let mut words: Vec<_> = asked.collect();
    words.push(format!("{} CPU", kind.cpus));
    words.push(show_bytes(u64::from(kind.memory_mib) << 20));
    words.push(format!("network {}", kind.net.name()));
    words.extend(kind.nested.then(|| "nested".to_owned()));
    words.join(", ")
}
