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
    std::fs::write(&policy, format!("confirm = 'never'\nroots = [{place:?}]\n")).unwrap();
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

// `roots = []`, and a policy that did not speak of roots, gave the model the directory that the server was started in, to read and
// to write.
#[test]
fn a_policy_without_roots_has_the_defaults_and_one_with_none_has_none() {
    let home = Home::new();
    home.spawn("web");
    let project = home.scratch("project");
    std::fs::create_dir_all(project.join("tree/.git")).unwrap();
    for name in ["in", ".env", "tree/.git/config", "tree/code"] {
        std::fs::write(project.join(name), "text").unwrap();
    }
    let policy = home.scratch("policy.toml");
    let guest = home.scratch("guest-file");
    let start = |text: &str| {
        std::fs::write(&policy, text).unwrap();
        let flags = ["--policy", policy.to_str().unwrap(), "--confirm", "never"];
        Client::started(&home, Era::Legacy, &flags, json!({}), Some(&project))
    };
    let upload = |source: &str| json!({"name": "web", "path": guest, "source": source});
    let download = |to: &str| json!({"name": "web", "path": guest, "destination": to});
    let mut client = start("roots = []");
    client.bad("vm_upload", upload("in"), "denied");
    client.bad("vm_download", download("out"), "denied");
    drop(client);
    let mut client = start("");
    client.good("vm_upload", upload("in"));
    // The project is read and not written; without a decision it is not even read.
    client.bad("vm_download", download(project.join("out").to_str().unwrap()), "denied");
    for hidden in [".env", "./.env", "tree/.git/config", "tree/.git", project.join(".env").to_str().unwrap()] {
        client.bad("vm_upload", upload(hidden), "denied");
    }
    let out = client.good("vm_download", download("out"));
    assert_eq!(out["path"], json!(home.path().join("exchange/out")));
    client.bad("vm_download", download(".envrc"), "denied");
    let copy = home.scratch("copies/tree");
    let copied = client.good("vm_upload", json!({"name": "web", "path": copy, "source": "tree"}));
    assert!(copy.join("code").exists() && !copy.join(".git").exists(), "{copied}");
    assert_eq!(copied["skipped"], 1);
    let told = client.ended();
    assert!(told.stderr.contains(project.to_str().unwrap()) && told.stderr.contains("exchange"), "{}", told.stderr);
    let log = home.nido(["audit", "show", "--tool", "vm_download", "--result", "success", "--json"]).run().ok().json();
    let reason = log["records"][0]["reason"].as_str().unwrap().to_owned();
    assert_eq!(reason, "sha256:982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1", "of 'text'");
    // Each for itself; what is allowed by name is allowed with everything in it.
    let mut client = start(&format!("read_roots = [{project:?}]\nwrite_roots = []"));
    client.good("vm_upload", upload(".env"));
    client.bad("vm_download", download("out"), "denied");
    drop(client);
    let told = start("roots = ['/']").ended();
    assert!(told.stderr.contains("every file of this host"), "{}", told.stderr);
}

#[test]
fn copies_report_progress_in_both_directions() {
    const BYTES: usize = 24 << 20;
    let home = Home::new();
    let place = home.scratch("place");
    std::fs::create_dir(&place).unwrap();
    std::fs::write(place.join("in"), vec![7; BYTES]).unwrap();
    let policy = home.scratch("policy.toml");
    std::fs::write(&policy, format!("confirm = 'never'\nroots = [{place:?}]\n")).unwrap();
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
