//! What is done about the requests that arrive over the control socket: one match for every phase of the VM's life.

use std::time::{Duration, Instant};

use nido_api::error::{Code, Error, Result};
use nido_api::state::{StateCause, VmState};
use nido_api::{ForwardSpec, StopRequest};

use super::control::{Reply, Request};
use super::control_server::Call;
use super::forwards::bind;
use super::launch::Running;
use super::qmp::{QMP_TIMEOUT, qmp_error};
use super::state::Supervisor;

impl Supervisor {
    pub(super) async fn on_call(&mut self, Call { request, reply }: Call, running: &Running) {
        let outcome = match request {
            // The loop has no part in them: they wait, or last.
            Request::Ready | Request::Lease => Ok(Reply::Done),
            Request::Stop(stop) => {
                self.stop_cause.get_or_insert(StateCause::User);
                self.begin_stop(stop.into(), running);
                Ok(Reply::Done)
            }
            Request::StopKept => {
                self.kept = true;
                self.stop_cause.get_or_insert(StateCause::User);
                self.begin_stop(StopRequest { force: true, ..StopRequest::default() }, running);
                Ok(Reply::Done)
            }
            Request::Pause => self.pause(running).await,
            Request::Resume => match self.may_pause_or_resume() {
                Ok(()) => return self.begin_resume(Some(reply), running),
                Err(error) => Err(error),
            },
            Request::Snapshot { name, into } => return self.take_snapshot(name, into, running, reply),
            Request::ForwardAdd { forward } => self.add_forward(&forward.into(), running).await,
            Request::ForwardRemove { forward } => self.remove_forward(&forward.into(), running).await,
            // The client may have given up, and created another VM.
            Request::Claim(_) if reply.is_closed() => return,
            Request::Claim(order) => self.claim(*order, running).await.map(|()| Reply::Done),
            Request::Retire => self.is_pooled().map(|()| {
                self.begin_stop(StopRequest { force: true, ..StopRequest::default() }, running);
                Reply::Done
            }),
            Request::Status => Ok(Reply::Status { idle_ms: self.limits.idle_for(Instant::now()).map(milliseconds) }),
        };
        let _ = reply.send(outcome);
    }

    /// The state may have changed since the request was admitted: a paused guest never powers off.
    fn may_pause_or_resume(&self) -> Result<()> {
        let busy = |words| Err(Error::new(Code::VmBusy, words));
        match () {
            () if self.is_being_saved() => busy("a snapshot of this VM is being taken"),
            () if self.state == VmState::Stopping => busy("this VM is being stopped"),
            () => Ok(()),
        }
    }

    async fn pause(&mut self, running: &Running) -> Result<Reply> {
        self.may_pause_or_resume()?;
        running.monitor()?.stop(QMP_TIMEOUT).await.map_err(|e| qmp_error(&e))?;
        if self.state != VmState::Paused {
            self.paused(StateCause::User);
        }
        Ok(Reply::Done)
    }

    async fn add_forward(&mut self, spec: &ForwardSpec, running: &Running) -> Result<Reply> {
        running.monitor()?;
        let (bound, listener) = bind(spec).await?;
        nido_files::failpoint!("forward.bound");
        self.context.store().add_forward(&self.row.id, &bound)?;
        self.forwards.start(bound.clone(), listener, self.guest.clone(), self.forward_users());
        Ok(Reply::Forward { forward: bound.into() })
    }

    async fn remove_forward(&mut self, spec: &ForwardSpec, running: &Running) -> Result<Reply> {
        running.monitor()?;
        self.context.store().remove_forward(&self.row.id, spec)?;
        nido_files::failpoint!("forward.unrecorded");
        self.forwards.stop(spec).await;
        Ok(Reply::Done)
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
