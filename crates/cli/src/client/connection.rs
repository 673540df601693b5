//! The connection that the tools share, and hints for its errors.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use http::uri::{Authority, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue};
use platform::channel::{Channel, Target};
use platform::grpc::frame;
use platform::tls::ClientTls;
use protocol::Method;
use protocol::inference::{
    ModelMetadataRequest, ModelMetadataResponse, RepositoryIndexRequest, RepositoryIndexResponse,
};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::call::{CallError, RequestTemplate, unary};
use super::options::{header, host_and_port};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Which server to call, and the metadata of every call.
#[derive(Debug, Clone, clap::Args)]
pub struct Connection {
    /// The server's gRPC address: a gateway, a worker or `andon serve`
    #[arg(long, global = true, value_name = "HOST:PORT", default_value = "127.0.0.1:8001", value_parser = host_and_port)]
    pub address: String,
    /// Metadata to send with each request; repeatable
    #[arg(long, global = true, value_name = "KEY=VALUE", value_parser = header)]
    pub header: Vec<(HeaderName, HeaderValue)>,
    /// File with the API key; defaults to the key in ANDON_API_KEY, if set
    #[arg(long, global = true, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Connect with TLS and trust the CA certificates in this PEM file
    #[arg(long, global = true, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// Timeout of each request, for example 5s
    #[arg(long, global = true, value_name = "DURATION", value_parser = platform::config::duration)]
    pub timeout: Option<Duration>,
}

impl Connection {
    /// The address and metadata of every request.
    pub fn template(&self) -> anyhow::Result<RequestTemplate> {
        let authority: Authority = self
            .address
            .parse()
            .map_err(|error: http::uri::InvalidUri| self.unreachable(&error.to_string()))?;
        let scheme = if self.tls_ca.is_some() {
            Scheme::HTTPS
        } else {
            Scheme::HTTP
        };
        let headers = self.headers()?;
        Ok(RequestTemplate::new(
            scheme,
            authority,
            headers,
            self.timeout,
        ))
    }

    /// The metadata of a call.
    fn headers(&self) -> anyhow::Result<HeaderMap> {
        let mut headers: HeaderMap = self.header.iter().cloned().collect();
        if let Some(key) = self.key()? {
            let mut value = HeaderValue::try_from(format!("Bearer {key}"))
                .map_err(|_| anyhow::anyhow!("the API key must be printable ASCII"))?;
            value.set_sensitive(true);
            headers.insert(http::header::AUTHORIZATION, value);
        }
        Ok(headers)
    }

    /// The API key of the file or of the variable.
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

    /// The error of a failed connection, with a hint.
    pub fn unreachable(&self, reason: &str) -> anyhow::Error {
        let address = &self.address;
        anyhow::anyhow!(
            "cannot connect to {address}: {reason}\n  \
             Is Andon running at {address}? Start it with: andon serve --repository models\n  \
             To call another server: --address HOST:PORT"
        )
    }
}

/// A client of one server.
pub struct Client {
    channel: Channel,
    target: Target,
    template: RequestTemplate,
    connection: Connection,
}

impl Client {
    /// Connects; an error has a hint.
    pub async fn connect(connection: &Connection) -> anyhow::Result<Self> {
        let template = connection.template()?;
        let target = connection.target()?;
        let channel = Channel::connect(&target, CONNECT_TIMEOUT)
            .await
            .map_err(|error| connection.unreachable(&error.to_string()))?;
        Ok(Self {
            channel,
            target,
            template,
            connection: connection.clone(),
        })
    }

