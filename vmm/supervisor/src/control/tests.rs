use nido_api::VmSpec;
use serde_json::json;

use super::*;

/// Lines of a client of version 1, as it wrote them.
const LINES_OF_AN_OLDER_CLIENT: [&str; 9] = [
    r#"{"op":"ready"}"#,
    r#"{"op":"stop","force":false,"timeout_ms":30000}"#,
    r#"{"op":"stop_kept"}"#,
    r#"{"op":"pause"}"#,
    r#"{"op":"snapshot","name":"before","into":null}"#,
    r#"{"op":"lease"}"#,
    r#"{"op":"forward_add","forward":{"host":"127.0.0.1","host_port":0,"guest_port":80}}"#,
    r#"{"op":"retire"}"#,
    r#"{"op":"claim","spec":{"name":"web","template":"sandbox","cpus":1,"memory_mib":512,"disk_bytes":null,"net":"none","machine":"auto","accel":"auto","require_isolation":false,"require_confinement":false,"nested":false,"forwards":[],"ttl_ms":60000,"idle_ms":null,"ephemeral":true,"labels":{}},"disk_bytes":1073741824,"reason":"KVM","warnings":[],"asked_ms_ago":3.5,"ready_within_ms":null,"ticket":"t","owner":null,"max_vms":null}"#,
];

#[test]
fn a_line_of_an_older_client_is_understood_and_replied_to_without_a_version() {
    for line in LINES_OF_AN_OLDER_CLIENT {
        let (version, request) = decode_request(line.as_bytes());
        assert_eq!(version, UNVERSIONED, "{line}");
        let request = request.unwrap();
        // The same line is what this nido sends to a supervisor of version 1.
        let repeated: Value = serde_json::from_slice(&encode(&request, UNVERSIONED).unwrap()).unwrap();
        assert_eq!(repeated, serde_json::from_str::<Value>(line).unwrap(), "{line}");
        assert_eq!(encode(&Reply::Done, version).unwrap(), b"{\"answer\":\"done\"}\n");
    }
}

