//! One attempt: a signed message is posted, and the answer's status is all that is read of it.
//!
//! Invariant: the addresses that were checked are exactly those that are connected to. A name goes through
//! `CheckedResolver`, an address in the URL itself through [`Sender::new`], and redirects are not followed.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use jiff::Timestamp;
use nido_api::error::{Code, Error, Hint, Result};
use nido_api::{WebhookFormat, WebhookSecret};
use nido_store::WebhookRow;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::RETRY_AFTER;
use reqwest::{Client, Response, Url};

use super::message::{Recipient, render};
use super::target;
use super::verdict::{Verdict, verdict};

/// How long an attempt may take, from the lookup of the name to the answer's head.
pub const RESPONSE_TIMEOUT: Duration = Duration::from_secs(15);
/// The most header lines of an answer.
const HEADERS_MAX: usize = 64;
/// How much of an answer's body is read, to be thrown away, so that its connection can be used again.
const BODY_MAX: usize = 16 << 10;
/// How long that may take.
const BODY_TIMEOUT: Duration = Duration::from_millis(100);
/// How long a connection is kept that nothing is sent over. Short, so that the other side rarely closes it first.
const IDLE: Duration = Duration::from_secs(1);
/// The longest reason that is kept, in characters.
const REASON_BYTES_MAX: usize = 200;

/// What came of an attempt.
#[derive(Debug)]
pub struct AttemptResult {
    /// The HTTP status, if there was an answer.
    pub status: Option<u16>,
    /// What it means.
    pub verdict: Verdict,
}

impl AttemptResult {
    /// There was none.
    #[must_use]
    pub fn none(why: impl Into<String>) -> Self {
        Self { status: None, verdict: Verdict::Again { why: why.into(), retry_after_ms: None } }
    }
}

/// Posts messages to one endpoint.
#[derive(Debug)]
pub struct Sender {
    client: Client,
    url: Url,
    secret: WebhookSecret,
    format: WebhookFormat,
}

impl Sender {
    /// For an endpoint.
    ///
    /// # Errors
    /// `webhook_invalid`; `tool_missing` if this host has no authorities' certificates to check an endpoint by.
    pub fn new(row: &WebhookRow) -> Result<Self> {
        let url = target::parse(&row.url, row.allow_private)?;
        let client = Client::builder()
            .tls_backend_preconfigured(tls(url.scheme() == "https")?)
            .user_agent(concat!("nido/", env!("CARGO_PKG_VERSION")))
            .dns_resolver(Arc::new(CheckedResolver { allow_private: row.allow_private }))
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            // The process that starts a delivery worker may have proxies in its environment that do not apply to the worker.
            .no_proxy()
            .http1_only()
            .http1_max_headers(HEADERS_MAX)
            .pool_idle_timeout(IDLE)
            .build()
            .map_err(|e| Error::internal(format!("cannot create an HTTP client: {}", reason(&e))))?;
        Ok(Self { client, url, secret: row.secret.clone(), format: row.format })
    }

    /// Posts a message, once. `kept` is its body as it was written with the event.
    pub async fn post(&self, message_id: &str, kept: String) -> AttemptResult {
        let to = Recipient { format: self.format, message_id, routing_key: self.secret.routing_key() };
        let body = match render(kept, &to) {
            Ok(body) => body,
            Err(error) => return AttemptResult::none(error.message()),
        };
        match tokio::time::timeout(RESPONSE_TIMEOUT, self.request(message_id, body).send()).await {
            Err(_) => AttemptResult::none(format!("no response within {} s", RESPONSE_TIMEOUT.as_secs())),
            Ok(Err(error)) => AttemptResult::none(reason(&error)),
            Ok(Ok(response)) => {
                let status = response.status().as_u16();
                let retry_after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
                let verdict = verdict(status, retry_after, Timestamp::now());
                discard(response).await;
                AttemptResult { status: Some(status), verdict }
            }
        }
    }

    fn request(&self, message_id: &str, body: String) -> reqwest::RequestBuilder {
        let timestamp = Timestamp::now().as_second();
        let request = self
            .client
            .post(self.url.clone())
            .header("content-type", "application/json")
            .header("webhook-id", message_id)
            .header("webhook-timestamp", timestamp);
        let request = match self.secret.sign(message_id, timestamp, &body) {
            Some(signature) => request.header("webhook-signature", signature),
            None => request,
        };
        request.body(body)
    }
}

