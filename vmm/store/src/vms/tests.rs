use super::super::{AdoptedStart, BootParts, Origin, Transition, TransitionOutcome};
use super::*;
use nido_api::VmSpec;
use nido_api::state::VmState;

fn parts() -> BootParts {
    BootParts {
        vmlinux: "a".into(),
        initramfs: "b".into(),
        initramfs_base: None,
        agent: None,
        root: "c".into(),
        root_bytes: 1,
        packages: "d".into(),
        init: nido_images::Init::Agent,
        append: "quiet".into(),
        frozen: Vec::new(),
        allow: None,
    }
}

fn open() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("db")).unwrap();
    (dir, store)
}

fn row(id: &str, name: &str) -> VmRow {
    let mut spec = VmSpec::named(name.parse().unwrap());
    spec.forwards = vec!["8080:80".parse().unwrap()];
    VmRow::new(id.into(), spec, Purpose::Use, VmState::Created, parts(), 1 << 30)
}

#[test]
fn a_row_is_read_back_unchanged() {
    let (_dir, store) = open();
    let vm = row("1", "web");
    store.insert_vm(&vm).unwrap();
    let mut back = store.vm_by_name(&"web".parse().unwrap()).unwrap();
    back.created_at = vm.created_at; // milliseconds are kept
    assert_eq!(back, vm);
}

#[test]
fn a_name_is_taken_once() {
    let (_dir, store) = open();
    store.insert_vm(&row("1", "web")).unwrap();
    assert_eq!(store.insert_vm(&row("2", "web")).unwrap_err().code(), Code::VmExists);
    assert_eq!(store.vms().unwrap().len(), 1);
}

#[test]
fn an_owner_has_no_more_vms_than_allowed() {
    let (_dir, store) = open();
    let own = |id: &str, owner: &str| VmRow { owner: Some(owner.into()), ..row(id, &format!("vm-{id}")) };
    store.insert_vm_within(&own("1", "a"), Some(1)).unwrap();
    let refused = store.insert_vm_within(&own("2", "a"), Some(1)).unwrap_err();
    assert_eq!(refused.code(), Code::LimitExceeded);
    store.insert_vm_within(&own("3", "b"), Some(1)).expect("each owner has its own");
    store.insert_vm(&row("4", "nobody-s")).unwrap();
    assert_eq!(store.vm_by_id("1").unwrap().unwrap().owner.as_deref(), Some("a"));
    store.mark_deleting("1").unwrap();
    store.insert_vm_within(&own("5", "a"), Some(1)).unwrap();
}

#[test]
fn a_vsock_address_is_taken_once() {
    let (_dir, store) = open();
    store.insert_vm(&row("1", "a")).unwrap();
    store.insert_vm(&row("2", "b")).unwrap();
    let taken = AdoptedStart { machine: None, origin: Origin::Boot, cid: Some(77), started_at: None, expires_at: None };
    let take = Transition::Adopted(Box::new(taken));
    assert_eq!(store.transition("1", &take).unwrap(), TransitionOutcome::Yes);
    assert_eq!(store.transition("2", &take).unwrap_err().code(), Code::VmBusy);
}

#[test]
fn only_unreconciled_rows_are_listed() {
    let (_dir, store) = open();
    store.insert_vm(&row("1", "a")).unwrap();
    store.insert_vm(&row("2", "b")).unwrap();
    assert_eq!(store.transition("2", &Transition::FoundRunning).unwrap(), TransitionOutcome::Yes);
    let ids: Vec<_> = store.rows_to_reconcile().unwrap().into_iter().map(|vm| vm.id).collect();
    assert_eq!(ids, ["2"]);
    store.mark_deleting("1").unwrap();
    assert_eq!(store.rows_to_reconcile().unwrap().len(), 2);
}

