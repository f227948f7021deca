//! Names of hosts: their canonical form, the addresses that the resolver has returned for them ([`Pins`]), and how many new
//! names a guest may look up below a wildcard ([`NameBudget`]).
//!
//! ```text
//!            insert                  1 h without a response or a use
//!   (none) ─────────> fresh pin ──────────────────────────────────> stale pin ──> evicted (least recently used)
//!                     │      ^ touch                                   │
//!                     └──────┘      ^────────── insert ────────────────┘
//! ```
//!
//! Invariants:
//! - A name is in canonical form ([`canonical_name`]) everywhere in this crate, so that names are compared as bytes.
//! - Only a response of the resolver ([`Pins::insert`]) makes a stale pin fresh; a use extends the life of fresh pins only.
//! - Memory is bounded whatever the guest looks up, and no operation takes longer than O(log n) for each address.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// The longest name, in bytes, without a trailing dot.
pub const NAME_MAX: usize = 253;
/// The longest label of a name, in bytes.
pub const LABEL_MAX: usize = 63;
/// How long a pin is fresh after the last response of the resolver or the last use.
pub const PIN_LIFETIME: Duration = Duration::from_secs(3600);
/// How many addresses have pins.
pub const ADDRESSES_MAX: usize = 4096;
/// How many names are pinned to one address.
pub const NAMES_PER_ADDRESS_MAX: usize = 16;
/// How many pins are exported: those of the addresses that were used last.
pub const EXPORTED_MAX: usize = 2048;

/// The canonical form of a host's name: lower case, without a trailing dot. `None` for text that is not such a name: a label is
/// empty, longer than 63 bytes or has a character outside `[A-Za-z0-9_-]`, the name is longer than 253 bytes, or its last label
/// is a number, so that a resolver would read the text as an IPv4 address (`127.1`, `0x7f.1`, `2130706433`).
pub fn canonical_name(text: &str) -> Option<String> {
    let name = text.strip_suffix('.').unwrap_or(text);
    if name.len() > NAME_MAX {
        return None;
    }
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    let is_label = |label: &str| (1..=LABEL_MAX).contains(&label.len()) && label.bytes().all(is_allowed);
    let is_name = name.split('.').all(is_label) && !name.rsplit('.').next().is_some_and(is_number);
    is_name.then(|| name.to_ascii_lowercase())
}

/// Whether a label is read as a number by `inet_aton`.
fn is_number(label: &str) -> bool {
    let hexadecimal = label.strip_prefix("0x").or_else(|| label.strip_prefix("0X"));
    let is_hexadecimal = hexadecimal.is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
    is_hexadecimal || label.bytes().all(|byte| byte.is_ascii_digit())
}

/// One pin, as it is stored with a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinRecord {
    /// The address that the resolver has returned.
    pub address: IpAddr,
    /// The name that it was returned for.
    pub name: String,
    /// How long before the export it was last returned or used, in seconds.
    pub age_seconds: u64,
}

#[derive(Debug)]
struct Pin {
    name: Arc<str>,
    expires: Instant,
}

#[derive(Debug)]
struct Entry {
    /// This address's key in [`Pins::by_use`].
    used: u64,
    /// One for each name, at most [`NAMES_PER_ADDRESS_MAX`].
    pins: Vec<Pin>,
}

/// The addresses that the resolver has returned to the guest, each with the names that it was returned for.
#[derive(Debug, Default)]
pub struct Pins {
    entries: HashMap<IpAddr, Entry>,
    /// The addresses in the order of their last use. Each entry has exactly one line here.
    by_use: BTreeMap<u64, IpAddr>,
    uses: u64,
}

impl Pins {
    /// How many addresses have pins.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no address has a pin.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Records a response of the resolver. `name` is canonical. The pins become fresh; the least recently used addresses make
    /// room.
    pub fn insert(&mut self, name: &str, addresses: &[IpAddr], now: Instant) {
        let name: Arc<str> = Arc::from(name);
        for address in addresses {
            self.put(*address, Arc::clone(&name), now + PIN_LIFETIME);
        }
    }

    /// The names that `address` was returned for, each with whether its pin is fresh. A stale pin is no permission: it allows the
    /// engine to resolve the name again.
    pub fn names_of(&self, address: IpAddr, now: Instant) -> impl Iterator<Item = (&str, bool)> {
        let pins = self.entries.get(&address).map_or(&[][..], |entry| &entry.pins);
        pins.iter().map(move |pin| (&*pin.name, now < pin.expires))
    }

    /// Records a use of the address: its fresh pins stay fresh for another [`PIN_LIFETIME`], and it is evicted later than others.
    pub fn touch(&mut self, address: IpAddr, now: Instant) {
        if let Some(entry) = self.entries.get_mut(&address) {
            for pin in entry.pins.iter_mut().filter(|pin| now < pin.expires) {
                pin.expires = pin.expires.max(now + PIN_LIFETIME);
            }
            self.move_to_end(address);
        }
    }

    /// The last [`EXPORTED_MAX`] pins, the least recently used address first.
    pub fn export(&self, now: Instant) -> Vec<PinRecord> {
        let records = |address: &IpAddr| {
            let address = *address;
            let pins = self.entries.get(&address).map_or(&[][..], |entry| &entry.pins);
            pins.iter().rev().map(move |pin| {
                let remaining = pin.expires.saturating_duration_since(now);
                let expired = now.saturating_duration_since(pin.expires);
                let age = PIN_LIFETIME.saturating_sub(remaining).saturating_add(expired);
                PinRecord { address, name: pin.name.to_string(), age_seconds: age.as_secs() }
            })
        };
        let mut last: Vec<PinRecord> = self.by_use.values().rev().flat_map(records).take(EXPORTED_MAX).collect();
        last.reverse();
        last
    }

