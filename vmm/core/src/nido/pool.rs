//! The warm pool: how many clones of a template wait, and the background process that keeps them so many.
//!
//! ```text
//!  pool set ─ spawn ─ template bake ──> nido pool-fill (one at a time: pool.lock)
//!                                         plan ─ delete clones not needed ─ start what is missing, two at a time ─┐
//!                                          ^──────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Invariant: a process that changes the need tests for a filler after that, and a filler counts once more after it has released
//! its lock; so no need is missed, and no process stays without work.

use std::time::{Duration, Instant};

use futures::future::join_all;
use nido_api::error::{Code, Error, Hint, Result};
use nido_api::name::TemplateName;
use nido_api::state::VmState;
use nido_api::{Grant, POOL_MAX, PathChoice, PoolInfo, PoolKind, PoolList, PoolRequest, StartRequest, VmSpec};
use nido_engine::bake::{choose, qemu_id, shape};
use nido_engine::host::{HostFacts, QemuFacts};
use nido_engine::machine;
use nido_files::lock::{HeldLock, is_held};
use nido_files::random;
use nido_store::{Origin, PoolRow, Purpose, VmRow};
use nido_supervisor::control::Request;

use super::create::machine_request;
use super::{Nido, OpenOptions as NidoOptions};

/// How many clones are made at the same time.
const CONCURRENT_CLONES_MAX: usize = 2;
/// How many clones in a row may fail before the filler gives up.
const FAILURES_MAX: u32 = 2;
/// How long the filler waits after a failure.
const BACK_OFF: Duration = Duration::from_secs(1);
/// How long a filler waits for the client that has just taken a clone, and for its first command.
const CLIENT_PRIORITY_DELAY: Duration = Duration::from_millis(100);
/// How long a filler may take to release the pools.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60);

impl Nido {
    /// Sets how many clones of a template wait, for one kind of machine. They are made in the background; what is too much
    /// is gone when this returns.
    ///
    /// # Errors
    /// `template_not_found`, `template_mismatch` if no bake fits such a machine, `spec_invalid`, and what the host lacks.
    pub async fn pool_set(&self, template: &TemplateName, request: &PoolRequest) -> Result<PoolInfo> {
        let kind = kind_of(request)?;
        if request.wanted > POOL_MAX {
            return Err(Error::new(Code::SpecInvalid, format!("a pool keeps at most {POOL_MAX} clones")));
        }
        {
            let _template_stays = self.templates_shared().await?;
            if request.wanted == 0 {
                // One whose template is gone can still be ended.
                if !self.store().pools()?.iter().any(|pool| pool.template == *template) {
                    self.template_info(template)?;
                }
            } else {
                let (host, qemu) = self.host_facts().await?;
                self.bake_for(template, &kind, (&host, &qemu))?;
            }
            self.store().set_pool(template, &kind, request.wanted)?;
            nido_files::failpoint!("pool.set");
        }
        if !self.pool_plan().await?.remove.is_empty() {
            let path = self.home().pool_lock();
            let deadline = Instant::now() + LOCK_TIMEOUT;
            let held = HeldLock::take(&path, deadline).await.map_err(|e| Error::io("cannot lock the pools", e))?;
            // A filler that cannot be waited for removes them itself.
            if held.is_some() {
                let plan = self.pool_plan().await?;
                self.remove_clones(&plan.remove).await?;
            }
        }
        self.await_ended_clones().await;
        self.refill();
        let pool = PoolRow { template: template.clone(), kind, wanted: request.wanted };
        Ok(pool_info(pool, &self.store().clones()?, None))
    }

    /// Waits until the clones that have ended are deleted, with their files, by their supervisors or by this process.
    async fn await_ended_clones(&self) {
        let rows = self.store().vms().unwrap_or_default();
        for clone in rows.iter().filter(|row| row.purpose == Purpose::Pool && row.state.is_inactive()) {
            if let Err(error) = self.delete_row(clone, true).await {
                tracing::info!("clone {} is not deleted yet: {error}", clone.spec.name);
            }
        }
    }

    /// All pools, and how full they are.
    ///
    /// # Errors
    /// Of the store, and what the host lacks.
    pub async fn pool_list(&self) -> Result<PoolList> {
        let pools = self.store().pools()?;
        let clones = self.store().clones()?;
        if pools.is_empty() {
            return Ok(PoolList { pools: Vec::new() });
        }
        let (host, qemu) = self.host_facts().await?;
        let pools = pools.into_iter().map(|pool| {
            let trouble = self.bake_for(&pool.template, &pool.kind, (&host, &qemu)).err();
            pool_info(pool, &clones, trouble.map(|error| error.message().to_owned()))
        });
        let list = PoolList { pools: pools.collect() };
        self.refill();
        Ok(list)
    }

