//! Reconciliation of homes on a real file system, with a real store.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use nido_api::VmSpec;
use nido_api::state::VmState;
use nido_engine::home::{DISK, SUPERVISOR_LOCK, VM_LOCK, VM_RECORD};
use nido_files::lock::HeldLock;
use nido_store::{BootParts, Purpose, VmRow};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::nido::{Nido, OpenOptions};

/// What is in a VM's directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Files {
    Missing,
    Locks,
    Disk,
    InterruptedSnapshot,
}

/// The session that a VM belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Session {
    None,
    Open,
    Over,
}

#[derive(Debug, Clone)]
struct Case {
    row: Option<(VmState, bool, bool, Session)>,
    files: Files,
    /// A process works on the VM.
    attended: bool,
    /// QEMU runs; then so does its supervisor.
    runs: bool,
}

fn cases() -> impl Strategy<Value = Case> {
    let files = prop::sample::select(vec![Files::Missing, Files::Locks, Files::Disk, Files::InterruptedSnapshot]);
    let session = prop::sample::select(vec![Session::None, Session::None, Session::Open, Session::Over]);
    let row = (prop::sample::select(VmState::ALL.to_vec()), any::<bool>(), any::<bool>(), session);
    (proptest::option::weighted(0.8, row), files, any::<bool>(), any::<bool>()).prop_map(
        |(row, files, attended, runs)| {
            let attended = attended && files != Files::Missing;
            Case { row, files, attended, runs: runs && attended }
        },
    )
}

fn parts() -> BootParts {
    let hash = |digit: &str| digit.repeat(64);
    serde_json::from_value(serde_json::json!({
        "vmlinux": hash("a"), "initramfs": hash("b"), "root": hash("c"), "root_bytes": 1, "packages": hash("d"),
        "init": "agent", "append": ""
    }))
    .unwrap()
}

fn open(root: &Path) -> Nido {
    let supervisor = Some("/bin/false".into());
    Nido::open_unreconciled(OpenOptions { home: Some(root.to_owned()), supervisor, ..OpenOptions::default() }).unwrap()
}

/// Makes what a case describes. The locks are held until they are dropped.
fn make(nido: &Nido, id: &str, case: &Case, open_session: &str) -> Vec<HeldLock> {
    let dir = nido.vm_dir(id);
    if let Some((state, deleting, ephemeral, session)) = case.row {
        let mut spec = VmSpec::named(format!("vm-{id}").parse().unwrap());
        spec.ephemeral = ephemeral;
        spec.lease = match session {
            Session::None => None,
            Session::Open => Some(open_session.to_owned().try_into().unwrap()),
            Session::Over => Some("ffffffffffffffff".to_owned().try_into().unwrap()),
        };
        nido.store().insert_vm(&VmRow::new(id.into(), spec, Purpose::Use, state, parts(), 1)).unwrap();
        if deleting {
            nido.store().mark_deleting(id).unwrap();
        }
    }
    if case.files == Files::Missing {
        return Vec::new();
    }
    dir.make().unwrap();
    let supervisor = HeldLock::try_take(&dir.file(SUPERVISOR_LOCK)).unwrap().unwrap();
    let qemu = HeldLock::try_take(&dir.file(VM_LOCK)).unwrap().unwrap();
    if case.files != Files::Locks {
        fs::write(dir.file(DISK), "disk").unwrap();
    }
    if case.files == Files::InterruptedSnapshot {
        fs::create_dir_all(dir.file("snapshots/.new-one")).unwrap();
        fs::create_dir_all(dir.file("snapshots/whole")).unwrap();
    }
    [case.attended.then_some(supervisor), case.runs.then_some(qemu)].into_iter().flatten().collect()
}

/// Every file of a VM with what is in it; the copy of its row apart.
fn files_of(nido: &Nido, id: &str) -> BTreeMap<std::path::PathBuf, Vec<u8>> {
    let entries = walkdir::WalkDir::new(nido.vm_dir(id).path()).into_iter().flatten();
    let kept = entries.filter(|entry| entry.file_name() != VM_RECORD);
    kept.map(|entry| (entry.path().to_owned(), fs::read(entry.path()).unwrap_or_default())).collect()
}

