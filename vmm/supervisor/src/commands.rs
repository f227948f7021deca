//! What is done about the requests that arrive over the control socket: one match for every phase of the VM's life.

use std::time::{Duration, Instant};

use nido_api::ForwardSpec;
use nido_api::error::Result;
use nido_api::state::StateCause;

use super::control::{Reply, Request};
use super::control_server::{ControlRequest, ReplySender};
use super::forwards::bind;
use super::launch::RunningQemu;
use super::lifecycle::{Event, Stop};
use super::qmp::{QMP_TIMEOUT, qmp_error};
use super::state::{Report, Supervisor};

impl Supervisor {
    pub(super) async fn on_call(&mut self, call: ControlRequest, running: &RunningQemu) {
        let Some(ControlRequest { request, reply }) = self.defer(call) else { return };
        let outcome = match request {
            // The loop has no part in them: they wait, or last.
            Request::Ready | Request::Lease => Ok(Reply::Done),
            Request::Stop(stop) => {
                let (force, timeout) = (stop.force, Duration::from_millis(stop.timeout_ms));
                self.step(Event::Stop(Stop { cause: Some(StateCause::User), force, timeout }), running);
                Ok(Reply::Done)
            }
            Request::StopKept => {
                self.kept = true;
                self.step(Event::Stop(Stop::force(Some(StateCause::User))), running);
                Ok(Reply::Done)
            }
            Request::Pause => match self.admit_pause_or_resume() {
                Ok(()) => return self.begin_pause(reply, running),
                Err(error) => Err(error),
            },
            Request::Resume => match self.admit_pause_or_resume() {
                Ok(()) => return self.begin_resume(Some(reply), running),
                Err(error) => Err(error),
            },
            Request::Snapshot { name, into } => return self.take_snapshot(name, into, running, reply),
            Request::ForwardAdd { forward } => self.add_forward(&forward.into(), running).await,
            Request::ForwardRemove { forward } => self.remove_forward(&forward.into(), running).await,
            Request::ApplyRules => self.apply_stored_rules().await.map(|()| Reply::Done),
            // The client may have given up, and created another VM.
            Request::Claim(_) if reply.is_closed() => return,
            Request::Claim(order) => self.claim(*order, running).await.map(|()| Reply::Done),
            Request::Retire => self.lifecycle.admit_retirement().map(|()| {
                self.step(Event::Stop(Stop::force(None)), running);
                Reply::Done
            }),
            Request::Status => {
                let idle_ms = self.lifecycle.idle_for(Instant::now()).map(milliseconds);
                Ok(Reply::Status { idle_ms, network: self.network_info().await.map(Box::new) })
            }
        };
        let _ = reply.send(outcome);
    }

    fn admit_pause_or_resume(&mut self) -> Result<()> {
        self.lifecycle.set_saving(self.is_being_saved());
        self.lifecycle.admit_pause_or_resume()
    }

    /// Pauses the CPUs, in a task of its own.
    fn begin_pause(&self, reply: ReplySender, running: &RunningQemu) {
        let (monitor, report) = (running.monitor().cloned(), self.reports.0.clone());
        tokio::spawn(async move {
            let outcome = match monitor {
                Ok(monitor) => monitor.stop(QMP_TIMEOUT).await.map_err(|e| qmp_error(&e)),
                Err(error) => Err(error),
            };
            let _ = report.send(Report::Paused(outcome, reply)).await;
        });
    }

    async fn add_forward(&mut self, spec: &ForwardSpec, running: &RunningQemu) -> Result<Reply> {
        running.monitor()?;
        let (bound, listener) = bind(spec).await?;
        nido_files::failpoint!("forward.bound");
        self.context.store().add_forward(&self.row.id, &bound)?;
        self.forwards.start(bound.clone(), listener, self.guest.clone(), self.forward_users());
        Ok(Reply::Forward { forward: bound.into() })
    }

    async fn remove_forward(&mut self, spec: &ForwardSpec, running: &RunningQemu) -> Result<Reply> {
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