#[test]
fn an_unknown_request_gets_a_versioned_refusal() {
    let (_, old) = decode_request(br#"{"op":"dance"}"#);
    let Err(Reply::Failed { problem }) = old else { panic!("{old:?}") };
    assert_eq!(problem.slug(), "spec_invalid");
    for line in [r#"{"version":2,"op":"dance"}"#, r#"{"version":2,"op":"claim"}"#, r#"{"version":2}"#] {
        let (version, new) = decode_request(line.as_bytes());
        assert!(matches!(new, Err(Reply::Unsupported { supported: VERSION, .. })), "{line}: {new:?}");
        assert_eq!(version, VERSION);
    }
}

#[test]
fn a_request_of_a_newer_version_is_refused_with_the_version_that_is_spoken() {
    for line in [r#"{"version":3,"op":"ready"}"#, r#"{"version":"x","op":"ready"}"#, r#"{"version":-1}"#] {
        let (version, request) = decode_request(line.as_bytes());
        assert!(matches!(request, Err(Reply::Unsupported { supported: VERSION, .. })), "{line}");
        assert_eq!(version, VERSION);
    }
}

#[test]
fn every_message_carries_its_version() {
    let line = encode(&Request::Stop(StopCommand::default()), VERSION).unwrap();
    let text: Value = serde_json::from_slice(&line).unwrap();
    assert_eq!(text, json!({"version": 2, "op": "stop", "force": false, "timeout_ms": 30000}));
    let reply = encode(&Reply::Stage { stage: StartStage::Booting }, VERSION).unwrap();
    assert_eq!(
        serde_json::from_slice::<Value>(&reply).unwrap(),
        json!({"version": 2, "answer": "stage", "stage": "booting"})
    );
}

// A claim with a field of a newer nido was refused as invalid.
#[test]
fn an_order_with_an_unknown_field_or_without_a_new_one_is_understood() {
    let claim = br#"{"version":2,"op":"claim","colour":"red","disk_bytes":7,"spec":{"name":"web","a_field_of_the_future":{"x":1},"forwards":[{"guest_port":80,"protocol":"tcp"}]}}"#;
    let Ok(Request::Claim(order)) = decode_request(claim).1 else { panic!() };
    let spec = VmSpec::from(order.spec.clone());
    let mut expected = VmSpec::named("web".parse().unwrap());
    expected.forwards = vec!["0:80".parse().unwrap()];
    assert_eq!((spec, order.disk_bytes, order.ticket.as_str(), order.max_vms), (expected, 7, "", None));
    let stop = br#"{"version":2,"op":"stop","why":"maintenance"}"#;
    assert_eq!(decode_request(stop).1, Ok(Request::Stop(StopCommand { force: false, timeout_ms: 30_000 })));
}

#[test]
fn a_specification_survives_the_claim_command() {
    let mut spec = VmSpec::named("web".parse().unwrap());
    spec.forwards = vec!["8080:80".parse().unwrap()];
    spec.net = nido_api::NetChoice::Restricted;
    spec.allow = vec!["example.com:443".parse().unwrap()];
    spec.labels.insert("role".into(), "demo".into());
    (spec.cpus, spec.ttl_ms, spec.ephemeral, spec.nested) = (3, Some(5), true, true);
    let sent = serde_json::to_value(VmOrder::from(spec.clone())).unwrap();
    // An older supervisor decodes it as the strict type of the API.
    assert_eq!(serde_json::from_value::<VmSpec>(sent.clone()).unwrap(), spec);
    assert_eq!(VmSpec::from(serde_json::from_value::<VmOrder>(sent).unwrap()), spec);
}

#[test]
fn replies_of_an_older_supervisor_are_understood() {
    let reply = |line: &str| decode_reply(line.as_bytes()).unwrap();
    assert_eq!(reply(r#"{"answer":"done"}"#), Reply::Done);
    assert_eq!(reply(r#"{"answer":"stage","stage":"booting"}"#), Reply::Stage { stage: StartStage::Booting });
    assert_eq!(reply(r#"{"answer":"status","idle_ms":5}"#), Reply::Status { idle_ms: Some(5), network: None });
    let forward: ForwardSpec = "127.0.0.1:8080:80".parse().unwrap();
    assert_eq!(
        reply(r#"{"answer":"forward","forward":{"host":"127.0.0.1","host_port":8080,"guest_port":80}}"#),
        Reply::Forward { forward: forward.into() }
    );
    let Reply::Failed { problem } = reply(
        r#"{"answer":"failed","problem":{"type":"urn:nido:problem:vm_busy","title":"The VM is busy","status":409,"detail":"this VM is being stopped","code":"vm_busy"}}"#,
    ) else {
        panic!()
    };
    assert_eq!(problem.slug(), "vm_busy");
}

// It does not know `version` in a stop, whose options are strict there.
#[test]
fn an_older_supervisor_that_cannot_read_a_request_is_recognized() {
    let line = r#"{"answer":"failed","problem":{"type":"urn:nido:problem:spec_invalid","title":"The request is not valid","status":422,"detail":"not a request to a supervisor: unknown field `version`, expected `force` or `timeout_ms`","code":"spec_invalid"}}"#;
    assert!(matches!(decode_reply(line.as_bytes()), Ok(Reply::Unsupported { supported: UNVERSIONED, .. })));
    // An error about the request itself does not count as one of these.
    let line = r#"{"answer":"failed","problem":{"type":"urn:nido:problem:spec_invalid","title":"The request is not valid","status":422,"detail":"the port is privileged","code":"spec_invalid"}}"#;
    assert!(matches!(decode_reply(line.as_bytes()), Ok(Reply::Failed { .. })));
}

#[test]
fn a_reply_of_a_newer_supervisor_is_not_a_defect() {
    let newer = br#"{"version":9,"answer":"teleported"}"#;
    assert!(matches!(decode_reply(newer), Ok(Reply::Unsupported { supported: 9, .. })));
    let extended = br#"{"version":9,"answer":"done","took_ms":3}"#;
    assert_eq!(decode_reply(extended).unwrap(), Reply::Done);
    decode_reply(br#"{"version":2,"answer":"teleported"}"#).unwrap_err();
}

/// Requests as a supervisor of version 1 decodes them.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum RequestOfVersion1 {
    Ready,
    Stop(StopRequest),
    StopKept,
    Pause,
    Snapshot { name: SnapshotName, into: Option<String> },
    Lease,
    ForwardAdd { forward: ForwardSpec },
    Retire,
    Claim(Box<ClaimOfVersion1>),
}

#[derive(Debug, PartialEq, Deserialize)]
struct ClaimOfVersion1 {
    spec: VmSpec,
    disk_bytes: u64,
}

#[test]
fn an_older_supervisor_understands_all_but_a_stop_and_that_without_a_version() {
    for line in LINES_OF_AN_OLDER_CLIENT {
        let request = decode_request(line.as_bytes()).1.unwrap();
        let older = |version| serde_json::from_slice::<RequestOfVersion1>(&encode(&request, version).unwrap());
        let expected: RequestOfVersion1 = serde_json::from_str(line).unwrap();
        assert_eq!(older(UNVERSIONED).unwrap(), expected, "{line}");
        match (older(VERSION), &request) {
            (Err(error), Request::Stop(_)) => assert!(error.to_string().contains("unknown field `version`"), "{error}"),
            (decoded, _) => assert_eq!(decoded.unwrap(), expected, "{line}"),
        }
    }
}
