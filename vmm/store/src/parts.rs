//! Which VM owns which template parts, and whether there may be some that nothing owns any more.
//!
//! Invariants: the rows of a VM's parts are written in the transaction that inserts, changes or removes the VM's row. The change
//! that takes a part's last owner away also records that parts are due to be collected: if the process is killed after it, the
//! next command collects them.

use std::collections::{BTreeMap, HashSet};

use nido_api::error::Result;
use rusqlite::params;

use super::{BootParts, Origin, Store, VmRow, fault};

impl BootParts {
    /// The hashes of all parts that it names.
    pub fn hashes(&self) -> impl Iterator<Item = &str> {
        let always = [&self.vmlinux, &self.initramfs, &self.root, &self.packages];
        let some = [self.initramfs_base.as_ref(), self.agent.as_ref()];
        let layers = self.frozen.iter().map(|layer| &layer.sha256);
        always.into_iter().chain(some.into_iter().flatten()).chain(layers).map(String::as_str)
    }
}

impl VmRow {
    /// The hashes of the parts that it was made from, each with the part's name. Layers of a fork are numbered from the lowest.
    #[must_use]
    pub fn named_parts(&self) -> BTreeMap<String, String> {
        let parts = &self.parts;
        let always = [
            ("vmlinux", &parts.vmlinux),
            ("initramfs", &parts.initramfs),
            ("root", &parts.root),
            ("packages", &parts.packages),
        ];
        let some = [("initramfs_base", parts.initramfs_base.as_ref()), ("agent", parts.agent.as_ref())];
        let some = some.into_iter().filter_map(|(name, hash)| Some((name, hash?)));
        let saved = match &self.origin {
            Origin::Fork(saved) => vec![("memory", &saved.memory), ("state", &saved.state)],
            Origin::Boot | Origin::Restore { .. } => Vec::new(),
        };
        let named = always.into_iter().chain(some).chain(saved).map(|(name, hash)| (name.to_owned(), hash.clone()));
        let layers = parts.frozen.iter().enumerate().map(|(n, layer)| (format!("disk_{n}"), layer.sha256.clone()));
        named.chain(layers).collect()
    }
}

impl VmRow {
    /// Of those, what its start has loaded: memory, state of the devices, and layers of the disk. Empty unless it was forked.
    #[must_use]
    pub fn named_image(&self) -> BTreeMap<String, String> {
        if !matches!(self.origin, Origin::Fork(_)) {
            return BTreeMap::new();
        }
        let is_loaded = |name: &str| matches!(name, "memory" | "state") || name.starts_with("disk_");
        self.named_parts().into_iter().filter(|(name, _)| is_loaded(name)).collect()
    }
}

impl Store {
    /// Hashes of all template parts that VMs own. `None` if that is unknown, because a VM's row names none.
    ///
    /// # Errors
    /// Of the store.
    pub fn owned_parts(&self) -> Result<Option<HashSet<String>>> {
        let unknown = "SELECT EXISTS (SELECT 1 FROM vms WHERE id NOT IN (SELECT vm_id FROM part_owners))";
        if self.connection.query_row(unknown, [], |row| row.get(0)).map_err(fault)? {
            return Ok(None);
        }
        let mut statement = self.connection.prepare("SELECT DISTINCT part FROM part_owners").map_err(fault)?;
        let parts = statement.query_map([], |row| row.get(0)).map_err(fault)?;
        parts.collect::<rusqlite::Result<_>>().map(Some).map_err(fault)
    }

    /// Whether parts are due to be collected: a number that changes with each reason, 0 if not.
    ///
    /// # Errors
    /// Of the store.
    pub fn parts_due(&self) -> Result<i64> {
        self.connection.query_row("SELECT due FROM unused_parts", [], |row| row.get(0)).map_err(fault)
    }

    /// Records that they were collected, unless there is another reason since `due` was read.
    ///
    /// # Errors
    /// Of the store.
    pub fn parts_collected(&self, due: i64) -> Result<()> {
        let done = self.connection.execute("UPDATE unused_parts SET due = 0 WHERE due = ?1", [due]);
        done.map(drop).map_err(fault)
    }

    /// Records that parts are due, in the transaction that is open.
    pub(super) fn mark_parts_due(&self) -> Result<()> {
        self.connection.execute("UPDATE unused_parts SET due = due + 1", []).map(drop).map_err(fault)
    }

