use proptest::prelude::*;

use super::*;

fn data(text: &str) -> String {
    format!("[redacted: {} bytes, sha256:{}]", text.len(), hex::encode(&Sha256::digest(text)))
}

fn redacted(from: &Value) -> Value {
    serde_json::from_str(&params(from)).unwrap()
}

#[test]
fn secrets_are_recognized_by_name() {
    let from = json!({
        "name": "web", "token": "t0ps3cret", "apiToken": "x", "webhook-secret": "yy", "PASSWORD": "zzz", "stdin": "hello",
        "content": "file", "data": [1, 2], "private_key": "k", "public_key": "p", "tokens_left": 3, "interactive": true,
        "nested": { "content": null, "user": "root" }
    });
    assert_eq!(
        redacted(&from),
        json!({
            "name": "web", "token": "[redacted: 9 bytes]", "apiToken": "[redacted: 1 bytes]",
            "webhook-secret": "[redacted: 2 bytes]", "PASSWORD": "[redacted: 3 bytes]", "stdin": data("hello"),
            "content": data("file"), "data": data("[1,2]"), "private_key": "[redacted: 1 bytes]",
            "public_key": "p", "tokens_left": 3, "interactive": true, "nested": { "content": null, "user": "root" }
        })
    );
}

#[test]
fn redaction_keeps_the_host_of_an_address() {
    for (address, kept) in [
        (json!("https://hooks.slack.com/services/T0/B0/s3cret"), json!("https://hooks.slack.com/[redacted: 22 bytes]")),
        (json!("https://hooks.slack.com"), json!("https://hooks.slack.com")),
        (json!("http://127.0.0.1:8080/s3cret"), json!("http://127.0.0.1:8080/[redacted: 7 bytes]")),
        (json!("https://s3cret:s3cret@example.com/?s3cret#s3cret"), json!("https://example.com/[redacted: 29 bytes]")),
        (json!("HTTPS:\\\\example.com\\s3cret"), json!("https://example.com/[redacted: 7 bytes]")),
        (json!("https:example.com/s3cret"), json!("https://example.com/[redacted: 5 bytes]")),
        (json!("hooks.slack.com/s3cret"), json!("[redacted: 22 bytes]")),
        (json!("slack://s3cret/x"), json!("[redacted: 16 bytes]")),
        (json!("https:///"), json!("[redacted: 9 bytes]")),
        (json!(["https://example.com/s3cret"]), json!("[redacted: 30 bytes]")),
        (json!(null), json!(null)),
    ] {
        assert_eq!(redacted(&json!({ "url": &address })), json!({ "url": kept }), "{address}");
        assert!(!params(&json!({ "body": [{ "webhookUrl": address }] })).contains("s3cret"));
    }
}

#[test]
fn redaction_keeps_the_names_of_variables() {
    let env = json!({ "env": ["LANG=C", "TOKEN=a=b", "EMPTY=", 7] });
    assert_eq!(redacted(&env), json!({ "env": ["LANG", "TOKEN", "EMPTY", "[redacted: 1 bytes]"] }));
    assert_eq!(redacted(&json!({ "environment": { "A": "b" } })), json!({ "environment": ["A"] }));
}

#[test]
fn arguments_of_a_command_that_are_called_secret_are_left_out() {
    for (argument, kept) in [
        (&["--password", "hunter2", "x"][..], &["--password", "[redacted: 7 bytes]", "x"][..]),
        (&["--password", "-hunter2"], &["--password", "[redacted: 8 bytes]"]),
        (&["--token", "--force"], &["--token", "--force"]),
        (&["--api-token=abc", "--user=me"], &["--api-token=[redacted: 3 bytes]", "--user=me"]),
        (&["PGPASSWORD=x", "DB_PASSWORD=a=b"], &["PGPASSWORD=[redacted: 1 bytes]", "DB_PASSWORD=[redacted: 3 bytes]"]),
        (&["-H", "Authorization: Bearer x"], &["-H", "Authorization:[redacted: 9 bytes]"]),
        (&["a b token=x", "http://x:y"], &["a b token=x", "http://x:y"]),
    ] {
        assert_eq!(redacted(&json!({ "command": argument })), json!({ "command": kept }));
    }
}

