//! Templates that travel, with the guests that are made from them.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::rig::TestHome;

#[test]
fn an_imported_sandbox_runs_like_the_one_that_was_built() {
    let home = TestHome::new();
    let file = home.user_dir().join("sandbox.nido");
    // Bytes of the disk that all parts take.
    let parts = home.path().join("blobs/sha256");
    let allocated =
        || -> u64 { fs::read_dir(&parts).unwrap().map(|e| e.unwrap().metadata().unwrap().blocks() * 512).sum() };
    let built_bytes = allocated();
    let built = home.nido(["template", "info", "sandbox"]).json();
    let out = home.nido(["template", "export", "sandbox"]).args([&file]).json();
    assert_eq!(out["archive_bytes"], fs::metadata(&file).unwrap().len());
    home.nido(["template", "delete", "sandbox"]).ok();
    home.nido(["spawn", "none", "-T", "sandbox"]).problem(1, "template_not_found");

    let came = home.nido(["template", "import"]).args([&file]).json();
    assert_eq!(came["template"], built, "the manifest is the same to the last byte");
    assert_eq!((&came["already_present"], &came["warnings"]), (&false.into(), &serde_json::json!([])));
    // Holes stayed holes; their grain in an archive is coarser than that of most file systems.
    assert!(allocated() <= built_bytes / 16 * 17, "{} after {built_bytes}", allocated());
    let vm = home.spawn("web", &["-T", "sandbox"]);
    assert_eq!(vm.sh("hostname && id -u && python3 -c 'print(6 * 7)'").text(), "web\n0\n42");

    // Through a pipe and back, under another name: with the same parts.
    let before = fs::read_dir(&parts).unwrap().count();
    let piped = home.nido(["template", "export", "sandbox", "-"]).ok().stdout;
    assert!(piped == fs::read(&file).unwrap(), "the same template makes the same archive");
    home.nido(["template", "import", "-", "--name", "piped"]).stdin(piped).ok();
    assert_eq!(fs::read_dir(&parts).unwrap().count(), before);
    let second = home.spawn("second", &["-T", "piped", "--net", "none"]);
    assert_eq!(second.exec(["cat", "/etc/hostname"]).text(), "second");
    // A VM keeps its template, whatever its template came from.
    home.nido(["template", "delete", "piped"]).problem(1, "template_in_use");
    assert_eq!(vm.exec(["true"]).run().code, 0);
    // What an import could not finish would lie here.
    assert_eq!(fs::read_dir(home.path().join("build")).unwrap().count(), 0);
}