    /// Adds exported pins, `elapsed` after their export. The last ones win if there are more than the limits allow. Records whose
    /// name is not canonical are ignored.
    pub fn import(&mut self, records: &[PinRecord], elapsed: Duration, now: Instant) {
        let first = records.len().saturating_sub(ADDRESSES_MAX * NAMES_PER_ADDRESS_MAX);
        for record in &records[first..] {
            if canonical_name(&record.name).as_deref() == Some(&record.name) {
                let age = Duration::from_secs(record.age_seconds).saturating_add(elapsed);
                self.put(record.address, Arc::from(record.name.as_str()), now + PIN_LIFETIME.saturating_sub(age));
            }
        }
    }

    fn put(&mut self, address: IpAddr, name: Arc<str>, expires: Instant) {
        if !self.entries.contains_key(&address) && self.entries.len() >= ADDRESSES_MAX {
            self.evict_least_recently_used();
        }
        let entry = self.entries.entry(address).or_insert(Entry { used: 0, pins: Vec::new() });
        if let Some(pin) = entry.pins.iter_mut().find(|pin| pin.name == name) {
            pin.expires = pin.expires.max(expires);
        } else {
            if entry.pins.len() >= NAMES_PER_ADDRESS_MAX {
                let oldest = entry.pins.iter().enumerate().min_by_key(|(_, pin)| pin.expires).map(|(index, _)| index);
                oldest.map(|index| entry.pins.swap_remove(index));
            }
            entry.pins.push(Pin { name, expires });
        }
        self.move_to_end(address);
    }

    fn evict_least_recently_used(&mut self) {
        if let Some((_, address)) = self.by_use.pop_first() {
            self.entries.remove(&address);
        }
    }

    fn move_to_end(&mut self, address: IpAddr) {
        if let Some(entry) = self.entries.get_mut(&address) {
            self.by_use.remove(&entry.used);
            self.uses += 1;
            entry.used = self.uses;
            self.by_use.insert(entry.used, address);
        }
    }
}

/// The longest name that a wildcard allows, in bytes.
pub const WILDCARD_NAME_MAX: usize = 128;
/// How many new names a wildcard allows in each [`BUDGET_WINDOW`].
pub const NEW_NAMES_MAX: usize = 30;
/// The time in which [`NEW_NAMES_MAX`] new names are allowed.
pub const BUDGET_WINDOW: Duration = Duration::from_secs(60);
/// How many names of a wildcard are remembered. The first ones are removed; they count as new again.
const REMEMBERED_MAX: usize = 1024;

/// Why a name below a wildcard is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BudgetError {
    /// The name is longer than [`WILDCARD_NAME_MAX`].
    NameTooLong,
    /// [`NEW_NAMES_MAX`] other names were new within the last [`BUDGET_WINDOW`].
    TooManyNames,
}

#[derive(Debug, Default)]
struct RememberedNames {
    names: HashSet<Arc<str>>,
    /// The same names, the first one first.
    order: VecDeque<Arc<str>>,
    /// When the last names were new; at most [`NEW_NAMES_MAX`].
    times: VecDeque<Instant>,
}

/// Limits how much a guest can transmit to the name servers of a wildcard's domain in the labels of names: only so many different
/// names are resolved in a minute. A name that was resolved before is free.
#[derive(Debug)]
pub struct NameBudget<K> {
    keys: HashMap<K, RememberedNames>,
}

impl<K> Default for NameBudget<K> {
    fn default() -> Self {
        Self { keys: HashMap::new() }
    }
}

impl<K: Eq + Hash> NameBudget<K> {
    /// Charges the lookup of a canonical name to the rule `key`. The keys are the rules of the policy, so the caller bounds them.
    ///
    /// # Errors
    /// If the name must not be resolved now.
    pub fn charge(&mut self, key: K, name: &str, now: Instant) -> Result<(), BudgetError> {
        if name.len() > WILDCARD_NAME_MAX {
            return Err(BudgetError::NameTooLong);
        }
        let remembered = self.keys.entry(key).or_default();
        if remembered.names.contains(name) {
            return Ok(());
        }
        while remembered.times.front().is_some_and(|time| now.saturating_duration_since(*time) >= BUDGET_WINDOW) {
            remembered.times.pop_front();
        }
        if remembered.times.len() >= NEW_NAMES_MAX {
            return Err(BudgetError::TooManyNames);
        }
        remembered.times.push_back(now);
        if remembered.order.len() >= REMEMBERED_MAX
            && let Some(first) = remembered.order.pop_front()
        {
            remembered.names.remove(&first);
        }
        let name: Arc<str> = Arc::from(name);
        remembered.names.insert(Arc::clone(&name));
        remembered.order.push_back(name);
        Ok(())
    }

    /// Removes what is remembered of rules that no longer exist.
    pub fn retain(&mut self, is_rule: impl Fn(&K) -> bool) {
        self.keys.retain(|key, _| is_rule(key));
    }
}

#[cfg(test)]
mod tests;
