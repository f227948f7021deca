//! Connections to ports inside the guest.

use nido_guest_agent::wire::{Connect, Fault, ToGuest, ToHost};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::support::{Host, soon};

#[tokio::test]
async fn both_directions_carry_bytes_and_end_independently() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let Ok(guest) = TcpListener::bind(address).await else { panic!("{address} is not there") };
        let port = guest.local_addr().unwrap().port();
        session.send(&ToGuest::Connect(Connect { host: None, port })).await;
        let (mut stream, _) = soon("a connection", guest.accept()).await.unwrap();
        assert_eq!(session.message().await, ToHost::Connected);
        let sent: Vec<u8> = (0..=255).cycle().take(1_000_000).collect();
        let (ours, theirs) = (sent.clone(), sent.clone());
        let echo = async {
            let mut received = Vec::new();
            stream.read_to_end(&mut received).await.unwrap();
            assert!(received == theirs);
            stream.write_all(&received).await.unwrap();
            drop(stream);
        };
        let ask = async {
            session.stream.write_all(&ours).await.unwrap();
            // Half-closed: the reply still comes.
            session.stream.shutdown().await.unwrap();
            let mut received = Vec::new();
            session.stream.read_to_end(&mut received).await.unwrap();
            assert!(received == ours);
        };
        soon("an echo", futures::future::join(echo, ask)).await;
        session = host.open().await;
    }
}

#[tokio::test]
async fn nothing_that_listens_is_unreachable() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    session.send(&ToGuest::Connect(Connect { host: None, port: free })).await;
    assert_eq!(session.failure().await, Fault::Unreachable);
    session.send(&ToGuest::Connect(Connect { host: Some("localhost".into()), port: free })).await;
    assert_eq!(session.failure().await, Fault::Invalid);
    assert_eq!(session.run("echo on").await.stdout, b"on\n");
}
