use super::*;

#[test]
fn unknown_host_names_are_refused() {
    let hosts = Hosts { names: vec!["ci.example".into()], ..Hosts::default() };
    for ours in ["localhost", "localhost:8080", "127.0.0.1:8080", "[::1]:8080", "10.1.2.3", "CI.example:80"] {
        assert!(hosts.is_ours(ours), "{ours}");
    }
    for not in ["", "evil.example", "localhost.evil.example:8080", "127.0.0.1.evil.example", "[evil]:1", ":8080"] {
        assert!(!hosts.is_ours(not), "{not}");
    }
}

// `Host` twice, `Host: localhost@evil`, and a target that names another host were accepted.
#[test]
fn a_request_that_can_be_read_in_two_ways_is_refused() {
    let request = |target: &str, headers: &[(&str, &str)]| {
        let mut request = Request::builder().uri(target);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(axum::body::Body::empty()).unwrap()
    };
    let host = ("host", "localhost:8080");
    for fine in [vec![host], vec![host, ("authorization", "Bearer a")], vec![("host", "[::1]:80")], vec![("host", "")]]
    {
        assert!(check_head(&request("/", &fine)).is_ok(), "{fine:?}");
    }
    for bad in [
        vec![],
        vec![host, host],
        vec![("host", "localhost:8080@evil")],
        vec![("host", "evil@localhost")],
        vec![("host", "local host")],
        vec![host, ("authorization", "Bearer a"), ("authorization", "Bearer b")],
        vec![host, ("origin", "http://localhost:8080"), ("origin", "http://evil")],
    ] {
        assert_eq!(check_head(&request("/", &bad)).unwrap_err().code(), Code::RequestInvalid, "{bad:?}");
    }
    let absolute = request("http://evil.example/v1/vms", &[host]);
    let peer = Peer::Network { tls: false };
    let refused = check_host(&Hosts::default(), &peer, absolute.headers(), authority(&absolute)).unwrap_err();
    assert_eq!(refused.code(), Code::Denied);
}

#[test]
fn pages_of_others_are_refused() {
    let hosts = Hosts { public: Some("https://ci.example/nido/".parse().unwrap()), ..Hosts::default() };
    let check = |origin: &'static str, tls| {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, "localhost:8080".parse().unwrap());
        headers.insert(header::ORIGIN, origin.parse().unwrap());
        check_origin(&hosts, &Peer::Network { tls }, &headers, None).is_ok()
    };
    assert!(check("http://localhost:8080", false) && check("https://localhost:8080", true));
    assert!(check("https://ci.example", false), "its own page, as browsers see it through the proxy");
    for not in ["null", "http://localhost", "http://localhost:8081", "https://localhost:8080", "http://evil"] {
        assert!(!check(not, false), "{not}");
    }
}

// Some clients add a slash to every address.
#[test]
fn a_token_for_agents_opens_their_address_with_and_without_a_slash() {
    for open in ["/mcp", "/mcp/"] {
        assert!(check_restriction(Some(TokenAudience::Mcp), open).is_ok(), "{open}");
    }
    for closed in ["/", "/v1/vms", "/mcp/v1", "/mcpx", "//mcp"] {
        assert!(check_restriction(Some(TokenAudience::Mcp), closed).is_err(), "{closed}");
    }
    assert!(check_restriction(None, "/v1/vms").is_ok());
}

#[test]
fn a_burst_is_let_through_and_then_it_is_enough() {
    let rates = RateLimiter::new(5);
    assert!((0..10).all(|_| rates.take("a").is_ok()));
    assert_eq!(rates.take("a").unwrap_err().code(), Code::RateLimited);
    assert!(rates.take("b").is_ok());
}