async fn reconcile_everything(nido: &Nido) {
    for repair in nido.plan_reconciliation(Scope::Everything).unwrap().repairs {
        nido.apply(&repair, Scope::Everything).await.unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn reconciliation_is_idempotent_and_keeps_running_vms_and_data(all in vec(cases(), 1..5)) {
        let root = tempfile::tempdir().unwrap();
        let nido = open(&root.path().join("home"));
        let session = nido.lease_open().unwrap();
        let ids: Vec<_> = (0..all.len()).map(|number| format!("{number:016}")).collect();
        let made = ids.iter().zip(&all).map(|(id, case)| make(&nido, id, case, session.id().as_str()));
        let _held: Vec<_> = made.collect();
        let row = |id: &str| nido.store().vm_by_id(id).unwrap();
        let before: Vec<_> = ids.iter().map(|id| (row(id), files_of(&nido, id))).collect();

        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            nido.reconcile().await.unwrap();
            reconcile_everything(&nido).await;
        });
        prop_assert_eq!(nido.plan_reconciliation(Scope::Everything).unwrap().repairs, []);

        for ((id, case), (row_before, files_before)) in ids.iter().zip(&all).zip(&before) {
            let has_data = matches!(case.files, Files::Disk | Files::InterruptedSnapshot);
            if case.attended || case.row.is_none() && has_data {
                prop_assert_eq!(&row(id), row_before, "{:?}", case);
                prop_assert_eq!(&files_of(&nido, id), files_before, "{:?}", case);
                continue;
            }
            let Some((state, deleting, ephemeral, session)) = case.row else {
                prop_assert!(files_of(&nido, id).is_empty(), "{:?}", case);
                continue;
            };
            let is_unwanted = deleting || session == Session::Over || ephemeral && state != VmState::Created;
            prop_assert_eq!(row(id).is_none(), is_unwanted, "{:?}", case);
            if is_unwanted {
                prop_assert!(files_of(&nido, id).is_empty(), "{:?}", case);
            } else {
                prop_assert!(row(id).unwrap().state.is_inactive(), "{:?}", case);
                prop_assert_eq!(nido.vm_dir(id).file(DISK).exists(), has_data, "{:?}", case);
                prop_assert!(!nido.vm_dir(id).file("snapshots/.new-one").exists(), "{:?}", case);
                let is_whole = nido.vm_dir(id).file("snapshots/whole").exists();
                prop_assert_eq!(is_whole, case.files == Files::InterruptedSnapshot, "{:?}", case);
            }
        }
    }
}

/// A QEMU that lost its supervisor, while none can be started: nothing of the VM is touched.
#[tokio::test]
async fn a_vm_whose_qemu_runs_is_kept_while_no_supervisor_can_be_started() {
    let root = tempfile::tempdir().unwrap();
    let nido = open(&root.path().join("home"));
    let id = "0123456789abcdef";
    let case = Case {
        row: Some((VmState::Running, true, true, Session::Over)),
        files: Files::Disk,
        attended: false,
        runs: true,
    };
    let _held = make(&nido, id, &case, "");
    let before = nido.store().vm_by_id(id).unwrap();
    for _ in 0..2 {
        nido.reconcile().await.unwrap();
        assert_eq!(nido.store().vm_by_id(id).unwrap(), before);
        assert!(nido.vm_dir(id).file(DISK).exists());
    }
}

/// Orphans that belong to no VM: each is removed by the scope that covers it.
#[tokio::test]
async fn orphans_of_ended_processes_are_removed() {
    let root = tempfile::tempdir().unwrap();
    let home = root.path().join("home");
    let nido = open(&home);
    for dir in ["vms/.gone-0123456789abcdef/snapshots", "present", "build/dead/rootfs", "blobs/sha256", "templates"] {
        fs::create_dir_all(home.join(dir)).unwrap();
    }
    let part = "f".repeat(64);
    for file in ["present/0123456789abcdef", "templates/.new-1"] {
        fs::write(home.join(file), "").unwrap();
    }
    fs::write(home.join("blobs/sha256").join(&part), "part").unwrap();
    let due = nido.store().parts_due().unwrap();
    nido.store().parts_collected(due).unwrap();
    nido.reconcile().await.unwrap();
    assert!(home.join("vms/.gone-0123456789abcdef").exists() && !home.join("present/0123456789abcdef").exists());
    nido.reconcile_scope(Scope::Create).await.unwrap();
    assert!(
        !home.join("vms/.gone-0123456789abcdef").exists()
            && home.join("build/dead").exists()
            && home.join("blobs/sha256").join(&part).exists()
    );
    let plan = nido.plan_reconciliation(Scope::Everything).unwrap();
    assert_eq!(plan.removes(), RemovalCounts { directories: 1, interrupted: 0, part_bytes: 4 });
    reconcile_everything(&nido).await;
    assert!(!home.join("build/dead").exists() && !home.join("templates/.new-1").exists());
    assert!(!home.join("blobs/sha256").join(&part).exists());
    assert!(nido.plan_reconciliation(Scope::Everything).unwrap().repairs.is_empty());
}
