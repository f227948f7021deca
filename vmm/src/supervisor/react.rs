//! What the supervisor does about what happens: an answer of the agent, an event of QEMU's, an order, a deadline.
//!
//! Invariant: nothing here waits for the guest. Whatever may take long is a task of its own, with a deadline.

use std::time::{Duration, Instant};

use nido_guest_agent::wire::{Pong, Power};
use tokio::time::Instant as TokioInstant;

use super::begin::Awake;
use super::forwards::bind;
use super::launch::Running;
use super::limits::Reached;
use super::run::{SESSION_EVERY, Supervisor};
use super::serve::{Life, Order};
use crate::api::{AgentInfo, ForwardSpec, Limit, StopRequest};
use crate::error::{Code, Error, Result};
use crate::guest::Guest;
use crate::qemu::{Monitor, MonitorError, MonitorEvent, QemuExit, QemuProcess};
use crate::state::{Fact, VmState};
use crate::store::{Purpose, VmUpdate};

/// How long any QMP command may take.
pub(super) const QMP_WITHIN: Duration = Duration::from_secs(10);
/// How long QEMU may take to quit before it is killed.
const QUIT_WITHIN: Duration = Duration::from_secs(5);
/// How long the agent may take to say that it powers off, before the power button is pressed.
const AGENT_WITHIN: Duration = Duration::from_secs(30);
/// The same of an agent that was not there yet when it was asked first.
const NEW_AGENT_WITHIN: Duration = Duration::from_secs(5);
/// How long after that it is asked again.
const ASKED_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// How long the VM is told to stop when its time is up, before the plug is pulled.
const LIMIT_STOP_MS: u64 = 10_000;

impl Supervisor {
    pub(super) async fn on_agent(&mut self, answer: Awake, running: &Running) {
        match answer {
            // A VM that was taken over: its agent has answered before, and may again.
            Awake::Late if self.row.agent.ready => drop(self.life.send_replace(Life::Ready)),
            Awake::Late => {
                self.seen.late_after_ms = Some(u64::try_from(self.ready_within.as_millis()).unwrap_or(u64::MAX));
                self.learn(Fact::DeadlinePassed);
                self.quit(running);
            }
            Awake::NotRenewed(why) => {
                tracing::error!("the guest could not be renewed: {why}");
                self.seen.not_renewed = Some(why.escape_debug().take(400).collect());
                self.quit(running);
            }
            Awake::Yes(_) if self.row.purpose == Purpose::Bake => self.bake(running).await,
            Awake::Yes(pong) if self.row.purpose == Purpose::Pool => self.park(pong, running).await,
            Awake::Yes(pong) => self.on_ready(pong),
        }
    }

    pub(super) fn on_ready(&mut self, pong: Pong) {
        let total_ms = self.asked_for_ms();
        if !self.row.agent.ready
            && let Some(timings) = &mut self.row.timings
        {
            timings.agent_ms = total_ms - timings.load_ms;
            timings.total_ms = total_ms;
        }
        let version = pong.agent.chars().filter(char::is_ascii_graphic).take(64).collect();
        self.row.agent = AgentInfo { ready: true, version: Some(version), transport: None };
        self.row.ip_address = pong.address.and_then(|a| a.parse::<std::net::IpAddr>().ok()).map(|a| a.to_string());
        self.write(&VmUpdate {
            state: Some(self.state),
            agent: Some(self.row.agent.clone()),
            ip_address: Some(self.row.ip_address.clone()),
            timings: Some(self.row.timings),
            ..VmUpdate::default()
        });
        self.life.send_replace(Life::Ready);
    }

    pub(super) async fn on_event(&mut self, event: MonitorEvent, running: &Running) {
        let MonitorEvent::Event(event) = event else {
            tracing::warn!("QEMU sent events faster than they were read");
            return self.ask_status(running).await;
        };
        tracing::info!(event = %event.name, data = %event.data, "QEMU");
        match event.name.as_str() {
            // The agent was started again, or its guest closed the port: what was agreed with it is void.
            "VSERPORT_CHANGE" if event.data.get("open") == Some(&serde_json::Value::Bool(false)) => {
                self.channel.iter().for_each(|channel| channel.reset());
            }
            "SHUTDOWN" => self.seen.shutdown_reason = Some(shutdown_reason(&event)),
            "GUEST_PANICKED" => self.seen.panicked = true,
            "STOP" => self.ask_status(running).await,
            "RESUME" => self.learn(Fact::GuestResumed),
            _ => {}
        }
    }

