//! The channel, against guests that lie at its other end.

use std::future::poll_fn;
use std::time::Duration;

use nido_engine::guest::{Channel, GuestError, Link};
use nido_guest_agent::wire::sync::{Block, FILLER, Kind, Scanner};
use nido_guest_agent::wire::{self, Head, Pong, ToGuest, ToHost};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio_util::compat::{FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};

use crate::fake_agent::welcome;
use crate::rig::{Rig, soon, within};

/// The agent's end of the channel, up to the agreement, and what was seen on the way.
async fn dial(rig: &Rig) -> UnixStream {
    UnixStream::connect(rig.path("channel.sock")).await.unwrap()
}

async fn next_block(channel: &mut UnixStream) -> Block {
    let mut scanner = Scanner::default();
    loop {
        if let Some(block) = scanner.push(channel.read_u8().await.unwrap()) {
            return block;
        }
    }
}

async fn ack(channel: &mut UnixStream, nonce: [u8; 16]) {
    channel.write_all(&Block { kind: Kind::Ack, nonce }.bytes()).await.unwrap();
}

/// Answers probes as an agent does, until GO.
async fn agree(channel: &mut UnixStream) {
    let mut offered = None;
    loop {
        match next_block(channel).await {
            Block { kind: Kind::Probe, nonce } => {
                offered = Some(nonce);
                ack(channel, nonce).await;
            }
            Block { kind: Kind::Go, nonce } if offered == Some(nonce) => return,
            other => panic!("{other:?}"),
        }
    }
}

type Streams = yamux::Connection<tokio_util::compat::Compat<UnixStream>>;

fn multiplex(channel: UnixStream) -> Streams {
    yamux::Connection::new(channel.compat(), yamux::Config::default(), yamux::Mode::Server)
}

/// Answers every session's hello and ping, until the channel ends.
async fn serve_pings(mut streams: Streams) {
    while let Some(Ok(stream)) = poll_fn(|cx| streams.poll_next_inbound(cx)).await {
        tokio::spawn(async move {
            let mut stream = stream.compat();
            let mut head = [0; wire::HEAD];
            while stream.read_exact(&mut head).await.is_ok() {
                let mut payload = vec![0; Head::parse(head).unwrap().length];
                stream.read_exact(&mut payload).await.unwrap();
                let answer = match wire::decode(&payload).unwrap() {
                    ToGuest::Hello(hello) => welcome(hello.nonce),
                    _ => ToHost::Pong(Pong {
                        agent: "x".into(),
                        uptime_ms: 0,
                        sessions: 1,
                        is_init: true,
                        address: None,
                        warnings: None,
                    }),
                };
                stream.write_all(&wire::encode(&answer).unwrap()).await.unwrap();
                stream.flush().await.unwrap();
            }
        });
    }
}

