//! Freeze, thaw and identity reset, for an agent that does not own its machine.

use nido_guest_agent::wire::{
    ENTROPY_LEN, Fault, IdentityReset, Power, Refusal, Refused, TOKEN_LEN, ToGuest, ToHost, VERSION, sync,
};
use tokio::io::AsyncWriteExt;

use super::channel::gone;
use crate::support::{Host, TOKEN, agree, order, probe, shell, soon};

const NEW_TOKEN: [u8; TOKEN_LEN] = [8; TOKEN_LEN];

#[tokio::test]
async fn freeze_and_thaw_are_idempotent() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    for (request, answer) in [
        (ToGuest::Thaw, ToHost::Thawed),
        (ToGuest::Freeze, ToHost::Frozen),
        (ToGuest::Freeze, ToHost::Frozen),
        (ToGuest::Thaw, ToHost::Thawed),
        (ToGuest::Thaw, ToHost::Thawed),
        (ToGuest::Freeze, ToHost::Frozen),
    ] {
        session.send(&request).await;
        assert_eq!(session.message().await, answer);
    }
    session.send(&ToGuest::Power(Power::Off)).await;
    assert_eq!(session.message().await, ToHost::PoweringOff);
}

#[tokio::test]
async fn a_renewal_changes_the_token_and_leaves_a_foreign_machine_alone() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    session.send(&ToGuest::Freeze).await;
    assert_eq!(session.message().await, ToHost::Frozen);
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    session.send(&ToGuest::ResetIdentity(order(NEW_TOKEN))).await;
    let ToHost::IdentityReset(pong) = session.message().await else { panic!("not renewed") };
    assert_eq!((pong.sessions, pong.is_init), (1, false));
    assert_eq!(std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), name);

    let mut late = host.stream().await;
    let Some(ToHost::Refused(Refused { reason, .. })) = late.greet(&TOKEN, VERSION, VERSION).await else {
        panic!("the old token still opens sessions")
    };
    assert_eq!(reason, Refusal::Token);
    let mut fresh = host.stream().await;
    assert!(matches!(fresh.greet(&NEW_TOKEN, VERSION, VERSION).await, Some(ToHost::Welcome(_))));
    // The session that brought the token stays open, and may bring another.
    session.send(&ToGuest::ResetIdentity(order(TOKEN))).await;
    assert!(matches!(session.message().await, ToHost::IdentityReset(_)));
    assert_eq!(fresh.next().await, None);
    host.open().await;
}

#[tokio::test]
async fn sessions_of_the_old_token_end_with_all_that_runs_in_them() {
    let mut host = Host::start().await;
    let mut idle = host.open().await;
    let mut running = host.open().await;
    let pid = running.start(shell("trap '' HUP TERM; sleep 1000 & wait; sleep 1000")).await;
    // No process reads its output, so the agent is stuck in a send.
    let mut flooding = host.open().await;
    let flood = flooding.start(shell("exec cat /dev/zero")).await;
    let mut session = host.open().await;
    session.send(&ToGuest::ResetIdentity(order(NEW_TOKEN))).await;
    assert!(matches!(session.message().await, ToHost::IdentityReset(_)));
    assert_eq!(idle.next().await, None);
    assert_eq!(running.next().await, None);
    gone(pid).await;
    gone(flood).await;
    session.send(&ToGuest::Ping).await;
    let ToHost::Pong(pong) = session.message().await else { panic!("no pong") };
    assert_eq!(pong.sessions, 1);
}

#[tokio::test]
async fn an_incomplete_request_changes_nothing() {
    let mut host = Host::start().await;
    let mut bystander = host.open().await;
    let mut session = host.open().await;
    for bad in [
        IdentityReset { token: vec![8; TOKEN_LEN - 1].into(), ..order(NEW_TOKEN) },
        IdentityReset { token: Vec::new().into(), ..order(NEW_TOKEN) },
        IdentityReset { entropy: vec![9; ENTROPY_LEN + 1].into(), ..order(NEW_TOKEN) },
        IdentityReset { entropy: Vec::new().into(), ..order(NEW_TOKEN) },
        IdentityReset { hostname: "two words".into(), ..order(NEW_TOKEN) },
        IdentityReset { identity: "../up".into(), ..order(NEW_TOKEN) },
        IdentityReset { time_ns: -1, ..order(NEW_TOKEN) },
    ] {
        session.send(&ToGuest::ResetIdentity(bad)).await;
        assert_eq!(session.failure().await, Fault::Invalid);
    }
    bystander.send(&ToGuest::Ping).await;
    assert!(matches!(bystander.message().await, ToHost::Pong(_)));
    host.open().await;
}

/// What a saved guest goes through: the host that froze it ends the connection and probes without continuing; another
/// host finds it and resets its identity.
#[tokio::test]
async fn a_frozen_agent_waits_for_the_next_host() {
    let mut host = Host::start_silent().await;
    let mut channel = host.accept().await;
    agree(&mut channel, 1).await;
    // The test stands between the multiplexer and the agent, so that it can end the one and keep the other.
    let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
    host.multiplex(ours);
    let (mut from_mux, mut to_mux) = theirs.into_split();
    let (mut from_agent, mut to_agent) = channel.into_split();
    let pump = tokio::spawn(async move {
        tokio::select! {
            _ = tokio::io::copy(&mut from_mux, &mut to_agent) => {}
            _ = tokio::io::copy(&mut from_agent, &mut to_mux) => {}
        }
        (from_agent, to_agent)
    });
    let mut session = host.open().await;
    session.send(&ToGuest::Freeze).await;
    assert_eq!(session.message().await, ToHost::Frozen);
    drop(session);
    host.multiplex(tokio::net::UnixStream::pair().unwrap().0);
    let (from_agent, to_agent) = soon("the old multiplexer's end", pump).await.unwrap();
    let mut channel = from_agent.reunite(to_agent).unwrap();

    let first = probe(&mut channel, 2).await;
    assert_ne!(probe(&mut channel, 30).await, first);
    // A late word of the first host does not begin what the second one has not asked for.
    channel.write_all(&sync::Block { kind: sync::Kind::Go, nonce: first }.bytes()).await.unwrap();
    agree(&mut channel, 77).await;
    host.multiplex(channel);
    let mut session = host.open().await;
    session.send(&ToGuest::ResetIdentity(order(NEW_TOKEN))).await;
    assert!(matches!(session.message().await, ToHost::IdentityReset(_)));
    session.send(&ToGuest::Thaw).await;
    assert_eq!(session.message().await, ToHost::Thawed);
}
