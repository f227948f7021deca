//! A real guest with the rules of a preset.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;

use crate::rig::{TestHome, Vm};

/// A package index on the host's loopback: its port.
fn index() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            // The head of the request, up to its empty line.
            let head =
                BufReader::new(&client).lines().map_while(Result::ok).take_while(|line| !line.is_empty()).count();
            let _ = write!(client, "HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\nindex{}", u8::from(head > 0));
        }
    });
    port
}

/// What the guest gets from there: the text, or the name of the error.
fn fetch(vm: &Vm<'_>, port: u16) -> String {
    let program = format!(
        "import urllib.request, errno\n\
         try: print(urllib.request.urlopen('http://host.nido.internal:{port}/simple/', timeout=20).read().decode())\n\
         except OSError as e: print(errno.errorcode.get(e.reason.errno, type(e.reason).__name__))"
    );
    vm.exec(["python3", "-c", &program]).text()
}

#[test]
fn a_guest_reaches_the_index_of_the_host_s_pip_and_nothing_else() {
    let home = TestHome::new();
    let (open, closed) = (index(), index());
    let config = home.user_dir().join("pip.conf");
    std::fs::write(&config, format!("[global]\nindex-url = http://127.0.0.1:{open}/simple\n")).unwrap();
    let spawn = home.nido(["spawn", "web", "--net", "restricted", "--allow", "@pip"]);
    spawn.env("PIP_CONFIG_FILE", &config).ok();
    let vm = Vm { home: &home, name: "web" };
    let info = vm.info();
    assert_eq!(info["presets"][0]["rules"], serde_json::json!([format!("host:{open}")]), "{info:#}");
    assert_eq!(fetch(&vm, open), "index1");
    assert_eq!(fetch(&vm, closed), "ECONNREFUSED");
    let denial = &vm.info()["network"]["denials"][0];
    assert_eq!(denial["rule"], format!("host:{closed}"), "{denial}");
    // The rules go with the preset.
    home.nido(["net", "deny", "web", "@pip"]).ok();
    assert_eq!(fetch(&vm, open), "ECONNREFUSED");
}
