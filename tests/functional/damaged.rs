//! Each part of a template and each file of a snapshot, damaged in turn: what needs it fails with a code of its own, nothing else is
//! lost, and it works again when the file is back.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::support::Home;

/// What happens to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Damage {
    Removed,
    Emptied,
    Halved,
}

const DAMAGES: [Damage; 3] = [Damage::Removed, Damage::Emptied, Damage::Halved];

/// A file that is damaged until it is repaired.
struct Damaged {
    path: PathBuf,
    content: Vec<u8>,
    mode: u32,
}

impl Damaged {
    fn new(path: &Path, damage: Damage) -> Self {
        let (content, mode) = (fs::read(path).unwrap(), fs::metadata(path).unwrap().permissions().mode());
        let damaged = Self { path: path.into(), content, mode };
        match damage {
            Damage::Removed => fs::remove_file(path).unwrap(),
            Damage::Emptied => damaged.replace(&[]),
            Damage::Halved => damaged.replace(&damaged.content[..damaged.content.len() / 2]),
        }
        damaged
    }

    fn replace(&self, content: &[u8]) {
        let _ = fs::remove_file(&self.path);
        fs::write(&self.path, content).unwrap();
        fs::set_permissions(&self.path, fs::Permissions::from_mode(self.mode)).unwrap();
    }

    fn repair(self) {
        self.replace(&self.content);
    }
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.is_file());
    found.sort();
    found
}

fn vm_dir(home: &Home, name: &str) -> PathBuf {
    home.path().join("vms").join(home.info(name)["id"].as_str().unwrap())
}

#[test]
fn a_damaged_part_of_a_template_is_reported_and_loses_nothing() {
    let home = Home::new();
    home.qemu("migrates");
    home.nido(["template", "bake", "sandbox", "--accel", "tcg"]).run().ok();
    home.spawn("running");
    home.nido(["create", "kept", "--accel", "tcg"]).run().ok();
    let names = home.names();
    let parts = files(&home.path().join("blobs/sha256"));
    assert!(parts.len() > 5, "{parts:?}");
    for part in &parts {
        for damage in
            DAMAGES.into_iter().filter(|damage| *damage != Damage::Halved || fs::metadata(part).unwrap().len() > 1)
        {
            let what = format!("{} {damage:?}", part.display());
            let damaged = Damaged::new(part, damage);
            for verb in [["spawn", "new"], ["start", "kept"]] {
                let run = home.nido(verb).arg("--json").run();
                if run.code() == 0 {
                    // A part that this start does not need, or it has booted instead.
                    home.nido(["stop", verb[1], "--force"]).run().ok();
                } else {
                    let problem = run.problem();
                    assert_ne!(problem["code"], "internal", "{what}: {problem}");
                }
                if verb[1] == "new" && home.names().contains(&"new".to_owned()) {
                    home.nido(["delete", "new", "--force", "--yes"]).run().ok();
                }
            }
            home.nido(["doctor", "--gc"]).run();
            home.nido(["template", "ls"]).run().ok();
            assert_eq!(home.names(), names, "{what}");
            assert_eq!(home.info("running")["status"], "running", "{what}");
            home.nido(["exec", "running", "--", "true"]).run().ok();
            assert!(vm_dir(&home, "kept").exists(), "{what}");
            damaged.repair();
            let there = files(&home.path().join("blobs/sha256"));
            assert_eq!(there, parts, "{what}");
        }
    }
    home.nido(["spawn", "new", "--accel", "tcg", "--fork"]).run().ok();
    home.nido(["start", "kept"]).run().ok();
}

#[test]
fn a_damaged_snapshot_is_reported_and_loses_neither_the_vm_nor_other_snapshots() {
    let home = Home::new();
    home.qemu("migrates");
    home.spawn("web");
    home.nido(["snapshot", "create", "web", "other"]).run().ok();
    home.nido(["snapshot", "create", "web", "damaged"]).run().ok();
    let directory = vm_dir(&home, "web");
    let parts = files(&directory.join("snapshots/damaged"));
    assert!(parts.len() > 2, "{parts:?}");
    for part in &parts {
        for damage in DAMAGES {
            let what = format!("{} {damage:?}", part.display());
            let damaged = Damaged::new(part, damage);
            let run = home.nido(["snapshot", "restore", "web", "damaged", "--json", "--timeout", "5s"]).run();
            if run.code() != 0 {
                let problem = run.problem();
                assert_ne!(problem["code"], "internal", "{what}: {problem}");
            }
            home.nido(["snapshot", "ls", "web"]).run().ok();
            assert!(directory.join("disk.qcow2").exists(), "{what}");
            damaged.repair();
            home.nido(["snapshot", "restore", "web", "other"]).run().ok();
            home.nido(["exec", "web", "--", "true"]).run().ok();
        }
    }
    home.nido(["snapshot", "restore", "web", "damaged"]).run().ok();
    home.nido(["snapshot", "delete", "web", "damaged"]).run().ok();
}
