//! TLS of a port, with certificates that are reloaded when their files change.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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

use crate::files::{ContentError, FileError, FileSource, Followed};
pub use crate::peer::Peer;
use crate::tasks::OwnedTask;

/// A file of certificates or keys: a bundle of all public authorities has
/// less than a tenth.
const PEM_BYTES_MAX: u64 = 4 << 20;

/// Where a port's certificates are.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct TlsSettings {
    /// The server's certificate chain in PEM; enables TLS on the ports.
    /// Reloaded when it changes
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key in PEM. Reloaded when it changes
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Certificate authorities of client certificates in PEM; enables mutual
    /// TLS. Reloaded when it changes
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,
    /// Also accept clients that present no certificate
    #[arg(long, requires = "tls_client_ca")]
    pub tls_client_optional: bool,
}

/// The current certificates of a process. Cheap to clone.
#[derive(Clone)]
pub struct Tls {
    config: Arc<ArcSwap<ServerConfig>>,
    files: Arc<Followed<ServerConfig>>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Tls").field(&self.files).finish()
    }
}

impl Tls {
    /// Reads the certificates; none when the settings name none.
    pub fn new(settings: &TlsSettings) -> Result<Option<Self>, FileError> {
        let (Some(cert), Some(key)) = (&settings.tls_cert, &settings.tls_key) else {
            return Ok(None);
        };
        let files = ServerFiles {
            cert: pem_file(cert, "TLS certificate file"),
            key: pem_file(key, "TLS key file"),
            client_ca: settings
                .tls_client_ca
                .as_deref()
                .map(|path| pem_file(path, "client CA file")),
            client_optional: settings.tls_client_optional,
        };
        let sources = [&files.cert, &files.key].into_iter();
        let sources = sources.chain(&files.client_ca).cloned().collect();
        let files = Followed::open(sources, move |contents| files.config(contents))?;
        Ok(Some(Self {
            config: Arc::new(ArcSwap::new(files.value().clone())),
            files: Arc::new(files),
        }))
    }

    /// Reloads the files whenever they change, until the returned task is
    /// dropped. Files that cannot be used change nothing: a half-written pair
    /// must not end the service.
    pub fn follow(&self) -> OwnedTask {
        let current = self.config.clone();
        let files = Followed::clone(&self.files);
        files.follow(move |config| current.store(config))
    }

    /// The server's side of a handshake; `protocols` are offered by ALPN.
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

/// The certificate authorities that a client trusts. Cheap to clone.
#[derive(Clone)]
pub struct ClientTls(Arc<rustls::ClientConfig>);

impl fmt::Debug for ClientTls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ClientTls")
    }
}

impl ClientTls {
    /// Trusts the authorities of a PEM file, and speaks HTTP/2.
    pub fn new(authorities: &Path) -> Result<Self, FileError> {
        let source = pem_file(authorities, "server CA file");
        let roots = root_store(&source, &source.read()?)?;
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| source.invalid(ContentError::new(error)))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self(Arc::new(config)))
    }

    /// The client's side of a handshake with the server of `HOST:PORT`.
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

/// The files of a server's certificates.
struct ServerFiles {
    cert: FileSource,
    key: FileSource,
    client_ca: Option<FileSource>,
    client_optional: bool,
}

impl ServerFiles {
    /// `contents` are those of the certificate, of the key and, where there is
    /// one, of the client CA file.
    fn config(&self, contents: &[Vec<u8>]) -> Result<ServerConfig, FileError> {
        let pem = |index: usize| contents.get(index).map_or(&[][..], Vec::as_slice);
        let unusable = |error: rustls::Error| {
            let reason = format!("the certificate and its key cannot be used: {error}");
            self.cert.invalid(ContentError::new(reason))
        };
        let chain = certificates(&self.cert, pem(0))?;
        let key = PrivateKeyDer::from_pem_slice(pem(1))
            .map_err(|_| self.key.invalid(ContentError::new("no private key in PEM")))?;
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(unusable)?;
        let Some(client_ca) = &self.client_ca else {
            let builder = builder.with_no_client_auth();
            return builder.with_single_cert(chain, key).map_err(unusable);
        };
        let roots = Arc::new(root_store(client_ca, pem(2))?);
        let mut verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
        if self.client_optional {
            verifier = verifier.allow_unauthenticated();
        }
        let verifier = verifier
            .build()
            .map_err(|error| client_ca.invalid(ContentError::new(error)))?;
        let builder = builder.with_client_cert_verifier(verifier);
        builder.with_single_cert(chain, key).map_err(unusable)
    }
}

fn pem_file(path: &Path, kind: &'static str) -> FileSource {
    FileSource::new(path, kind, PEM_BYTES_MAX)
}

fn root_store(source: &FileSource, pem: &[u8]) -> Result<rustls::RootCertStore, FileError> {
    let mut roots = rustls::RootCertStore::empty();
    for authority in certificates(source, pem)? {
        roots
            .add(authority)
            .map_err(|error| source.invalid(ContentError::new(error)))?;
    }
    Ok(roots)
}

fn certificates(
    source: &FileSource,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match all {
        Ok(all) if !all.is_empty() => Ok(all),
        _ => Err(source.invalid(ContentError::new("no certificate in PEM"))),
    }
}

/// The subject names of a certificate: URIs, then DNS names.
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
    // A fallback only: not every authority checks the common name (RFC 9525, 2).
    if names.is_empty() {
        let common = certificate.subject().iter_common_name();
        names.extend(common.filter_map(|name| name.as_str().ok().map(str::to_owned)));
    }
    names
}
