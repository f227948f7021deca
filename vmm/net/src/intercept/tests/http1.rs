//! HTTP/1.1.

use nido_api::egress::DenialReason;
use proptest::prelude::Rng;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{Authority, Guest, PLACEHOLDER, VALUE, World, answer, message, run};

/// Sends a request, and returns the response.
async fn exchange(guest: &mut Guest, request: &str) -> String {
    guest.write_all(request.as_bytes()).await.unwrap();
    message(guest).await.unwrap_or_default()
}

fn get(header: &str) -> String {
    format!("GET /a?b=c HTTP/1.1\r\nHost: api.example.com\r\n{header}\r\n\r\n")
}

#[test]
fn the_placeholder_is_replaced_in_its_header_only() {
    run(async {
        let mut world = World::new();
        let server = world.serve(&world.server_authority, &["http/1.1"], answer).await;
        let (_, mut guest) = world.open(server, &["http/1.1"]).await;
        let request = format!(
            "POST /{PLACEHOLDER} HTTP/1.1\r\nHost: api.example.com\r\nAuthorization: Bearer {PLACEHOLDER}\r\n\
             X-Other: {PLACEHOLDER}\r\nContent-Length: {}\r\n\r\n{PLACEHOLDER}",
            PLACEHOLDER.len()
        );
        assert!(exchange(&mut guest, &request).await.ends_with("\r\n\r\n1"));
        let seen = world.seen();
        assert!(seen.contains(&format!("authorization: Bearer {VALUE}\r\n")), "{seen}");
        assert_eq!(seen.matches(VALUE).count(), 1, "{seen}");
        assert!(seen.starts_with(&format!("POST /{PLACEHOLDER} HTTP/1.1\r\n")), "{seen}");
        assert!(seen.contains(&format!("x-other: {PLACEHOLDER}\r\n")) && seen.ends_with(PLACEHOLDER), "{seen}");
        assert_eq!(world.used(), ["key@api.example.com:authorization"]);
        assert_eq!(world.reasons(), []);
    });
}

#[test]
fn a_request_without_the_placeholder_passes_unchanged() {
    run(async {
        let mut world = World::new();
        world.set(None);
        let server = world.serve(&world.server_authority, &["http/1.1"], answer).await;
        // A client without ALPN.
        let (_, mut guest) = world.open(server, &[]).await;
        assert!(exchange(&mut guest, &get("Authorization: Basic abc")).await.starts_with("HTTP/1.1 200"));
        assert!(world.seen().contains("authorization: Basic abc\r\n"));
        assert_eq!((world.used(), world.reasons()), (vec![], vec![]));
    });
}

#[test]
fn a_new_value_is_used_by_the_next_request_of_a_connection() {
    run(async {
        let world = World::new();
        let server = world.serve(&world.server_authority, &["http/1.1"], answer).await;
        let (_, mut guest) = world.open(server, &["http/1.1"]).await;
        let request = get(&format!("Authorization: {PLACEHOLDER}"));
        assert!(exchange(&mut guest, &request).await.ends_with('1'));
        world.set(Some("rotated"));
        assert!(exchange(&mut guest, &request).await.ends_with('2'));
        assert!(world.seen.borrow()[0].contains(&format!("authorization: {VALUE}\r\n")));
        assert!(world.seen.borrow()[1].contains("authorization: rotated\r\n"));
    });
}

#[test]
fn a_secret_that_cannot_be_read_is_status_502() {
    run(async {
        let mut world = World::new();
        world.set(None);
        let server = world.serve(&world.server_authority, &["http/1.1"], answer).await;
        let (_, mut guest) = world.open(server, &["http/1.1"]).await;
        let response = exchange(&mut guest, &get(&format!("Authorization: {PLACEHOLDER}"))).await;
        assert!(response.starts_with("HTTP/1.1 502") && response.contains("the secret key"), "{response}");
        assert_eq!((world.seen().as_str(), world.reasons()), ("", vec![DenialReason::SecretUnavailable]));
    });
}