    async fn ask_status(&mut self, running: &Running) {
        match running.monitor.query_status(QMP_WITHIN).await {
            Ok(qapi::qmp::RunState::internal_error) => {
                self.seen.kvm_error = true;
                self.quit(running);
            }
            Ok(qapi::qmp::RunState::running) => self.learn(Fact::GuestResumed),
            // It goes on by itself; nobody has asked for a pause.
            Ok(_) if self.is_being_saved() => {}
            Ok(qapi::qmp::RunState::shutdown) => {}
            Ok(_) => self.learn(Fact::GuestPaused),
            Err(error) => tracing::warn!("QEMU's status is not known: {error}"),
        }
    }

    pub(super) async fn drain_events(&mut self, running: &mut Running) {
        let deadline = TokioInstant::now() + Duration::from_millis(200);
        while let Ok(Some(event)) = tokio::time::timeout_at(deadline, running.events.recv()).await {
            if let MonitorEvent::Event(event) = &event
                && event.name == "SHUTDOWN"
            {
                self.seen.shutdown_reason = Some(shutdown_reason(event));
            }
        }
    }

    pub(super) async fn on_order(&mut self, order: Order, running: &Running) {
        match order {
            Order::Stop(stop) => self.begin_stop(stop, running),
            Order::Pause(reply) if self.is_being_saved() => {
                drop(reply.send(Err(Error::new(Code::VmBusy, "a snapshot of this VM is being taken"))));
            }
            // What admitted it saw the VM as it was before: a guest that stands still never goes down.
            Order::Pause(reply) if self.state == VmState::Stopping => {
                drop(reply.send(Err(Error::new(Code::VmBusy, "this VM is being stopped"))));
            }
            Order::Pause(reply) => {
                let outcome = running.monitor.stop(QMP_WITHIN).await.map_err(|e| qmp_error(&e));
                if outcome.is_ok() {
                    self.learn(Fact::GuestPaused);
                }
                let _ = reply.send(outcome);
            }
            Order::Resume(reply) => {
                let outcome = running.monitor.cont(QMP_WITHIN).await.map_err(|e| qmp_error(&e));
                if outcome.is_ok() {
                    self.learn(Fact::GuestResumed);
                }
                let _ = reply.send(outcome);
            }
            Order::Snapshot(name, into, reply) => self.take_snapshot(name, into, running, reply),
            Order::ForwardAdd(spec, reply) => drop(reply.send(self.add_forward(&spec).await)),
            Order::ForwardRemove(spec, reply) => drop(reply.send(self.remove_forward(&spec).await)),
            // Whoever asked may have given up, and made another VM.
            Order::Claim(_, reply) if reply.is_closed() => {}
            Order::Claim(order, reply) => {
                let outcome = self.claim(*order, running).await;
                let _ = reply.send(outcome);
            }
            Order::Retire(reply) => {
                let mine = self.is_pooled();
                if mine.is_ok() {
                    self.begin_stop(StopRequest { force: true, ..StopRequest::default() }, running);
                }
                let _ = reply.send(mine);
            }
            Order::Status(reply) => drop(reply.send(self.limits.idle_for(Instant::now()))),
        }
    }

    async fn add_forward(&mut self, spec: &ForwardSpec) -> Result<ForwardSpec> {
        let (bound, listener) = bind(spec).await?;
        self.nido.store().add_forward(&self.row.id, &bound)?;
        self.forwards.start(bound.clone(), listener, self.guest.clone(), self.forward_users());
        Ok(bound)
    }

    async fn remove_forward(&mut self, spec: &ForwardSpec) -> Result<()> {
        self.nido.store().remove_forward(&self.row.id, spec)?;
        self.forwards.stop(spec).await;
        Ok(())
    }

    pub(super) fn time_is_up(&mut self, reached: Reached, running: &Running) {
        let what = match reached {
            Reached::Ttl => "its time to live is over",
            Reached::Idle => "it has been idle for too long",
        };
        tracing::info!("stopping VM {}: {what}", self.row.spec.name);
        let limit = if reached == Reached::Ttl { Limit::Ttl } else { Limit::Idle };
        self.write(&VmUpdate { expired: Some(limit), ..VmUpdate::default() });
        self.begin_stop(StopRequest { force: false, timeout_ms: LIMIT_STOP_MS }, running);
    }

    /// Nobody will miss what is in it, so it is not asked to go down.
    pub(super) fn session_is_over(&mut self, running: &Running) {
        tracing::info!("ending VM {}: the session it was made for is over", self.row.spec.name);
        self.write(&VmUpdate { expired: Some(Limit::Session), ..VmUpdate::default() });
        self.begin_stop(StopRequest { force: true, ..StopRequest::default() }, running);
    }

