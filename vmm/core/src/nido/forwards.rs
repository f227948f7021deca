//! Published ports, and a port of the guest as standard input and output.

use nido_api::error::{Code, Error, Hint, Result};
use nido_api::operation as op;
use nido_api::{ForwardList, ForwardSpec, Grant, VmRef};
use nido_engine::guest::proxy;
use nido_guest_agent::wire::Connect;
use nido_supervisor::control::{Reply, Request};
use tokio::time::Instant;

use super::Nido;
use super::exec::{AGENT_REPLY_TIMEOUT, guest_error};

impl Nido {
    /// Publishes a port of the guest; the result has the selected host port. A stopped VM publishes it when it
    /// starts, and needs a port by number.
    ///
    /// # Errors
    /// `vm_not_found`, `port_in_use`, `spec_invalid`, `denied` by the grant.
    pub async fn forward_add(&self, vm: impl Into<VmRef<'_>>, spec: ForwardSpec, grant: &Grant) -> Result<ForwardSpec> {
        let vm = vm.into();
        grant.limits.check_forward(&spec)?;
        let (row, name) = (self.resolve(vm)?, vm.name);
        if row.state.is_inactive() {
            if spec.host_port == 0 {
                return Err(Error::new(
                    Code::SpecInvalid,
                    format!("VM '{name}' is not running, so no free port can be selected"),
                )
                .hint("specify a port of the host, for example 8080:80"));
            }
            if let Some(taken) = row.forwards.iter().find(|known| known.collides(&spec)) {
                let words = format!("port {} of {} is published already, as {taken}", spec.host_port, spec.host);
                return Err(
                    Error::new(Code::PortInUse, words).hint("remove that forward first, or choose another port")
                );
            }
            self.store().add_forward(&row.id, &spec)?;
            nido_files::failpoint!("forward.row");
            self.context.refresh_record(&row.id);
            return Ok(spec);
        }
        match self.request(&row, &Request::ForwardAdd { forward: spec.into() }).await? {
            Reply::Forward { forward } => {
                nido_files::failpoint!("forward.published");
                self.context.refresh_record(&row.id);
                Ok(forward.into())
            }
            other => Err(Error::internal(format!("unexpected reply of the supervisor: {other:?}"))),
        }
    }

    /// Published ports.
    ///
    /// # Errors
    /// `vm_not_found`.
    pub fn forward_list<'a>(&self, vm: impl Into<VmRef<'a>>) -> Result<ForwardList> {
        Ok(ForwardList { forwards: self.resolve(vm.into())?.forwards })
    }

    /// Unpublishes a port, named as it is listed; without a host port, every forward of that guest port.
    ///
    /// # Errors
    /// `vm_not_found`, `forward_not_found`.
    pub async fn forward_remove(&self, vm: impl Into<VmRef<'_>>, spec: &ForwardSpec) -> Result<()> {
        let vm = vm.into();
        let (row, name) = (self.resolve(vm)?, vm.name);
        let matches = |f: &&ForwardSpec| f.guest_port == spec.guest_port && (spec.host_port == 0 || *f == spec);
        let found: Vec<_> = row.forwards.iter().filter(matches).cloned().collect();
        if found.is_empty() {
            return Err(Error::new(Code::ForwardNotFound, format!("VM '{name}' has no forward {spec}"))
                .hint(Hint::run_on(op::FORWARD_LIST, name).to("list them")));
        }
        for forward in found {
            if row.state.is_inactive() {
                self.store().remove_forward(&row.id, &forward)?;
            } else {
                self.request(&row, &Request::ForwardRemove { forward: forward.into() }).await?;
            }
            nido_files::failpoint!("forward.removed");
        }
        self.context.refresh_record(&row.id);
        Ok(())
    }

    /// Connects standard input and output to a TCP port of the guest until the guest has closed it.
    ///
    /// # Errors
    /// `vm_not_found`, `vm_not_running`, `port_closed`, `agent_unreachable`.
    pub async fn proxy(&self, vm: impl Into<VmRef<'_>>, port: u16) -> Result<()> {
        let vm = vm.into();
        let (reached, name) = (self.reach(vm).await?, vm.name);
        let tunnel = reached
            .guest
            .connect(&Connect { host: None, port }, Instant::now() + AGENT_REPLY_TIMEOUT)
            .await
            .map_err(|e| guest_error(name, e))?;
        proxy(tunnel, tokio::io::stdin(), tokio::io::stdout()).await.map_err(|e| guest_error(name, e))
    }
}
