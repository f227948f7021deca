//! An authority of the test's own, and what it vouches for.

use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, StreamOwned};

use super::{DEADLINE, Home};

/// An authority, and a server's certificate for `localhost` and `127.0.0.1` that it has signed; each as PEM.
pub struct Authority {
    /// Its own certificate.
    pub root: String,
    /// The server's.
    pub certificate: String,
    /// The server's private key.
    pub key: String,
}

impl Authority {
    /// A fresh, unknown one.
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        let key = KeyPair::generate().unwrap();
        let server = CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()]).unwrap();
        let certificate = server.signed_by(&key, &issuer).unwrap().pem();
        Self { root, certificate, key: key.serialize_pem() }
    }

    /// Writes the three into files: root, certificate, key.
    pub fn write(&self, home: &Home) -> [PathBuf; 3] {
        [("root.pem", &self.root), ("certificate.pem", &self.certificate), ("key.pem", &self.key)].map(
            |(name, text)| {
                let path = home.scratch(name);
                std::fs::write(&path, text).unwrap();
                path
            },
        )
    }

    /// For a server.
    pub fn server(&self) -> Arc<ServerConfig> {
        let certificate = CertificateDer::from_pem_slice(self.certificate.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let config = config.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
        Arc::new(config.with_single_cert(vec![certificate], key).unwrap())
    }

    /// Connects to a server that this authority vouches for, under the name `localhost`.
    pub fn connect(&self, address: &str) -> StreamOwned<ClientConnection, TcpStream> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.root.as_bytes()).unwrap()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let config = config.with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(roots).with_no_client_auth();
        let session = ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap();
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        StreamOwned::new(session, stream)
    }
}
