//! Forwarded connections, against the real agent.

use nido_engine::guest::{Connections, proxy};
use nido_guest_agent::wire::{Connect, Fault};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::rig::{Rig, soon, until, within};

/// A server that sends back what it gets and half-closes when its client does.
async fn echo_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = client.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
                let _ = to.write_all(b" and goodbye").await;
            });
        }
    });
    port
}

#[tokio::test(flavor = "current_thread")]
async fn a_port_is_forwarded_and_half_closes_are_kept() {
    let rig = Rig::start().await;
    let to = Connect { host: None, port: echo_server().await };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let here = listener.local_addr().unwrap();
    let guest = rig.guest.clone();
    let forward = tokio::spawn(async move { guest.forward(listener, to, &Connections::new(4), || ()).await });
    // More than four in all, so places are given back.
    for size in [0, 1, 100_000, 3_000_000, 5, 6, 7] {
        let mut client = TcpStream::connect(here).await.unwrap();
        let sent = vec![0x61; size];
        let (mut from, mut into) = client.split();
        let mut got = Vec::new();
        let send = async {
            into.write_all(&sent).await.unwrap();
            into.shutdown().await.unwrap();
        };
        within(async { tokio::join!(send, async { from.read_to_end(&mut got).await.unwrap() }) }).await;
        assert_eq!(got.len(), size + " and goodbye".len());
    }
    forward.abort();
}

#[tokio::test(flavor = "current_thread")]
async fn a_full_forward_refuses_and_closed_clients_free_slots() {
    // The 33rd connection was accepted and never served, and clients that had gone kept their places.
    let rig = Rig::start().await;
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = Connect { host: None, port: server.local_addr().unwrap().port() };
    // It greets, and never closes.
    tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((mut client, _)) = server.accept().await {
            client.write_all(b"hello").await.unwrap();
            open.push(client);
        }
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let here = listener.local_addr().unwrap();
    let guest = rig.guest.clone();
    let forward = tokio::spawn(async move { guest.forward(listener, to, &Connections::new(2), || ()).await });
    let mut clients = Vec::new();
    for _ in 0..2 {
        let mut client = TcpStream::connect(here).await.unwrap();
        within(client.read_exact(&mut [0; 5])).await.unwrap();
        clients.push(client);
    }
    let mut refused = TcpStream::connect(here).await.unwrap();
    assert!(!matches!(within(refused.read(&mut [0; 5])).await, Ok(1..)));
    drop(clients);
    until("a place is free", async || {
        let mut client = TcpStream::connect(here).await.unwrap();
        within(client.read_exact(&mut [0; 5])).await.is_ok()
    })
    .await;
    forward.abort();
}

#[tokio::test(flavor = "current_thread")]
async fn a_port_without_a_listener_is_reported_as_closed() {
    let rig = Rig::start().await;
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = unused.local_addr().unwrap().port();
    drop(unused);
    let error = rig.guest.connect(&Connect { host: None, port }, soon()).await.unwrap_err();
    assert_eq!(error.fault(), Some(Fault::Unreachable), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn a_proxy_ends_when_the_guest_does() {
    let rig = Rig::start().await;
    let to = Connect { host: None, port: echo_server().await };
    let tunnel = rig.guest.connect(&to, soon()).await.unwrap();
    let (mut keyboard, input) = tokio::io::duplex(64);
    let (output, mut screen) = tokio::io::duplex(64);
    let mut shown = String::new();
    let use_it = async {
        keyboard.write_all(b"hello").await.unwrap();
        keyboard.shutdown().await.unwrap();
        screen.read_to_string(&mut shown).await.unwrap();
    };
    let (ended, ()) = within(async { tokio::join!(proxy(tunnel, input, output), use_it) }).await;
    ended.unwrap();
    assert_eq!(shown, "hello and goodbye");
}

/// A client of a forwarded port closes; the server inside does not check and keeps sending. Without a reset of the
/// half-closed stream the agent's session stayed for ever, and after 64 such clients the agent was busy.
#[tokio::test(flavor = "current_thread")]
async fn a_connection_whose_client_has_gone_does_not_stay() {
    let rig = Rig::start().await;
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = Connect { host: None, port: server.local_addr().unwrap().port() };
    tokio::spawn(async move {
        while let Ok((mut client, _)) = server.accept().await {
            tokio::spawn(async move { while client.write_all(&[0; 10_000]).await.is_ok() {} });
        }
    });
    for _ in 0..3 {
        let mut tunnel = rig.guest.connect(&to, soon()).await.unwrap();
        within(tunnel.read_exact(&mut [0; 100])).await.unwrap();
        tunnel.shutdown().await.unwrap();
        within(tunnel.read_exact(&mut [0; 100])).await.unwrap();
    }
    until("the sessions end", async || rig.guest.ping(soon()).await.unwrap().sessions == 1).await;
}

/// The same where the server is silent: then nothing but the client's own end can show that the client is gone, and the
/// VM would never count as idle.
#[tokio::test(flavor = "current_thread")]
async fn a_half_closed_connection_ends_with_its_client() {
    let rig = Rig::start().await;
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = Connect { host: None, port: server.local_addr().unwrap().port() };
    let mut tunnel = rig.guest.connect(&to, soon()).await.unwrap();
    let (mut inside, _) = server.accept().await.unwrap();
    tunnel.shutdown().await.unwrap();
    assert_eq!(within(inside.read(&mut [0])).await.unwrap(), 0);
    let mut open = rig.channel.activity().open();
    within(open.wait_for(|open| *open == 1)).await.unwrap();
    drop(tunnel);
    within(open.wait_for(|open| *open == 0)).await.unwrap();
    // The agent notices as a host without it would: when the server sends something, or closes.
    drop(inside);
    until("the session ends", async || rig.guest.ping(soon()).await.unwrap().sessions == 1).await;
}
