//! The connection that the tools share, and what its failures mean to people.

use std::error::Error as _;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use http::{HeaderMap, HeaderName, HeaderValue};
use platform::channel::Target;
use platform::grpc::code_name;
use platform::tls::ClientTls;
use protocol::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use protocol::inference::{ModelMetadataRequest, ModelMetadataResponse, RepositoryIndexRequest};
use tonic::metadata::MetadataMap;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

use super::options::{header, host_and_port};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Answers may be longer than requests, for example one vector per token.
const ANSWER_BYTES_MAX: usize = 1 << 30;

/// Which server, and what every call carries.
#[derive(Debug, Clone, clap::Args)]
pub struct Connection {
    /// The server: a gateway, a worker, or `andon serve`
    #[arg(long, global = true, value_name = "HOST:PORT", default_value = "127.0.0.1:8001", value_parser = host_and_port)]
    pub address: String,
    /// Metadata that every call carries; repeatable
    #[arg(long, global = true, value_name = "KEY=VALUE", value_parser = header)]
    pub header: Vec<(HeaderName, HeaderValue)>,
    /// A file with the key that every call carries; without it, the variable
    /// ANDON_API_KEY
    #[arg(long, global = true, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Speak TLS, and trust the authorities of this PEM file
    #[arg(long, global = true, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// How long to wait for an answer, for example 5s
    #[arg(long, global = true, value_name = "DURATION", value_parser = platform::config::duration)]
    pub timeout: Option<Duration>,
}

impl Connection {
    /// The metadata of a call.
    pub fn headers(&self) -> anyhow::Result<HeaderMap> {
        let mut headers: HeaderMap = self.header.iter().cloned().collect();
        if let Some(key) = self.key()? {
            let mut value = HeaderValue::try_from(format!("Bearer {key}"))
                .map_err(|_| anyhow::anyhow!("the key holds characters that no key has"))?;
            value.set_sensitive(true);
            headers.insert(http::header::AUTHORIZATION, value);
        }
        Ok(headers)
    }

    /// The key of the file or of the variable.
    fn key(&self) -> anyhow::Result<Option<String>> {
        let key = match &self.key_file {
            Some(file) => std::fs::read_to_string(file)
                .with_context(|| format!("cannot read {}", file.display()))?,
            None => std::env::var("ANDON_API_KEY").unwrap_or_default(),
        };
        Ok(Some(key.trim().to_owned()).filter(|key| !key.is_empty()))
    }

    /// Where and how to connect.
    pub fn target(&self) -> anyhow::Result<Target> {
        let address = self.address.clone();
        Ok(match &self.tls_ca {
            Some(authorities) => Target::Tls(address, ClientTls::new(authorities)?),
            None => Target::Tcp(address),
        })
    }

    /// The address as a URI.
    pub fn origin(&self) -> String {
        let scheme = if self.tls_ca.is_some() {
            "https"
        } else {
            "http"
        };
        format!("{scheme}://{}", self.address)
    }

    /// Why there is no connection, and what to do.
    pub fn unreachable(&self, reason: &str) -> anyhow::Error {
        let address = &self.address;
        anyhow::anyhow!(
            "cannot connect to {address}: {reason}\n  \
             Is Andon running at {address}? Start it with: andon serve --repository models\n  \
             Another server is named with: --address HOST:PORT"
        )
    }
}

/// A client of one server.
pub struct Client {
    stub: GrpcInferenceServiceClient<Channel>,
    connection: Connection,
    headers: HeaderMap,
}