#[test]
fn another_host_is_status_421() {
    run(async {
        let mut world = World::new();
        let server = world.serve(&world.server_authority, &["http/1.1"], answer).await;
        let (_, mut guest) = world.open(server, &["http/1.1"]).await;
        for host in ["other.example.com", "api.example.com:8443", "user@api.example.com", "api.example.com."] {
            let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\nAuthorization: {PLACEHOLDER}\r\n\r\n");
            let response = exchange(&mut guest, &request).await;
            assert!(response.starts_with("HTTP/1.1 421"), "{host}: {response}");
        }
        assert!(world.reasons().contains(&DenialReason::HostMismatch));
        let request = "GET https://api.example.com/ HTTP/1.1\r\nHost: API.example.com:443\r\n\r\n";
        let response = exchange(&mut guest, request).await;
        assert!(response.starts_with("HTTP/1.1 400"), "{response}");
        assert_eq!(world.seen(), "");
        assert!(exchange(&mut guest, "GET / HTTP/1.1\r\nHost: API.example.com:443\r\n\r\n").await.ends_with('1'));
    });
}

#[test]
fn requests_that_could_be_read_in_two_ways_are_refused_or_written_again() {
    run(async {
        let world = World::new();
        let server = world.serve(&world.server_authority, &["http/1.1"], answer).await;
        let host = "Host: api.example.com\r\n";
        for bad in [
            format!("CONNECT api.example.com:443 HTTP/1.1\r\n{host}\r\n"),
            format!("GET / HTTP/1.1\r\n{host}{host}\r\n"),
            format!("GET / HTTP/1.1\r\n{host}Host: other.example.com\r\n\r\n"),
            format!("GET https://other.example.com/ HTTP/1.1\r\n{host}\r\n"),
            "GET / HTTP/1.1\r\n\r\n".into(),
            format!("GET / HTTP/1.1\r\n{host}A: b\r\n c\r\n\r\n"),
            format!("GET / HTTP/1.1\r\n{host}Content-Length: 1\r\nContent-Length: 2\r\n\r\n"),
            format!("GET / HTTP/1.1\r\n{host}Transfer-Encoding: gzip\r\n\r\n"),
            format!("GET / HTTP/1.1\r\n{host}Content-Length: +1\r\n\r\na"),
            format!("GET / HTTP/1.1\r\n{host}A : b\r\n\r\n"),
            format!("GET / HTTP/1.1\r\n{host}A: {}\r\n\r\n", "x".repeat(80 << 10)),
        ] {
            let (_, mut guest) = world.open(server, &["http/1.1"]).await;
            // The end of what is too long may be refused before it was sent.
            let _ = guest.write_all(bad.as_bytes()).await;
            let _ = guest.flush().await;
            let response = message(&mut guest).await.unwrap_or_default();
            let shown = &bad[..bad.len().min(120)];
            assert!(response.is_empty() || response.starts_with("HTTP/1.1 4"), "{shown}: {response}");
            assert_eq!(world.seen(), "", "{shown}");
        }
        // Two lengths: the server gets one.
        for lengths in
            ["Content-Length: 3\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nContent-Length: 3"]
        {
            let (_, mut guest) = world.open(server, &["http/1.1"]).await;
            let request = format!("POST / HTTP/1.1\r\n{host}{lengths}\r\n\r\n5\r\nhello\r\n0\r\n\r\n");
            let _ = guest.write_all(request.as_bytes()).await;
            let response = message(&mut guest).await.unwrap_or_default();
            assert!(!response.starts_with("HTTP/1.1 2") || !world.seen().contains("content-length"), "{response}");
        }
        // `Connection` does not remove the host.
        let (_, mut guest) = world.open(server, &["http/1.1"]).await;
        exchange(&mut guest, &get("Connection: host, x-a\r\nX-A: b\r\nUpgrade: websocket")).await;
        let last = world.seen.borrow().last().cloned().unwrap().to_ascii_lowercase();
        assert!(last.contains("host: api.example.com\r\n"), "{last}");
        assert!(!last.contains("x-a") && !last.contains("upgrade"), "{last}");
    });
}

