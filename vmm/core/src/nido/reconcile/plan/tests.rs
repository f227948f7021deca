use std::collections::HashSet;

use nido_api::state::{Fact, advance};
use nido_images::{Part, StoreContents};
use nido_store::RowFacts;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::*;

fn locks() -> impl Strategy<Value = Lock> {
    prop::sample::select(vec![Lock::Free, Lock::Held, Lock::Unknown])
}

fn rows() -> impl Strategy<Value = RowFacts> {
    let known = prop::sample::select(VmState::ALL.to_vec());
    (option::weighted(0.9, known), any::<bool>(), any::<bool>()).prop_map(|(state, deleting, ephemeral)| RowFacts {
        id: String::new(),
        state,
        deleting,
        ephemeral,
        lease: None,
        expires_ms: None,
        made_by: None,
    })
}

fn vms() -> impl Strategy<Value = VmFacts> {
    let directory = prop::sample::select(vec![Directory::Missing, Directory::WithoutData, Directory::WithData]);
    (option::of(rows()), any::<bool>(), directory, locks(), locks(), any::<bool>(), any::<bool>()).prop_map(
        |(row, abandoned, directory, supervisor, qemu, unfinished, without_record)| VmFacts {
            id: String::new(),
            abandoned: abandoned && row.is_some(),
            row,
            directory,
            supervisor,
            qemu,
            unfinished,
            without_record,
        },
    )
}

fn inventories() -> impl Strategy<Value = Inventory> {
    let hash = || prop::sample::select(vec!["a", "b", "c", "d"]).prop_map(str::to_owned);
    let stored = vec(hash().prop_map(|sha256| Part { sha256, bytes: 1 }), 0..4);
    let owned = prop_oneof![
        4 => vec(hash(), 0..4).prop_map(|owned| Ok(owned.into_iter().collect::<HashSet<_>>())),
        1 => Just(Err("a manifest cannot be read".to_owned())),
    ];
    let parts =
        (stored, vec(Just(".new-1".to_owned()), 0..2), owned).prop_map(|(parts, unfinished_manifests, owned)| {
            PartFacts { is_due: !parts.is_empty(), stored: StoreContents { parts, unfinished_manifests }, owned }
        });
    (vec(vms(), 0..5), any::<bool>(), option::of(parts)).prop_map(|(mut vms, others, parts)| {
        for (number, vm) in vms.iter_mut().enumerate() {
            vm.id = number.to_string();
        }
        let others = |name: &str| if others { vec![name.to_owned()] } else { Vec::new() };
        Inventory {
            vms,
            deleted_directories: others(".gone-1"),
            dead_processes: others("0123"),
            orphaned_builds: others("build/1").into_iter().map(Into::into).collect(),
            temporary_files: others("cache/.tmp-1").into_iter().map(Into::into).collect(),
            parts,
        }
    })
}

/// What is there after a repair has been made.
fn after(inventory: &Inventory, repair: &Repair) -> Inventory {
    let mut now = inventory.clone();
    match repair {
        Repair::Vm { id, repairs } => {
            let vm = now.vms.iter_mut().find(|vm| vm.id == *id).unwrap();
            repairs.iter().for_each(|repair| repaired(vm, *repair));
        }
        Repair::RemoveDeletedDirectory(name) => now.deleted_directories.retain(|other| other != name),
        Repair::RemoveLivenessFile(id) => now.dead_processes.retain(|other| other != id),
        Repair::RemoveBuild(path) => now.orphaned_builds.retain(|other| other != path),
        Repair::RemoveTemporaryFile(path) => now.temporary_files.retain(|other| other != path),
        Repair::Parts(repairs) => {
            let parts = now.parts.as_mut().unwrap();
            parts.is_due = false;
            let stored = &mut parts.stored;
            for repair in repairs {
                match repair {
                    PartRepair::RemovePart { sha256, .. } => stored.parts.retain(|part| part.sha256 != *sha256),
                    PartRepair::RemoveManifest(name) => stored.unfinished_manifests.retain(|other| other != name),
                }
            }
        }
    }
    now
}

fn repaired(vm: &mut VmFacts, repair: VmRepair) {
    match repair {
        VmRepair::Supervise => vm.supervisor = Lock::Held,
        VmRepair::RecordEnd { .. } => {
            let row = vm.row.as_mut().unwrap();
            row.state = row.state.map(|state| advance(state, Fact::QemuExited { clean: false }));
        }
        VmRepair::Delete => (vm.row, vm.directory, vm.abandoned) = (None, Directory::Missing, false),
        VmRepair::RemoveUnfinished => vm.unfinished = false,
        VmRepair::WriteRecord => vm.without_record = false,
        VmRepair::RemoveEmptyDirectory => vm.directory = Directory::Missing,
    }
}

fn all_after(inventory: &Inventory) -> Inventory {
    plan(inventory).repairs.iter().fold(inventory.clone(), |now, repair| after(&now, repair))
}

proptest! {
    #[test]
    fn a_second_plan_repairs_nothing(inventory in inventories()) {
        prop_assert_eq!(plan(&all_after(&inventory)).repairs, []);
    }

    #[test]
    fn a_vm_that_a_process_holds_is_not_touched(vm in vms()) {
        let repairs = plan_vm(&vm);
        if vm.supervisor != Lock::Free || vm.qemu == Lock::Unknown {
            prop_assert_eq!(&repairs[..], []);
        }
        if vm.qemu == Lock::Held {
            prop_assert!(repairs.iter().all(|repair| *repair == VmRepair::Supervise), "{:?}", repairs);
        }
    }

    #[test]
    fn no_data_is_removed_because_a_row_is_missing(inventory in inventories()) {
        let now = all_after(&inventory);
        for (before, now) in inventory.vms.iter().zip(&now.vms) {
            if before.row.is_none() && before.directory == Directory::WithData {
                prop_assert_eq!(before, now);
            }
        }
    }

    #[test]
    fn a_vm_is_only_deleted_for_a_reason_that_its_row_gives(vm in vms()) {
        if plan_vm(&vm).contains(&VmRepair::Delete) {
            let row = vm.row.as_ref().unwrap();
            let was_started = row.state != Some(VmState::Created);
            prop_assert!(row.deleting || vm.abandoned || row.ephemeral && was_started);
        }
    }

    #[test]
    fn a_part_is_removed_only_if_all_owners_are_known_and_none_names_it(inventory in inventories()) {
        let Some(before) = &inventory.parts else { return Ok(()) };
        let now = all_after(&inventory).parts.unwrap();
        match &before.owned {
            Err(_) => prop_assert_eq!(&now.stored, &before.stored),
            Ok(owned) => {
                let of = |facts: &PartFacts| {
                    facts.stored.parts.iter().filter(|part| owned.contains(&part.sha256)).cloned().collect::<Vec<_>>()
                };
                prop_assert_eq!(of(&now), of(before));
                prop_assert_eq!(now.stored.parts.len(), of(before).len());
            }
        }
    }

    #[test]
    fn every_vm_without_row_or_files_is_reported(vm in vms()) {
        let found = finding(&vm);
        let has_data = vm.directory == Directory::WithData;
        prop_assert_eq!(matches!(found, Some(Finding::UnknownVm(_))), vm.row.is_none() && has_data);
        let keeps_row = vm.row.as_ref().is_some_and(|row| !row.deleting && row.state.is_some());
        let lost = keeps_row && vm.directory == Directory::Missing;
        prop_assert_eq!(matches!(found, Some(Finding::FilesLost(_))), lost);
    }
}