async fn is_up(channel: &Channel) {
    within(channel.link().wait_for(|link| *link == Link::Up)).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn noise_and_old_answers_before_the_agreement_are_skipped() {
    let rig = Rig::without_agent();
    let mut channel = dial(&rig).await;
    within(async {
        let probe = next_block(&mut channel).await;
        assert_eq!(probe.kind, Kind::Probe);
        channel.write_all(&[0, 0, 0, 1, 0xff, b'N', b'I']).await.unwrap();
        channel.write_all(&vec![0xab; 100_000]).await.unwrap();
        ack(&mut channel, [9; 16]).await;
        channel.write_all(&Block { kind: Kind::Go, nonce: probe.nonce }.bytes()).await.unwrap();
        channel.write_all(&Block { kind: Kind::Probe, nonce: probe.nonce }.bytes()).await.unwrap();
        ack(&mut channel, probe.nonce).await;
        agree_from(&mut channel, probe).await;
    })
    .await;
    tokio::spawn(serve_pings(multiplex(channel)));
    rig.guest.ping(soon()).await.unwrap();
}

/// Continues until GO, `offered` having been answered.
async fn agree_from(channel: &mut UnixStream, mut offered: Block) {
    loop {
        let block = next_block(channel).await;
        match block.kind {
            Kind::Go if block.nonce == offered.nonce => return,
            Kind::Probe => {
                offered = block;
                ack(channel, block.nonce).await;
            }
            other => panic!("{other:?}"),
        }
    }
}

/// An agent that was slow answers every probe it finds waiting. The replies behind the first one must not be taken for
/// the start of the multiplexed stream.
#[tokio::test(flavor = "current_thread")]
async fn an_agent_that_answers_late_and_often_is_understood() {
    let rig = Rig::without_agent();
    let mut channel = dial(&rig).await;
    within(async {
        let first = next_block(&mut channel).await;
        let second = next_block(&mut channel).await;
        assert_eq!(first, second, "the same nonce again");
        ack(&mut channel, first.nonce).await;
        ack(&mut channel, first.nonce).await;
        let fresh = next_block(&mut channel).await;
        assert_ne!(fresh.nonce, first.nonce);
        ack(&mut channel, fresh.nonce).await;
        agree_from(&mut channel, fresh).await;
    })
    .await;
    tokio::spawn(serve_pings(multiplex(channel)));
    rig.guest.ping(soon()).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_that_does_not_read_is_not_flooded() {
    let rig = Rig::without_agent();
    let mut channel = dial(&rig).await;
    let mut link = rig.channel.link();
    within(link.wait_for(|link| *link == Link::Agreeing)).await.unwrap();
    // By the clock alone there would be one for each step.
    tokio::time::pause();
    for _ in 0..50 {
        tokio::time::advance(Duration::from_secs(3)).await;
        tokio::task::yield_now().await;
    }
    tokio::time::resume();
    let mut waiting = vec![0; 1 << 20];
    let count = within(channel.read(&mut waiting)).await.unwrap();
    assert!(count <= 4 * wire::sync::BLOCK, "{count} bytes were waiting");
}

#[tokio::test(flavor = "current_thread")]
async fn an_agent_stuck_inside_a_frame_is_fed_until_it_is_out() {
    let rig = Rig::without_agent();
    let mut channel = dial(&rig).await;
    within(async {
        // It takes what comes for the body of a frame of the largest size.
        channel.read_exact(&mut vec![0; FILLER]).await.unwrap();
        agree(&mut channel).await;
    })
    .await;
    tokio::spawn(serve_pings(multiplex(channel)));
    rig.guest.ping(soon()).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_that_opens_streams_is_disconnected_and_may_reconnect() {
    let rig = Rig::without_agent();
    let mut channel = dial(&rig).await;
    within(agree(&mut channel)).await;
    is_up(&rig.channel).await;
    // A window update with SYN, as opens a stream: version 0, type 1, flag 1, even numbers.
    for id in 1..=200u32 {
        let mut frame = [0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
        frame[4..8].copy_from_slice(&(2 * id).to_be_bytes());
        if channel.write_all(&frame).await.is_err() {
            break;
        }
    }
    within(rig.channel.link().wait_for(|link| *link == Link::Waiting)).await.unwrap();
    let mut channel = dial(&rig).await;
    within(agree(&mut channel)).await;
    tokio::spawn(serve_pings(multiplex(channel)));
    rig.guest.ping(soon()).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn garbage_in_a_running_channel_ends_it_for_everyone() {
    let rig = Rig::without_agent();
    let mut channel = dial(&rig).await;
    within(agree(&mut channel)).await;
    let garbage = async {
        let mut first = [0; 64];
        channel.read_exact(&mut first).await.unwrap();
        channel.write_all(&[0xff; 64]).await.unwrap();
    };
    let (outcome, ()) = within(async { tokio::join!(rig.guest.ping(soon()), garbage) }).await;
    assert!(matches!(outcome, Err(GuestError::Gone)), "{outcome:?}");
    within(rig.channel.link().wait_for(|link| *link == Link::Waiting)).await.unwrap();
}