#[test]
fn nothing_is_sent_to_a_server_whose_certificate_is_not_valid() {
    run(async {
        let mut world = World::new();
        let unknown = Authority::generate().unwrap();
        let server = world.serve(&unknown, &["http/1.1"], answer).await;
        let (_, mut guest) = world.open(server, &["http/1.1"]).await;
        let response = exchange(&mut guest, &get(&format!("Authorization: {PLACEHOLDER}"))).await;
        assert!(response.starts_with("HTTP/1.1 502") && response.contains("certificate"), "{response}");
        assert_eq!((world.seen().as_str(), world.used()), ("", vec![]));
        assert_eq!(world.reasons(), [DenialReason::CertificateInvalid]);
    });
}

#[test]
fn a_secret_whose_use_cannot_be_recorded_does_not_leave() {
    run(async {
        let mut world = World::new();
        world.records.set(false);
        let server = world.serve(&world.server_authority, &["http/1.1"], answer).await;
        let (_, mut guest) = world.open(server, &["http/1.1"]).await;
        let request = get(&format!("Authorization: {PLACEHOLDER}"));
        let response = exchange(&mut guest, &request).await;
        assert!(response.starts_with("HTTP/1.1 502") && response.contains("cannot be recorded"), "{response}");
        assert_eq!((world.seen().as_str(), world.used()), ("", vec![]));
        assert_eq!(world.reasons(), [DenialReason::SecretUnavailable]);
        world.records.set(true);
        assert!(exchange(&mut guest, &request).await.starts_with("HTTP/1.1 200"));
        assert_eq!(world.used(), ["key@api.example.com:authorization"]);
    });
}

#[test]
fn a_server_without_tls_is_status_502_and_no_denial() {
    run(async {
        let mut world = World::new();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = listener.local_addr().unwrap();
        tokio::task::spawn_local(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        });
        let (_, mut guest) = world.open(server, &["http/1.1"]).await;
        let response = exchange(&mut guest, &get(&format!("Authorization: {PLACEHOLDER}"))).await;
        assert!(response.starts_with("HTTP/1.1 502"), "{response}");
        assert_eq!((world.reasons(), world.used()), (vec![], vec![]));
    });
}

#[test]
fn the_end_of_the_servers_connection_ends_the_guests() {
    run(async {
        let world = World::new();
        let server = world
            .serve(&world.server_authority, &["http/1.1"], |mut stream, _| async move {
                message(&mut stream).await.unwrap();
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx").await.unwrap();
                stream.shutdown().await.unwrap();
            })
            .await;
        let (task, mut guest) = world.open(server, &["http/1.1"]).await;
        assert!(exchange(&mut guest, &get("A: b")).await.ends_with('x'));
        assert_eq!(guest.read(&mut [0]).await.unwrap_or(0), 0);
        task.await.unwrap();
    });
}

#[test]
fn any_bytes_end_without_a_panic() {
    run(async {
        let world = World::new();
        let server = world.serve(&world.server_authority, &["h2", "http/1.1"], answer).await;
        let mut random = proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha);
        for round in 0..150_usize {
            let protocol = ["http/1.1", "h2"][round % 2];
            let mut bytes = match round % 3 {
                0 => Vec::new(),
                1 => get(&format!("X: {PLACEHOLDER}\r\nContent-Length: 3")).into_bytes(),
                _ => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec(),
            };
            let more = random.next_u32() as usize % 600;
            bytes.extend((0..more).map(|_| random.next_u32() as u8));
            if round % 4 == 0 {
                for _ in 0..3 {
                    let at = random.next_u32() as usize % (bytes.len() + 1);
                    bytes.insert(at, random.next_u32() as u8);
                }
            }
            let task = if round % 5 == 0 {
                // In place of the handshake.
                let (task, mut stream) = world.begin(server).await;
                let _ = stream.write_all(&bytes).await;
                task
            } else {
                let (task, mut guest) = world.open(server, &[protocol]).await;
                let _ = guest.write_all(&bytes).await;
                let _ = guest.shutdown().await;
                drop(guest);
                task
            };
            task.await.unwrap();
        }
        assert!(!world.seen().contains(VALUE));
    });
}
