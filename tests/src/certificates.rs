//! Certificates that tests issue, and a gRPC client that shows them.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use hyper_util::rt::TokioIo;
use protocol::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::Endpoint;

use crate::calls::Client;

/// Whoever vouches for certificates.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key.
pub struct Certificate {
    /// The certificate, encoded.
    pub der: CertificateDer<'static>,
    pem: String,
    key: KeyPair,
}

impl Authority {
    /// A new one, that nobody trusts yet.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Who issues for its own name looks like a certificate that signed itself.
        let name = "an authority of the tests";
        params.distinguished_name.push(DnType::CommonName, name);
        Ok(Self(CertifiedIssuer::self_signed(
            params,
            KeyPair::generate()?,
        )?))
    }

    /// Its own certificate, in PEM.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for localhost, and for a URI if there is one.
    pub fn issue(&self, uri: Option<&str>) -> Result<Certificate> {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()])?;
        if let Some(uri) = uri {
            params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
        }
        let key = KeyPair::generate()?;
        let made = params.signed_by(&key, &self.0)?;
        Ok(Certificate {
            der: made.der().clone(),
            pem: made.pem(),
            key,
        })
    }
}

impl Certificate {
    /// Writes the files that a server reads; they do not fit each other
    /// between the two.
    pub fn write(&self, cert: &Path, key: &Path) -> Result<()> {
        std::fs::write(cert, &self.pem)?;
        std::fs::write(key, self.key.serialize_pem())?;
        Ok(())
    }
}

/// Connects to a server whose authority is trusted, and may show a certificate.
/// What the server shows is left in `seen`.
pub async fn client(
    address: SocketAddr,
    authority: &Authority,
    shown: Option<&Certificate>,
    seen: &Arc<Mutex<Option<CertificateDer<'static>>>>,
) -> Result<Client> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.0.der().clone())?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let mut config = match shown {
        Some(shown) => {
            let key = PrivatePkcs8KeyDer::from(shown.key.serialize_der());
            builder.with_client_auth_cert(vec![shown.der.clone()], PrivateKeyDer::Pkcs8(key))?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let seen = seen.clone();
    let connect = tower::service_fn(move |_| {
        let (connector, seen) = (connector.clone(), seen.clone());
        async move {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let name = ServerName::try_from("localhost").map_err(std::io::Error::other)?;
            let stream = connector.connect(name, stream).await?;
            let certificates = stream.get_ref().1.peer_certificates();
            let first = certificates.and_then(<[_]>::first).cloned();
            *seen.lock().unwrap_or_else(PoisonError::into_inner) = first;
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    let channel = Endpoint::from_static("http://localhost")
        .connect_timeout(Duration::from_secs(10))
        .connect_with_connector(connect)
        .await?;
    Ok(GrpcInferenceServiceClient::new(channel))
}
