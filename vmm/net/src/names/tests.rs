//! Names, pins and budgets.

use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;

fn address(number: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from_bits(0x0800_0000 + number))
}

fn names(pins: &Pins, of: IpAddr, now: Instant) -> Vec<(String, bool)> {
    let mut names: Vec<_> = pins.names_of(of, now).map(|(name, fresh)| (name.to_owned(), fresh)).collect();
    names.sort();
    names
}

#[test]
fn names_have_one_canonical_form() {
    let label = "a".repeat(63);
    let long = [label.as_str(); 4].join(".");
    let table = [
        ("example.com", Some("example.com")),
        ("Example.COM.", Some("example.com")),
        ("localhost", Some("localhost")),
        ("_dmarc.x-y.example", Some("_dmarc.x-y.example")),
        ("xn--bcher-kva.example", Some("xn--bcher-kva.example")),
        ("1.example", Some("1.example")),
        (&label, Some(&label)),
        (&long[..253], Some(&long[..253])),
        (&long[..254], None),
        (&long, None),
        ("", None),
        (".", None),
        ("a..b", None),
        (".a", None),
        ("a..", None),
        ("*.example.com", None),
        ("b\u{fc}cher.example", None),
        ("a b.example", None),
        ("a\0.example", None),
        ("a:80", None),
        ("a@b", None),
        ("10.0.0.1", None),
        ("127.1", None),
        ("2130706433", None),
        ("0x7f000001", None),
        ("0x7f.1", None),
        ("1.0X", None),
        ("::1", None),
        ("[::1]", None),
    ];
    for (text, canonical) in table {
        assert_eq!(canonical_name(text).as_deref(), canonical, "{text:?}");
    }
    assert_eq!(canonical_name(&format!("{label}a")), None);
}

#[test]
fn a_pin_is_fresh_for_an_hour_after_a_response_or_a_use_and_stays_when_stale() {
    let (mut pins, start) = (Pins::default(), Instant::now());
    let (a, minute) = (address(1), Duration::from_secs(60));
    pins.insert("a.example", &[a], start);
    assert_eq!(names(&pins, a, start + 59 * minute), [("a.example".into(), true)]);
    pins.touch(a, start + 59 * minute);
    assert_eq!(names(&pins, a, start + 118 * minute), [("a.example".into(), true)]);
    assert_eq!(names(&pins, a, start + 119 * minute), [("a.example".into(), false)]);
    pins.touch(a, start + 119 * minute);
    assert_eq!(names(&pins, a, start + 119 * minute), [("a.example".into(), false)], "a use refreshes no stale pin");
    pins.insert("a.example", &[a], start + 120 * minute);
    assert_eq!(names(&pins, a, start + 120 * minute), [("a.example".into(), true)]);
    assert_eq!(names(&pins, address(2), start), []);
}

#[test]
fn the_least_recently_used_address_is_evicted() {
    let (mut pins, now) = (Pins::default(), Instant::now());
    for number in 0..4096 {
        pins.insert("a.example", &[address(number)], now);
    }
    pins.touch(address(0), now);
    pins.insert("b.example", &[address(5000)], now);
    assert_eq!((pins.len(), pins.by_use.len()), (ADDRESSES_MAX, ADDRESSES_MAX));
    assert_eq!(names(&pins, address(0), now).len(), 1);
    assert_eq!(names(&pins, address(1), now), []);
    assert_eq!(names(&pins, address(5000), now), [("b.example".into(), true)]);
}

#[test]
fn an_address_keeps_its_last_names() {
    let (mut pins, now) = (Pins::default(), Instant::now());
    for number in 0..20_u64 {
        pins.insert(&format!("n{number:02}.example"), &[address(1)], now + Duration::from_secs(number));
    }
    let names = names(&pins, address(1), now);
    assert_eq!(names.len(), NAMES_PER_ADDRESS_MAX);
    assert_eq!(names[0].0, "n04.example");
}

