//! Small JSON values cached on disk with the key that they depend on.
//!
//! Invariant: a reader sees a whole entry or none (written beside, then renamed), and an entry whose key differs is as
//! good as absent. A cache that cannot be written costs time, never correctness, so that is only a warning.

use std::fs;
use std::path::Path;

use nido_files::atomic_file::{Durability, write_private};
use nido_files::private_dir::make_private_dir;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct Entry<K, V> {
    key: K,
    value: V,
}

/// The value stored under `name`, if it is there and was stored with this key.
pub fn get<K, V>(dir: &Path, name: &str, key: &K) -> Option<V>
where
    K: DeserializeOwned + PartialEq,
    V: DeserializeOwned,
{
    let bytes = fs::read(dir.join(name)).ok()?;
    let entry: Entry<K, V> = serde_json::from_slice(&bytes).ok()?;
    (entry.key == *key).then_some(entry.value)
}

/// Stores `value` under `name`, replacing what was there.
pub fn put<K: Serialize, V: Serialize>(dir: &Path, name: &str, key: &K, value: &V) {
    if let Err(error) = try_put(dir, name, &Entry { key, value }) {
        tracing::warn!(%error, dir = %dir.display(), name, "cannot write the cache");
    }
}

/// Removes what is stored under `name`.
pub fn invalidate(dir: &Path, name: &str) {
    let _ = fs::remove_file(dir.join(name));
}

fn try_put<T: Serialize>(dir: &Path, name: &str, entry: &T) -> std::io::Result<()> {
    make_private_dir(dir)?;
    write_private(&dir.join(name), &serde_json::to_vec(entry)?, Durability::Kill)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_returned_only_for_its_key() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "a.json", &("boot", 1), &42);
        assert_eq!(get::<(String, i32), i32>(dir.path(), "a.json", &("boot".into(), 1)), Some(42));
        assert_eq!(get::<(String, i32), i32>(dir.path(), "a.json", &("boot".into(), 2)), None);
        invalidate(dir.path(), "a.json");
        assert_eq!(get::<(String, i32), i32>(dir.path(), "a.json", &("boot".into(), 1)), None);
    }

    #[test]
    fn a_damaged_entry_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.json"), b"{\"key\":1,\"val").unwrap();
        assert_eq!(get::<i32, i32>(dir.path(), "a.json", &1), None);
        put(dir.path(), "a.json", &1, &2);
        assert_eq!(get::<i32, i32>(dir.path(), "a.json", &1), Some(2));
    }
}
