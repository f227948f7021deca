//! The secrets that the requests of a VM get: which, for which hosts, and where their values are.
//!
//! Invariants: a value is read for each request that needs it, so that a new one applies at once; no value leaves before its use
//! is recorded (`usage.rs`).

mod usage;

use std::fmt;
use std::sync::Arc;

use nido_api::name::SecretName;
use nido_api::{SecretUse, SecretValue};
use rustls::{ClientConfig, RootCertStore};
use tokio::sync::{OnceCell, mpsc};

use self::usage::Usage;
pub use self::usage::UseReport;
use crate::authority::Authority;

/// Where the value of a secret is read.
pub type SecretSource = Arc<dyn Fn(&SecretName) -> nido_api::error::Result<SecretValue> + Send + Sync>;

/// How many connections get secrets at a time.
const CONNECTIONS_MAX: usize = 64;

/// The place of a connection that gets secrets.
pub type Slot = Arc<()>;

/// The secrets of one VM.
#[derive(Clone)]
pub struct Credentials {
    uses: Vec<SecretUse>,
    source: SecretSource,
    authority: Arc<Authority>,
    usage: Arc<Usage>,
    roots: OnceCell<Arc<RootCertStore>>,
    slots: Slot,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("uses", &self.uses).finish_non_exhaustive()
    }
}

impl Credentials {
    /// The secrets of a VM that has this certificate authority. Each use is sent to `reports`.
    #[must_use]
    pub fn new(
        uses: Vec<SecretUse>,
        source: SecretSource,
        authority: Arc<Authority>,
        reports: mpsc::Sender<UseReport>,
    ) -> Self {
        let usage = Arc::new(Usage::new(reports));
        Self { uses, source, authority, usage, roots: OnceCell::new(), slots: Slot::default() }
    }

    /// The same, for servers that these authorities certify.
    #[cfg(test)]
    pub(crate) fn with_roots(self, roots: RootCertStore) -> Self {
        Self { roots: OnceCell::new_with(Some(Arc::new(roots))), ..self }
    }

    /// A place for one more connection; `None` if there are too many.
    pub(crate) fn slot(&self) -> Option<Slot> {
        (Arc::strong_count(&self.slots) <= CONNECTIONS_MAX).then(|| Arc::clone(&self.slots))
    }

    /// Whether requests to this host get a secret.
    pub(crate) fn has_host(&self, host: &str) -> bool {
        self.uses.iter().any(|used| used.host.as_str() == host)
    }

    pub(crate) fn uses_of<'a>(&'a self, host: &'a str) -> impl Iterator<Item = &'a SecretUse> + 'a {
        self.uses.iter().filter(move |used| used.host.as_str() == host)
    }

    pub(crate) fn authority(&self) -> &Authority {
        &self.authority
    }

    /// The value of a secret, read now.
    ///
    /// # Errors
    /// One sentence, without anything of the value.
    pub(crate) async fn read(&self, used: &SecretUse) -> Result<SecretValue, String> {
        let (source, name) = (Arc::clone(&self.source), used.name.clone());
        let read = tokio::task::spawn_blocking(move || source(&name)).await;
        read.map_err(|_| "it could not be read".to_owned())?.map_err(|e| e.to_string())
    }

    /// Counts a use, and has it recorded, unless that was done within the last minute. `false` if it cannot be recorded.
    pub(crate) async fn record(&self, used: &SecretUse) -> bool {
        self.usage.record(used).await
    }

    /// The uses that were not recorded yet, with their numbers; they count as recorded then.
    pub(crate) async fn take_uses(&self) -> Vec<(SecretUse, u64)> {
        self.usage.take().await
    }

    /// Reports uses that are counted for a minute, without an end.
    pub(crate) async fn report_counts(&self) {
        self.usage.report_counts().await;
    }

    /// How servers are verified: by the host's certificates.
    ///
    /// # Errors
    /// One sentence: the host has none.
    pub(crate) async fn client(&self, protocols: Vec<Vec<u8>>) -> Result<ClientConfig, String> {
        let roots = self.roots.get_or_try_init(|| async {
            tokio::task::spawn_blocking(host_roots)
                .await
                .map_err(|_| "the host's certificates cannot be read".to_owned())?
        });
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let roots = Arc::clone(roots.await?);
        let mut client = versions.map_err(|e| e.to_string())?.with_root_certificates(roots).with_no_client_auth();
        client.alpn_protocols = protocols;
        Ok(client)
    }
}

fn host_roots() -> Result<Arc<RootCertStore>, String> {
    let loaded = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(loaded.certs);
    if roots.is_empty() {
        return Err("this host has no certificates of authorities (package ca-certificates)".into());
    }
    Ok(Arc::new(roots))
}
