//! The channel and the sessions on it, with the real agent at its end.

use std::sync::Arc;

use nido_engine::guest::{Guest, GuestError, Link};
use nido_guest_agent::wire::MAX_SESSIONS;

use crate::rig::{Rig, TOKEN, collect, command, soon, within};

#[tokio::test(flavor = "current_thread")]
async fn a_ping_returns_the_agents_description() {
    let rig = Rig::start().await;
    let pong = rig.guest.ping(soon()).await.unwrap();
    assert_eq!(pong.agent, env!("CARGO_PKG_VERSION"));
    assert!(!pong.is_init);
    let mut session = rig.guest.session(soon()).await.unwrap();
    assert_eq!(session.agent(), pong.agent);
    session.ping(soon()).await.unwrap();
    session.ping(soon()).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_client_that_is_early_waits_for_the_agent() {
    let mut rig = Rig::without_agent();
    let guest = rig.guest.clone();
    let waiting = tokio::spawn(async move { guest.wait_ready(soon()).await });
    let mut open = rig.channel.activity().open();
    within(open.wait_for(|open| *open == 1)).await.unwrap();
    rig.start_agent();
    waiting.await.unwrap().unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_wrong_token_is_refused() {
    let rig = Rig::start().await;
    let stranger = Guest::new(rig.guest.endpoint().clone(), vec![7; TOKEN.len()]);
    assert!(matches!(stranger.ping(soon()).await, Err(GuestError::TokenRefused)));
    // And waiting does not help, so it is not waited.
    assert!(matches!(stranger.wait_ready(soon()).await, Err(GuestError::TokenRefused)));
}

#[tokio::test(flavor = "current_thread")]
async fn many_commands_at_once() {
    let rig = Arc::new(Rig::start().await);
    let all: Vec<_> = (0..40)
        .map(|i| {
            let rig = Arc::clone(&rig);
            tokio::spawn(async move { rig.sh(&format!("head -c 300000 /dev/zero; echo {i} >&2")).await })
        })
        .collect();
    for (i, one) in all.into_iter().enumerate() {
        let outcome = within(one).await.unwrap();
        assert_eq!(outcome.stdout.len(), 300_000);
        assert_eq!(outcome.stderr, format!("{i}\n").into_bytes());
    }
    let mut open = rig.channel.activity().open();
    within(open.wait_for(|open| *open == 0)).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_session_beyond_the_limit_is_refused_as_busy() {
    let rig = Rig::start().await;
    let mut open = Vec::new();
    let refused = loop {
        match rig.guest.session(soon()).await {
            Ok(session) => open.push(session),
            Err(error) => break error,
        }
        assert!(open.len() <= MAX_SESSIONS, "more sessions than agreed");
    };
    assert!(matches!(refused, GuestError::Busy), "{refused}");
    drop(open);
    rig.guest.wait_ready(soon()).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn an_ended_agent_is_noticed_and_a_new_one_served() {
    let mut rig = Rig::start().await;
    let running = rig.guest.exec(command(&["sleep", "1000"]), soon()).await.unwrap();
    rig.stop_agent();
    assert!(matches!(within(collect(running)).await, Err(GuestError::Gone)));
    let mut link = rig.channel.link();
    within(link.wait_for(|link| *link == Link::Waiting)).await.unwrap();
    rig.start_agent();
    within(link.wait_for(|link| *link == Link::Up)).await.unwrap();
    assert_eq!(rig.sh("echo again").await.stdout, b"again\n");
}

#[tokio::test(flavor = "current_thread")]
async fn the_supervisors_sessions_and_idle_connections_are_not_activity() {
    let rig = Rig::start().await;
    let mut open = rig.channel.activity().open();
    within(open.wait_for(|open| *open == 0)).await.unwrap();
    open.mark_unchanged();
    let mut session =
        nido_engine::guest::Session::open(rig.channel.stream(soon()).await.unwrap(), TOKEN, soon()).await.unwrap();
    session.ping(soon()).await.unwrap();
    let look = tokio::net::UnixStream::connect(rig.path("agent.sock")).await.unwrap();
    drop(look);
    session.ping(soon()).await.unwrap();
    assert!(!open.has_changed().unwrap());
    rig.guest.ping(soon()).await.unwrap();
    assert!(open.has_changed().unwrap());
    assert_ne!(rig.channel.activity().bytes(), (0, 0));
}
