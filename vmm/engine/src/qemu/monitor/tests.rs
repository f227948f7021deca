use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::AsFd as _;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::task::JoinHandle;

use super::*;

const TEST_TIMEOUT: Duration = Duration::from_secs(30);
const GREETING: &str = r#"{"QMP":{"version":{"qemu":{"major":7,"minor":2,"micro":0},"package":""},"capabilities":[]}}"#;

/// The other end: sends `lines`, one after each command it has read (the greeting and the capabilities come first),
/// `ID` standing for the command's number. Then closes.
async fn qemu(lines: &[&str]) -> (Monitor, mpsc::Receiver<MonitorEvent>, JoinHandle<Vec<String>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let script: Vec<String> =
        std::iter::once(r#"{"return":{},"id":ID}"#).chain(lines.iter().copied()).map(String::from).collect();
    let task = tokio::spawn(async move {
        let (input, mut output) = theirs.into_split();
        let mut commands = BufReader::new(input).lines();
        output.write_all(format!("{GREETING}\r\n").as_bytes()).await.unwrap();
        let mut heard = Vec::new();
        for line in script {
            let Some(command) = commands.next_line().await.unwrap() else { break };
            let id = serde_json::from_str::<Value>(&command).unwrap()["id"].to_string();
            heard.push(command);
            output.write_all(format!("{}\r\n", line.replace("ID", &id)).as_bytes()).await.unwrap();
        }
        heard
    });
    let (monitor, events) = Monitor::negotiate(ours).await.unwrap();
    (monitor, events, task)
}

#[tokio::test]
async fn a_command_gets_its_answer_past_events_of_any_age() {
    let answer = [
        r#"{"event":"QUANTUM_LEAP","timestamp":{"seconds":0,"microseconds":0}}"#,
        r#"{"return":{"status":"postmigrate"},"id":999}"#,
        r#"{"return":{"running":false,"singlestep":false,"status":"paused"},"id":ID}"#,
    ];
    let (monitor, mut events, _task) = qemu(&[&answer.join("\r\n")]).await;
    assert_eq!(monitor.query_status(TEST_TIMEOUT).await.unwrap(), qmp::RunState::paused);
    match events.recv().await {
        Some(MonitorEvent::Event(event)) => assert_eq!(event.name, "QUANTUM_LEAP"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_refusal_names_the_command() {
    let refusal = r#"{"error":{"class":"GenericError","desc":"not now"},"id":ID}"#;
    let (monitor, _events, _task) = qemu(&[refusal]).await;
    let error = monitor.stop(TEST_TIMEOUT).await.unwrap_err();
    assert_eq!(error.to_string(), "QEMU refused stop: not now");
}

#[tokio::test]
async fn its_end_ends_every_wait() {
    let (monitor, mut events, task) = qemu(&[]).await;
    assert!(matches!(monitor.cont(TEST_TIMEOUT).await, Err(MonitorError::QemuGone)));
    assert_eq!(events.recv().await, None);
    assert_eq!(task.await.unwrap().len(), 1);
    assert!(matches!(monitor.cont(TEST_TIMEOUT).await, Err(MonitorError::QemuGone)));
    monitor.quit(TEST_TIMEOUT).await.unwrap();
}

#[tokio::test]
async fn garbage_closes_the_monitor() {
    let (monitor, mut events, _task) = qemu(&["\u{1b}[2J not json", "{}"]).await;
    assert!(matches!(monitor.cont(TEST_TIMEOUT).await, Err(MonitorError::Protocol { .. })));
    assert!(matches!(monitor.quit(TEST_TIMEOUT).await, Err(MonitorError::Protocol { .. })));
    assert_eq!(events.recv().await, None);
}

#[tokio::test]
async fn a_command_times_out_and_a_late_reply_is_ignored() {
    let late = r#"{"return":{},"id":1}"#.to_owned() + "\r\n" + r#"{"return":{},"id":ID}"#;
    let (monitor, _events, _task) = qemu(&["{}", &late]).await;
    let error = monitor.stop(Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(error.to_string(), "QEMU did not reply to stop within 50 ms");
    monitor.cont(TEST_TIMEOUT).await.unwrap();
}

#[tokio::test]
async fn a_peer_without_a_greeting_is_refused() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"SSH-2.0-OpenSSH\r\n").await.unwrap();
    assert!(matches!(Monitor::negotiate(ours).await, Err(MonitorError::Protocol { .. })));
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    assert!(matches!(Monitor::negotiate(ours).await, Err(MonitorError::QemuGone)));
}

#[tokio::test]
async fn a_flood_of_events_is_counted_and_stalls_nothing() {
    let event = r#"{"event":"VSERPORT_CHANGE","timestamp":{"seconds":0,"microseconds":0}}"#;
    let flood = vec![event; EVENTS_MAX + 10].join("\r\n") + "\r\n" + r#"{"return":{},"id":ID}"#;
    let after = format!("{event}\r\n{}", r#"{"return":{},"id":ID}"#);
    let (monitor, mut events, _task) = qemu(&[&flood, &after]).await;
    monitor.cont(TEST_TIMEOUT).await.unwrap();
    for _ in 0..EVENTS_MAX {
        assert!(matches!(events.recv().await, Some(MonitorEvent::Event(_))));
    }
    monitor.cont(TEST_TIMEOUT).await.unwrap();
    assert_eq!(events.recv().await, Some(MonitorEvent::Lost(10)));
    assert!(matches!(events.recv().await, Some(MonitorEvent::Event(_))));
}

#[tokio::test]
async fn a_monitor_that_never_listens_ends_at_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let result = Monitor::connect(&dir.path().join("qmp.sock"), Duration::from_millis(100)).await;
    assert!(matches!(result, Err(MonitorError::Timeout { .. })));
}

#[tokio::test]
async fn a_file_arrives_with_its_command_and_with_no_other() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let task = tokio::spawn(async move {
        let mut output = theirs;
        output.write_all(format!("{GREETING}\r\n").as_bytes()).await.unwrap();
        let mut heard = Vec::new();
        for _ in 0..3 {
            let (mut line, mut space) = ([0; 4096], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let received = output.async_io(Interest::READABLE, || {
                let mut parts = [io::IoSliceMut::new(&mut line)];
                Ok(recvmsg(output.as_fd(), &mut parts, &mut control, RecvFlags::DONTWAIT)?)
            });
            let bytes = received.await.unwrap().bytes;
            let command: Value = serde_json::from_slice(&line[..bytes]).unwrap();
            let files: Vec<OwnedFd> = control
                .drain()
                .filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(files) => Some(files),
                    _ => None,
                })
                .flatten()
                .collect();
            output.write_all(format!("{{\"return\":{{}},\"id\":{}}}\r\n", command["id"]).as_bytes()).await.unwrap();
            heard.push((command, files));
        }
        heard
    });
    let (monitor, _events) = Monitor::negotiate(ours).await.unwrap();
    let mut file = tempfile::tempfile().unwrap();
    monitor.send_file("state", &file, TEST_TIMEOUT).await.unwrap();
    monitor.cont(TEST_TIMEOUT).await.unwrap();
    let heard = task.await.unwrap();
    assert_eq!(heard.iter().map(|(_, files)| files.len()).collect::<Vec<_>>(), [0, 1, 0]);
    let (command, files) = heard.into_iter().nth(1).unwrap();
    assert_eq!((&command["execute"], &command["arguments"]["fdname"]), (&"getfd".into(), &"state".into()));
    File::from(files.into_iter().next().unwrap()).write_all(b"saved").unwrap();
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "saved");
}
