//! Sessions and commands, against agents that lie.

use std::time::Duration;

use nido_engine::guest::GuestError;
use nido_guest_agent::wire::{self, Exited, Failed, Fault, Pong, STDIN_WINDOW, Summary, ToHost, WireError, kind};
use tokio::io::AsyncWriteExt;
use tokio::time::Instant;

use crate::fake_agent::{FakeAgent, FakeSession, welcome};
use crate::rig::{Outcome, collect, command, soon, within};

/// What a ping gives when the agent's first bytes are `answer`.
async fn ping_answered(answer: impl AsyncFnOnce(&mut FakeSession, wire::Hello)) -> GuestError {
    let liar = FakeAgent::new();
    let lie = async {
        let mut end = liar.accept().await;
        let hello = end.hello().await;
        answer(&mut end, hello).await;
        end
    };
    let (outcome, _end) = within(async { tokio::join!(liar.guest.ping(soon()), lie) }).await;
    outcome.unwrap_err()
}

#[tokio::test(flavor = "current_thread")]
async fn a_welcome_for_another_hello_is_no_welcome() {
    let error = ping_answered(async |end, hello| end.send_message(&welcome(hello.nonce ^ 1)).await).await;
    assert!(matches!(error, GuestError::Protocol(_)), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn an_answer_without_a_welcome_is_not_taken() {
    let pong = Pong { agent: "liar".into(), uptime_ms: 1, sessions: 1, is_init: true, address: None, warnings: None };
    let error = ping_answered(async |end, _| end.send_message(&ToHost::Pong(pong)).await).await;
    assert!(matches!(error, GuestError::Protocol(_)), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn another_version_is_named() {
    let error = ping_answered(async |end, hello| {
        let welcome = wire::Welcome { version: 9, nonce: hello.nonce, agent: String::new(), features: None };
        end.send_message(&ToHost::Welcome(welcome)).await;
    })
    .await;
    assert!(matches!(error, GuestError::VersionMismatch { host: wire::VERSION, guest: 9 }), "{error}");
    let error = ping_answered(async |end, _| {
        let refused = wire::Refused { reason: wire::Refusal::Version, oldest: 7, newest: 8 };
        end.send_message(&ToHost::Refused(refused)).await;
    })
    .await;
    assert!(matches!(error, GuestError::VersionMismatch { guest: 8, .. }), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn oversized_and_unknown_frames_are_refused() {
    let error = ping_answered(async |end, _| end.raw(&[kind::MESSAGE, 0xff, 0xff, 0xff]).await).await;
    assert!(matches!(error, GuestError::Protocol(WireError::TooLong { .. })), "{error}");
    let error = ping_answered(async |end, _| end.raw(b"SSH-2.0-OpenSSH_9.2\r\n").await).await;
    assert!(matches!(error, GuestError::Protocol(WireError::UnknownKind(b'S'))), "{error}");
    let error = ping_answered(async |end, _| end.raw(&[kind::MESSAGE, 0, 0, 1, 0xff]).await).await;
    assert!(matches!(error, GuestError::Protocol(WireError::Malformed(_))), "{error}");
    let error = ping_answered(async |end, _| end.raw(&[kind::STDOUT, 0, 0, 0]).await).await;
    assert!(matches!(error, GuestError::Protocol(WireError::Malformed(_))), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn an_early_end_is_an_end() {
    let error = ping_answered(async |end, _| end.0.shutdown().await.unwrap()).await;
    assert!(matches!(error, GuestError::Gone), "{error}");
    let error = ping_answered(async |end, hello| {
        let frame = wire::encode(&welcome(hello.nonce)).unwrap();
        end.raw(&frame[..frame.len() - 1]).await;
        end.0.shutdown().await.unwrap();
    })
    .await;
    assert!(matches!(error, GuestError::Gone), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn silence_ends_at_the_deadline() {
    let liar = FakeAgent::new();
    let error = liar.guest.ping(Instant::now() + Duration::from_millis(50)).await.unwrap_err();
    assert!(matches!(error, GuestError::Timeout { .. }), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn an_invalid_address_is_not_passed_on() {
    let liar = FakeAgent::new();
    let lie = async {
        let mut end = liar.accept_welcome().await;
        let address = Some("\u{1b}[2Jpwned".into());
        end.send_message(&ToHost::Pong(Pong {
            agent: "x".repeat(9999),
            uptime_ms: 1,
            sessions: 1,
            is_init: true,
            address,
            warnings: None,
        }))
        .await;
    };
    let (pong, ()) = within(async { tokio::join!(liar.guest.ping(soon()), lie) }).await;
    let pong = pong.unwrap();
    assert_eq!(pong.address, None);
    assert!(pong.agent.len() < 200);
}

/// The result of a command when, once started, the agent sends `answer`.
async fn exec_answered(answer: &[ToHost]) -> Result<Outcome, GuestError> {
    let liar = FakeAgent::new();
    let lie = async {
        let mut end = liar.accept_welcome().await;
        end.send_message(&ToHost::Started(42)).await;
        for message in answer {
            end.send_message(message).await;
        }
        end
    };
    let exec = async { collect(liar.guest.exec(command(&["true"]), soon()).await?).await };
    within(async { tokio::join!(exec, lie) }).await.0
}

#[tokio::test(flavor = "current_thread")]
async fn credit_that_was_never_used_is_a_breach() {
    for credit in [1, STDIN_WINDOW, u32::MAX] {
        let error = exec_answered(&[ToHost::StdinCredit(credit)]).await.unwrap_err();
        assert!(matches!(error, GuestError::Protocol(_)), "{error}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn an_exit_has_one_status() {
    for (code, signal, fine) in
        [(Some(0), None, true), (None, Some(9), true), (None, None, false), (Some(1), Some(1), false)]
    {
        let exited = Exited { code, signal, timed_out: false, duration_ms: 0 };
        assert_eq!(exec_answered(&[ToHost::Exited(exited)]).await.is_ok(), fine);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_long_failure_text_is_truncated() {
    let failed = Failed { fault: Fault::Other, message: "\u{e9}".repeat(100_000) };
    let Err(GuestError::Guest(failed)) = exec_answered(&[ToHost::Failed(failed)]).await else { panic!("no failure") };
    assert!(failed.message.len() <= 4096);
}

#[tokio::test(flavor = "current_thread")]
async fn events_of_another_request_are_a_breach() {
    for stray in [ToHost::Connected, ToHost::PutDone(Summary::default()), ToHost::Started(1)] {
        assert!(matches!(exec_answered(&[stray]).await, Err(GuestError::Protocol(_))));
    }
}
