//! Published ports and `proxy`, in guests without a network card.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

use crate::rig::{TestHome, Vm, eventually};

/// Answers with the number of bytes that came, once the client has sent everything.
const COUNTER: &str = "import socket, threading
s = socket.create_server(('127.0.0.1', 7000))
def serve(c):
    n = 0
    while d := c.recv(65536): n += len(d)
    c.sendall(b'%d' % n); c.close()
print('up', flush=True)
while True: threading.Thread(target=serve, args=(s.accept()[0],)).start()
";

fn serve(vm: &Vm<'_>) {
    vm.nido("upload", &["-", "/root/counter.py"]).stdin(COUNTER).ok();
    vm.sh("setsid python3 /root/counter.py > /tmp/up 2>&1 & until grep -q up /tmp/up; do sleep 0.1; done").ok();
}

fn connect(forward: &serde_json::Value) -> std::io::Result<TcpStream> {
    TcpStream::connect((
        forward["host"].as_str().unwrap(),
        u16::try_from(forward["host_port"].as_u64().unwrap()).unwrap(),
    ))
}

fn count(forward: &serde_json::Value, bytes: usize) -> String {
    let mut stream = connect(forward).unwrap();
    stream.write_all(&vec![b'x'; bytes]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn ports_are_published_and_withdrawn() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none", "-p", "7000", "-p", "127.0.0.1:0:7001"]);
    serve(&vm);
    let at_spawn = vm.info()["forwards"].clone();
    assert_eq!(at_spawn.as_array().unwrap().len(), 2);
    assert_ne!(at_spawn[0]["host_port"], 0);
    let counting = at_spawn.as_array().unwrap().iter().find(|f| f["guest_port"] == 7000).unwrap().clone();
    let silent = at_spawn.as_array().unwrap().iter().find(|f| f["guest_port"] == 7001).unwrap().clone();

    // A client that has closed its sending side still gets the response; many at once are not mixed.
    assert_eq!(count(&counting, 3_000_000), "3000000");
    std::thread::scope(|scope| {
        for number in 1..=12 {
            let counting = &counting;
            scope.spawn(move || assert_eq!(count(counting, number * 10_001), (number * 10_001).to_string()));
        }
    });
    // Nothing listens there in the guest: the connection ends, and nothing else does.
    let mut end = Vec::new();
    let ended = connect(&silent).unwrap().read_to_end(&mut end);
    assert!(matches!(ended, Ok(0) | Err(_)) && end.is_empty());
    assert_eq!(count(&counting, 1), "1");

    // More of them while it runs.
    let added = home.nido(["forward", "add", "web", "7000"]).json();
    assert_eq!((&added["host"], &added["guest_port"]), (&"127.0.0.1".into(), &7000.into()));
    assert_eq!(count(&added, 5), "5");
    let list = home.nido(["forward", "ls", "web"]).json();
    assert!(list["forwards"].as_array().unwrap().contains(&added), "{list}");
    assert_eq!(vm.info()["forwards"], list["forwards"]);
    let shown = home.nido(["forward", "ls", "-q", "web"]).text();
    let as_text = format!("127.0.0.1:{}:7000", added["host_port"]);
    assert!(shown.lines().any(|line| line == as_text), "{shown}");
    home.nido(["forward", "rm", "web", &as_text]).ok();
    assert!(connect(&added).is_err());
    home.nido(["forward", "rm", "web", &as_text]).problem(1, "forward_not_found");

    // A port that is in use.
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = format!("{}:7000", held.local_addr().unwrap().port());
    home.nido(["forward", "add", "web", &taken]).problem(1, "port_in_use");
    home.nido(["spawn", "second", "--net", "none", "-p", &taken]).problem(1, "port_in_use");
    assert_eq!(home.names(), ["web"], "a spawn that failed leaves nothing");
    let ours = format!("{}:7000", counting["host_port"]);
    home.nido(["forward", "add", "web", &ours]).problem(1, "port_in_use");
    drop(held);
    home.nido(["forward", "add", "web", &taken]).ok();
    for wrong in ["x", "0", "70000:1", "1:2:3"] {
        home.nido(["forward", "add", "web", wrong]).problem(2, "spec_invalid");
    }

    // They belong to the VM, not to one of its lives.
    let before = vm.info()["forwards"].clone();
    vm.nido("restart", &[]).ok();
    assert_eq!(vm.info()["forwards"], before);
    serve(&vm);
    assert_eq!(count(&counting, 17), "17");
    vm.nido("stop", &[]).ok();
    assert!(connect(&counting).is_err());
    home.nido(["forward", "rm", "web", "7000"]).problem(2, "spec_invalid");
    home.nido(["forward", "rm", "web", "7000", "--all"]).ok();
    assert_eq!(home.nido(["forward", "ls", "web"]).json()["forwards"].as_array().unwrap().len(), 1);
}

#[test]
fn proxy_connects_standard_streams() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    serve(&vm);
    assert_eq!(vm.nido("proxy", &["7000"]).stdin(vec![b'x'; 2_000_000]).ok().stdout, b"2000000");
    vm.nido("proxy", &["7001"]).problem(1, "port_closed");
    vm.nido("proxy", &["0"]).run().expect(2);

    // A real program over it.
    vm.sh("cd /etc && setsid python3 -m http.server 8000 --bind 127.0.0.1 >/dev/null 2>&1 &").ok();
    let page = eventually("the page", || {
        let done = vm.nido("proxy", &["8000"]).stdin("GET /hostname HTTP/1.0\r\n\r\n").run();
        (done.code == 0).then_some(done.stdout)
    });
    let page = String::from_utf8(page).unwrap();
    assert!(page.starts_with("HTTP/1.0 200 OK\r\n") && page.ends_with("\r\n\r\nweb\n"), "{page:?}");
}
