//! Starting, stopping, pausing.

use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};

use super::Nido;
use super::create::{machine_request, make_disk, write_guest_config};
use crate::api::{AgentInfo, STOP_MAX_MS, StartRequest, StartStage, StopRequest, VmInfo, VmSpec, Which};
use crate::error::{Code, Error, Result};
use crate::home::SUPERVISOR_LOCK;
use crate::lock::Held;
use crate::machine::{self, GUEST_CIDS, Machine, Transport};
use crate::name::VmName;
use crate::state::{Admission, Request as Act, VmState, admit};
use crate::store::{BootParts, Origin, Purpose, VmRow, VmUpdate};
use crate::supervisor::control::Request;

/// How long a start waits for whoever works on the VM at the moment.
pub(super) const LET_GO: Duration = Duration::from_secs(5);

impl Nido {
    /// Makes a VM and starts it. If this fails, the VM is gone again; if the future is dropped half-way, a
    /// [`Nido::delete`] with `force` removes what was made.
    ///
    /// # Errors
    /// Those of [`Nido::create`] and [`Nido::start`].
    pub async fn spawn(
        &self,
        spec: VmSpec,
        start: StartRequest,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<VmInfo> {
        let asked_at = Instant::now();
        let spec = self.leased(spec)?;
        if let Some(info) = Box::pin(self.spawn_from_pool(&spec, start, asked_at, progress)).await? {
            self.refill();
            return Ok(info);
        }
        let (row, held) = self.make_vm(spec, Purpose::Use, VmState::Starting).await?;
        // Told only now: whoever drops this future knows by it whether the name is theirs to remove.
        progress(StartStage::Preparing);
        let name = row.spec.name.clone();
        let outcome = match self.launch(&row, held, start, asked_at).await {
            Ok(()) => self.await_start(&row, start, progress).await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(info) => {
                self.refill();
                Ok(info)
            }
            Err(error) => {
                let gone = self.delete(&name, true).await;
                match gone {
                    Err(e) if e.code() != Code::VmNotFound => tracing::warn!("VM {name} could not be removed: {e}"),
                    _ => {}
                }
                Err(error)
            }
        }
    }

    /// Starts a VM that is at rest.
    ///
    /// # Errors
    /// `vm_not_found`, `vm_busy`, `qemu_failed`, `guest_failed`, `agent_unreachable`, `port_in_use` and what the host lacks.
    pub async fn start(
        &self,
        name: &VmName,
        start: StartRequest,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<VmInfo> {
        let asked_at = Instant::now();
        let row = self.store().vm_by_name(name)?;
        match admit(row.state, Act::Start) {
            Admission::AlreadySo => return self.await_start(&row, start, progress).await,
            Admission::Denied(why) => return Err(denied(&row, "started", why)),
            Admission::Do => {}
        }
        progress(StartStage::Preparing);
        let lock = self.vm_dir(&row.id).file(SUPERVISOR_LOCK);
        let held = Held::take(&lock, Instant::now() + LET_GO).await.map_err(|e| Error::io("cannot lock the VM", e))?;
        let Some(held) = held else {
            // Another command started it in this moment.
            let row = self.store().vm_by_name(name)?;
            return self.await_start(&row, start, progress).await;
        };
        let row = self.store().vm_by_name(name)?;
        if !matches!(admit(row.state, Act::Start), Admission::Do) {
            return Err(Error::new(Code::VmBusy, format!("VM '{name}' changed meanwhile; it is {}", row.state.word())));
        }
        self.store().update_vm(&row.id, &VmUpdate { state: Some(VmState::Starting), ..VmUpdate::default() })?;
        if let Err(error) = self.launch(&row, held, start, asked_at).await {
            // The state goes back to what it was, unless a supervisor has already written something else.
            let now = self.store().vm_by_id(&row.id)?;
            if now.is_some_and(|now| now.state == VmState::Starting) {
                self.store().update_vm(&row.id, &VmUpdate { state: Some(row.state), ..VmUpdate::default() })?;
            }
            return Err(error);
        }
        self.await_start(&row, start, progress).await
    }

    /// Decides on the machine, writes it down and hands the VM to a new supervisor.
    pub(crate) async fn launch(&self, row: &VmRow, held: Held, start: StartRequest, asked_at: Instant) -> Result<()> {
        self.launch_from(row, held, start, asked_at, None).await
    }

    /// The same, where it is decided already what the VM goes on from.
    pub(super) async fn launch_from(
        &self,
        row: &VmRow,
        held: Held,
        start: StartRequest,
        asked_at: Instant,
        from: Option<Origin>,
    ) -> Result<()> {
        let (host, qemu) = self.host_facts().await?;
        let started_at = Timestamp::now();
        let expires_at = row.spec.ttl_ms.and_then(|ttl| {
            started_at.checked_add(SignedDuration::from_millis(i64::try_from(ttl).unwrap_or(i64::MAX))).ok()
        });
        let mut tries = 0;
        // What is forked needs the parts of its bake.
        let _parts_stay = self.templates_shared().await?;
        let (machine, frozen, origin) = loop {
            let cid = random_cid()?;
            let mut machine = machine::decide(&machine_request(&row.spec, row.disk_bytes, cid), &host, &qemu)?;
            let (origin, frozen) = match &from {
                Some(origin) => {
                    machine.reason.push_str(match origin {
                        Origin::Boot => "; booted",
                        Origin::Fork(_) => "; forked from a running VM",
                        Origin::Restore { .. } => "; goes on from a snapshot",
                    });
                    (origin.clone(), row.parts.frozen.clone())
                }
                None => self.origin(row, start.path, &mut machine, (&host, &qemu))?,
            };
            let update = VmUpdate {
                state: Some(VmState::Starting),
                cid: Some(matches!(machine.transport, Transport::Vsock { .. }).then_some(cid)),
                machine: Some(machine.clone()),
                started_at: Some(started_at),
                expires_at: Some(expires_at),
                agent: Some(AgentInfo::default()),
                ip_address: Some(None),
                failure: Some(None),
                timings: Some(None),
                parts: Some(BootParts { frozen: frozen.clone(), ..row.parts.clone() }),
                origin: Some(origin.clone()),
                ..VmUpdate::default()
            };
            match self.store().update_vm(&row.id, &update) {
                // Another VM has this vsock address: take another.
                Err(e) if e.code() == Code::VmBusy && tries < 8 => tries += 1,
                Err(e) => return Err(e),
                Ok(()) => break (machine, frozen, origin),
            }
        };
        let row = &VmRow { parts: BootParts { frozen, ..row.parts.clone() }, origin, ..row.clone() };
        self.prepare(row, &machine)?;
        let launch = super::supervision::Launch { asked_at, timeout_ms: start.timeout_ms };
        self.start_supervisor(&row.id, held, Some(launch)).await
    }

    fn prepare(&self, row: &VmRow, machine: &Machine) -> Result<()> {
        let dir = self.vm_dir(&row.id);
        make_disk(&dir, row)?;
        write_guest_config(&dir, row, machine)
    }

    pub(super) async fn await_start(
        &self,
        row: &VmRow,
        start: StartRequest,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<VmInfo> {
        if start.wait {
            self.ask_with_stages(row, &Request::Ready, progress).await?;
        }
        self.describe_current(row)
    }

    pub(super) fn describe_current(&self, row: &VmRow) -> Result<VmInfo> {
        let now = self.store().vm_by_id(&row.id)?;
        Ok(self.describe(now.as_ref().unwrap_or(row)))
    }

    /// Stops a VM. The answer about an ephemeral VM is the last that is heard of it.
    ///
    /// # Errors
    /// `vm_not_found`, `vm_replaced`, `spec_invalid` if it may take too long, `timeout` if even the plug could not be pulled.
    pub async fn stop(&self, vm: impl Into<Which<'_>>, stop: StopRequest) -> Result<VmInfo> {
        let vm = vm.into();
        if stop.timeout_ms > STOP_MAX_MS {
            return Err(Error::new(Code::SpecInvalid, "timeout_ms: a guest may take an hour at most to power off")
                .hint("the plug of one that takes longer can be pulled with force"));
        }
        let row = self.store().vm_by_name(vm.name)?;
        vm.is(&row.id)?;
        if matches!(admit(row.state, Act::Stop), Admission::Do) {
            return self.stop_row(&row, stop).await;
        }
        Ok(self.describe(&row))
    }

    pub(super) async fn stop_row(&self, row: &VmRow, stop: StopRequest) -> Result<VmInfo> {
        match self.ask(row, &Request::Stop(stop)).await {
            // It ended by itself before it could be asked: how, its row says.
            Err(e) if self.store().vm_by_id(&row.id)?.is_some_and(|now| !now.state.at_rest()) => return Err(e),
            Ok(_) | Err(_) => {}
        }
        let mut info = self.describe_current(row)?;
        if !info.status.at_rest() {
            info.status = VmState::Stopped;
        }
        Ok(info)
    }

    /// Stops and starts again.
    ///
    /// # Errors
    /// Those of both.
    pub async fn restart(
        &self,
        name: &VmName,
        stop: StopRequest,
        start: StartRequest,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<VmInfo> {
        let row = self.store().vm_by_name(name)?;
        if row.spec.ephemeral {
            return Err(Error::new(Code::SpecInvalid, format!("VM '{name}' is ephemeral: it vanishes when it stops"))
                .hint("spawn a new one"));
        }
        self.stop(Which { name, id: Some(&row.id) }, stop).await?;
        self.start(name, start, progress).await
    }

    /// Halts the CPUs.
    ///
    /// # Errors
    /// `vm_not_found`, `vm_not_running`.
    pub async fn pause(&self, name: &VmName) -> Result<VmInfo> {
        self.pause_or_resume(name, Act::Pause, "paused", &Request::Pause).await
    }

    /// Lets them run on.
    ///
    /// # Errors
    /// `vm_not_found`, `vm_not_running`.
    pub async fn resume(&self, name: &VmName) -> Result<VmInfo> {
        self.pause_or_resume(name, Act::Resume, "resumed", &Request::Resume).await
    }

    async fn pause_or_resume(&self, name: &VmName, act: Act, done: &str, request: &Request) -> Result<VmInfo> {
        let row = self.store().vm_by_name(name)?;
        match admit(row.state, act) {
            Admission::Denied(why) => return Err(denied(&row, done, why)),
            Admission::AlreadySo => {}
            Admission::Do => {
                self.ask(&row, request).await?;
            }
        }
        self.describe_current(&row)
    }
}

/// The error for a request that the state does not allow.
pub(super) fn denied(row: &VmRow, done: &str, why: &str) -> Error {
    let name = &row.spec.name;
    let code = match row.state {
        VmState::Starting | VmState::Stopping => Code::VmBusy,
        _ => Code::VmNotRunning,
    };
    let error = Error::new(code, format!("VM '{name}' cannot be {done}: {why}"));
    match row.state {
        VmState::Created | VmState::Stopped | VmState::Failed => error.hint(format!("nido start {name}")),
        VmState::Paused => error.hint(format!("nido resume {name}")),
        VmState::Starting | VmState::Stopping | VmState::Running => error,
    }
}

/// A vsock address nobody is likely to have.
pub(crate) fn random_cid() -> Result<u32> {
    loop {
        let cid = u32::from_le_bytes(super::random_bytes()?);
        if GUEST_CIDS.contains(&cid) {
            return Ok(cid);
        }
    }
}
