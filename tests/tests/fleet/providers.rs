//! Models of outside services, against services that the tests control and
//! against a second Andon.

mod chains;
mod failures;
mod generation;
mod money;
mod parameters;
mod pass_through;
mod scenarios;
mod vectors;
mod web;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use fleet_tests::calls::{self, Client};
use fleet_tests::process::{Andon, scratch};
use protocol::inference::{ModelInferRequest, ModelInferResponse};
use serde_json::{Value, json};
use tonic::metadata::MetadataMap;
use tonic::{Code, Status};
use wiremock::matchers::{method, path};
use wiremock::{Mock, MockServer, Request, ResponseTemplate};

const SECRET: &str = "sk-5ecret-of-the-tests";
const TIMEOUT: Duration = Duration::from_secs(20);

/// A gateway without workers, whose models are those of outside services.
struct Outside {
    gateway: Andon,
    client: Client,
    files: Vec<PathBuf>,
}

impl Drop for Outside {
    fn drop(&mut self) {
        for file in &self.files {
            // Gone is gone.
            let _ = std::fs::remove_file(file);
        }
    }
}

impl Outside {
    async fn start(catalogue: &str) -> Result<Self> {
        Self::with(catalogue, &[]).await
    }

    async fn with(catalogue: &str, flags: &[&str]) -> Result<Self> {
        let file = scratch("providers.toml")?;
        std::fs::write(&file, catalogue)?;
        let mut all = vec!["--providers".to_owned(), file.display().to_string()];
        all.extend(flags.iter().map(ToString::to_string));
        let gateway = Andon::start("gateway", &all, None)?;
        gateway.ready().await?;
        Ok(Self {
            client: calls::client(gateway.grpc).await?,
            gateway,
            files: vec![file],
        })
    }

    /// Calls a model; the response with its metadata.
    async fn call(
        &self,
        request: ModelInferRequest,
    ) -> Result<(ModelInferResponse, MetadataMap), Status> {
        let mut request = tonic::Request::new(request);
        request.set_timeout(TIMEOUT);
        let response = self.client.clone().model_infer(request).await?;
        let (metadata, answer, _) = response.into_parts();
        Ok((answer, metadata))
    }

    /// Calls a model that fails; neither the caller nor the log may
    /// read the secret.
    async fn fails(&self, request: ModelInferRequest) -> Result<Status> {
        let Err(status) = self.call(request).await else {
            anyhow::bail!("it succeeded");
        };
        let shown = format!("{status:?}\n{}", self.gateway.logged());
        ensure!(!shown.contains(SECRET), "{shown}");
        ensure!(status.code() != Code::Internal, "{status:?}");
        Ok(status)
    }
}

/// A file with the secret.
fn key() -> Result<PathBuf> {
    let file = scratch("key")?;
    std::fs::write(&file, format!("{SECRET}\n"))?;
    Ok(file)
}

/// A model of the catalogue.
fn entry(name: &str, url: &str, more: &str) -> String {
    format!("[models.{name}]\nmodel = \"theirs\"\nbase_url = \"{url}\"\n{more}\n")
}

const EMBEDDING: &str = "kind = \"openai\"\ntask = \"embedding\"";

/// An OpenAI-shaped embedding model at a service.
fn embedding(name: &str, server: &MockServer, more: &str) -> String {
    entry(
        name,
        &format!("{}/v1", server.uri()),
        &format!("{EMBEDDING}\n{more}"),
    )
}

/// A request for vectors of texts.
fn texts(model: &str, texts: &[&str]) -> ModelInferRequest {
    ModelInferRequest {
        model_name: model.to_owned(),
        ..calls::texts(texts)
    }
}

/// The vector that the tests' service has for a text.
fn vector(text: &str) -> [f32; 3] {
    [text.len() as f32 / 3.0, 0.1, -1.0e-7]
}

/// Answers embeddings the last first, as a service may.
fn embed(request: &Request) -> ResponseTemplate {
    let body: Value = request.body_json().unwrap_or_default();
    let texts = body["input"].as_array().cloned().unwrap_or_default();
    let data = texts.iter().enumerate().rev().map(|(index, text)| {
        let vector = vector(text.as_str().unwrap_or_default());
        // Not by a Value, which would write each as an FP64.
        let numbers = serde_json::to_string(&vector).unwrap_or_default();
        format!("{{\"index\":{index},\"embedding\":{numbers}}}")
    });
    let data: Vec<String> = data.collect();
    let usage = json!({"prompt_tokens": 2 * texts.len(), "total_tokens": 2 * texts.len()});
    let text = format!("{{\"data\":[{}],\"usage\":{usage}}}", data.join(","));
    ResponseTemplate::new(200).set_body_raw(text, "application/json")
}

/// A service that answers embeddings.
async fn embedder() -> MockServer {
    let server = MockServer::start().await;
    posts("/v1/embeddings")
        .respond_with(embed)
        .mount(&server)
        .await;
    server
}

fn posts(to: &str) -> wiremock::MockBuilder {
    Mock::given(method("POST")).and(path(to))
}

fn quoted(path: &Path) -> String {
    format!("{:?}", path.display().to_string())
}
