use nido_api::FrontEnd;
use proptest::prelude::*;

use super::*;

proptest! {
    // A number of many digits came back as its neighbour: an event had another time than its webhook message.
    #[test]
    fn large_numbers_are_exact(ms in proptest::num::f64::NORMAL) {
        prop_assert_eq!(decode::<f64>("timings", &encode(&ms).unwrap()).unwrap(), ms);
    }
}

fn shape(connection: &Connection) -> Vec<(String, String)> {
    let columns = "SELECT m.name, group_concat(c.name) FROM sqlite_schema m, pragma_table_info(m.name) c \
                   WHERE m.type = 'table' GROUP BY m.name ORDER BY m.name";
    let mut statement = connection.prepare(columns).unwrap();
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    rows.map(Result::unwrap).collect()
}

// A store that was not a database any more gave an error without its path and without a fix.
#[test]
fn a_damaged_store_is_named_with_its_path_and_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nido.db");
    std::fs::write(&path, [7; 4096]).unwrap();
    let error = Store::open(&path).unwrap_err();
    assert_eq!(error.code(), Code::StoreDamaged);
    assert!(error.message().contains(&*path.to_string_lossy()), "{error}");
    assert!(error.hint_for(FrontEnd::Cli).unwrap().contains("nido doctor --rebuild"));
    // Damaged in the middle: found only when that page is read.
    std::fs::remove_file(&path).unwrap();
    drop(Store::open(&path).unwrap());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[4096..].fill(7);
    std::fs::write(&path, bytes).unwrap();
    let error = Store::open(&path).and_then(|store| store.vms()).unwrap_err();
    assert_eq!(error.code(), Code::StoreDamaged, "{error}");
}

#[test]
fn a_store_that_was_not_there_or_empty_is_incomplete_until_its_home_was_checked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nido.db");
    let is_complete = || Store::open(&path).unwrap().is_complete().unwrap();
    // Not only for the process that made it, which may have nobody to tell.
    assert!(!is_complete() && !is_complete());
    Store::open(&path).unwrap().set_complete().unwrap();
    assert!(is_complete() && is_complete());
    for ending in ["", "-wal", "-shm"] {
        let _ = std::fs::remove_file(dir.path().join(format!("nido.db{ending}")));
    }
    std::fs::write(&path, "").unwrap();
    assert!(!is_complete());
}

#[test]
fn a_store_is_private_new_or_old() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nido.db");
    let modes = || {
        let entries = std::fs::read_dir(dir.path()).unwrap().map(Result::unwrap);
        entries
            .map(|entry| (entry.file_name(), entry.metadata().unwrap().permissions().mode() & 0o777))
            .collect::<Vec<_>>()
    };
    let private =
        |modes: Vec<_>| assert!(modes.len() == 3 && modes.iter().all(|(_, mode)| *mode == 0o600), "{modes:?}");
    let open = Store::open(&path).unwrap();
    private(modes());
    for (name, _) in modes() {
        std::fs::set_permissions(dir.path().join(name), Permissions::from_mode(0o644)).unwrap();
    }
    let _again = Store::open(&path).unwrap();
    private(modes());
    drop(open);
}

#[test]
fn a_store_of_any_version_becomes_one_of_today() {
    let dir = tempfile::tempdir().unwrap();
    let new = shape(&Store::open(&dir.path().join("new")).unwrap().connection);
    for version in 1..STEPS.len() {
        let path = dir.path().join(version.to_string());
        let old = Connection::open(&path).unwrap();
        STEPS[..version].iter().for_each(|step| old.execute_batch(step).unwrap());
        old.pragma_update(None, "user_version", version as i64).unwrap();
        // Tokens of that time are still valid.
        let token = "INSERT INTO tokens (id, name, sha256, scope, created_ms) VALUES ('1', 'ci', 'x', 'run', 0)";
        let had_token = old.execute(token, []).is_ok();
        drop(old);
        let tokens = Store::open(&path).unwrap().tokens().unwrap();
        assert_eq!(tokens.iter().filter(|token| token.only.is_none()).count(), usize::from(had_token));
        assert!(had_token || version < 5, "from version {version}");
        assert_eq!(shape(&Store::open(&path).unwrap().connection), new, "from version {version}");
    }
}

// A row that another version of nido had written made every list fail that it was in; one of a webhook kept VMs from changing
// their state.
#[test]
fn a_row_that_cannot_be_decoded_is_left_out_of_its_list_and_stops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("nido.db")).unwrap();
    let rows = [
        "INSERT INTO pools VALUES ('sandbox', '{', 1)",
        "INSERT INTO pools VALUES ('no name', '{}', 1)",
        "INSERT INTO tokens (id, name, sha256, scope, created_ms) VALUES ('1', 'x', 'x', 'emperor', 0)",
        "INSERT INTO webhooks (id, url, events, format, secret, allow_private, created_ms) VALUES ('1', 'u', '{', 'f', 's', 0, 0)",
        "INSERT INTO events (at_ms, event, details) VALUES (0, 'vm.flown', '{}')",
        "INSERT INTO jobs (id, tool, actor, holder, state, started_ms, percent) VALUES ('1', 't', 'a', 'h', 'lost?', 0, 999)",
        "INSERT INTO approvals (id, tool, vm_id, vm_name, actor, arguments, digest, state, created_ms, expires_ms) \
         VALUES ('1', 't', '1', 'no name', 'a', '{', 'd', 'pending', 0, 9000000000000000)",
    ];
    for row in rows {
        store.connection.execute(row, []).unwrap();
    }
    assert!(store.pools().unwrap().is_empty() && store.tokens().unwrap().is_empty());
    assert!(store.webhooks().unwrap().is_empty() && store.approvals().unwrap().is_empty());
    assert!(store.jobs(nido_api::Viewer::Everyone).unwrap().is_empty());
    let (events, cursor) = store.events(&nido_api::EventsRequest::default()).unwrap();
    assert_eq!((events.len(), cursor), (0, 1));
    assert!(store.token("1").is_err(), "it is valid for nothing");
    let spec = nido_api::VmSpec::named("web".parse().unwrap());
    let parts = parts::tests::parts_with_root("c");
    let row = VmRow::new("2".into(), spec, Purpose::Use, nido_api::state::VmState::Created, parts, 1);
    store.insert_vm(&row).unwrap();
    assert_eq!(store.events(&nido_api::EventsRequest::default()).unwrap().0.len(), 1);
}