    /// The hidden verb: fills the pools, unless another process does, and returns when they are full.
    ///
    /// # Errors
    /// What keeps it from that; the next claim tries again.
    pub async fn pool_fill(options: NidoOptions) -> Result<()> {
        let nido = Self::open(options).await?;
        let path = nido.home().pool_lock();
        tokio::time::sleep(CLIENT_PRIORITY_DELAY).await;
        loop {
            let Some(held) = HeldLock::try_take(&path).map_err(|e| Error::io("cannot lock the pools", e))? else {
                return Ok(());
            };
            let filled = nido.fill().await;
            drop(held);
            filled?;
            // A process that found the lock held in between relies on this.
            if nido.pool_plan().await?.is_empty() {
                return Ok(());
            }
        }
    }

    /// Starts a filler if a pool is short and none runs. Returns at once; a failure is no trouble of the caller's.
    pub(super) fn refill(&self) {
        match self.store().pools_short() {
            Ok(false) => {}
            Ok(true) => self.start_filler(),
            Err(error) => tracing::warn!("cannot read the pools: {error}"),
        }
    }

    /// Has clones replaced that a change of a template made useless.
    pub(super) fn refresh_pools(&self) {
        if self.store().pools().is_ok_and(|pools| !pools.is_empty()) {
            self.start_filler();
        }
    }

    fn start_filler(&self) {
        if is_held(&self.home().pool_lock()) {
            return;
        }
        if let Err(error) = self.context.start_in_background("pool-fill", "pool.log") {
            tracing::warn!("the pools are not refilled: {error}");
        }
    }

    /// Works until every pool is as it shall be. The caller holds the lock.
    async fn fill(&self) -> Result<()> {
        let mut failures = 0;
        loop {
            let mut plan = self.pool_plan().await?;
            if plan.is_empty() {
                return Ok(());
            }
            nido_files::failpoint!("pool.planned");
            self.remove_clones(&plan.remove).await?;
            plan.start.truncate(CONCURRENT_CLONES_MAX);
            for made in join_all(plan.start.into_iter().map(|pool| self.make_clone(pool))).await {
                match made {
                    Ok(()) => failures = 0,
                    Err(error) => {
                        tracing::error!("a clone could not be created: {error}");
                        failures += 1;
                        if failures >= FAILURES_MAX {
                            return Err(error);
                        }
                        tokio::time::sleep(BACK_OFF).await;
                    }
                }
            }
        }
    }

    /// Makes one clone, to where it waits. If that fails, it is gone again.
    async fn make_clone(&self, pool: PoolRow) -> Result<()> {
        let asked_at = Instant::now();
        let spec = clone_spec(&pool)?;
        let name = spec.name.clone();
        let (row, held) = self.make_vm(spec, Purpose::Pool, VmState::Starting, &Grant::own()).await?;
        let start = StartRequest { wait: true, timeout_ms: None, path: PathChoice::Fork, ..StartRequest::default() };
        let made = match Box::pin(self.launch(&row, held, start, asked_at)).await {
            Ok(()) => {
                nido_files::failpoint!("pool.launched");
                self.request(&row, &Request::Ready).await.map(drop)
            }
            Err(error) => Err(error),
        };
        match &made {
            Ok(()) => tracing::info!("clone {name} of {} waits after {:?}", pool.template, asked_at.elapsed()),
            Err(_) => self.remove_clones(std::slice::from_ref(&row)).await?,
        }
        made
    }

    /// Deletes clones that no command has claimed meanwhile, and the parts that only they used.
    async fn remove_clones(&self, clones: &[VmRow]) -> Result<()> {
        for clone in clones {
            let now = self.store().vm_by_id(&clone.id)?;
            let Some(now) = now.filter(|now| now.purpose == Purpose::Pool) else { continue };
            match self.delete_row(&now, true).await {
                Ok(_) => tracing::info!("clone {} was deleted", clone.spec.name),
                Err(error) => {
                    let now = self.store().vm_by_id(&clone.id)?;
                    if now.is_some_and(|now| now.purpose == Purpose::Pool) {
                        return Err(error);
                    }
                }
            }
        }
        if !clones.is_empty() {
            self.drop_unowned_parts().await;
        }
        Ok(())
    }

    async fn pool_plan(&self) -> Result<Plan> {
        let pools = self.store().pools()?;
        let clones = self.store().clones()?;
        if pools.is_empty() {
            return Ok(plan(&[], &clones));
        }
        let (host, qemu) = self.host_facts().await?;
        let pools: Vec<_> = pools
            .into_iter()
            .map(|pool| {
                let bake = self.bake_for(&pool.template, &pool.kind, (&host, &qemu));
                (pool, bake.inspect_err(|error| tracing::warn!("a pool cannot be filled: {error}")).ok())
            })
            .collect();
        Ok(plan(&pools, &clones))
    }

