//! TLS of a port, with certificates that are read again when their files change.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::server::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::tasks::{Owned, owned};

/// How often the files are looked at. A secret that Kubernetes mounts is
/// replaced within a minute or so of its change; this adds little.
const LOOK: Duration = Duration::from_secs(1);

/// Where a port's certificates are.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct TlsSettings {
    /// The server's certificate with its chain, in PEM: the ports speak TLS.
    /// Read again when it changes
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Authorities whose certificates callers may show, in PEM: mutual TLS
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,
    /// Whether a caller may also show no certificate
    #[arg(long, requires = "tls_client_ca")]
    pub tls_client_optional: bool,
}

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or holds nothing of the kind.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The certificate and the key do not make a server.
    #[error("the certificate cannot be used: {0}")]
    Rejected(#[from] rustls::Error),
    /// The authorities do not make a verifier.
    #[error("the clients' authorities cannot be used: {0}")]
    Authorities(#[from] rustls::server::VerifierBuilderError),
}

/// The other end of a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Peer {
    /// Where it is; none in the same process.
    pub address: Option<std::net::SocketAddr>,
    /// Whom its certificate was made for, when an authority vouched for it:
    /// URIs, then DNS names; the common name where it has neither.
    pub certificate_names: Vec<String>,
}

/// The current certificates of a process. Cheap to clone.
#[derive(Clone)]
pub struct Tls {
    config: Arc<ArcSwap<ServerConfig>>,
    files: Arc<Files>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Tls({})", self.files.cert.display())
    }
}

struct Files {
    cert: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
    client_optional: bool,
}

/// What the files held.
#[derive(PartialEq, Eq)]
struct Contents {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

impl Tls {
    /// Reads the certificates; none when the settings name none.
    pub fn new(settings: &TlsSettings) -> Result<Option<Self>, TlsError> {
        let (Some(cert), Some(key)) = (&settings.tls_cert, &settings.tls_key) else {
            return Ok(None);
        };
        let files = Files {
            cert: cert.clone(),
            key: key.clone(),
            client_ca: settings.tls_client_ca.clone(),
            client_optional: settings.tls_client_optional,
        };
        let config = files.config(&files.read()?)?;
        Ok(Some(Self {
            config: Arc::new(ArcSwap::from_pointee(config)),
            files: Arc::new(files),
        }))
    }

    /// Reads the files again whenever they change, until the returned task is
    /// dropped. Files that cannot be used change nothing: a half-written pair
    /// must not end the service.
    pub fn follow(&self) -> Owned {
        let tls = self.clone();
        owned(async move {
            // What was tried last, so that a bad pair is logged once.
            let mut tried = tls.files.read().ok();
            loop {
                tokio::time::sleep(LOOK).await;
                let Ok(contents) = tls.files.read() else {
                    continue;
                };
                if tried.as_ref() == Some(&contents) {
                    continue;
                }
                match tls.files.config(&contents) {
                    Ok(config) => {
                        tls.config.store(Arc::new(config));
                        tracing::info!("the certificates were read again");
                    }
                    Err(error) => {
                        tracing::error!(%error, "the new certificates cannot be used: the old ones stay");
                    }
                }
                tried = Some(contents);
            }
        })
    }

    /// Shakes hands as a server that speaks one of these protocols.
    pub(crate) async fn accept<I>(
        &self,
        io: I,
        protocols: &[&[u8]],
    ) -> std::io::Result<TlsStream<I>>
    where
        I: AsyncRead + AsyncWrite + Unpin,
    {
        let mut config = ServerConfig::clone(&self.config.load());
        config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        TlsAcceptor::from(Arc::new(config)).accept(io).await
    }
}

/// What a client trusts. Cheap to clone.
#[derive(Clone)]
pub struct ClientTls(Arc<rustls::ClientConfig>);

impl fmt::Debug for ClientTls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ClientTls")
    }
}

impl ClientTls {
    /// Trusts the authorities of a PEM file, and speaks HTTP/2.
    pub fn new(authorities: &Path) -> Result<Self, TlsError> {
        let mut roots = rustls::RootCertStore::empty();
        for authority in certificates(authorities, &read(authorities)?)? {
            roots.add(authority)?;
        }
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self(Arc::new(config)))
    }

    /// Shakes hands with the server of an address, `HOST:PORT`.
    pub(crate) async fn connect<I>(
        &self,
        address: &str,
        io: I,
    ) -> std::io::Result<tokio_rustls::client::TlsStream<I>>
    where
        I: AsyncRead + AsyncWrite + Unpin,
    {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned()).map_err(std::io::Error::other)?;
        TlsConnector::from(self.0.clone()).connect(name, io).await
    }
}

impl Files {
    fn read(&self) -> Result<Contents, TlsError> {
        Ok(Contents {
            cert: read(&self.cert)?,
            key: read(&self.key)?,
            client_ca: self.client_ca.as_deref().map(read).transpose()?,
        })
    }

    fn config(&self, contents: &Contents) -> Result<ServerConfig, TlsError> {
        let chain = certificates(&self.cert, &contents.cert)?;
        let key = PrivateKeyDer::from_pem_slice(&contents.key)
            .map_err(|_| unusable(&self.key, "holds no private key in PEM"))?;
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?;
        let builder = match (&self.client_ca, &contents.client_ca) {
            (Some(path), Some(pem)) => {
                let mut roots = rustls::RootCertStore::empty();
                for authority in certificates(path, pem)? {
                    roots.add(authority)?;
                }
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                let verifier = match self.client_optional {
                    true => verifier.allow_unauthenticated(),
                    false => verifier,
                };
                builder.with_client_cert_verifier(verifier.build()?)
            }
            _ => builder.with_no_client_auth(),
        };
        Ok(builder.with_single_cert(chain, key)?)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|error| unusable(path, &error.to_string()))
}

fn unusable(path: &Path, reason: &str) -> TlsError {
    TlsError::File {
        path: path.to_owned(),
        reason: reason.to_owned(),
    }
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match all {
        Ok(all) if !all.is_empty() => Ok(all),
        _ => Err(unusable(path, "holds no certificate in PEM")),
    }
}

/// Whom a certificate was made for.
pub(crate) fn certificate_names(der: &[u8]) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(der) else {
        return Vec::new();
    };
    let mut names = Vec::new();
    if let Ok(Some(alternatives)) = certificate.subject_alternative_name() {
        let general = &alternatives.value.general_names;
        names.extend(general.iter().filter_map(|name| match name {
            GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        }));
        names.extend(general.iter().filter_map(|name| match name {
            GeneralName::DNSName(dns) => Some((*dns).to_owned()),
            _ => None,
        }));
    }
    // Who has other names is known by them: not every authority checks the
    // common name (RFC 9525, 2).
    if names.is_empty() {
        let common = certificate.subject().iter_common_name();
        names.extend(common.filter_map(|name| name.as_str().ok().map(str::to_owned)));
    }
    names
}