    /// Calls a unary method; an error has a hint.
    pub async fn call<R: prost::Message + Default>(
        &mut self,
        method: Method,
        message: &impl prost::Message,
    ) -> anyhow::Result<R> {
        match self.try_call(method, message).await {
            Ok(response) => Ok(response),
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// Calls a unary method, within the timeout if there is one.
    pub async fn try_call<R: prost::Message + Default>(
        &mut self,
        method: Method,
        message: &impl prost::Message,
    ) -> Result<R, CallError> {
        let head = self.template.head(method);
        let framed = frame(message);
        let timeout = self.connection.timeout;
        let call = async {
            match unary(&self.channel, head.clone(), framed.clone()).await {
                // For example a connection that has reached its age.
                Err(CallError::Unprocessed(_)) => {
                    self.channel = Channel::connect(&self.target, CONNECT_TIMEOUT).await?;
                    unary(&self.channel, head, framed).await
                }
                result => result,
            }
        };
        match timeout {
            None => call.await,
            Some(timeout) => tokio::time::timeout(timeout, call)
                .await
                .unwrap_or(Err(CallError::TimedOut(timeout))),
        }
    }

    /// A model's inputs and outputs. The error for an unknown model lists the
    /// models that are ready.
    pub async fn metadata(
        &mut self,
        model: &str,
        version: &str,
    ) -> anyhow::Result<ModelMetadataResponse> {
        let request = ModelMetadataRequest {
            name: model.to_owned(),
            version: version.to_owned(),
        };
        self.call(Method::ModelMetadata, &request).await
    }

    /// An error with a hint.
    pub async fn explain(&mut self, error: CallError) -> anyhow::Error {
        let mut text = format!("{}: {error}", error.code());
        let hint = match &error {
            CallError::Status(status) => {
                text.push_str(&details(status));
                self.hint(status.code()).await
            }
            CallError::TimedOut(_) => Some(LONGER_TIMEOUT.to_owned()),
            CallError::TooLong(_) => None,
            _ => Some(format!(
                "Does {} speak gRPC? By default Andon serves gRPC on port 8001, HTTP on 8000, metrics on 8002",
                self.connection.address
            )),
        };
        if let Some(hint) = hint {
            let _ = write!(text, "\n  {hint}");
        }
        anyhow::Error::msg(text)
    }

    /// The hint for an error of the server.
    async fn hint(&mut self, code: Code) -> Option<String> {
        let hint = match code {
            Code::NotFound => match self.ready_models().await? {
                names if names.is_empty() => "No model is ready: see andon models list".to_owned(),
                names => format!("Ready models: {}", names.join(", ")),
            },
            Code::DeadlineExceeded | Code::Cancelled if self.connection.timeout.is_some() => {
                LONGER_TIMEOUT.to_owned()
            }
            Code::Unauthenticated => {
                "Give an API key with --key-file FILE or in ANDON_API_KEY".to_owned()
            }
            Code::Unavailable => "For the state of each model: andon models list".to_owned(),
            _ => return None,
        };
        Some(hint)
    }

    /// The models that are ready; none when the server does not list them.
    async fn ready_models(&mut self) -> Option<Vec<String>> {
        let request = RepositoryIndexRequest {
            repository_name: String::new(),
            ready: true,
        };
        let index: RepositoryIndexResponse = self
            .try_call(Method::RepositoryIndex, &request)
            .await
            .ok()?;
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

const LONGER_TIMEOUT: &str = "To wait longer: --timeout DURATION";

/// A line for each field that is wrong, and the time after which to retry.
fn details(status: &Status) -> String {
    let mut text = String::new();
    let details = status.get_error_details();
    for violation in details
        .bad_request()
        .map(|bad| bad.field_violations.as_slice())
        .unwrap_or_default()
    {
        // Andon's own messages have the hint already.
        let description = &violation.description;
        if description.is_empty() || !status.message().contains(description) {
            let _ = write!(text, "\n  field {}: {description}", violation.field);
        }
    }
    if let Some(delay) = details.retry_info().and_then(|retry| retry.retry_delay) {
        let _ = write!(text, "\n  Retry in {delay:?}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic_types::ErrorDetails;

    #[test]
    fn a_wrong_field_is_named() {
        let violation = ErrorDetails::with_bad_request_violation("inputs[0].shape", "is negative");
        let status = Status::with_error_details(Code::InvalidArgument, "wrong", violation);
        assert_eq!(details(&status), "\n  field inputs[0].shape: is negative");
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
