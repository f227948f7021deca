//! `forward`: ports of a guest published on the host.

use clap::Subcommand;
use nido_api::ForwardSpec;
use nido_api::error::{Code, Error, Hint};
use nido_api::name::VmName;
use nido_api::operation as op;
use serde_json::{Value, json};

use super::Context;
use crate::exit::{Exit, Outcome};
use crate::output::table;

const EXAMPLES: &str = "\
Examples:
  nido forward add web 8080:80
  nido forward add web 22                 selects a free port of the host and prints it
  nido forward add web 0.0.0.0:8443:443   on every address: any client that reaches the host reaches the guest
  nido forward ls web
  nido forward rm web 8080:80
  nido forward rm web 80 --all            every forward of the guest's port 80

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
    /// Publish a port; prints the host port
    Add(OneArgs),
    /// List published ports
    #[command(visible_alias = "list")]
    Ls {
        /// Name of the VM
        name: VmName,
    },
    /// Remove a published port, named as listed; GUEST alone if it is published once
    Rm {
        #[command(flatten)]
        one: OneArgs,
        /// Remove all forwards of the port GUEST
        #[arg(long)]
        all: bool,
    },
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
    fn audit_arguments(&self) -> Value {
        let ForwardSpec { host, host_port, guest_port } = &self.forward;
        json!({ "name": self.name, "host": host, "host_port": host_port, "guest_port": guest_port })
    }
}

impl Args {
    pub async fn run(self, cx: &Context) -> Outcome {
        let nido = cx.nido().await?;
        match self.verb {
            Verb::Add(one) => {
                let arguments = one.audit_arguments();
                let grant = Context::grant();
                let made = nido.forward_add(&one.name, one.forward, &grant);
                let made = cx.audited(&nido, op::FORWARD_ADD, arguments, made).await?;
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
            Verb::Rm { one, all } => {
                // Without a VM of that name the removal reports that, and the audit log has it.
                let published = nido.forward_list(&one.name).map(|list| list.forwards).unwrap_or_default();
                let meant = forwards_to_remove(&published, &one, all)?;
                for forward in &meant {
                    let OneArgs { name, .. } = &one;
                    let exact = OneArgs { name: name.clone(), forward: forward.clone() };
                    let gone = nido.forward_remove(name, forward);
                    cx.audited(&nido, op::FORWARD_REMOVE, exact.audit_arguments(), gone).await?;
                }
                cx.answer_each("forwards", &meant, |forward| format!("{forward}\n"))?;
            }
        }
        Ok(Exit::Success)
    }
}

/// The forwards that are removed. A guest port alone is clear only if it is published once, unless all are meant. One that is not
/// there is passed on: the core reports the error.
fn forwards_to_remove(published: &[ForwardSpec], one: &OneArgs, all: bool) -> Result<Vec<ForwardSpec>, Error> {
    let OneArgs { name, forward } = one;
    if forward.host_port != 0 {
        return Ok(vec![forward.clone()]);
    }
    let found: Vec<_> = published.iter().filter(|known| known.guest_port == forward.guest_port).cloned().collect();
    match found.len() {
        0 => Ok(vec![forward.clone()]),
        2.. if !all => {
            let (port, times) = (forward.guest_port, found.len());
            let listed = found.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            Err(Error::new(
                Code::SpecInvalid,
                format!("port {port} of VM '{name}' is published {times} times: {listed}"),
            )
            .hint(Hint::command_line(format!("name one of them, or: nido forward rm {name} {port} --all"))))
        }
        _ => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // A guest port alone removed every forward of it, and named one that was not there.
    #[test]
    fn a_guest_port_that_is_published_several_times_has_to_be_named_exactly() {
        let parsed = |text: &str| text.parse::<ForwardSpec>().unwrap();
        let published = [parsed("8080:80"), parsed("0.0.0.0:9090:80"), parsed("2222:22")];
        let removed = |text: &str, all| {
            let one = OneArgs { name: "web".parse().unwrap(), forward: parsed(text) };
            forwards_to_remove(&published, &one, all)
        };
        assert_eq!(removed("80", false).unwrap_err().code(), Code::SpecInvalid);
        assert_eq!(removed("80", true).unwrap(), published[..2]);
        assert_eq!(removed("22", false).unwrap(), published[2..]);
        assert_eq!(removed("8080:80", false).unwrap(), published[..1]);
        assert_eq!(removed("443", false).unwrap(), [parsed("443")]);
    }
}