#[test]
fn pins_survive_export_and_import_with_their_age_and_order() {
    let (mut pins, start) = (Pins::default(), Instant::now());
    let later = start + Duration::from_secs(600);
    pins.insert("a.example", &[address(1), address(2)], start);
    pins.insert("b.example", &[address(1)], later);
    let records = pins.export(later);
    let record =
        |number, name: &str, age_seconds| PinRecord { address: address(number), name: name.into(), age_seconds };
    assert_eq!(records, [record(2, "a.example", 600), record(1, "a.example", 600), record(1, "b.example", 0)]);

    let mut restored = Pins::default();
    restored.import(&records, Duration::ZERO, start);
    assert_eq!(restored.export(start), records);
    let mut old = Pins::default();
    old.import(&records, Duration::from_secs(3000), start);
    assert_eq!(names(&old, address(1), start), [("a.example".into(), false), ("b.example".into(), true)]);
}

#[test]
fn an_import_is_bounded_and_ignores_names_that_are_not_canonical() {
    let (mut pins, now) = (Pins::default(), Instant::now());
    let record =
        |number: u32, name: &str| PinRecord { address: address(number), name: name.into(), age_seconds: u64::MAX };
    let mut records: Vec<_> = (0..70_000).map(|number| record(number, "a.example")).collect();
    records.extend(["A.example", "a.example.", "", "10.0.0.1"].map(|name| record(80_000, name)));
    pins.import(&records, Duration::MAX, now);
    assert_eq!(pins.len(), ADDRESSES_MAX);
    assert_eq!(names(&pins, address(69_999), now), [("a.example".into(), false)]);
    assert_eq!(names(&pins, address(80_000), now), []);
}

#[test]
fn a_wildcard_allows_thirty_new_names_a_minute() {
    let (mut budget, start) = (NameBudget::default(), Instant::now());
    for number in 0..30 {
        assert_eq!(budget.charge(1, &format!("n{number}.example"), start), Ok(()));
    }
    let second = Duration::from_secs(1);
    assert_eq!(budget.charge(1, "x.example", start + 59 * second), Err(BudgetError::TooManyNames));
    assert_eq!(budget.charge(1, "n7.example", start + 59 * second), Ok(()), "a name that is remembered is free");
    assert_eq!(budget.charge(2, "x.example", start), Ok(()), "each rule has its own budget");
    assert_eq!(budget.charge(1, "x.example", start + 60 * second), Ok(()));
    assert_eq!(budget.charge(1, &"a".repeat(129), start + 600 * second), Err(BudgetError::NameTooLong));
    budget.retain(|key| *key == 2);
    assert_eq!(budget.keys.len(), 1);
}

#[test]
fn a_wildcard_remembers_a_bounded_number_of_names() {
    let (mut budget, start) = (NameBudget::default(), Instant::now());
    for number in 0..3000_u32 {
        budget.charge((), &format!("n{number}.example"), start + BUDGET_WINDOW * number).unwrap();
    }
    let remembered = &budget.keys[&()];
    assert_eq!((remembered.names.len(), remembered.order.len()), (REMEMBERED_MAX, REMEMBERED_MAX));
}

proptest! {
    #[test]
    fn canonical_names_are_stable(text in "[a-zA-Z0-9_.-]{0,40}|\\PC{0,20}") {
        if let Some(name) = canonical_name(&text) {
            prop_assert_eq!(canonical_name(&name), Some(name.clone()));
            prop_assert_eq!(canonical_name(&text.to_ascii_uppercase()), Some(name.clone()));
            prop_assert!(name.parse::<IpAddr>().is_err());
        }
    }

    #[test]
    fn pins_stay_consistent(operations in proptest::collection::vec((0_u32..6000, 0_u8..20, 0_u64..9000, any::<bool>()), 0..200)) {
        let (mut pins, start) = (Pins::default(), Instant::now());
        for (number, name, seconds, is_use) in operations {
            let now = start + Duration::from_secs(seconds);
            if is_use {
                pins.touch(address(number % 8), now);
            } else {
                pins.insert(&format!("n{name}.example"), &[address(number % 8), address(number)], now);
                prop_assert!(pins.names_of(address(number), now).any(|(_, fresh)| fresh));
            }
            prop_assert_eq!(pins.entries.len(), pins.by_use.len());
            prop_assert!(pins.by_use.iter().all(|(used, address)| pins.entries[address].used == *used));
        }
    }
}