    /// The hash of the memory image from which clones of such a machine are forked.
    fn bake_for(
        &self,
        template: &TemplateName,
        kind: &PoolKind,
        (host, qemu): (&HostFacts, &QemuFacts),
    ) -> Result<String> {
        let manifest = self.manifest(template)?;
        let pool = PoolRow { template: template.clone(), kind: kind.clone(), wanted: 0 };
        let request =
            machine_request(&clone_spec(&pool)?, manifest.parts.root.virtual_bytes, *machine::GUEST_CIDS.start());
        let machine = machine::decide(&request, host, qemu)?;
        let bake = choose(&manifest.bakes, &shape(&machine, host), &qemu_id(qemu)).map_err(|unfit| {
            let what = format!("template '{template}' has no clones for a pool: {}", unfit.why());
            Error::new(Code::TemplateMismatch, what)
                .hint(Hint::host(format!("run nido template bake {template}{}", flags(kind))))
        })?;
        Ok(bake.memory.sha256.clone())
    }

    /// The error of a deletion of a template that has pools.
    pub(super) fn refuse_pools_of(&self, template: &TemplateName) -> Result<()> {
        let pools: Vec<_> = self.store().pools()?.into_iter().filter(|pool| pool.template == *template).collect();
        if pools.is_empty() {
            return Ok(());
        }
        let empty = pools.iter().map(|pool| format!("nido pool set {template} 0{}", flags(&pool.kind)));
        Err(Error::new(Code::TemplateInUse, format!("template '{template}' has a pool"))
            .hint(Hint::host(format!("empty it first: {}", empty.collect::<Vec<_>>().join("; ")))))
    }
}

/// The machine that a request means.
fn kind_of(request: &PoolRequest) -> Result<PoolKind> {
    let defaults = VmSpec::named("x".parse()?);
    Ok(PoolKind {
        cpus: request.cpus.unwrap_or(defaults.cpus),
        memory_mib: request.memory_mib.unwrap_or(defaults.memory_mib),
        net: request.net.hardware(),
        machine: request.machine,
        accel: request.accel,
        nested: request.nested,
    })
}

fn flags(kind: &PoolKind) -> String {
    kind_of(&PoolRequest::default()).map(|plain| kind.flags(&plain)).unwrap_or_default()
}

fn clone_spec(pool: &PoolRow) -> Result<VmSpec> {
    let PoolKind { cpus, memory_mib, net, machine, accel, nested } = pool.kind.clone();
    let spec = VmSpec::named(random::vm_name("pool")?);
    Ok(VmSpec {
        template: pool.template.clone(),
        cpus,
        memory_mib,
        net,
        machine,
        accel,
        nested,
        ephemeral: true,
        ..spec
    })
}

fn belongs(clone: &VmRow, pool: &PoolRow) -> bool {
    clone.spec.template == pool.template && PoolKind::of(&clone.spec) == pool.kind
}

fn is_ready(clone: &VmRow) -> bool {
    clone.state == VmState::Paused && clone.agent.ready
}

/// Whether it waits or will; one that ends or has ended is no longer counted.
fn is_alive(clone: &VmRow) -> bool {
    matches!(clone.state, VmState::Starting | VmState::Running | VmState::Paused)
}

fn pool_info(pool: PoolRow, clones: &[VmRow], trouble: Option<String>) -> PoolInfo {
    let own = || clones.iter().filter(|clone| belongs(clone, &pool) && is_alive(clone));
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let ready = own().filter(|clone| is_ready(clone)).count();
    let filling = own().count() - ready;
    PoolInfo {
        ready: count(ready),
        filling: count(filling),
        wanted: pool.wanted,
        template: pool.template,
        kind: pool.kind,
        trouble,
    }
}

/// What is to be done so that every pool is as it shall be.
#[derive(Debug, Default, PartialEq)]
struct Plan {
    remove: Vec<VmRow>,
    start: Vec<PoolRow>,
}

impl Plan {
    fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.start.is_empty()
    }
}

/// Decides what to do, from all pools (each with the memory image of its clones, if there is one) and all clones.
fn plan(pools: &[(PoolRow, Option<String>)], clones: &[VmRow]) -> Plan {
    let mut plan = Plan::default();
    let alive: Vec<&VmRow> = clones.iter().filter(|clone| is_alive(clone)).collect();
    let orphans = alive.iter().filter(|clone| !pools.iter().any(|(pool, _)| belongs(clone, pool)));
    plan.remove.extend(orphans.copied().cloned());
    for (pool, memory) in pools {
        let own = alive.iter().copied().filter(|clone| belongs(clone, pool));
        let (mut fit, unfit): (Vec<&VmRow>, Vec<&VmRow>) = own.partition(|clone| match &clone.origin {
            Origin::Fork(saved) => Some(&saved.memory) == memory.as_ref(),
            // It is decided when it starts.
            Origin::Boot => memory.is_some() && clone.state == VmState::Starting,
            // There are no clones of snapshots.
            Origin::Restore { .. } => false,
        });
        plan.remove.extend(unfit.into_iter().cloned());
        // Those that are ready stay before those that are not yet.
        fit.sort_by_key(|clone| !is_ready(clone));
        let wanted = pool.wanted as usize;
        plan.remove.extend(fit.iter().skip(wanted).copied().cloned());
        if memory.is_some() {
            plan.start.extend(std::iter::repeat_n(pool.clone(), wanted.saturating_sub(fit.len())));
        }
    }
    plan
}

#[cfg(test)]
mod tests;