// Padding in front of a command, or in a field before it, left a hash and padding in the log.
#[test]
fn long_arguments_keep_both_ends_and_the_command_first() {
    let fits = json!({ "a": "x".repeat(LIMIT - 8) });
    assert_eq!(params_and_whole(&fits), (fits.to_string(), None));
    let padding = "é".repeat(LIMIT);
    let many: Vec<_> = std::iter::repeat_n("-v", 5000).chain(["rm", "/srv"]).collect();
    for (long, shown) in [
        (json!({ "command": format!("# {padding}\nrm -rf /srv"), "name": "web" }), "rm -rf /srv\""),
        (json!({ "command": format!("rm -rf /srv; # {padding}"), "name": "web" }), "\"rm -rf /srv;"),
        (json!({ "env_file": padding, "cut": padding, "name": "web", "argv": ["rm", "/srv"] }), "[\"rm\",\"/srv\"]"),
        (json!({ "name": "web", "argv": ["sh", "-c", format!("{padding}; rm /srv")] }), "rm /srv\"]"),
        (json!({ "name": "web", "argv": many }), "\"rm\",\"/srv\"]"),
    ] {
        let (line, whole) = params_and_whole(&long);
        assert!(line.contains(shown) && line.len() <= LIMIT, "{line}");
        let (short, whole) = (redacted(&long), whole.unwrap());
        assert_eq!((&short["name"], &short["cut"]["bytes"]), (&json!("web"), &json!(whole.text.len())));
        assert_eq!(short["cut"]["sha256"], hex::encode(&Sha256::digest(&whole.text)));
        assert_eq!(whole.text, long.to_string());
    }
    let fields: Map<_, _> = (0..5000).map(|n| (format!("{n}{}", "k".repeat(100)), json!("v".repeat(50)))).collect();
    assert!(params(&json!(fields)).len() <= LIMIT);
}

// What a shell was given behind `-c` was left out as the value of a variable: `sh -c 'token=; rm -rf /srv'`.
#[test]
fn a_script_is_no_secret() {
    for script in ["token=; rm -rf /srv", "cookie: ; rm /srv", "--password=;rm", "data=$(rm /srv)"] {
        for option in ["-c", "-lc", "-e", "--eval"] {
            let command = json!({ "argv": ["sh", option, script, "password=x"], "name": "web" });
            let kept = json!({ "argv": ["sh", option, script, "password=[redacted: 1 bytes]"], "name": "web" });
            assert_eq!(redacted(&command), kept);
        }
    }
    let docker = json!({ "argv": ["docker", "run", "-e", "TOKEN=abc", "x"] });
    assert_eq!(redacted(&docker)["argv"][3], "TOKEN=[redacted: 3 bytes]");
}

#[test]
fn binary_bytes_are_recorded_as_numbers() {
    assert_eq!((bytes(b"ls"), bytes(b"\xff\x00")), (json!("ls"), json!({ "hex": "ff00" })));
    assert_eq!(bytes(b"--token=\xff\x00"), "--token=[redacted: 2 bytes]");
    let command = json!({ "command": ["--token", bytes(b"\xff"), bytes(b"\xff")] });
    let kept = json!({ "command": ["--token", "[redacted: 12 bytes]", { "hex": "ff" }] });
    assert_eq!(redacted(&command), kept);
}

proptest! {
    #[test]
    fn a_secret_is_never_in_the_output(secret in "[A-Z]{12,40}", key in "(my_)?(token|secret|password|stdin|content|data)") {
        let from = json!({ &key: &secret, "deep": [{ &key: [&secret] }], "env": [format!("K={secret}")], "command": [format!("--{key}"), &secret, format!("{key}={secret}")] });
        prop_assert!(!params(&from).contains(&secret), "{}", params(&from));
    }

    #[test]
    fn the_length_is_limited(text in "\\PC{0,3000}") {
        let written = params(&json!({ "name": &text, "command": [&text, &text] }));
        prop_assert!(written.len() <= LIMIT, "{}", written.len());
    }
}