    /// Writes the parts that a VM owns, in the transaction that is open.
    pub(super) fn own_parts(&self, row: &VmRow) -> Result<()> {
        debug_assert!(row.unreadable.is_none(), "its parts are unknown");
        let insert = "INSERT OR IGNORE INTO part_owners (vm_id, part, in_memory) VALUES (?1, ?2, ?3)";
        let mut statement = self.connection.prepare_cached(insert).map_err(fault)?;
        for part in row.parts.hashes() {
            statement.execute(params![row.id, part, false]).map_err(fault)?;
        }
        // A guest reads its memory image for as long as it runs.
        if let (Origin::Fork(saved), false) = (&row.origin, row.state.is_inactive()) {
            for part in [&saved.memory, &saved.state] {
                statement.execute(params![row.id, part, true]).map_err(fault)?;
            }
        }
        Ok(())
    }

    /// The same for a row that has been changed from `before`.
    pub(super) fn update_owned_parts(&self, before: &VmRow) -> Result<()> {
        let Some(now) = self.vm_by_id(&before.id)? else { return Ok(()) };
        let same = now.parts == before.parts && now.origin == before.origin;
        // What a row that cannot be read owned before, it owns still.
        if now.unreadable.is_some() || same && now.state.is_inactive() == before.state.is_inactive() {
            return Ok(());
        }
        let owned = self.parts_of(&before.id)?;
        self.connection.execute("DELETE FROM part_owners WHERE vm_id = ?1", [&before.id]).map_err(fault)?;
        self.own_parts(&now)?;
        for part in owned {
            let query = "SELECT NOT EXISTS (SELECT 1 FROM part_owners WHERE part = ?1)";
            if self.connection.query_row(query, [part], |row| row.get(0)).map_err(fault)? {
                return self.mark_parts_due();
            }
        }
        Ok(())
    }

    fn parts_of(&self, id: &str) -> Result<Vec<String>> {
        let mut statement =
            self.connection.prepare_cached("SELECT part FROM part_owners WHERE vm_id = ?1").map_err(fault)?;
        let parts = statement.query_map([id], |row| row.get(0)).map_err(fault)?;
        parts.collect::<rusqlite::Result<_>>().map_err(fault)
    }

    /// Whether a VM owns a part that no other VM owns.
    pub(super) fn is_only_owner_of_a_part(&self, id: &str) -> Result<bool> {
        let query = "SELECT EXISTS (SELECT 1 FROM part_owners AS own WHERE vm_id = ?1 AND NOT EXISTS \
                     (SELECT 1 FROM part_owners AS other WHERE other.part = own.part AND other.vm_id <> ?1))";
        self.connection.query_row(query, [id], |row| row.get(0)).map_err(fault)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{AdoptedStart, LaunchRecord, Purpose, StoredBake, Transition, TransitionOutcome};
    use nido_api::VmSpec;
    use nido_api::state::VmState;

    /// Parts of a template whose root disk has this hash.
    pub fn parts_with_root(root: &str) -> BootParts {
        BootParts {
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
            allow: None,
        }
    }

    fn row(id: &str, purpose: Purpose, root: &str) -> VmRow {
        let spec = VmSpec::named(format!("vm-{id}").parse().unwrap());
        VmRow::new(id.into(), spec, purpose, VmState::Starting, parts_with_root(root), 1)
    }

    fn collected(store: &Store) {
        store.parts_collected(store.parts_due().unwrap()).unwrap();
        assert_eq!(store.parts_due().unwrap(), 0);
    }

    fn owned(store: &Store) -> Vec<String> {
        let mut owned: Vec<_> = store.owned_parts().unwrap().unwrap().into_iter().collect();
        owned.sort();
        owned
    }

    // Memory images of forks were never collected where a supervisor removed the last VM that used them.
    #[test]
    fn parts_are_due_when_their_last_owner_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        for row in [row("1", Purpose::Use, "r"), row("2", Purpose::Use, "r"), row("3", Purpose::Bake, "r")] {
            store.insert_vm(&row).unwrap();
        }
        collected(&store);
        store.remove_vm("1", Vec::new()).unwrap();
        assert_eq!(store.parts_due().unwrap(), 0, "another VM owns them");
        store.remove_vm("3", Vec::new()).unwrap();
        assert_ne!(store.parts_due().unwrap(), 0, "a warm image may be in no manifest");
        let seen = store.parts_due().unwrap();
        store.remove_vm("2", Vec::new()).unwrap();
        store.parts_collected(seen).unwrap();
        assert_ne!(store.parts_due().unwrap(), 0, "there is a reason that came later");
        assert!(owned(&store).is_empty());
    }

    fn make(store: &Store, id: &str, transition: &Transition) {
        assert_eq!(store.transition(id, transition).unwrap(), TransitionOutcome::Yes);
    }

