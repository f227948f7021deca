//! Starting, stopping, pausing.

use std::time::{Duration, Instant};

use jiff::SignedDuration;
use nido_api::error::{Code, Error, Result};
use nido_api::state::{Admission, Request as StateRequest, VmState, admit};
use nido_api::{Grant, PathChoice, STOP_MAX_MS, StartRequest, StartStage, StopRequest, VmInfo, VmRef, VmSpec, moment};
use nido_engine::home::{SUPERVISOR_LOCK, VM_LOCK};
use nido_engine::machine::{self, GUEST_CIDS, Machine, MachineRequest, Transport};
use nido_files::lock::{HeldLock, is_held};
use nido_files::random;
use nido_store::{BootParts, LaunchRecord, Origin, Purpose, Transition, TransitionOutcome, VmRow};
use nido_supervisor::context::write_guest_config;
use nido_supervisor::control::Request;

use super::Nido;
use super::create::{boot_parts, disk_bytes, machine_request, make_disk};
use super::denied::denied;
use super::restart_policy::StartOrigin;
use super::vm_in_progress::VmInProgress;

/// How long a start waits for another process that holds the VM's lock.
pub(super) const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

impl Nido {
    /// Makes a VM and starts it. If this fails, the VM is gone again. An operation that may be dropped half-way uses
    /// [`Nido::spawn_tracked`].
    ///
    /// # Errors
    /// Those of [`Nido::create`] and [`Nido::start`].
    pub async fn spawn(
        &self,
        spec: VmSpec,
        start: StartRequest,
        grant: &Grant,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<VmInfo> {
        self.spawn_tracked(spec, start, grant, &VmInProgress::default(), progress).await
    }

    /// The same; `begun` holds which VM was begun, so that [`Nido::undo`] removes it if the future is dropped.
    ///
    /// # Errors
    /// As there.
    pub async fn spawn_tracked(
        &self,
        spec: VmSpec,
        start: StartRequest,
        grant: &Grant,
        begun: &VmInProgress,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<VmInfo> {
        let asked_at = Instant::now();
        let spec = self.with_presets(self.leased(spec)?).await?;
        if let Some(info) = Box::pin(self.spawn_from_pool(&spec, start, grant, (asked_at, begun), progress)).await? {
            self.refill();
            return Ok(info);
        }
        self.check_start(&spec, start).await?;
        let (row, held) = self.make_vm(spec, Purpose::Use, VmState::Starting, grant).await?;
        begun.set(&row.id);
        nido_files::failpoint!("spawn.made");
        progress(StartStage::Preparing);
        let outcome = match Box::pin(self.launch(&row, held, start, asked_at)).await {
            Ok(()) => self.await_start(&row, start, progress).await,
            Err(error) => {
                // No supervisor has had it: nothing ran, so nothing has crashed.
                self.give_up_start(&row, VmState::Stopped);
                Err(error)
            }
        };
        match outcome {
            Ok(info) => {
                self.refill();
                Ok(info)
            }
            Err(error) => {
                if let Err(left) = self.delete_id(&row.id).await {
                    tracing::warn!("VM {} could not be deleted: {left}", row.spec.name);
                }
                Err(error)
            }
        }
    }

    /// Whether a VM that does not exist yet could be started so: a refusal leaves nothing, and no event.
    async fn check_start(&self, spec: &VmSpec, start: StartRequest) -> Result<()> {
        if start.path != PathChoice::Fork {
            return Ok(());
        }
        let (host, qemu) = self.host_facts().await?;
        let parts = boot_parts(&self.manifest(&spec.template)?);
        let bytes = disk_bytes(spec, &parts)?;
        let asked = machine_request(spec, bytes, *GUEST_CIDS.start());
        let asked = MachineRequest { accel: start.accel.unwrap_or(spec.accel), ..asked };
        let mut machine = machine::decide(&asked, &host, &qemu)?;
        let row = VmRow::new(random::id()?, spec.clone(), Purpose::Use, VmState::Created, parts, bytes);
        self.origin(&row, start.path, &mut machine, (&host, &qemu)).map(drop)
    }

    /// Starts a stopped VM.
    ///
    /// # Errors
    /// `vm_not_found`, `vm_replaced`, `vm_busy`, `qemu_failed`, `guest_failed`, `agent_unreachable`, `port_in_use` and what the host lacks.
    pub async fn start(
        &self,
        vm: impl Into<VmRef<'_>>,
        start: StartRequest,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<VmInfo> {
        self.start_for(vm.into(), start, StartOrigin::User, progress).await
    }

    pub(super) async fn start_for(
        &self,
        vm: VmRef<'_>,
        start: StartRequest,
        starter: StartOrigin,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<VmInfo> {
        let asked_at = Instant::now();
        let name = vm.name;
        let row = self.resolve(vm)?;
        match admit(row.state, StateRequest::Start) {
            Admission::AlreadySo => return self.await_start(&row, start, progress).await,
            Admission::Denied(why) => return Err(denied(&row, "started", why)),
            Admission::Do => {}
        }
        progress(StartStage::Preparing);
        let lock = self.vm_dir(&row.id).file(SUPERVISOR_LOCK);
        let held = HeldLock::take(&lock, Instant::now() + LOCK_TIMEOUT).await.map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound if self.files_are_gone(&row.id) => self.files_lost(&row, "started"),
            _ => Error::io("cannot lock the VM", e),
        })?;
        let Some(held) = held else {
            // Another command started it in this moment.
            let row = self.store().vm_by_id(&row.id)?.ok_or_else(|| super::gone_meanwhile(name))?;
            return self.await_start(&row, start, progress).await;
        };
        let row = self.store().vm_by_id(&row.id)?.ok_or_else(|| super::gone_meanwhile(name))?;
        if is_held(&self.vm_dir(&row.id).file(VM_LOCK)) {
            // A QEMU that outlived its row.
            drop(held);
            let row = self.reconcile_vm(&row).await?.ok_or_else(|| super::gone_meanwhile(name))?;
            return self.await_start(&row, start, progress).await;
        }
        if !matches!(admit(row.state, StateRequest::Start), Admission::Do) {
            return Err(Error::new(Code::VmBusy, format!("VM '{name}' changed meanwhile; it is {}", row.state.word())));
        }
        self.count_start(&row, starter)?;
        self.begin_start(&row)?;
        nido_files::failpoint!("start.row");
        if let Err(error) = Box::pin(self.launch(&row, held, start, asked_at)).await {
            self.give_up_start(&row, row.state);
            return Err(error);
        }
        self.await_start(&row, start, progress).await
    }

    /// Records that a start has begun. The caller holds the VM's lock.
    pub(super) fn begin_start(&self, row: &VmRow) -> Result<()> {
        match self.store().transition(&row.id, &Transition::StartBegan)? {
            TransitionOutcome::Yes => Ok(()),
            TransitionOutcome::No(state) => {
                let words = format!("VM '{}' changed meanwhile; it is {}", row.spec.name, state.word());
                Err(Error::new(Code::VmBusy, words))
            }
            TransitionOutcome::Gone => Err(super::gone_meanwhile(&row.spec.name)),
        }
    }

    /// Records that a start was given up: the VM is in the state that it had, unless a supervisor has recorded another one.
    pub(super) fn give_up_start(&self, row: &VmRow, to: VmState) {
        match self.store().transition(&row.id, &Transition::StartGivenUp { to }) {
            Ok(_) => {}
            // The next command finds that no process takes care of it.
            Err(error) => tracing::warn!("cannot record that VM {} does not start: {error}", row.spec.name),
        }
    }

    /// Decides on the machine, writes it down and hands the VM to a new supervisor.
    pub(crate) async fn launch(
        &self,
        row: &VmRow,
        held: HeldLock,
        start: StartRequest,
        asked_at: Instant,
    ) -> Result<()> {
        Box::pin(self.launch_from(row, held, start, asked_at, None)).await
    }

    /// The same, with a given origin.
    pub(super) async fn launch_from(
        &self,
        row: &VmRow,
        held: HeldLock,
        start: StartRequest,
        asked_at: Instant,
        from: Option<Origin>,
    ) -> Result<()> {
        self.remove_unfinished(&row.id, from.as_ref());
        let (host, qemu) = self.host_facts().await?;
        let started_at = moment::now();
        let expires_at = row.spec.ttl_ms.and_then(|ttl| {
            started_at.checked_add(SignedDuration::from_millis(i64::try_from(ttl).unwrap_or(i64::MAX))).ok()
        });
        let mut tries = 0;
        // What is forked needs the parts of its bake.
        let _parts_stay = self.templates_shared().await?;
        let (machine, boot_parts, origin) = loop {
            let cid = random::number_in(&GUEST_CIDS)?;
            let request = MachineRequest {
                accel: start.accel.unwrap_or(row.spec.accel),
                ran_under: row.machine.as_ref().map(|machine| machine.accel),
                ..machine_request(&row.spec, row.disk_bytes, cid)
            };
            let mut machine = machine::decide(&request, &host, &qemu)?;
            let (origin, frozen) = match &from {
                Some(origin) => {
                    machine.reason.push_str(match origin {
                        Origin::Boot => "; booted",
                        Origin::Fork(_) => "; forked from a running VM",
                        Origin::Restore { .. } => "; restored from a snapshot",
                    });
                    (origin.clone(), row.parts.frozen.clone())
                }
                None => self.origin(row, start.path, &mut machine, (&host, &qemu))?,
            };
            let mut boot_parts = BootParts { frozen, ..row.parts.clone() };
            // What is there to be saved becomes a part of its template, which has an agent of its own.
            if origin == Origin::Boot && row.purpose != Purpose::Bake {
                boot_parts = Box::pin(self.with_own_agent(boot_parts)).await?;
            }
            let launching = Transition::Launching(Box::new(LaunchRecord {
                cid: matches!(machine.transport, Transport::Vsock { .. }).then_some(cid),
                machine: machine.clone(),
                started_at,
                expires_at,
                parts: boot_parts.clone(),
                origin: origin.clone(),
            }));
            match self.store().transition(&row.id, &launching) {
                // Another VM has this vsock address: take another.
                Err(e) if e.code() == Code::VmBusy && tries < 8 => tries += 1,
                Err(e) => return Err(e),
                Ok(TransitionOutcome::Yes) => break (machine, boot_parts, origin),
                Ok(TransitionOutcome::No(_) | TransitionOutcome::Gone) => {
                    return Err(super::gone_meanwhile(&row.spec.name));
                }
            }
        };
        nido_files::failpoint!("start.machine");
        let row = &VmRow { parts: boot_parts, origin, ..row.clone() };
        self.context.refresh_record(&row.id);
        self.prepare(row, &machine)?;
        nido_files::failpoint!("start.prepared");
        let launch = super::supervisor_client::Launch { asked_at, timeout_ms: start.timeout_ms };
        self.start_supervisor(&row.id, held, Some(launch)).await
    }

    fn prepare(&self, row: &VmRow, machine: &Machine) -> Result<()> {
        let dir = self.vm_dir(&row.id);
        make_disk(&dir, row)?;
        nido_files::failpoint!("start.disk");
        write_guest_config(&dir, row, machine)
    }

    pub(super) async fn await_start(
        &self,
        row: &VmRow,
        start: StartRequest,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<VmInfo> {
        if start.wait {
            self.request_with_stages(row, &Request::Ready, progress).await?;
        }
        nido_files::failpoint!("start.ready");
        self.describe_current(row)
    }

    pub(super) fn describe_current(&self, row: &VmRow) -> Result<VmInfo> {
        let now = self.store().vm_by_id(&row.id)?;
        Ok(self.describe(&self.current(now.unwrap_or_else(|| row.clone()))))
    }

    /// Stops a VM. The result for an ephemeral VM is the last information about it.
    ///
    /// # Errors
    /// `vm_not_found`, `vm_replaced`, `spec_invalid` if it may take too long, `timeout` if even the plug could not be pulled.
    pub async fn stop(&self, vm: impl Into<VmRef<'_>>, stop: StopRequest) -> Result<VmInfo> {
        let vm = vm.into();
        if stop.timeout_ms > STOP_MAX_MS {
            return Err(Error::new(Code::SpecInvalid, "timeout_ms: at most an hour")
                .hint("use force for a guest that takes longer"));
        }
        let row = self.resolve(vm)?;
        if matches!(admit(row.state, StateRequest::Stop), Admission::Do) {
            return self.stop_row(&row, stop).await;
        }
        self.keep_stopped(&row, stop).await
    }

    pub(super) async fn stop_row(&self, row: &VmRow, stop: StopRequest) -> Result<VmInfo> {
        match self.request(row, &Request::Stop(stop.into())).await {
            // It ended by itself before the request: its row states how.
            Err(e) if self.store().vm_by_id(&row.id)?.is_some_and(|now| !now.state.is_inactive()) => return Err(e),
            Ok(_) | Err(_) => {}
        }
        let mut info = self.describe_current(row)?;
        if !info.status.is_inactive() {
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
        vm: impl Into<VmRef<'_>>,
        stop: StopRequest,
        start: StartRequest,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<VmInfo> {
        let vm = vm.into();
        let (row, name) = (self.resolve(vm)?, vm.name);
        if row.spec.ephemeral {
            return Err(Error::new(
                Code::SpecInvalid,
                format!("VM '{name}' is ephemeral: it is deleted when it stops"),
            )
            .hint("spawn a new one"));
        }
        let vm = VmRef { name, id: Some(&row.id) };
        self.stop(vm, stop).await?;
        nido_files::failpoint!("restart.stopped");
        self.start(vm, start, progress).await
    }

    /// Pauses the CPUs.
    ///
    /// # Errors
    /// `vm_not_found`, `vm_replaced`, `vm_not_running`.
    pub async fn pause(&self, vm: impl Into<VmRef<'_>>) -> Result<VmInfo> {
        self.pause_or_resume(vm.into(), StateRequest::Pause, "paused", &Request::Pause).await
    }

    /// Resumes the CPUs.
    ///
    /// # Errors
    /// `vm_not_found`, `vm_replaced`, `vm_not_running`.
    pub async fn resume(&self, vm: impl Into<VmRef<'_>>) -> Result<VmInfo> {
        self.pause_or_resume(vm.into(), StateRequest::Resume, "resumed", &Request::Resume).await
    }

    async fn pause_or_resume(&self, vm: VmRef<'_>, act: StateRequest, done: &str, request: &Request) -> Result<VmInfo> {
        let row = self.current(self.resolve(vm)?);
        match admit(row.state, act) {
            Admission::Denied(why) => return Err(denied(&row, done, why)),
            Admission::AlreadySo => {}
            Admission::Do => {
                self.request(&row, request).await?;
                nido_files::failpoint!("pause.done");
            }
        }
        self.describe_current(&row)
    }
}
