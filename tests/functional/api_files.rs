//! The REST API over the real program: files and directories, both ways.

use crate::support::http::Server;
use crate::support::{Home, until};

#[test]
fn files_go_both_ways() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let there = home.scratch("there");
    let path = format!("/v1/vms/web/files?path={}", there.display());
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let sent = server.send("PUT", &format!("{path}&mode=600"), &[], &bytes).ok(200);
    assert_eq!(sent["bytes"], 3_000_000);
    let got = server.get(&path);
    assert_eq!((got.header("content-type"), got.body == bytes), ("application/octet-stream", true));
    server.get("/v1/vms/web/files?path=/no/such/file").problem(404, "guest_not_found");
    server.get("/v1/vms/web/files?path=relative").problem(422, "path_invalid");
    server.send("PUT", &format!("{path}&mode=7777"), &[], b"x").problem(422, "spec_invalid");
}

#[test]
fn directories_go_both_ways_as_archives() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let (here, there) = (home.scratch("here"), home.scratch("there"));
    std::fs::create_dir_all(here.join("a/b")).unwrap();
    std::fs::write(here.join("a/b/file"), vec![5; 3_000_000]).unwrap();
    std::os::unix::fs::symlink("../nowhere", here.join("a/link")).unwrap();
    let tar = |arguments: &[&str]| std::process::Command::new("tar").args(arguments).output().unwrap().stdout;
    let whole = tar(&["-C", here.to_str().unwrap(), "-c", "."]);
    let path = format!("/v1/vms/web/files?path={}", there.display());
    let put = |path: &str, body: &[u8]| server.send("PUT", path, &[("content-type", "application/x-tar")], body);
    put(&path, &whole[..1_000_000]).problem(422, "spec_invalid");
    assert!(!there.exists());
    let sent = put(&path, &whole).ok(200);
    assert_eq!((&sent["entries"], &sent["bytes"]), (&5.into(), &3_000_000.into()));
    assert_eq!(std::fs::read(there.join("a/b/file")).unwrap(), [5; 3_000_000]);
    let got = server.send("GET", &path, &[("accept", "application/x-tar")], b"");
    assert_eq!((got.status, got.header("content-type")), (200, "application/x-tar"));
    let packed = home.scratch("packed.tar");
    std::fs::write(&packed, got.body).unwrap();
    let mut listed: Vec<_> =
        String::from_utf8(tar(&["-tf", packed.to_str().unwrap()])).unwrap().lines().map(str::to_owned).collect();
    listed.sort();
    assert_eq!(listed, ["./", "./a/", "./a/b/", "./a/b/file", "./a/link"]);
    // A client that does not know gets the error.
    let problem = server.get(&path).problem(422, "path_invalid");
    assert!(problem["hint"].as_str().unwrap().contains("application/x-tar"), "{problem}");
    // What is below a file is no directory, so an archive would be no help.
    let below = server.send("GET", &format!("{path}/a/b/file/x"), &[], b"").problem(422, "path_invalid");
    assert!(!below["hint"].to_string().contains("x-tar"), "{below}");
    put(&format!("{path}&mode=600"), &whole).problem(422, "spec_invalid");
    let unknown = server.send("PUT", &path, &[("content-type", "application/zip")], &whole);
    unknown.problem(415, "media_type_unsupported");
    // A body that breaks off leaves nothing.
    let twice = home.scratch("twice");
    let path = format!("/v1/vms/web/files?path={}", twice.display());
    let headers = format!("Bearer {}", server.token());
    let headers = [("authorization", &*headers), ("content-type", "application/x-tar"), ("host", "localhost")];
    drop(server.begin("PUT", &path, &headers, whole.len(), &whole[..2_000_000]));
    until("nothing is left", || {
        let names = std::fs::read_dir(home.scratch("")).unwrap().map(|entry| entry.unwrap().file_name());
        let left = names.filter(|name| name.to_str().is_some_and(|name| name.starts_with(".nido-") || name == "twice"));
        (left.count() == 0).then_some(())
    });
}
