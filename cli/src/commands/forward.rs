//! `forward`: ports of a guest published on the host.

use clap::Subcommand;
use nido_vmm::api::ForwardSpec;
use nido_vmm::name::VmName;
use serde_json::{Value, json};

use super::Context;
use crate::exit::{Exit, Outcome};
use crate::output::table;

const EXAMPLES: &str = "\
Examples:
  nido forward add web 8080:80
  nido forward add web 22                 takes a free port of the host and prints it
  nido forward add web 0.0.0.0:8443:443   on every address: anyone who reaches the host reaches the guest
  nido forward ls web
  nido forward rm web 8080:80

A forward works without a network card too. It connects to 127.0.0.1 inside the guest.";

/// Publish ports of a VM on the host
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Publish a port; prints where
    Add(OneArgs),
    /// List published ports
    #[command(visible_alias = "list")]
    Ls {
        /// Name of the VM
        name: VmName,
    },
    /// Unpublish a port, named as it is listed
    Rm(OneArgs),
}

#[derive(Debug, clap::Args)]
struct OneArgs {
    /// Name of the VM
    name: VmName,
    /// The port, [HOST:]PORT:GUEST or GUEST alone
    #[arg(value_name = "[[HOST:]PORT:]GUEST")]
    forward: ForwardSpec,
}

impl OneArgs {
    /// As the audit log has it: with the names that the API knows.
    fn told(&self) -> Value {
        let ForwardSpec { host, host_port, guest_port } = &self.forward;
        json!({ "name": self.name, "host": host, "host_port": host_port, "guest_port": guest_port })
    }
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        match self.verb {
            Verb::Add(one) => {
                let arguments = one.told();
                let made = nido.forward_add(&one.name, one.forward);
                let made = cx.audited(&nido, "forward_add", arguments, made).await?;
                cx.output.answer(&made, || format!("{made}\n"))?;
            }
            Verb::Ls { name } => {
                let list = nido.forward_list(&name)?;
                let row = |f: &ForwardSpec| [f.host.to_string(), f.host_port.to_string(), f.guest_port.to_string()];
                cx.output.answer(&list, || {
                    if cx.output.quiet {
                        list.forwards.iter().map(|forward| format!("{forward}\n")).collect()
                    } else {
                        table(["HOST", "PORT", "GUEST"], list.forwards.iter().map(row))
                    }
                })?;
            }
            Verb::Rm(one) => {
                let gone = nido.forward_remove(&one.name, &one.forward);
                cx.audited(&nido, "forward_remove", one.told(), gone).await?;
                cx.output.answer(&one.forward, || format!("{}\n", one.forward))?;
            }
        }
        Ok(Exit::Success)
    }
}
