//! What the host refuses is no defect of nido: exit code 1, a code of its own, and a hint.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use crate::support::Home;

fn set_mode(path: &std::path::Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

// A home that cannot be used was a defect of nido: exit code 70, code internal.
#[test]
fn a_home_that_cannot_be_used_is_an_ordinary_error_with_a_hint() {
    let home = Home::bare();
    let file = home.scratch("file");
    fs::write(&file, "").unwrap();
    let closed = home.scratch("closed");
    fs::create_dir(&closed).unwrap();
    set_mode(&closed, 0);
    let long = home.scratch(&"n".repeat(300));
    let below = file.join("below");
    for path in [std::path::PathBuf::from("/dev/null"), file.clone(), below, long, closed.join("home")] {
        let ran = home.nido(["ls", "--json"]).env("NIDO_HOME", &path).plainly().run();
        let problem = ran.exits(1).problem();
        let code = problem["code"].as_str().unwrap();
        assert!(["permission_denied", "path_unusable", "path_exists"].contains(&code), "{}: {problem}", path.display());
        assert!(problem["hint"].as_str().unwrap().contains("home") || code == "path_exists", "{problem}");
        assert!(problem["detail"].as_str().unwrap().contains(&path.display().to_string()[..8]), "{problem}");
        // The doctor reports it instead of failing itself.
        let ran = home.nido(["doctor", "--json"]).env("NIDO_HOME", &path).plainly().run().exits(1);
        let checks = ran.json()["checks"].clone();
        let home_check = checks.as_array().unwrap().iter().find(|check| check["name"] == "home").unwrap().clone();
        assert_eq!(home_check["status"], "failed", "{checks}");
    }
    set_mode(&closed, 0o700);
}

// On a home that cannot be written even the verbs that only read failed, the doctor among them.
#[test]
fn reading_verbs_work_on_a_home_that_cannot_be_written() {
    let home = Home::new();
    home.nido(["create", "web"]).run().ok();
    home.nido(["ls"]).run().ok();
    let path = home.path();
    set_mode(&path, 0o500);
    let ls = home.nido(["ls", "-q"]).plainly().run().ok();
    assert_eq!(ls.text(), "web\n");
    home.nido(["info", "web"]).plainly().run().ok();
    home.nido(["template", "ls"]).plainly().run().ok();
    let doctor = home.nido(["doctor"]).plainly().run().exits(1);
    assert!(doctor.text().contains("cannot be written"), "{}", doctor.text());
    let problem = home.nido(["create", "db", "--json"]).plainly().run().exits(1).problem();
    assert!(["read_only", "permission_denied"].contains(&problem["code"].as_str().unwrap()), "{problem}");
    set_mode(&path, 0o700);
}

// A socket's path that is taken by a file, or too long, was a defect of nido.
#[test]
fn a_socket_that_cannot_be_made_is_an_ordinary_error() {
    let home = Home::bare();
    let file = home.scratch("file");
    fs::write(&file, "").unwrap();
    let serve = |path: std::path::PathBuf| home.nido(["api-server", "start", "--json", "--socket"]).arg(path).run();
    serve(file.clone()).fails(1, "address_in_use");
    assert!(file.exists());
    serve(home.scratch(&"n".repeat(120))).fails(1, "path_unusable");
    serve(home.scratch("none/socket")).fails(1, "path_not_found");
}

// A directory that may not be written, as the place of a download, was a defect of nido.
#[test]
fn a_download_to_where_nothing_may_be_written_is_an_ordinary_error() {
    let home = Home::new();
    home.spawn("web");
    let (from, into) = (home.scratch("file"), home.scratch("into"));
    fs::write(&from, "x").unwrap();
    fs::create_dir(&into).unwrap();
    set_mode(&into, 0o500);
    let source = format!("web:{}", from.display());
    let problem = home.nido(["cp", "--json"]).arg(&source).arg(&into).plainly().run().fails(1, "permission_denied");
    assert!(problem["hint"].is_string() && problem["detail"].as_str().unwrap().contains("into"), "{problem}");
    home.nido(["cp", "--json"]).arg(&source).arg(from.join("x")).run().fails(1, "path_unusable");
    set_mode(&into, 0o700);
}