    #[test]
    fn a_memory_image_is_due_when_its_last_reader_stops() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        let saved = StoredBake { memory: "m".into(), state: "s".into(), token: "t".into(), live: false };
        for id in ["1", "2"] {
            store.insert_vm(&row(id, Purpose::Use, "r")).unwrap();
            let origin = Origin::Fork(saved.clone());
            let last_start = AdoptedStart { machine: None, origin, cid: None, started_at: None, expires_at: None };
            make(&store, id, &Transition::Adopted(Box::new(last_start)));
            make(&store, id, &Transition::Entered { state: VmState::Running, cause: None, timings: None });
        }
        collected(&store);
        assert_eq!(owned(&store), ["a", "b", "d", "m", "r", "s"]);
        let stop = Transition::ended(VmState::Stopped, None);
        make(&store, "1", &stop);
        assert_eq!(store.parts_due().unwrap(), 0);
        make(&store, "2", &stop);
        assert_ne!(store.parts_due().unwrap(), 0);
        assert_eq!(owned(&store), ["a", "b", "d", "r"]);
        collected(&store);
        make(&store, "2", &Transition::StartBegan);
        assert_eq!(owned(&store), ["a", "b", "d", "m", "r", "s"]);
        let launching = LaunchRecord {
            machine: crate::transition::tests::machine(),
            cid: None,
            started_at: jiff::Timestamp::now(),
            expires_at: None,
            parts: parts_with_root("q"),
            origin: Origin::Fork(saved),
        };
        make(&store, "2", &Transition::Launching(Box::new(launching)));
        assert_eq!(store.parts_due().unwrap(), 0, "VM 1 has the same root disk");
        assert_eq!(owned(&store), ["a", "b", "d", "m", "q", "r", "s"]);
    }

    // One row that could not be decoded kept all parts of the home for ever, or would have had its own removed.
    #[test]
    fn a_row_that_cannot_be_decoded_keeps_its_parts() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        store.insert_vm(&row("1", Purpose::Use, "r")).unwrap();
        store.connection.execute("UPDATE vms SET parts = '[]', spec = '{'", []).unwrap();
        assert!(store.vms().unwrap()[0].unreadable.is_some());
        assert_eq!(owned(&store), ["a", "b", "d", "r"]);
        store.connection.execute("DELETE FROM part_owners", []).unwrap();
        assert_eq!(store.owned_parts().unwrap(), None, "it may own any part");
        store.remove_vm("1", Vec::new()).unwrap();
        assert_ne!(store.parts_due().unwrap(), 0);
        assert!(owned(&store).is_empty());
    }

    /// What a store of an earlier version has in its rows becomes owned.
    #[test]
    fn a_store_without_owners_gets_them_from_its_rows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let old = rusqlite::Connection::open(&path).unwrap();
        let steps = &crate::STEPS[..15];
        steps.iter().for_each(|step| old.execute_batch(step).unwrap());
        old.pragma_update(None, "user_version", steps.len() as i64).unwrap();
        let hash = |digit: &str| digit.repeat(64);
        let mut parts = parts_with_root(&hash("c"));
        (parts.vmlinux, parts.initramfs, parts.packages) = (hash("a"), hash("b"), hash("d"));
        parts.frozen = vec![crate::BackingLayer { sha256: hash("e"), virtual_bytes: 1 }];
        let saved = StoredBake { memory: hash("f"), state: hash("0"), token: hash("1"), live: false };
        let (parts, origin) = (crate::encode(&parts).unwrap(), crate::encode(&Origin::Fork(saved)).unwrap());
        let insert = "INSERT INTO vms (id, name, spec, state, parts, disk_bytes, created_ms, origin) VALUES (?1, ?1, '{}', ?2, ?3, 1, 1, ?4)";
        for (id, state) in [("1", "running"), ("2", "stopped")] {
            old.execute(insert, params![id, state, parts, origin]).unwrap();
        }
        drop(old);
        let store = Store::open(&path).unwrap();
        let expected = |digits: &[&str]| digits.iter().map(|digit| hash(digit)).collect::<HashSet<_>>();
        let of = |id: &str| store.parts_of(id).unwrap().into_iter().collect::<HashSet<_>>();
        assert_eq!(of("1"), expected(&["a", "b", "c", "d", "e", "f", "0"]));
        assert_eq!(of("2"), expected(&["a", "b", "c", "d", "e"]));
        store.connection.execute("UPDATE vms SET parts = '{'", []).unwrap();
        drop(store);
        assert!(Store::open(&path).unwrap().owned_parts().unwrap().is_some());
    }
}
