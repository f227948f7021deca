//! The MCP server and files of the host: which may be named, and how far a copy has come.

use serde_json::json;

use crate::support::Home;
use crate::support::mcp::{Client, Era};

#[test]
fn files_of_the_host_are_those_below_directories_that_are_allowed() {
    let home = Home::new();
    let place = home.scratch("place");
    std::fs::create_dir(&place).unwrap();
    std::fs::write(place.join("in"), "in").unwrap();
    std::fs::write(home.scratch("secret"), "secret").unwrap();
    std::os::unix::fs::symlink("../secret", place.join("link")).unwrap();
    let policy = home.scratch("policy.toml");
    std::fs::write(&policy, format!("roots = [{place:?}]\n")).unwrap();
    let mut client = Client::with(&home, Era::Modern, &["--policy", policy.to_str().unwrap()], json!({}));
    home.spawn("web");
    let guest = home.scratch("guest-file");
    let guest = guest.to_str().unwrap();
    client.good("vm_upload", json!({"name": "web", "path": guest, "source": "in"}));
    let out = client.good("vm_download", json!({"name": "web", "path": guest, "destination": "out"}));
    assert_eq!(std::fs::read_to_string(out["path"].as_str().unwrap()).unwrap(), "in");
    client.bad("vm_download", json!({"name": "web", "path": guest, "destination": "out"}), "path_exists");
    client.good("vm_download", json!({"name": "web", "path": guest, "destination": "out", "overwrite": true}));
    // A directory goes with everything in it; what a symlink leads to does not.
    std::fs::create_dir_all(place.join("tree/sub/empty")).unwrap();
    std::fs::write(place.join("tree/sub/file"), "deep").unwrap();
    std::os::unix::fs::symlink("../../secret", place.join("tree/way")).unwrap();
    let copy = home.scratch("copies/tree");
    for _ in 0..2 {
        let done = client.good("vm_upload", json!({"name": "web", "path": copy, "source": "tree"}));
        assert_eq!((&done["entries"], &done["bytes"]), (&5.into(), &4.into()));
        assert_eq!(std::fs::read_to_string(copy.join("sub/file")).unwrap(), "deep");
        assert!(copy.join("sub/empty").is_dir() && !copy.join("tree").exists());
        assert_eq!(std::fs::read_link(copy.join("way")).unwrap(), std::path::Path::new("../../secret"));
    }
    client.bad("vm_upload", json!({"name": "web", "path": copy, "source": "tree", "mode": "600"}), "spec_invalid");
    std::os::unix::fs::symlink("tree", place.join("tree-link")).unwrap();
    for outside in ["../secret", "link", "/etc/passwd", "..", "tree-link", "tree/way", "/etc"] {
        client.bad("vm_upload", json!({"name": "web", "path": guest, "source": outside}), "denied");
    }
    client.bad("vm_download", json!({"name": "web", "path": guest, "destination": "../x"}), "denied");
    drop(client);
    let log = home.nido(["audit", "show", "--json"]).run().ok().json();
    assert!(log["records"].as_array().unwrap().iter().any(|r| r["reason"] == "not_in_roots"));
}

#[test]
fn a_copy_tells_how_much_of_it_is_done_both_ways() {
    const BYTES: usize = 24 << 20;
    let home = Home::new();
    let place = home.scratch("place");
    std::fs::create_dir(&place).unwrap();
    std::fs::write(place.join("in"), vec![7; BYTES]).unwrap();
    let policy = home.scratch("policy.toml");
    std::fs::write(&policy, format!("roots = [{place:?}]\n")).unwrap();
    let mut client = Client::with(&home, Era::Modern, &["--policy", policy.to_str().unwrap()], json!({}));
    home.spawn("web");
    let guest = home.scratch("guest-file");
    for (tool, arguments) in [
        ("vm_upload", json!({"name": "web", "path": guest, "source": "in"})),
        ("vm_download", json!({"name": "web", "path": guest, "destination": "out"})),
    ] {
        client.heard.clear();
        let id = client.begin(tool, arguments, json!({"progressToken": "p"}));
        assert_eq!(client.done(tool, id)["isError"], false);
        let steps: Vec<_> = client.heard.iter().map(|message| &message["params"]).collect();
        assert!(!steps.is_empty(), "{tool}");
        let total = BYTES as f64;
        assert!(
            steps.iter().all(|step| step["total"] == total && step["progress"].as_f64() <= Some(total)),
            "{steps:?}"
        );
    }
    assert_eq!(std::fs::metadata(place.join("out")).unwrap().len(), BYTES as u64);
}