    /// Asks the guest to go down, and sets the time at which the plug is pulled.
    fn begin_stop(&mut self, stop: StopRequest, running: &Running) {
        let paused = self.state == VmState::Paused;
        self.learn(Fact::StopAsked);
        if stop.force {
            return self.quit(running);
        }
        let deadline = TokioInstant::now() + Duration::from_millis(stop.timeout_ms);
        self.kill_at = Some(self.kill_at.map_or(deadline, |earlier| earlier.min(deadline)));
        let asking = GoingDown {
            guest: self.guest.clone(),
            monitor: running.monitor.clone(),
            ready: self.row.agent.ready,
            deadline,
        };
        tokio::spawn(asking.ask(paused));
    }

    pub(super) fn quit(&mut self, running: &Running) {
        self.quit_sent = true;
        self.kill_at = Some(TokioInstant::now() + QUIT_WITHIN);
        let monitor = running.monitor.clone();
        tokio::spawn(async move { monitor.quit(QUIT_WITHIN).await });
    }

    /// A deadline has passed: first QEMU is asked to quit, then it is killed.
    pub(super) fn pull_plug(&mut self, running: &Running) {
        if self.kill_at.is_none_or(|at| TokioInstant::now() < at) {
            return;
        }
        if self.quit_sent {
            tracing::warn!("QEMU does not quit; killing it");
            let _ = running.process.kill();
            self.kill_at = Some(TokioInstant::now() + QUIT_WITHIN);
        } else {
            tracing::warn!("the guest did not power off in time; pulling the plug");
            self.quit(running);
        }
    }

    /// Watches over a QEMU whose monitor does not answer: all that can be done with it is to end it.
    pub(super) async fn watch_over_mute(&mut self, process: &QemuProcess) -> QemuExit {
        let mut session = tokio::time::interval(SESSION_EVERY);
        loop {
            tokio::select! {
                exit = process.wait() => return exit.unwrap_or(QemuExit::Unknown),
                _ = session.tick(), if self.row.spec.lease.is_some() => if self.nido.is_orphan(&self.row) {
                    self.learn(Fact::StopAsked);
                    let _ = process.kill();
                },
                Some(order) = self.orders.recv() => {
                    let mute = || Error::new(Code::QemuFailed, "the VM's QEMU does not answer").hint("nido stop --force ends it");
                    match order {
                        Order::Stop(_) => {
                            self.learn(Fact::StopAsked);
                            let _ = process.kill();
                        }
                        Order::Retire(reply) => {
                            let mine = self.is_pooled();
                            if mine.is_ok() {
                                self.learn(Fact::StopAsked);
                                let _ = process.kill();
                            }
                            let _ = reply.send(mine);
                        }
                        Order::Pause(reply)
                        | Order::Resume(reply)
                        | Order::Snapshot(_, _, reply)
                        | Order::ForwardRemove(_, reply)
                        | Order::Claim(_, reply) => drop(reply.send(Err(mute()))),
                        Order::ForwardAdd(_, reply) => drop(reply.send(Err(mute()))),
                        Order::Status(reply) => drop(reply.send(self.limits.idle_for(Instant::now()))),
                    }
                }
            }
        }
    }
}

/// A guest that is asked to go down.
struct GoingDown {
    guest: Guest,
    monitor: Monitor,
    /// Its agent has answered before.
    ready: bool,
    deadline: TokioInstant,
}

impl GoingDown {
    /// Asks until the agent says that it does, the VM is gone, or the time is up. Once is not enough: while the guest comes up
    /// it overlooks the power button, and while its disk is held still the agent does not answer.
    async fn ask(self, paused: bool) {
        if paused {
            let _ = self.monitor.cont(QMP_WITHIN).await;
        }
        let mut may_answer = self.ready;
        while TokioInstant::now() < self.deadline {
            // The agent syncs and powers off; where it does not answer, the power button is what is left.
            let patience = if self.ready { AGENT_WITHIN } else { NEW_AGENT_WITHIN };
            let within = self.deadline.min(TokioInstant::now() + patience);
            if may_answer && self.guest.power(Power::Off, within).await.is_ok() {
                return;
            }
            if matches!(self.monitor.system_powerdown(QMP_WITHIN).await, Err(MonitorError::QemuGone)) {
                return;
            }
            may_answer = true;
            tokio::time::sleep_until(self.deadline.min(TokioInstant::now() + ASKED_AGAIN_AFTER)).await;
        }
    }
}

pub(super) fn qmp_error(error: &MonitorError) -> Error {
    Error::new(Code::QemuFailed, error.to_string().escape_debug().to_string())
}

fn shutdown_reason(event: &crate::qemu::monitor::Event) -> String {
    event.data.get("reason").and_then(|reason| reason.as_str()).unwrap_or("unknown").chars().take(40).collect()
}