impl Client {
    /// Connects, or says what to do.
    pub async fn connect(connection: &Connection) -> anyhow::Result<Self> {
        let mut endpoint = Endpoint::from_shared(connection.origin())
            .map_err(|error| connection.unreachable(&error.to_string()))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true);
        if let Some(file) = &connection.tls_ca {
            let authorities =
                std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
            let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authorities));
            endpoint = endpoint.tls_config(tls)?;
        }
        let headers = connection.headers()?;
        let channel = endpoint
            .connect()
            .await
            .map_err(|error| connection.unreachable(&innermost(&error)))?;
        Ok(Self {
            stub: GrpcInferenceServiceClient::new(channel)
                .max_decoding_message_size(ANSWER_BYTES_MAX)
                .max_encoding_message_size(ANSWER_BYTES_MAX),
            connection: connection.clone(),
            headers,
        })
    }

    /// The generated client.
    pub fn stub(&mut self) -> &mut GrpcInferenceServiceClient<Channel> {
        &mut self.stub
    }

    /// A call with the metadata and the deadline that were asked for.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let metadata = MetadataMap::from_headers(self.headers.clone());
        let mut request = Request::from_parts(metadata, tonic::Extensions::default(), message);
        if let Some(timeout) = self.connection.timeout {
            request.set_timeout(timeout);
        }
        request
    }

    /// What a model takes and gives. An unknown model's error lists those that
    /// are known.
    pub async fn metadata(
        &mut self,
        model: &str,
        version: &str,
    ) -> anyhow::Result<ModelMetadataResponse> {
        let request = self.request(ModelMetadataRequest {
            name: model.to_owned(),
            version: version.to_owned(),
        });
        match self.stub.model_metadata(request).await {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => Err(self.explain(status).await),
        }
    }

    /// A failure in words that say what to do.
    pub async fn explain(&mut self, status: Status) -> anyhow::Error {
        let mut text = describe(&status);
        match status.code() {
            Code::NotFound => match self.ready_models().await {
                Some(names) if names.is_empty() => {
                    text.push_str("\n  No model is ready there: see andon models list");
                }
                Some(names) => {
                    let _ = write!(text, "\n  Models there: {}", names.join(", "));
                }
                None => {}
            },
            Code::DeadlineExceeded | Code::Cancelled if self.connection.timeout.is_some() => {
                text.push_str("\n  Wait longer with --timeout DURATION");
            }
            Code::Unavailable | Code::Unknown | Code::Internal if status.source().is_some() => {
                let _ = write!(
                    text,
                    "\n  Does {} speak gRPC? Andon's gRPC port is 8001; 8002 has the metrics",
                    self.connection.address
                );
            }
            Code::Unauthenticated => {
                text.push_str("\n  Give the key with --key-file FILE or in ANDON_API_KEY");
            }
            Code::Unavailable => {
                text.push_str("\n  States and reasons are shown by: andon models list");
            }
            _ => {}
        }
        anyhow::Error::msg(text)
    }

    /// The models that are ready; none when the server does not say.
    async fn ready_models(&mut self) -> Option<Vec<String>> {
        let request = self.request(RepositoryIndexRequest {
            repository_name: String::new(),
            ready: true,
        });
        let index = self.stub.repository_index(request).await.ok()?.into_inner();
        let mut names: Vec<String> = index
            .models
            .into_iter()
            .map(|model| format!("{} version {}", model.name, model.version))
            .collect();
        names.sort();
        names.dedup();
        Some(names)
    }
}

/// A status in one line, and a line for each field that is wrong.
fn describe(status: &Status) -> String {
    // tonic ends a call whose deadline passed as cancelled, on the client.
    let expired = status.code() == Code::Cancelled && status.message() == "Timeout expired";
    if expired {
        return "DEADLINE_EXCEEDED: no answer came in time".to_owned();
    }
    let message = match (status.message(), status.source()) {
        ("", Some(source)) | ("transport error", Some(source)) => innermost(source),
        (message, _) => message.to_owned(),
    };
    let mut text = format!("{}: {message}", code_name(status.code()));
    let details = status.get_error_details();
    for violation in details
        .bad_request()
        .map(|bad| bad.field_violations.as_slice())
        .unwrap_or_default()
    {
        // Andon's own messages say it already.
        if !message.contains(&violation.description) || violation.description.is_empty() {
            let _ = write!(
                text,
                "\n  field {}: {}",
                violation.field, violation.description
            );
        }
    }
    if let Some(delay) = details.retry_info().and_then(|retry| retry.retry_delay) {
        let _ = write!(text, "\n  Try again in {delay:?}");
    }
    text
}

/// The cause at the bottom: the layers above it say "transport error".
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic_types::ErrorDetails;

    #[test]
    fn a_wrong_field_is_named() {
        let details = ErrorDetails::with_bad_request_violation("inputs[0].shape", "is negative");
        let status = Status::with_error_details(Code::InvalidArgument, "wrong", details);
        assert_eq!(
            describe(&status),
            "INVALID_ARGUMENT: wrong\n  field inputs[0].shape: is negative"
        );
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_named_with_what_to_do() {
        let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = closed.local_addr().unwrap().to_string();
        drop(closed);
        let connection = Connection {
            address: address.clone(),
            header: Vec::new(),
            key_file: None,
            tls_ca: None,
            timeout: None,
        };
        let error = Client::connect(&connection)
            .await
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.contains(&format!("Is Andon running at {address}?")),
            "{error}"
        );
        assert!(error.contains("andon serve"), "{error}");
    }
}
