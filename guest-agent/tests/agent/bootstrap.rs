//! Bootstrap requests: what a guest that has just been loaded receives before any multiplexer starts.

use nido_guest_agent::wire::{
    self, Fault, HEAD, Head, Hello, Refusal, Refused, TOKEN_LEN, ToGuest, ToHost, VERSION, Welcome, sync,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::support::{Host, TOKEN, agree, order, shell, soon};

const NEW_TOKEN: [u8; TOKEN_LEN] = [8; TOKEN_LEN];

fn words(token: &[u8], request: &ToGuest) -> Vec<u8> {
    let hello = ToGuest::Hello(Hello { oldest: VERSION, newest: VERSION, token: token.to_vec().into(), nonce: 99 });
    [wire::encode(&hello).unwrap(), wire::encode(request).unwrap()].concat()
}

async fn post(channel: &mut UnixStream, seed: u8, words: &[u8]) {
    let kind = sync::Kind::Letter(u16::try_from(words.len()).unwrap());
    let block = sync::Block { kind, nonce: [seed; 16] }.bytes();
    channel.write_all(&[&block, words].concat()).await.unwrap();
}

/// The next block, and what follows it.
async fn receive(channel: &mut UnixStream) -> (sync::Block, Vec<u8>) {
    let mut scanner = sync::Scanner::default();
    let block = loop {
        if let Some(block) = scanner.push(soon("a block", channel.read_u8()).await.unwrap()) {
            break block;
        }
    };
    let length = if let sync::Kind::Reply(length) = block.kind { usize::from(length) } else { 0 };
    let mut words = vec![0; length];
    soon("the rest of a reply", channel.read_exact(&mut words)).await.unwrap();
    (block, words)
}

/// Sends a bootstrap request; returns the messages of the reply.
async fn send_bootstrap_request(channel: &mut UnixStream, seed: u8, words: &[u8]) -> Vec<ToHost> {
    post(channel, seed, words).await;
    let (block, mut answer) = receive(channel).await;
    assert_eq!((block.nonce, block.kind), ([seed; 16], sync::Kind::Reply(u16::try_from(answer.len()).unwrap())));
    let mut messages = Vec::new();
    while !answer.is_empty() {
        let head = Head::parse(answer[..HEAD].try_into().unwrap()).unwrap();
        messages.push(wire::decode(&answer[HEAD..HEAD + head.length]).unwrap());
        answer.drain(..HEAD + head.length);
    }
    messages
}

#[tokio::test]
async fn a_bootstrap_request_resets_the_identity_before_the_multiplexer_starts() {
    let mut host = Host::start_silent().await;
    let mut channel = host.accept().await;
    channel.write_all(b"noise\xff\xffNIDO").await.unwrap();
    let refused =
        send_bootstrap_request(&mut channel, 2, &words(&NEW_TOKEN, &ToGuest::ResetIdentity(order(NEW_TOKEN)))).await;
    assert!(matches!(&refused[..], [ToHost::Refused(Refused { reason: Refusal::Token, .. })]), "{refused:?}");
    let renewed =
        send_bootstrap_request(&mut channel, 3, &words(&TOKEN, &ToGuest::ResetIdentity(order(NEW_TOKEN)))).await;
    assert!(
        matches!(&renewed[..], [ToHost::Welcome(Welcome { nonce: 99, .. }), ToHost::IdentityReset(pong)] if pong.sessions == 0),
        "{renewed:?}"
    );
    agree(&mut channel, 4).await;
    host.multiplex(channel);
    let Some(ToHost::Refused(Refused { reason, .. })) = host.stream().await.greet(&TOKEN, VERSION, VERSION).await
    else {
        panic!("the old token still opens sessions")
    };
    assert_eq!(reason, Refusal::Token);
    let welcome = host.stream().await.greet(&NEW_TOKEN, VERSION, VERSION).await;
    assert!(matches!(welcome, Some(ToHost::Welcome(_))), "{welcome:?}");
}

#[tokio::test]
async fn a_bootstrap_request_has_a_hello_and_a_request_only() {
    let mut host = Host::start_silent().await;
    let mut channel = host.accept().await;
    let whole = &words(&TOKEN, &ToGuest::ResetIdentity(order(NEW_TOKEN)));
    let hello = whole.len() - wire::encode(&ToGuest::ResetIdentity(order(NEW_TOKEN))).unwrap().len();
    for (seed, bad) in [&b""[..], b"\xff", &[0xff; 4096], &whole[..10], &whole[hello..]].iter().enumerate() {
        let answer = send_bootstrap_request(&mut channel, u8::try_from(seed).unwrap(), bad).await;
        assert!(
            matches!(&answer[..], [ToHost::Refused(Refused { reason: Refusal::NoHello, .. })]),
            "{bad:?}: {answer:?}"
        );
    }
    let exec = words(&TOKEN, &ToGuest::Exec(shell("sleep 1000")));
    for (seed, bad) in
        [&whole[..hello], &whole[..whole.len() - 1], &[whole, &b"x"[..]].concat(), &exec].iter().enumerate()
    {
        let answer = send_bootstrap_request(&mut channel, u8::try_from(seed).unwrap(), bad).await;
        let [ToHost::Welcome(_), ToHost::Failed(failed)] = &answer[..] else { panic!("{bad:?}: {answer:?}") };
        assert_eq!(failed.fault, Fault::Invalid);
    }
    agree(&mut channel, 9).await;
    host.multiplex(channel);
    host.open().await;
}
