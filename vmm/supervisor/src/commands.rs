//! What commands ask of the supervisor over its control socket.

use std::time::Instant;

use nido_api::error::{Code, Error, Result};
use nido_api::state::{StateCause, VmState};
use nido_api::{ForwardSpec, StopRequest};

use super::control_server::ControlCommand;
use super::forwards::bind;
use super::launch::Running;
use super::qmp::{QMP_TIMEOUT, qmp_error};
use super::state::Supervisor;

impl Supervisor {
    pub(super) async fn on_order(&mut self, order: ControlCommand, running: &Running) {
        match order {
            ControlCommand::Stop(stop) => {
                self.stop_cause.get_or_insert(StateCause::User);
                self.begin_stop(stop, running);
            }
            ControlCommand::StopKept => {
                self.kept = true;
                self.stop_cause.get_or_insert(StateCause::User);
                self.begin_stop(StopRequest { force: true, ..StopRequest::default() }, running);
            }
            ControlCommand::Pause(reply) if self.is_being_saved() => {
                drop(reply.send(Err(Error::new(Code::VmBusy, "a snapshot of this VM is being taken"))));
            }
            // The state may have changed since the request was admitted: a paused guest never powers off.
            ControlCommand::Pause(reply) if self.state == VmState::Stopping => {
                drop(reply.send(Err(Error::new(Code::VmBusy, "this VM is being stopped"))));
            }
            ControlCommand::Pause(reply) => {
                let outcome = running.monitor.stop(QMP_TIMEOUT).await.map_err(|e| qmp_error(&e));
                if outcome.is_ok() && self.state != VmState::Paused {
                    self.paused(StateCause::User);
                }
                let _ = reply.send(outcome);
            }
            ControlCommand::Resume(reply) if self.is_being_saved() => {
                drop(reply.send(Err(Error::new(Code::VmBusy, "a snapshot of this VM is being taken"))));
            }
            ControlCommand::Resume(reply) if self.state == VmState::Stopping => {
                drop(reply.send(Err(Error::new(Code::VmBusy, "this VM is being stopped"))));
            }
            ControlCommand::Resume(reply) => self.begin_resume(Some(reply), running),
            ControlCommand::Snapshot(name, into, reply) => self.take_snapshot(name, into, running, reply),
            ControlCommand::ForwardAdd(spec, reply) => drop(reply.send(self.add_forward(&spec).await)),
            ControlCommand::ForwardRemove(spec, reply) => drop(reply.send(self.remove_forward(&spec).await)),
            // The client may have given up, and created another VM.
            ControlCommand::Claim(_, reply) if reply.is_closed() => {}
            ControlCommand::Claim(order, reply) => {
                let outcome = self.claim(*order, running).await;
                let _ = reply.send(outcome);
            }
            ControlCommand::Retire(reply) => {
                let mine = self.is_pooled();
                if mine.is_ok() {
                    self.begin_stop(StopRequest { force: true, ..StopRequest::default() }, running);
                }
                let _ = reply.send(mine);
            }
            ControlCommand::Status(reply) => drop(reply.send(self.limits.idle_for(Instant::now()))),
        }
    }

    async fn add_forward(&mut self, spec: &ForwardSpec) -> Result<ForwardSpec> {
        let (bound, listener) = bind(spec).await?;
        nido_files::failpoint!("forward.bound");
        self.context.store().add_forward(&self.row.id, &bound)?;
        self.forwards.start(bound.clone(), listener, self.guest.clone(), self.forward_users());
        Ok(bound)
    }

    async fn remove_forward(&mut self, spec: &ForwardSpec) -> Result<()> {
        self.context.store().remove_forward(&self.row.id, spec)?;
        nido_files::failpoint!("forward.unrecorded");
        self.forwards.stop(spec).await;
        Ok(())
    }
}
