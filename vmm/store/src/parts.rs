//! Which template parts VMs use, and whether there may be some that none uses any more.
//!
//! Invariant: the change that takes a part's last VM away also writes down that parts are due to be collected. So whoever is
//! killed after it, the next command collects them.

use std::collections::HashSet;

use nido_api::error::Result;
use rusqlite::params;

use super::{Origin, Purpose, Store, VmRow, fault};

impl Store {
    /// Hashes of all template parts that VMs use.
    ///
    /// # Errors
    /// Of the store.
    pub fn parts_in_use(&self) -> Result<HashSet<String>> {
        let mut used = HashSet::new();
        for vm in self.vms()? {
            used.extend([vm.parts.vmlinux, vm.parts.initramfs, vm.parts.root, vm.parts.packages]);
            used.extend(vm.parts.initramfs_base);
            used.extend(vm.parts.frozen.into_iter().map(|frozen| frozen.sha256));
            // A guest reads its memory image for as long as it runs.
            if let (Origin::Fork(saved), false) = (vm.origin, vm.state.at_rest()) {
                used.extend([saved.memory, saved.state]);
            }
        }
        Ok(used)
    }

    /// Whether parts are due to be collected: a number that changes with each reason, 0 if not.
    ///
    /// # Errors
    /// Of the store.
    pub fn parts_due(&self) -> Result<i64> {
        self.connection.query_row("SELECT due FROM unused_parts", [], |row| row.get(0)).map_err(fault)
    }

    /// Writes down that they were collected, unless there is another reason since `due` was read.
    ///
    /// # Errors
    /// Of the store.
    pub fn parts_collected(&self, due: i64) -> Result<()> {
        let done = self.connection.execute("UPDATE unused_parts SET due = 0 WHERE due = ?1", [due]);
        done.map(drop).map_err(fault)
    }

    /// Writes down that parts are due, in the transaction that is open.
    pub(super) fn mark_parts_due(&self) -> Result<()> {
        self.connection.execute("UPDATE unused_parts SET due = due + 1", []).map(drop).map_err(fault)
    }

    /// Whether no other VM uses the same parts as `row`, which is about to be removed. What a bake leaves is in no row.
    pub(super) fn is_last_user(&self, row: &VmRow) -> Result<bool> {
        let others =
            "SELECT EXISTS (SELECT 1 FROM vms WHERE id <> ?1 AND parts = (SELECT parts FROM vms WHERE id = ?1))";
        let others: bool = self.connection.query_row(others, [&row.id], |row| row.get(0)).map_err(fault)?;
        Ok(row.purpose == Purpose::Bake || !others)
    }

    /// Whether no other VM that runs was forked from the memory image of `row`, which is ending.
    pub(super) fn is_last_reader(&self, row: &VmRow) -> Result<bool> {
        let Origin::Fork(saved) = &row.origin else { return Ok(false) };
        let others = "SELECT EXISTS (SELECT 1 FROM vms WHERE id <> ?1 AND state NOT IN ('created', 'stopped', 'failed') \
                      AND json_extract(origin, '$.memory') = ?2)";
        let others = self.connection.query_row(others, params![row.id, saved.memory], |row| row.get::<_, bool>(0));
        others.map(|others| !others).map_err(fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BootParts, Saved, VmUpdate};
    use nido_api::VmSpec;
    use nido_api::state::VmState;

    fn row(id: &str, purpose: Purpose, root: &str) -> VmRow {
        let parts = BootParts {
            vmlinux: "a".into(),
            initramfs: "b".into(),
            initramfs_base: None,
            agent: None,
            root: root.into(),
            root_bytes: 1,
            packages: "d".into(),
            init: nido_images::Init::Agent,
            append: String::new(),
            frozen: Vec::new(),
        };
        VmRow::new(id.into(), VmSpec::named(format!("vm-{id}").parse().unwrap()), purpose, VmState::Starting, parts, 1)
    }

    fn collected(store: &Store) {
        store.parts_collected(store.parts_due().unwrap()).unwrap();
        assert_eq!(store.parts_due().unwrap(), 0);
    }

    // Memory images of forks were never collected where a supervisor removed the last VM that used them.
    #[test]
    fn parts_are_due_when_their_last_user_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        for row in [row("1", Purpose::Use, "r"), row("2", Purpose::Use, "r"), row("3", Purpose::Bake, "r")] {
            store.insert_vm(&row).unwrap();
        }
        collected(&store);
        store.remove_vm("1", Vec::new()).unwrap();
        assert_eq!(store.parts_due().unwrap(), 0, "another VM uses them");
        store.remove_vm("3", Vec::new()).unwrap();
        assert_ne!(store.parts_due().unwrap(), 0, "what was baked may be in no manifest");
        let seen = store.parts_due().unwrap();
        store.remove_vm("2", Vec::new()).unwrap();
        store.parts_collected(seen).unwrap();
        assert_ne!(store.parts_due().unwrap(), 0, "there is a reason that came later");
    }

    #[test]
    fn a_memory_image_is_due_when_its_last_reader_stops() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        let saved = Saved { memory: "m".into(), state: "s".into(), token: "t".into(), live: false };
        for id in ["1", "2"] {
            store.insert_vm(&row(id, Purpose::Use, "r")).unwrap();
            let origin = Some(Origin::Fork(saved.clone()));
            store.update_vm(id, &VmUpdate { origin, state: Some(VmState::Running), ..VmUpdate::default() }).unwrap();
        }
        collected(&store);
        let stop = VmUpdate { state: Some(VmState::Stopped), ..VmUpdate::default() };
        store.update_vm("1", &stop).unwrap();
        assert_eq!(store.parts_due().unwrap(), 0);
        store.update_vm("2", &stop).unwrap();
        assert_ne!(store.parts_due().unwrap(), 0);
    }
}
