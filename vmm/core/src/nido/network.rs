//! The network of a VM: what it has done, and changes of its rules.
//!
//! ```text
//!  command ── rules ──> store (one transaction) ──> supervisor reads the row, and applies it ──> reply
//! ```
//!
//! Invariant: the store has the rules before the supervisor is asked, so a supervisor that starts meanwhile has them as well.

use nido_api::egress::{covers, effective_rules, split_entries};
use nido_api::error::{Error, Hint, Result};
use nido_api::operation as op;
use nido_api::{AllowEntry, Grant, RuleChange, RuleChangeResult, VmNetwork, VmRef, VmSpec};
use nido_store::VmRow;
use nido_supervisor::control::Request;

use super::Nido;
use super::create::check_template_rules;

impl Nido {
    /// The network of a VM, its rules, and what it has done.
    ///
    /// # Errors
    /// `vm_not_found`.
    pub async fn net_show(&self, vm: impl Into<VmRef<'_>>) -> Result<VmNetwork> {
        let row = self.current(self.resolve(vm.into())?);
        let (_, network) = self.status(&row).await;
        let warnings = row.spec.rule_warnings();
        let VmSpec { net, allow, net_limits: limits, presets, .. } = row.spec;
        Ok(VmNetwork { net, allow, limits, presets, network, warnings })
    }

    /// Adds rules and presets to a VM's network. A VM that runs follows them when this returns, a stopped one from its next start.
    ///
    /// # Errors
    /// `vm_not_found`, `spec_invalid`, `denied` by the grant or the rules of the template; `vm_busy` if its supervisor is of another version of nido.
    pub async fn net_allow(
        &self,
        vm: impl Into<VmRef<'_>>,
        entries: Vec<AllowEntry>,
        grant: &Grant,
    ) -> Result<RuleChangeResult> {
        let row = self.resolve(vm.into())?;
        let change = self.checked_addition(&row, entries, grant).await?;
        self.change_rules(&row, &change).await
    }

    /// Whether the guest could reach more with these rules than with those that it has, where no limit of the grant covers them.
    ///
    /// # Errors
    /// Those that [`Self::net_allow`] would have.
    pub async fn net_widens(&self, vm: impl Into<VmRef<'_>>, entries: Vec<AllowEntry>, grant: &Grant) -> Result<bool> {
        let row = self.resolve(vm.into())?;
        let change = self.checked_addition(&row, entries, grant).await?;
        let changed = change.apply(&row.spec)?;
        let (before, after) = (row.spec.rules(), effective_rules(&changed.allow, &changed.presets));
        // What the limits do not cover was refused.
        Ok(grant.limits.allow.is_none() && after.iter().any(|rule| !covers(&before, rule)))
    }

    /// The addition of these rules, if the limits allow it.
    async fn checked_addition(&self, row: &VmRow, entries: Vec<AllowEntry>, grant: &Grant) -> Result<RuleChange> {
        grant.limits.check_net(row.spec.net)?;
        let (rules, presets) = split_entries(entries);
        let presets = self.expanded(presets).await?;
        let wanted = effective_rules(&rules, &presets);
        grant.limits.check_rules(row.spec.net, &wanted)?;
        check_template_rules(
            &VmSpec { allow: wanted, presets: Vec::new(), ..row.spec.clone() },
            row.parts.allow.as_deref(),
        )?;
        Ok(RuleChange::Allow(rules, presets))
    }

    /// Removes rules of a VM's network: all of them, or none if one is not there. Connections that no rule allows any more are reset
    /// when this returns.
    ///
    /// # Errors
    /// `vm_not_found`, `spec_invalid`, `rule_not_found`; `vm_busy` if its supervisor is of another version of nido.
    pub async fn net_deny(&self, vm: impl Into<VmRef<'_>>, entries: Vec<AllowEntry>) -> Result<RuleChangeResult> {
        let row = self.resolve(vm.into())?;
        self.change_rules(&row, &RuleChange::Deny(entries)).await
    }

    async fn change_rules(&self, row: &VmRow, change: &RuleChange) -> Result<RuleChangeResult> {
        let (row, changed) = self.store().change_rules(&row.id, change)?;
        nido_files::failpoint!("net.row");
        self.context.refresh_record(&row.id);
        // Also if nothing has changed: a command before this one may have been killed here.
        if !row.state.is_inactive() {
            self.apply_rules(&row).await?;
            nido_files::failpoint!("net.applied");
        }
        Ok(changed)
    }

    /// Has the supervisor of a running VM apply the stored rules.
    async fn apply_rules(&self, row: &VmRow) -> Result<()> {
        let Err(error) = self.request(row, &Request::ApplyRules).await else { return Ok(()) };
        match self.store().vm_by_id(&row.id)? {
            // It has stopped meanwhile: its next start has the rules.
            Some(now) if now.state.is_inactive() => Ok(()),
            Some(_) => {
                let name = &row.spec.name;
                let words = format!("the rules of VM '{name}' are stored, but apply only from its next start: {error}");
                Err(Error::new(error.code(), words).hint(Hint::run_on(op::VM_RESTART, name).to("restart the VM")))
            }
            None => Err(error),
        }
    }
}
