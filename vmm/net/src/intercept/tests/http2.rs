//! HTTP/2.

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use nido_api::egress::DenialReason;
use tokio::task::spawn_local;

use super::{Accepted, Authority, Guest, PLACEHOLDER, Seen, VALUE, World, run};
use crate::intercept::LocalExecutor;

type Client = SendRequest<Full<Bytes>>;

/// A server of HTTP/2 that records requests.
async fn answer(stream: Accepted, seen: Seen) {
    let service = service_fn(move |request: Request<Incoming>| {
        let seen = Seen::clone(&seen);
        async move {
            let (head, body) = request.into_parts();
            let headers = head.headers.iter().map(|(name, value)| format!("{name}: {}\n", value.to_str().unwrap()));
            let headers: String = headers.collect();
            let body = String::from_utf8(body.collect().await?.to_bytes().to_vec()).unwrap();
            seen.borrow_mut().push(format!("{} {}\n{headers}\n{body}", head.method, head.uri));
            Ok::<_, hyper::Error>(Response::new(Full::new(Bytes::from_static(b"done"))))
        }
    });
    let _ =
        hyper::server::conn::http2::Builder::new(LocalExecutor).serve_connection(TokioIo::new(stream), service).await;
}

async fn client(guest: Guest) -> Client {
    let (client, connection) =
        hyper::client::conn::http2::Builder::new(LocalExecutor).handshake(TokioIo::new(guest)).await.unwrap();
    spawn_local(async move { drop(connection.await) });
    client
}

async fn send(client: &mut Client, uri: &str, header: (&str, &str), body: &'static str) -> (StatusCode, String) {
    let request = Request::post(uri).header(header.0, header.1).body(Full::new(Bytes::from_static(body.as_bytes())));
    let (head, body) = client.send_request(request.unwrap()).await.unwrap().into_parts();
    (head.status, String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap())
}

#[test]
fn a_stream_gets_its_secret_in_its_header_only() {
    run(async {
        let mut world = World::new();
        let server = world.serve(&world.server_authority, &["h2", "http/1.1"], answer).await;
        let (_, guest) = world.open(server, &["h2", "http/1.1"]).await;
        assert_eq!(guest.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let mut client = client(guest).await;
        let uri = format!("https://api.example.com/{PLACEHOLDER}?x={PLACEHOLDER}");
        let bearer = format!("Bearer {PLACEHOLDER}");
        let answer = send(&mut client, &uri, ("authorization", &bearer), PLACEHOLDER).await;
        assert_eq!(answer, (StatusCode::OK, "done".into()));
        assert_eq!(send(&mut client, &uri, ("x-other", &bearer), "").await.0, StatusCode::OK);
        world.set(Some("rotated"));
        assert_eq!(send(&mut client, &uri, ("authorization", &bearer), "").await.0, StatusCode::OK);
        let seen = world.seen.borrow().clone();
        assert!(seen[0].contains(&format!("authorization: Bearer {VALUE}\n")), "{}", seen[0]);
        assert!(seen[0].starts_with(&format!("POST {uri}\n")) && seen[0].ends_with(PLACEHOLDER), "{}", seen[0]);
        assert!(seen[1].contains(&format!("x-other: {bearer}\n")), "{}", seen[1]);
        assert!(seen[2].contains("authorization: Bearer rotated\n"), "{}", seen[2]);
        assert_eq!(world.seen().matches(VALUE).count(), 1);
        assert_eq!(world.used(), ["key@api.example.com:authorization"]);
    });
}

#[test]
fn another_authority_is_status_421() {
    run(async {
        let mut world = World::new();
        let server = world.serve(&world.server_authority, &["h2"], answer).await;
        let (_, guest) = world.open(server, &["h2"]).await;
        let mut client = client(guest).await;
        for (uri, header, status) in [
            ("https://other.example.com/", ("authorization", PLACEHOLDER), StatusCode::MISDIRECTED_REQUEST),
            ("https://api.example.com:8443/", ("authorization", PLACEHOLDER), StatusCode::MISDIRECTED_REQUEST),
            ("https://api.example.com/", ("host", "other.example.com"), StatusCode::BAD_REQUEST),
        ] {
            assert_eq!(send(&mut client, uri, header, "").await.0, status, "{uri}");
        }
        assert_eq!((world.seen().as_str(), world.used()), ("", vec![]));
        assert!(world.reasons().contains(&DenialReason::HostMismatch));
        assert_eq!(send(&mut client, "https://api.example.com/", ("a", "b"), "").await.0, StatusCode::OK);
    });
}

#[test]
fn a_server_of_http1_gets_http1() {
    run(async {
        let world = World::new();
        let server = world.serve(&world.server_authority, &["http/1.1"], super::answer).await;
        let (_, guest) = world.open(server, &["h2", "http/1.1"]).await;
        assert_eq!(guest.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    });
}

#[test]
fn nothing_is_sent_to_a_server_whose_certificate_is_not_valid() {
    run(async {
        let mut world = World::new();
        let unknown = Authority::generate().unwrap();
        let server = world.serve(&unknown, &["h2"], answer).await;
        let (_, guest) = world.open(server, &["h2"]).await;
        let mut client = client(guest).await;
        let (status, why) =
            send(&mut client, "https://api.example.com/", ("authorization", PLACEHOLDER), PLACEHOLDER).await;
        assert!(status == StatusCode::BAD_GATEWAY && why.contains("certificate"), "{why}");
        assert_eq!((world.seen().as_str(), world.used()), ("", vec![]));
        assert_eq!(world.reasons(), [DenialReason::CertificateInvalid]);
    });
}
