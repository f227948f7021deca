use super::*;

fn schema() -> Value {
    json!({ "type": "object", "required": ["name"], "properties": {
        "name": { "type": "string" },
        "cpus": { "type": "integer", "minimum": 1, "maximum": 64 },
        "force": { "type": "boolean", "default": false },
        "net": { "type": "string", "enum": ["nat", "none"] },
        "argv": { "type": "array", "items": { "type": "string" } },
        "env": { "type": "object", "additionalProperties": { "type": "string" } },
        "content": { "type": "string" },
        "forwards": { "type": "array", "items": { "type": "object", "required": ["guest_port"], "properties": {
            "guest_port": { "type": "integer", "minimum": 1, "maximum": 65535 },
            "host_port": { "type": "integer" },
            "host": { "type": "string" } } } },
        "timeout_seconds": { "type": "number", "minimum": 0, "maximum": 100 },
    } })
}

#[expect(clippy::needless_pass_by_value, reason = "made where it is used")]
fn ok(given: Value) -> Value {
    let read = read(&schema(), &[], given.clone());
    assert!(read.wrong.is_none() && read.notes.is_empty(), "{given}: {:?} {:?}", read.wrong, read.notes);
    read.value
}

fn wrong(given: Value) -> String {
    read(&schema(), &[], given).wrong.unwrap().message().to_owned()
}

#[test]
fn null_and_empty_values_of_optional_fields_mean_absent() {
    // A model under OpenAI's strict mode sends every field, and was refused for most of them.
    for empty in [json!(null), json!(""), json!([])] {
        let mut given = json!({ "name": "web" });
        for field in ["cpus", "force", "net", "argv", "env", "forwards", "timeout_seconds", "timeout_ms"] {
            given[field] = empty.clone();
        }
        assert_eq!(ok(given), json!({ "name": "web" }), "{empty}");
    }
    assert_eq!(ok(json!({ "name": "web", "content": "" })), json!({ "name": "web", "content": "" }));
    let inner = json!({ "name": "web", "argv": ["echo", ""], "env": { "A": "" } });
    assert_eq!(ok(inner.clone()), inner);
    let nested = json!({ "name": "web", "forwards": [{ "guest_port": 80, "host": null }] });
    assert_eq!(ok(nested)["forwards"], json!([{ "guest_port": 80 }]));
    // A default that is spelled out is the same call.
    assert_eq!(ok(json!({ "name": "web", "force": false })), json!({ "name": "web" }));
}

