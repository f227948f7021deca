//! The rules of a VM's network, in the specification of its row.

use nido_api::error::{Code, Error, Result};
use nido_api::{RuleChange, RuleChangeResult};
use rusqlite::params;

use super::{Purpose, Store, VmRow, encode, fault};

impl Store {
    /// Changes the rules of a VM, in one step: of two processes that add a rule at the same time, none loses its own. Returns the
    /// row as it was before, and what has changed. The rest of the specification stays as it is, also what this nido does not know.
    ///
    /// # Errors
    /// `vm_not_found`, `store_damaged` if the row cannot be read whole, and those of the change.
    pub fn change_rules(&self, id: &str, change: &RuleChange) -> Result<(VmRow, RuleChangeResult)> {
        self.in_transaction(|| {
            let row = self.vm_by_id(id)?.filter(|row| row.purpose == Purpose::Use && !row.deleting);
            let row = row.ok_or_else(|| Error::new(Code::VmNotFound, "the VM has just been deleted"))?;
            if let Some(why) = &row.unreadable {
                return Err(super::vms::unreadable(&row.spec.name, why));
            }
            let changed = change.apply(&row.spec)?;
            if !changed.changed.is_empty() {
                // Without rules the field is absent, as in a row that never had any.
                for (field, list) in [("$.allow", encode(&changed.allow)?), ("$.presets", encode(&changed.presets)?)] {
                    let update = "UPDATE vms SET spec = iif(json_array_length(?3) > 0, json_set(spec, ?2, json(?3)), \
                                  json_remove(spec, ?2)) WHERE id = ?1";
                    self.connection.execute(update, params![id, field, list]).map_err(fault)?;
                }
            }
            Ok((row, changed))
        })
    }
}

#[cfg(test)]
mod tests {
    use nido_api::state::VmState;
    use nido_api::{EgressRule, NetChoice, PresetRules, VmSpec};

    use super::*;
    use crate::parts::tests::parts_with_root;

    fn rules(texts: &[&str]) -> Vec<EgressRule> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn allow(texts: &[&str]) -> RuleChange {
        RuleChange::Allow(rules(texts), Vec::new())
    }

    fn deny(texts: &[&str]) -> RuleChange {
        RuleChange::Deny(texts.iter().map(|text| text.parse().unwrap()).collect())
    }

    fn insert(store: &Store, id: &str, purpose: Purpose) {
        let mut spec = VmSpec::named(format!("vm-{id}").parse().unwrap());
        spec.net = NetChoice::Restricted;
        spec.labels.insert("a".into(), "b".into());
        let row = VmRow::new(id.into(), spec, purpose, VmState::Stopped, parts_with_root("c"), 1);
        store.insert_vm(&row).unwrap();
    }

    #[test]
    fn a_change_keeps_the_rest_of_the_specification() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("nido.db")).unwrap();
        insert(&store, "1", Purpose::Use);
        let spec = || -> serde_json::Value {
            let text = store.connection.query_row("SELECT spec FROM vms", [], |row| row.get::<_, String>(0)).unwrap();
            serde_json::from_str(&text).unwrap()
        };
        store.connection.execute("UPDATE vms SET spec = json_set(spec, '$.of_the_future', 7)", []).unwrap();
        let before = spec();
        let (row, changed) = store.change_rules("1", &allow(&["host:80", "example.com"])).unwrap();
        assert!(row.spec.allow.is_empty() && changed.changed.len() == 2, "{changed:?}");
        assert_eq!(store.vm_by_id("1").unwrap().unwrap().spec.allow, rules(&["host:80", "example.com"]));
        store.change_rules("1", &deny(&["host:80"])).unwrap();
        let mut expected = before.clone();
        expected["allow"] = serde_json::json!(["example.com"]);
        assert_eq!(spec(), expected);
        let error = store.change_rules("1", &deny(&["example.com", "host:80"])).unwrap_err();
        assert_eq!((error.code(), spec()), (Code::RuleNotFound, expected));
        store.change_rules("1", &deny(&["example.com"])).unwrap();
        assert_eq!(spec(), before);
        let pip = PresetRules { rules: rules(&["pypi.org:443"]), ..PresetRules::unexpanded("@pip".parse().unwrap()) };
        store.change_rules("1", &RuleChange::Allow(Vec::new(), vec![pip.clone()])).unwrap();
        assert_eq!(store.vm_by_id("1").unwrap().unwrap().spec.presets, [pip]);
        store.change_rules("1", &deny(&["@pip"])).unwrap();
        assert_eq!(spec(), before);
    }

    #[test]
    fn only_vms_of_users_have_rules_that_can_be_changed() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("nido.db")).unwrap();
        insert(&store, "1", Purpose::Pool);
        insert(&store, "2", Purpose::Use);
        insert(&store, "3", Purpose::Use);
        store.mark_deleting("2").unwrap();
        store.connection.execute("UPDATE vms SET spec = '{' WHERE id = '3'", []).unwrap();
        let code = |id| store.change_rules(id, &allow(&["host:80"])).unwrap_err().code();
        assert_eq!(
            ["1", "2", "3", "4"].map(code),
            [Code::VmNotFound, Code::VmNotFound, Code::StoreDamaged, Code::VmNotFound]
        );
    }

    #[test]
    fn of_changes_at_the_same_time_none_is_lost() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nido.db");
        insert(&Store::open(&path).unwrap(), "1", Purpose::Use);
        let add = |first: u16| {
            let store = Store::open(&path).unwrap();
            for port in first..first + 20 {
                store.change_rules("1", &allow(&[&format!("host:{port}")])).unwrap();
            }
        };
        std::thread::scope(|scope| {
            for first in [100, 200, 300, 400] {
                scope.spawn(move || add(first));
            }
        });
        let row = Store::open(&path).unwrap().vm_by_id("1").unwrap().unwrap();
        assert_eq!(row.spec.allow.len(), 80);
    }
}
