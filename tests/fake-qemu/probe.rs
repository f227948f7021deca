//! `-machine none -qmp stdio`: what this QEMU reports that it can do. It has no kernel vsock, so that the agent is always reached
//! through the socket that stands for the virtio-serial port.

use std::io::{BufRead as _, Write as _};
use std::process::ExitCode;

use serde_json::{Value, json};

use crate::script::Script;

/// Answers questions on standard input until `quit` or its end.
pub fn answer(script: &Script) -> ExitCode {
    if script.not_qemu {
        println!("hello, I am not QEMU");
        eprintln!("usage: hello");
        return ExitCode::SUCCESS;
    }
    if script.hang_probe {
        loop {
            std::thread::park();
        }
    }
    print_message(&json!({ "QMP": { "version": script.version_object(), "capabilities": [] } }));
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let Ok(question) = serde_json::from_str::<Value>(&line) else { continue };
        print_message(&json!({ "return": reply_to(&question, script), "id": question["id"] }));
        if question["execute"] == "quit" {
            break;
        }
    }
    ExitCode::SUCCESS
}

fn reply_to(question: &Value, script: &Script) -> Value {
    let has = |what: &str| !script.lacks.iter().any(|lack| what.contains(lack.as_str()));
    let names =
        |names: &[&str]| names.iter().filter(|name| has(name)).map(|name| json!({ "name": name })).collect::<Value>();
    match (question["execute"].as_str(), question["arguments"]["implements"].as_str()) {
        (Some("qom-list-types"), Some("machine")) => {
            names(&["microvm-machine", "pc-i440fx-7.2-machine", "pc-q35-7.2-machine"])
        }
        (Some("qom-list-types"), Some("accel")) => names(&["kvm-accel", "tcg-accel"]),
        (Some("qom-list-types"), _) => names(&["virtio-net-device", "virtio-net-pci"]),
        (Some("qom-list-properties"), _) => names(&["mem-path", "share"]),
        (Some("query-command-line-options"), _) => match has("sandbox") {
            true => json!([{ "option": "sandbox", "parameters": [] }]),
            false => json!([]),
        },
        (Some("query-qmp-schema"), _) => {
            let kinds: Vec<_> = ["dgram", "tap", "hubport"].into_iter().filter(|kind| has(kind)).collect();
            json!([{ "meta-type": "enum", "values": kinds }])
        }
        _ => json!({}),
    }
}

fn print_message(value: &Value) {
    println!("{value}");
    let _ = std::io::stdout().flush();
}
