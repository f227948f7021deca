//! Bootstrap requests to a guest that has just been loaded: with the real agent, and with fake ones.

use std::time::Duration;

use nido_engine::guest::{Guest, GuestError, Link, Session};
use nido_guest_agent::wire::sync::{BLOCK, BOOTSTRAP_REQUEST_MAX, Block, Kind, Scanner};
use nido_guest_agent::wire::{self, ENTROPY_LEN, Head, IdentityReset, Pong, TOKEN_LEN, ToGuest, ToHost};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::fake_agent::welcome;
use crate::rig::{Rig, TOKEN, soon, within};

const NEW_TOKEN: [u8; TOKEN_LEN] = [8; TOKEN_LEN];

fn order() -> IdentityReset {
    IdentityReset {
        token: NEW_TOKEN.to_vec().into(),
        entropy: vec![9; ENTROPY_LEN].into(),
        time_ns: 1_700_000_000_000_000_000,
        hostname: "web".into(),
        identity: "0123abc".into(),
        network: None,
        disk_grown: false,
    }
}

async fn reset_identity(rig: &Rig, token: &[u8], deadline: Instant) -> Option<Result<Pong, GuestError>> {
    within(Session::reset_identity_by_bootstrap(&rig.channel, token, &order(), deadline)).await
}

#[tokio::test(flavor = "current_thread")]
async fn the_identity_is_reset_before_the_multiplexer_starts() {
    let mut rig = Rig::with_bootstrap();
    rig.start_agent();
    assert!(matches!(reset_identity(&rig, b"wrong", soon()).await, Some(Err(GuestError::TokenRefused))));
    assert_eq!(*rig.channel.link().borrow(), Link::Waiting);
    reset_identity(&rig, TOKEN, soon()).await.unwrap().unwrap();
    rig.channel.end_bootstrap();
    assert!(matches!(rig.guest.wait_ready(soon()).await, Err(GuestError::TokenRefused)));
    Guest::new(rig.guest.endpoint().clone(), NEW_TOKEN.to_vec()).wait_ready(soon()).await.unwrap();
    assert!(reset_identity(&rig, TOKEN, soon()).await.is_none(), "there are streams now");
}

/// The bootstrap request that arrives, and the hello in it.
async fn receive_bootstrap_request(channel: &mut UnixStream) -> (Block, wire::Hello) {
    let mut scanner = Scanner::default();
    let block = loop {
        if let Some(block) = scanner.push(channel.read_u8().await.unwrap()) {
            break block;
        }
    };
    let Kind::Letter(length) = block.kind else { panic!("{block:?}") };
    let mut words = vec![0; length.into()];
    channel.read_exact(&mut words).await.unwrap();
    let head = Head::parse(*words.first_chunk().unwrap()).unwrap();
    let ToGuest::Hello(hello) = wire::decode(&words[wire::HEAD..wire::HEAD + head.length]).unwrap() else {
        panic!("no hello")
    };
    (block, hello)
}

fn reply(to: Block, words: &[u8]) -> Vec<u8> {
    let kind = Kind::Reply(u16::try_from(words.len()).unwrap());
    [&Block { kind, nonce: to.nonce }.bytes(), words].concat()
}

fn identity_reset_reply() -> ToHost {
    ToHost::IdentityReset(Pong {
        agent: "x".into(),
        uptime_ms: 0,
        sessions: 1,
        is_init: true,
        address: None,
        warnings: None,
    })
}

/// Replies to one bootstrap request with `answer`; returns the result.
async fn answered(answer: impl FnOnce(Block, u64) -> Vec<u8>) -> Result<Pong, GuestError> {
    let rig = Rig::with_bootstrap();
    let mut channel = UnixStream::connect(rig.path("channel.sock")).await.unwrap();
    let guest = async {
        let (block, hello) = receive_bootstrap_request(&mut channel).await;
        channel.write_all(&answer(block, hello.nonce)).await.unwrap();
    };
    let (outcome, ()) = tokio::join!(reset_identity(&rig, TOKEN, soon()), guest);
    outcome.unwrap()
}

fn whole(nonce: u64) -> Vec<u8> {
    [wire::encode(&welcome(nonce)).unwrap(), wire::encode(&identity_reset_reply()).unwrap()].concat()
}

#[tokio::test(flavor = "current_thread")]
async fn only_the_reply_to_this_bootstrap_request_is_accepted() {
    let noise = |block: Block, nonce| {
        let older = Block { nonce: [3; 16], ..block };
        [vec![0xab; 10_000], b"\xff\xffNIDO".to_vec(), reply(older, b"old"), reply(block, &whole(nonce))].concat()
    };
    answered(noise).await.unwrap();
    for lie in [
        |block, nonce: u64| reply(block, &whole(nonce.wrapping_add(1))),
        |block, nonce| reply(block, &whole(nonce)[..5]),
        |block, nonce| reply(block, &wire::encode(&welcome(nonce)).unwrap()),
        |block, nonce| reply(block, &[wire::encode(&welcome(nonce)).unwrap(), vec![0x01, 0xff, 0xff, 0xff]].concat()),
        |block, _| reply(block, b""),
        |block, _| reply(block, &[0xff; BOOTSTRAP_REQUEST_MAX]),
        |block, nonce| {
            reply(block, &[wire::encode(&welcome(nonce)).unwrap(), wire::encode(&ToHost::Thawed).unwrap()].concat())
        },
    ] {
        assert!(matches!(answered(lie).await, Err(GuestError::Protocol(_))), "{:?}", answered(lie).await);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_silent_guest_times_out_and_a_closed_one_is_gone() {
    let rig = Rig::with_bootstrap();
    let mut channel = UnixStream::connect(rig.path("channel.sock")).await.unwrap();
    channel.write_all(&vec![0xab; 100_000]).await.unwrap();
    let late = reset_identity(&rig, TOKEN, Instant::now() + Duration::from_millis(300)).await;
    assert!(matches!(late, Some(Err(GuestError::Timeout { .. }))), "{late:?}");
    let half = async {
        receive_bootstrap_request(&mut channel).await;
        let (block, hello) = receive_bootstrap_request(&mut channel).await;
        channel.write_all(&reply(block, &whole(hello.nonce))[..BLOCK + 3]).await.unwrap();
        drop(channel);
    };
    let (gone, ()) = tokio::join!(reset_identity(&rig, TOKEN, soon()), half);
    assert!(matches!(gone, Some(Err(GuestError::Gone))), "{gone:?}");
}