/// Reads what is left of a short answer.
async fn discard(mut response: Response) {
    let read = async {
        let mut left = BODY_MAX;
        while let Ok(Some(chunk)) = response.chunk().await {
            left = left.saturating_sub(chunk.len());
            if left == 0 {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(BODY_TIMEOUT, read).await;
}

/// The addresses of a name, all of them checked.
///
/// # Errors
/// `webhook_invalid` if one of them is not allowed, `timeout` if the name cannot be resolved in time.
pub async fn resolve(host: &str, allow_private: bool) -> Result<Vec<SocketAddr>> {
    // The text of the host's resolver has no further details.
    let unknown = || Error::new(Code::Timeout, "the endpoint's name cannot be resolved");
    let found: Vec<_> = tokio::net::lookup_host((host, 0)).await.map_err(|_| unknown())?.collect();
    if found.is_empty() {
        return Err(unknown());
    }
    if !allow_private {
        found.iter().try_for_each(|address| target::check(address.ip()))?;
    }
    Ok(found)
}

/// Resolves names to addresses that may be connected to.
struct CheckedResolver {
    allow_private: bool,
}

impl Resolve for CheckedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let allow_private = self.allow_private;
        Box::pin(async move {
            let found = resolve(name.as_str(), allow_private).await?;
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// How endpoints prove who they are: by the certificates that this host trusts.
fn tls(needed: bool) -> Result<rustls::ClientConfig> {
    static TRUSTED: OnceLock<rustls::ClientConfig> = OnceLock::new();
    let with = |roots: rustls::RootCertStore| {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| Error::internal(format!("TLS cannot be set up: {e}")))?;
        Ok::<_, Error>(builder.with_root_certificates(roots).with_no_client_auth())
    };
    if !needed {
        return with(rustls::RootCertStore::empty());
    }
    if let Some(trusted) = TRUSTED.get() {
        return Ok(trusted.clone());
    }
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        return Err(Error::new(Code::ToolMissing, "this host has no certificate authorities to verify endpoints")
            .hint(Hint::host("install them: apt-get install ca-certificates")));
    }
    let trusted = with(roots)?;
    Ok(TRUSTED.get_or_init(|| trusted).clone())
}

/// Why an attempt failed, as reported by the innermost error; without the URL, which may contain a secret.
fn reason(error: &reqwest::Error) -> String {
    let mut deepest: &dyn std::error::Error = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    if let Some(ours) = deepest.downcast_ref::<Error>() {
        return ours.message().to_owned();
    }
    if std::ptr::addr_eq(deepest, error) {
        return "the request failed".into();
    }
    if let Some(rustls::Error::InvalidCertificate(why)) = deepest.downcast_ref() {
        return format!("no response: the endpoint's certificate {}", certificate_fault(why));
    }
    let text: String = deepest.to_string().chars().flat_map(char::escape_debug).take(REASON_BYTES_MAX).collect();
    format!("no response: {text}")
}

/// What is wrong with a certificate.
fn certificate_fault(error: &rustls::CertificateError) -> String {
    use rustls::CertificateError as Fault;
    match error {
        Fault::UnknownIssuer => "is not signed by an authority that this host trusts".into(),
        Fault::Expired | Fault::ExpiredContext { .. } => "has expired".into(),
        Fault::NotValidYet | Fault::NotValidYetContext { .. } => "is not valid yet".into(),
        Fault::NotValidForName | Fault::NotValidForNameContext { .. } => "is for another name".into(),
        Fault::Revoked => "was revoked".into(),
        other => {
            let text = format!("{other:?}");
            // An authority's own certificate, which is what the usual recipes for a self-signed one make.
            if text.contains("CaUsedAsEndEntity") {
                return "is a self-signed certificate authority; use a certificate that an authority trusted by this host has signed".into();
            }
            format!(
                "is not valid: {}",
                text.chars().flat_map(char::escape_debug).take(REASON_BYTES_MAX).collect::<String>()
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(url: &str, allow_private: bool) -> WebhookRow {
        WebhookRow {
            id: "w".into(),
            url: url.into(),
            events: Vec::new(),
            format: WebhookFormat::Standard,
            secret: WebhookSecret::new([7; 32]),
            allow_private,
            created_at: Timestamp::UNIX_EPOCH,
            disabled: None,
        }
    }

    async fn why(url: &str, allow_private: bool) -> String {
        match Sender::new(&row(url, allow_private)).unwrap().post("msg", "{}".into()).await {
            AttemptResult { status: None, verdict: Verdict::Again { why, .. } } => why,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_name_that_leads_inside_is_not_followed() {
        let error = resolve("localhost", false).await.unwrap_err();
        assert_eq!(error.code(), Code::WebhookInvalid);
        assert!(resolve("localhost", true).await.unwrap().iter().all(|address| address.ip().is_loopback()));
        // The check stands where the connection is made, not only where an endpoint is added.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let refused = why(&format!("https://localhost:{port}/secret-path"), false).await;
        assert!(refused.ends_with("is not a public one"), "{refused}");
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "nothing was connected to");
        assert!(Sender::new(&row("https://127.0.0.1/", false)).is_err());
    }

    #[test]
    fn certificate_errors_are_explained() {
        use rustls::CertificateError as Fault;
        for (error, words) in [
            (Fault::UnknownIssuer, "is not signed by an authority that this host trusts"),
            (Fault::Expired, "has expired"),
            (Fault::NotValidForName, "is for another name"),
            (Fault::BadEncoding, "is not valid: BadEncoding"),
        ] {
            assert_eq!(certificate_fault(&error), words);
        }
    }

    #[tokio::test]
    async fn a_reason_never_contains_the_url() {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let refused = why(&format!("http://127.0.0.1:{port}/secret-path"), true).await;
        assert!(refused.contains("refused") && !refused.contains("secret-path"), "{refused}");
        let unknown = why("https://nobody.invalid/secret-path", false).await;
        assert_eq!(unknown, "the endpoint's name cannot be resolved");
    }
}
