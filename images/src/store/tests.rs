use super::*;
use crate::manifest::tests::sample;

/// A store with the sample template under each of the names, its parts holding the sample's contents.
fn store(names: &[&str]) -> (tempfile::TempDir, Store) {
    let home = tempfile::tempdir().unwrap();
    let store = Store::new(home.path());
    store.create().unwrap();
    let lock = store.lock().unwrap();
    for content in ["vmlinux", "initramfs", "base", "root", "packages"] {
        let path = home.path().join("scratch");
        fs::write(&path, content).unwrap();
        let part = hash_file(&path).unwrap();
        store.import(&path, &part, &lock).unwrap();
    }
    for name in names {
        store.publish(&sample(name), &lock).unwrap();
    }
    (home, store)
}

fn blobs(store: &Store) -> usize {
    entries(&store.blobs).unwrap().len()
}

#[test]
fn a_published_template_is_listed_and_opened() {
    let (_home, store) = store(&["two", "one"]);
    let names: Vec<_> = store.ls().unwrap().into_iter().map(|manifest| manifest.unwrap().name).collect();
    assert_eq!(names, ["one", "two"]);
    assert_eq!(store.open("one").unwrap(), sample("one"));
    assert_eq!(blobs(&store), 5);
}

#[test]
fn parts_are_read_only() {
    let (_home, store) = store(&[]);
    let mode = fs::metadata(store.blob_path(&sample("x").parts.vmlinux)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o444);
}

#[test]
fn delete_removes_the_manifest_and_leaves_the_parts() {
    let (home, store) = store(&["one", "two"]);
    store.delete("one").unwrap();
    assert!(matches!(store.delete("one"), Err(ImageError::TemplateNotFound { .. })));
    assert_eq!(store.named_parts().unwrap().len(), 5, "of template two");
    store.delete("two").unwrap();
    assert!(store.named_parts().unwrap().is_empty());
    fs::write(home.path().join("templates/.new-1"), "{").unwrap();
    let stored = store.stored().unwrap();
    assert_eq!((stored.parts.len(), &stored.unfinished_manifests[..]), (5, &[".new-1".to_owned()][..]));
    assert_eq!(stored.parts.iter().map(|part| part.bytes).sum::<u64>(), 32);
    let lock = store.lock().unwrap();
    for _ in 0..2 {
        stored.parts.iter().for_each(|part| store.remove_part(&part.sha256, &lock).unwrap());
        store.remove_unfinished_manifest(".new-1", &lock).unwrap();
    }
    assert_eq!(store.stored().unwrap(), StoreContents::default());
}

#[test]
fn an_unreadable_manifest_makes_part_owners_unknown() {
    let (home, store) = store(&["one"]);
    fs::write(home.path().join("templates/broken.json"), "{").unwrap();
    assert!(matches!(store.named_parts(), Err(ImageError::ManifestInvalid { .. })));
    store.delete("one").unwrap();
    store.delete("broken").unwrap();
    assert!(store.named_parts().unwrap().is_empty());
    assert_eq!(blobs(&store), 5);
}

#[test]
fn a_manifest_without_its_parts_is_not_published() {
    let (_home, store) = store(&[]);
    let lock = store.lock().unwrap();
    let mut manifest = sample("one");
    manifest.parts.vmlinux.bytes += 1;
    assert!(matches!(store.publish(&manifest, &lock), Err(ImageError::Damaged { part: "vmlinux", .. })));
}

#[test]
fn changed_content_is_found() {
    let (_home, store) = store(&["one"]);
    let path = store.blob_path(&sample("one").parts.packages);
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    fs::write(&path, "PACKAGES").unwrap();
    assert!(matches!(store.verify("one"), Err(ImageError::Damaged { part: "packages", .. })));
}

#[test]
fn names_that_are_paths_are_refused() {
    let (_home, store) = store(&[]);
    for name in ["", "..", "a/b", "-a", "a-", "A", "a\n", &"a".repeat(64)] {
        assert!(matches!(store.open(name), Err(ImageError::NameInvalid { .. })), "{name:?}");
    }
    assert!(matches!(store.open("a-1"), Err(ImageError::TemplateNotFound { .. })));
}
