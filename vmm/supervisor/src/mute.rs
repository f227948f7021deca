//! A QEMU whose monitor does not answer: its limits are kept, and it can only be killed.

use std::time::Instant;

use nido_api::Limit;
use nido_api::error::{Code, Error};
use nido_api::state::{Fact, StateCause};
use nido_engine::qemu::{QemuExit, QemuProcess};
use nido_store::Transition;
use tokio::time::Instant as TokioInstant;

use super::control_server::{ActiveSessions, ControlCommand};
use super::event_loop::GUARDIAN_EVERY;
use super::limits::Reached;
use super::state::{SESSION_EVERY, Supervisor};

impl Supervisor {
    /// Watches over a QEMU whose monitor does not answer: all that can be done with it is to end it.
    pub(super) async fn watch_over_mute(&mut self, process: &QemuProcess) -> QemuExit {
        let mut guardian = tokio::time::interval(GUARDIAN_EVERY);
        let mut session = tokio::time::interval(SESSION_EVERY);
        let mut direct = self.users.watch();
        let mut spliced =
            self.channel.as_ref().map_or_else(|| ActiveSessions::new().watch(), |channel| channel.activity().open());
        loop {
            let users = *direct.borrow_and_update() + *spliced.borrow_and_update();
            self.limits.used_by(users, Instant::now());
            if self.stop_cause.is_none()
                && let Some(reached) = self.limits.reached(Instant::now())
            {
                let (cause, limit) = match reached {
                    Reached::Ttl => (StateCause::Ttl, Limit::Ttl),
                    Reached::Idle => (StateCause::Idle, Limit::Idle),
                };
                self.stop_cause = Some(cause);
                self.write(Transition::LimitReached(limit));
                self.learn(Fact::StopAsked);
                let _ = process.kill();
            }
            let wake = self.limits.next_deadline().filter(|_| self.stop_cause.is_none()).map(TokioInstant::from_std);
            tokio::select! {
                _ = direct.changed() => {}
                Ok(()) = spliced.changed() => {}
                () = tokio::time::sleep_until(wake.unwrap_or_else(TokioInstant::now)), if wake.is_some() => {}
                _ = guardian.tick() => self.ensure_guardian(),
                exit = process.wait() => return exit.unwrap_or(QemuExit::Unknown),
                () = self.termination.requested() => {
                    self.stop_cause.get_or_insert(StateCause::Host);
                    self.learn(Fact::StopAsked);
                    let _ = process.kill();
                }
                _ = session.tick(), if self.row.spec.lease.is_some() => if self.context.is_abandoned(&self.row) {
                    self.learn(Fact::StopAsked);
                    let _ = process.kill();
                },
                Some(order) = self.orders.recv() => {
                    let mute = || Error::new(Code::QemuFailed, "the VM's QEMU does not reply").hint("terminate it with nido stop --force");
                    match order {
                        order @ (ControlCommand::Stop(_) | ControlCommand::StopKept) => {
                            self.kept |= matches!(order, ControlCommand::StopKept);
                            self.stop_cause.get_or_insert(StateCause::User);
                            self.learn(Fact::StopAsked);
                            let _ = process.kill();
                        }
                        ControlCommand::Retire(reply) => {
                            let mine = self.is_pooled();
                            if mine.is_ok() {
                                self.learn(Fact::StopAsked);
                                let _ = process.kill();
                            }
                            let _ = reply.send(mine);
                        }
                        ControlCommand::Pause(reply)
                        | ControlCommand::Resume(reply)
                        | ControlCommand::Snapshot(_, _, reply)
                        | ControlCommand::ForwardRemove(_, reply)
                        | ControlCommand::Claim(_, reply) => drop(reply.send(Err(mute()))),
                        ControlCommand::ForwardAdd(_, reply) => drop(reply.send(Err(mute()))),
                        ControlCommand::Status(reply) => drop(reply.send(self.limits.idle_for(Instant::now()))),
                    }
                }
            }
        }
    }
}