#[test]
fn vms_of_an_operation_are_kept_together_or_not_at_all() {
    let (_dir, store) = open();
    let operation: LeaseId = "0123456789abcdef".to_owned().try_into().unwrap();
    for (id, made_by) in [("1", Some(operation.clone())), ("2", Some(operation.clone())), ("3", None)] {
        store.insert_vm(&VmRow { made_by, ..row(id, &format!("vm-{id}")) }).unwrap();
    }
    assert_eq!(store.vms_made_by(&operation).unwrap().len(), 2);
    assert_eq!(store.rows_to_reconcile().unwrap().len(), 2, "looked after until then");
    store.mark_deleting("2").unwrap();
    store.keep_vms_made_by(&operation, 2).unwrap_err();
    assert!(store.is_being_made("1").unwrap() && !store.is_being_made("3").unwrap());
    store.remove_vm("2", Vec::new()).unwrap();
    store.keep_vms_made_by(&operation, 1).unwrap();
    assert!(!store.is_being_made("1").unwrap());
    assert_eq!(store.rows_to_reconcile().unwrap().len(), 0);
}

#[test]
fn a_store_of_a_newer_nido_is_left_alone() {
    let (dir, store) = open();
    store.connection.pragma_update(None, "user_version", 99).unwrap();
    drop(store);
    assert!(Store::open(&dir.path().join("db")).unwrap_err().message().contains("99"));
}

#[test]
fn forwards_go_with_their_vm() {
    let (_dir, store) = open();
    store.insert_vm(&row("1", "a")).unwrap();
    let extra = "9000:90".parse().unwrap();
    store.add_forward("1", &extra).unwrap();
    assert_eq!(store.forwards("1").unwrap().len(), 2);
    assert!(store.remove_forward("1", &extra).unwrap());
    assert!(!store.remove_forward("1", &extra).unwrap());
    store.remove_vm("1", Vec::new()).unwrap();
    assert!(store.forwards("1").unwrap().is_empty());
}

// One row that could not be decoded made every command fail that listed VMs.
#[test]
fn a_row_that_cannot_be_read_is_a_vm_in_an_unknown_state_and_harms_no_other() {
    let damages = [
        ("state", "flying"),
        ("spec", "{"),
        ("parts", "[]"),
        ("machine", "7"),
        ("agent", "x"),
        ("origin", r#"{"kind":"beamed"}"#),
        ("purpose", "fun"),
        ("failure", "null,"),
        ("made_by", "../x"),
        ("name", "no name"),
    ];
    for (column, damage) in damages {
        let (_dir, store) = open();
        for name in ["good", "bad"] {
            store.insert_vm(&row(name, name)).unwrap();
        }
        let update = format!("UPDATE vms SET {column} = ?1 WHERE id = 'bad'");
        store.connection.execute(&update, [damage]).unwrap();
        let rows = store.vms().unwrap();
        let bad = rows.iter().find(|row| row.id == "bad").unwrap();
        assert_eq!((bad.state, rows.len()), (VmState::Unknown, 2), "{column}");
        assert!(bad.unreadable.as_ref().unwrap().starts_with(&format!("column {column}: ")), "{bad:?}");
        assert_eq!(rows.iter().filter(|row| row.unreadable.is_some()).count(), 1);
        let name = bad.spec.name.clone();
        assert_eq!(store.vm_by_name(&name).unwrap_err().code(), Code::StoreDamaged, "{column}");
        assert!(store.vm_to_show(&name).is_ok());
        store.vm_by_name(&"good".parse().unwrap()).unwrap();
        store.remove_vm("bad", Vec::new()).unwrap();
        assert_eq!(store.vms().unwrap().len(), 1, "{column}");
    }
}

#[test]
fn a_published_port_that_cannot_be_read_is_left_out() {
    let (_dir, store) = open();
    store.insert_vm(&VmRow { forwards: vec!["8080:80".parse().unwrap()], ..row("1", "web") }).unwrap();
    store.connection.execute("INSERT INTO forwards VALUES ('1', 'here', 1, 1), ('1', '::1', 99999, 1)", []).unwrap();
    assert_eq!(store.forwards("1").unwrap().len(), 1);
    assert_eq!(store.vms().unwrap()[0].forwards.len(), 1);
}
