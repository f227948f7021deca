use super::*;
use nido_api::AgentInfo;
use nido_store::{BootParts, StoredBake};

fn pool(wanted: u32) -> PoolRow {
    let kind = kind_of(&PoolRequest::default()).unwrap();
    PoolRow { template: "sandbox".parse().unwrap(), kind, wanted }
}

fn clone(pool: &PoolRow, id: &str, state: VmState, memory: Option<&str>) -> VmRow {
    let parts = BootParts {
        vmlinux: String::new(),
        initramfs: String::new(),
        initramfs_base: None,
        agent: None,
        root: String::new(),
        root_bytes: 1,
        packages: String::new(),
        init: nido_images::Init::Agent,
        append: String::new(),
        frozen: Vec::new(),
        allow: None,
    };
    let mut row = VmRow::new(id.into(), clone_spec(pool).unwrap(), Purpose::Pool, state, parts, 1);
    row.agent = AgentInfo { ready: state == VmState::Paused, ..AgentInfo::default() };
    if let Some(memory) = memory {
        let saved = StoredBake { memory: memory.into(), state: String::new(), token: String::new(), live: false };
        row.origin = Origin::Fork(saved);
    }
    row
}

fn ids(rows: &[VmRow]) -> Vec<&str> {
    rows.iter().map(|row| row.id.as_str()).collect()
}

#[test]
fn missing_clones_are_started_and_starting_ones_counted() {
    let pool = pool(4);
    let clones = [
        clone(&pool, "ready", VmState::Paused, Some("m")),
        clone(&pool, "new", VmState::Starting, None),
        clone(&pool, "ending", VmState::Stopping, Some("m")),
        clone(&pool, "failed", VmState::Failed, Some("m")),
    ];
    let plan = plan(&[(pool.clone(), Some("m".into()))], &clones);
    assert_eq!(ids(&plan.remove), [""; 0]);
    assert_eq!(plan.start, [pool.clone(), pool]);
}

#[test]
fn a_pool_for_restricted_vms_is_the_pool_for_nat() {
    let request = PoolRequest { net: nido_api::NetChoice::Restricted, ..PoolRequest::default() };
    assert_eq!(kind_of(&request).unwrap(), pool(1).kind);
    assert!(belongs(&clone(&pool(1), "ready", VmState::Paused, Some("m")), &pool(1)));
}

#[test]
fn of_too_many_those_that_are_not_ready_go() {
    let pool = pool(1);
    let clones = [clone(&pool, "new", VmState::Running, Some("m")), clone(&pool, "ready", VmState::Paused, Some("m"))];
    let plan = plan(&[(pool, Some("m".into()))], &clones);
    assert_eq!((ids(&plan.remove), plan.start.len()), (vec!["new"], 0));
}

#[test]
fn clones_of_another_bake_are_replaced_and_those_of_no_pool_removed() {
    let (kept, gone) = (pool(1), PoolRow { template: "gone".parse().unwrap(), ..pool(1) });
    let clones =
        [clone(&kept, "old", VmState::Paused, Some("before")), clone(&gone, "orphan", VmState::Paused, Some("m"))];
    let plan = plan(&[(kept.clone(), Some("m".into()))], &clones);
    assert_eq!(ids(&plan.remove), ["orphan", "old"]);
    assert_eq!(plan.start, [kept]);
}

#[test]
fn a_pool_without_a_bake_is_emptied_and_not_filled() {
    let pool = pool(3);
    let clones = [clone(&pool, "old", VmState::Paused, Some("m"))];
    let plan = plan(&[(pool, None)], &clones);
    assert_eq!((ids(&plan.remove), plan.start.len()), (vec!["old"], 0));
}
