//! Guests that write what they please, as much as they please.

use crate::rig::{TestHome, eventually};

/// What a log may grow to before it is cut, in bytes.
const LOG_BYTES_MAX: u64 = 4 << 20;

#[test]
fn escape_sequences_stay_text() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    let evil = "\\033]0;owned\\007\\033[2J\\302\\233c\\r\\342\\200\\256over\\n";
    vm.sh(&format!("printf '{evil}' > /dev/ttyS0")).ok();
    let shown = eventually("the console's line", || {
        let shown = vm.nido("logs", &[]).text();
        shown.contains("over").then_some(shown)
    });
    assert!(!shown.contains(['\x1b', '\x07', '\u{9b}', '\u{202e}']), "{shown:?}");
    let as_json = vm.nido("logs", &["--json"]).text();
    assert!(!as_json.contains(['\x1b', '\x07', '\u{9b}', '\u{202e}']), "{as_json:?}");
    let lines: Vec<serde_json::Value> = as_json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().any(|line| line["line"].as_str().unwrap().contains('\u{202e}')), "what it said is all there");
    assert!(vm.nido("logs", &["--raw"]).ok().stdout.contains(&0x1b));
    let last = vm.nido("logs", &["--tail", "1"]).text();
    assert!(last.contains("over") && last.lines().count() == 1, "{last:?}");

    // Errors with words of the guest's in them.
    let odd = "no\x1b[2Jsuch\u{202e}";
    for done in
        [vm.exec([odd]).run(), vm.nido("download", &[odd, "x"]).run(), vm.nido("exec", &["-u", odd, "--", "id"]).run()]
    {
        assert!(done.code != 0 && !done.stderr.contains(['\x1b', '\u{202e}']), "{:?}", done.stderr);
    }
    // Bytes that are no text come as base64 in JSON.
    let told = home.nido(["--json", "exec", "web", "--", "printf", "\\377\\000"]).ok().json();
    assert_eq!((&told["stdout"], &told["stdout_base64"]), (&serde_json::Value::Null, &"/wA=".into()));
    assert_eq!(told["stderr"], "");
}

#[test]
fn a_flooded_console_stays_bounded() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    let (follow, _keys) = vm.nido("logs", &["-f"]).start();
    vm.sh("setsid sh -c 'yes \"$(head -c 4000 /dev/zero | tr \"\\\\0\" x)\" > /dev/ttyS0' > /dev/null 2>&1 &").ok();
    let dir = vm.dir();
    let size = |name: &str| std::fs::metadata(dir.join(name)).map_or(0, |meta| meta.len());
    eventually("the first cut", || (size("console.log.1") > 0).then_some(()));
    follow.read_until("xxxx");
    for _ in 0..20 {
        vm.exec(["true"]).ok();
        let both = size("console.log") + size("console.log.1");
        assert!(both < 4 * LOG_BYTES_MAX, "{both} bytes of console");
    }
    vm.exec(["pkill", "yes"]).ok();
    vm.nido("stop", &[]).ok();
    let shown = vm.nido("logs", &["--tail", "3"]).ok().stdout;
    assert!(!shown.is_empty());
    follow.wait().expect(0);
}