#[test]
fn values_in_another_spelling_are_parsed() {
    for (field, given, read) in [
        ("cpus", json!(2.0), json!(2)),
        ("cpus", json!("2"), json!(2)),
        ("cpus", json!("2.0"), json!(2)),
        ("force", json!("true"), json!(true)),
        ("force", json!("True"), json!(true)),
        ("argv", json!(r#"["ls", "-l"]"#), json!(["ls", "-l"])),
        ("env", json!(r#"{"A": "b"}"#), json!({"A": "b"})),
        ("forwards", json!(r#"[{"guest_port": "80"}]"#), json!([{"guest_port": 80}])),
    ] {
        assert_eq!(ok(json!({ "name": "web", field: given }))[field], read, "{field}: {given}");
    }
}

#[test]
fn ports_may_be_written_as_on_the_command_line() {
    for (given, host_port) in [(json!("8080:80"), 8080), (json!("80"), 0), (json!(80), 0)] {
        let read = ok(json!({ "name": "web", "forwards": [given] }));
        let port = json!({ "host": "127.0.0.1", "host_port": host_port, "guest_port": 80 });
        assert_eq!(read["forwards"], json!([port]), "{given}");
    }
}

#[test]
fn times_are_seconds_and_their_aliases_milliseconds() {
    for (given, ms) in [
        (json!({ "timeout_seconds": 5 }), 5000),
        (json!({ "timeout_seconds": 1.5 }), 1500),
        (json!({ "timeout_seconds": "0.25" }), 250),
        (json!({ "timeout_seconds": 0.07 }), 70),
        (json!({ "timeout_seconds": 0.0001 }), 1),
        (json!({ "timeout_seconds": 0 }), 0),
        (json!({ "timeout_ms": 2000.0 }), 2000),
        (json!({ "timeout_ms": 2000, "timeout_seconds": null }), 2000),
        (json!({ "timeout_ms": 2000, "timeout_seconds": 2 }), 2000),
    ] {
        let mut with_name = given.clone();
        with_name["name"] = "web".into();
        assert_eq!(ok(with_name)["timeout_ms"], ms, "{given}");
    }
    let differ = wrong(json!({ "name": "web", "timeout_ms": 1, "timeout_seconds": 2 }));
    assert!(differ.contains("give one of them"), "{differ}");
    let late = wrong(json!({ "name": "web", "timeout_ms": 200_000 }));
    assert!(late.starts_with("timeout_ms: must be a number from 0"), "{late}");
}

#[test]
fn unknown_fields_are_ignored_and_named() {
    let given = json!({ "name": "web", "toolCallId": "x", "nothing": null, "start": false,
        "forwards": [{ "guest_port": 80, "colour": 1 }] });
    let read = read(&schema(), &["start"], given);
    assert_eq!(read.value, json!({ "name": "web", "forwards": [{ "guest_port": 80 }], "start": false }));
    assert!(read.wrong.is_none());
    assert_eq!(read.notes.len(), 1);
    assert!(read.notes[0].ends_with("ignored: forwards[0].colour, toolCallId"), "{:?}", read.notes);
}

#[test]
fn wrong_values_are_refused_with_their_shape_and_an_example() {
    for (given, words) in [
        (json!({}), r#"name: it is missing; it must be text, for example "web-1""#),
        (json!({ "name": null }), "name: it is missing"),
        (json!({ "name": 5 }), r#"name: must be text, for example "web-1", not 5"#),
        (json!({ "name": "web", "cpus": 2.5 }), "cpus: must be a whole number from 1 to 64, for example 1, not 2.5"),
        (json!({ "name": "web", "cpus": 0 }), "cpus: must be a whole number from 1 to 64"),
        (json!({ "name": "web", "cpus": true }), "cpus: must be a whole number"),
        (json!({ "name": "web", "force": "yes" }), "force: must be true or false"),
        (json!({ "name": "web", "net": "bridge" }), r#"net: must be one of nat, none, not "bridge""#),
        (json!({ "name": "web", "argv": "ls -l" }), r#"argv: must be a list of texts, for example ["ls", "-l", "/"]"#),
        (json!({ "name": "web", "argv": [1] }), "argv[0]: must be text"),
        (json!({ "name": "web", "env": ["A=b"] }), r#"env: must be an object with text values, for example {"LANG""#),
        (json!({ "name": "web", "env": { "A": 1 } }), "env.A: must be text"),
        (json!({ "name": "web", "forwards": [{}] }), "forwards[0].guest_port: it is missing"),
        (
            json!({ "name": "web", "forwards": ["ssh"] }),
            r#"forwards[0]: must be a port such as "8080:80", or an object, for example {"guest_port": 80}, not "ssh""#,
        ),
        (json!({ "name": "web", "timeout_seconds": -1 }), "timeout_seconds: must be a number from 0 to 100"),
        (json!([]), "arguments: must be an object"),
    ] {
        let said = wrong(given);
        assert!(said.starts_with(words), "{said}");
        for rust in ["u32", "u64", "usize", "f64", "map", "sequence", "struct", "invalid type", "expected"] {
            assert!(!said.contains(rust), "{said}");
        }
    }
    let both = wrong(json!({ "cpus": 0 }));
    assert!(both.contains("name: ") && both.contains("; cpus: "), "all that is wrong is told at once: {both}");
}
