//! Prompts of a model: a text with a prompt has one vector, whichever way it comes.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fleet_tests::calls::{self, Client};
use fleet_tests::process::{Andon, scratch};
use fleet_tests::{link_folder, models};
use protocol::inference::infer_parameter::ParameterChoice;
use protocol::inference::model_infer_request::InferInputTensor;
use protocol::inference::{InferParameter, ModelConfigRequest, ModelInferRequest};
use protocol::tei::v1 as tei;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

const TEXT: &str = "The lantern is lit.";
const TIMEOUT: Duration = Duration::from_secs(60);

/// A text, what its request says of the prompt, and what the model reads.
struct Case {
    /// The parameter or field, and its value; none is the default prompt.
    chosen: Option<(&'static str, &'static str)>,
    read: &'static str,
}

const CASES: [Case; 6] = [
    Case {
        chosen: None,
        read: "query: The lantern is lit.",
    },
    Case {
        chosen: Some(("prompt_name", "query")),
        read: "query: The lantern is lit.",
    },
    Case {
        chosen: Some(("prompt_name", "passage")),
        read: "passage: The lantern is lit.",
    },
    Case {
        chosen: Some(("prompt_name", "none")),
        read: TEXT,
    },
    Case {
        chosen: Some(("prompt", "title: ")),
        read: "title: The lantern is lit.",
    },
    Case {
        chosen: Some(("prompt", "")),
        read: TEXT,
    },
];

/// One process with the model `minilm` as it is, and with prompts. Both are
/// declared deterministic: what comes from the cache has to have its prompt too.
struct Served {
    andon: Andon,
    grpc: Client,
    channel: Channel,
    web: reqwest::Client,
    repository: PathBuf,
}

impl Drop for Served {
    fn drop(&mut self) {
        // A folder that stays harms nobody.
        let _ = std::fs::remove_dir_all(&self.repository);
    }
}

impl Served {
    async fn start() -> Result<Self> {
        let repository = scratch("prompts")?;
        for model in ["plain", "prompted"] {
            let folder = repository.join(model);
            link_folder(&models()?.join("minilm/1"), &folder.join("1"))?;
            std::fs::write(folder.join("andon.toml"), "deterministic = true\n")?;
            let file = folder.join("1/config_sentence_transformers.json");
            if file.exists() {
                std::fs::remove_file(&file)?;
            }
            if model == "prompted" {
                let prompts = json!({"query": "query: ", "passage": "passage: ", "none": ""});
                let config = json!({"prompts": prompts, "default_prompt_name": "query"});
                std::fs::write(file, config.to_string())?;
            }
        }
        let flags = ["--repository".to_owned(), repository.display().to_string()];
        let andon = Andon::start("serve", &flags, None)?;
        andon.ready().await?;
        let channel = Channel::from_shared(format!("http://{}", andon.grpc))?;
        Ok(Self {
            grpc: calls::client(andon.grpc).await?,
            channel: channel.connect().await?,
            web: reqwest::Client::builder().timeout(TIMEOUT).build()?,
            andon,
            repository,
        })
    }

    /// The first row that a request of gRPC brings.
    async fn infer(&self, request: ModelInferRequest) -> Result<Vec<f32>, Status> {
        let response = calls::infer(&self.grpc, request, TIMEOUT).await?;
        Ok(calls::rows(&response, 0).swap_remove(0))
    }

    /// The same as the only message of a stream.
    async fn streamed(&self, request: ModelInferRequest) -> Result<Vec<f32>> {
        let requests = futures::stream::iter([request]);
        let responses = self.grpc.clone().model_stream_infer(requests).await?;
        let response = responses.into_inner().message().await?;
        let response = response.context("no response")?;
        let error = response.error_message;
        let response = response.infer_response.context(error.clone())?;
        ensure!(error.is_empty(), "{error}");
        Ok(calls::rows(&response, 0).swap_remove(0))
    }

    /// The vector of a call of `tei.v1`.
    async fn embed(&self, model: &str, text: &str, name: Option<&str>) -> Result<Vec<f32>, Status> {
        let request = tei::EmbedRequest {
            inputs: text.to_owned(),
            normalize: true,
            prompt_name: name.map(str::to_owned),
            ..Default::default()
        };
        let mut client = tei::embed_client::EmbedClient::new(self.channel.clone());
        let response = client.embed(of_model(model, request)).await?;
        Ok(response.into_inner().embeddings)
    }

    async fn post(&self, path: &str, body: &Value) -> Result<(StatusCode, Value)> {
        let address = format!("http://{}{path}", self.andon.http);
        let response = self.web.post(address).json(body).send().await?;
        Ok((response.status(), response.json().await?))
    }

    /// The vector of a call over HTTP, at a place of the response.
    async fn posted(&self, path: &str, body: &Value, place: &str) -> Result<Vec<f32>> {
        let (status, response) = self.post(path, body).await?;
        let vector = response.pointer(place);
        match vector {
            Some(vector) if status == StatusCode::OK => Ok(serde_json::from_value(vector.clone())?),
            _ => bail!("{path}: {status} {response}"),
        }
    }
}

/// A request of `tei.v1` for a model.
fn of_model<T>(model: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    if let Ok(model) = model.parse() {
        request.metadata_mut().insert("andon-model", model);
    }
    request
}

fn texts(model: &str, text: &str) -> ModelInferRequest {
    ModelInferRequest {
        model_name: model.to_owned(),
        ..calls::texts(&[text])
    }
}

fn with_string(mut request: ModelInferRequest, name: &str, value: &str) -> ModelInferRequest {
    let parameter_choice = Some(ParameterChoice::StringParam(value.to_owned()));
    let parameter = InferParameter { parameter_choice };
    request.parameters.insert(name.to_owned(), parameter);
    request
}

/// The bodies of the two calls over HTTP: OpenAI's, and that of REST v2.
fn bodies(model: &str, case: &Case) -> [Value; 2] {
    let mut openai = json!({"model": model, "input": TEXT});
    let input = json!({"name": "text", "datatype": "BYTES", "shape": [1], "data": [TEXT]});
    let mut infer = json!({"inputs": [input], "parameters": {}});
    if let Some((name, value)) = case.chosen {
        openai[name] = json!(value);
        infer["parameters"][name] = json!(value);
    }
    [openai, infer]
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The field that a status names.
fn field(status: &Status) -> Option<String> {
    use tonic_types::StatusExt;
    let details = status.get_error_details();
    let violation = details.bad_request()?.field_violations.first()?.clone();
    Some(violation.field)
}

#[tokio::test]
async fn a_text_with_a_prompt_has_the_same_bits_at_every_door() -> Result<()> {
    let served = Served::start().await?;
    // The second time, rows come from the cache.
    for round in 0..2 {
        for case in &CASES {
            let expected = bits(&served.infer(texts("plain", case.read)).await?);
            let (mut request, mut name) = (texts("prompted", TEXT), None);
            if let Some((key, value)) = case.chosen {
                request = with_string(request, key, value);
                name = (key == "prompt_name").then_some(value);
            }
            let [openai, infer] = bodies("prompted", case);
            let embedding = "/data/0/embedding";
            let (path, data) = ("/v2/models/prompted/infer", "/outputs/0/data");
            let mut vectors = vec![
                ("ModelInfer", served.infer(request.clone()).await?),
                ("ModelStreamInfer", served.streamed(request).await?),
                (
                    "/v1/embeddings",
                    served.posted("/v1/embeddings", &openai, embedding).await?,
                ),
                (path, served.posted(path, &infer, data).await?),
            ];
            // Its requests have no field for a prompt itself.
            if case.chosen.is_none() || name.is_some() {
                let vector = served.embed("prompted", TEXT, name).await?;
                vectors.push(("tei.v1", vector));
            }
            for (door, vector) in vectors {
                ensure!(
                    bits(&vector) == expected,
                    "round {round}, {door}: {:?} is not '{}'",
                    case.chosen,
                    case.read
                );
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn tokens_are_those_of_the_text_with_its_prompt() -> Result<()> {
    let served = Served::start().await?;
    let whole = CASES[0].read;
    let mut tokenize = tei::tokenize_client::TokenizeClient::new(served.channel.clone());
    let mut embed = tei::embed_client::EmbedClient::new(served.channel.clone());
    let mut tokens = Vec::new();
    let mut states = Vec::new();
    for (model, inputs) in [("plain", whole), ("prompted", TEXT)] {
        let request = tei::EncodeRequest {
            inputs: inputs.to_owned(),
            add_special_tokens: false,
            prompt_name: None,
        };
        let response = tokenize.tokenize(of_model(model, request)).await?;
        let ids = response.into_inner().tokens.into_iter();
        tokens.push(ids.map(|token| token.id).collect::<Vec<u32>>());
        let request = tei::EmbedAllRequest {
            inputs: inputs.to_owned(),
            ..Default::default()
        };
        let response = embed
            .embed_all(of_model(model, request))
            .await?
            .into_inner();
        let vectors = response.token_embeddings.iter();
        states.push(vectors.map(|one| bits(&one.embeddings)).collect::<Vec<_>>());
    }
    ensure!(tokens[0] == tokens[1], "{tokens:?}");
    ensure!(states[0].len() == tokens[0].len() + 2 && states[0] == states[1]);
    Ok(())
}

/// A request of token ids.
fn list(model: &str, ids: &[u32]) -> ModelInferRequest {
    let tensor = |name: &str, count: usize| InferInputTensor {
        name: name.to_owned(),
        datatype: "INT64".to_owned(),
        shape: vec![count as i64],
        ..Default::default()
    };
    let ids_raw = ids.iter().flat_map(|id| i64::from(*id).to_le_bytes());
    let length = (ids.len() as i64).to_le_bytes();
    ModelInferRequest {
        model_name: model.to_owned(),
        inputs: vec![tensor("input_lengths", 1), tensor("input_ids", ids.len())],
        raw_input_contents: vec![length.to_vec().into(), ids_raw.collect::<Vec<u8>>().into()],
        ..Default::default()
    }
}

#[tokio::test]
async fn token_ids_take_no_prompt() -> Result<()> {
    let served = Served::start().await?;
    let ids = [2000, 2001, 2002];
    let expected = served.infer(list("plain", &ids)).await?;
    let found = served.infer(list("prompted", &ids)).await?;
    ensure!(bits(&found) == bits(&expected));
    let mut body = json!({"model": "prompted", "input": ids});
    let place = "/data/0/embedding";
    let found = served.posted("/v1/embeddings", &body, place).await?;
    ensure!(bits(&found) == bits(&expected));
    for (name, value) in [("prompt_name", "query"), ("prompt", "title: ")] {
        let refused = served.infer(with_string(list("prompted", &ids), name, value));
        let status = refused.await.err().context("it was taken")?;
        let at = format!("parameters[{name}]");
        ensure!(status.code() == Code::InvalidArgument, "{status:?}");
        ensure!(field(&status) == Some(at), "{status:?}");
    }
    body["prompt_name"] = json!("query");
    let (status, error) = served.post("/v1/embeddings", &body).await?;
    ensure!(status == StatusCode::BAD_REQUEST, "{error}");
    ensure!(error["error"]["param"] == "prompt_name", "{error}");
    Ok(())
}

#[tokio::test]
async fn an_unknown_prompt_is_refused_with_the_known_ones_at_every_door() -> Result<()> {
    let served = Served::start().await?;
    for (model, reason) in [
        (
            "prompted",
            "must be one of the model's prompts: none, passage, query",
        ),
        ("plain", "must not be set: the model has no prompts"),
    ] {
        let request = with_string(texts(model, TEXT), "prompt_name", "nobody");
        let status = served.infer(request).await.err().context("taken")?;
        let by_tei = served.embed(model, TEXT, Some("nobody")).await;
        let by_tei = by_tei.err().context("taken")?;
        for (status, at) in [(status, "parameters[prompt_name]"), (by_tei, "prompt_name")] {
            ensure!(status.code() == Code::InvalidArgument, "{status:?}");
            ensure!(field(&status).as_deref() == Some(at), "{status:?}");
            ensure!(status.message().contains(reason), "{status:?}");
        }
        let case = Case {
            chosen: Some(("prompt_name", "nobody")),
            read: TEXT,
        };
        let [openai, infer] = bodies(model, &case);
        let (status, error) = served.post("/v1/embeddings", &openai).await?;
        ensure!(status == StatusCode::BAD_REQUEST, "{error}");
        ensure!(error["error"]["param"] == "prompt_name", "{error}");
        ensure!(error.to_string().contains(reason), "{error}");
        let path = format!("/v2/models/{model}/infer");
        let (status, problem) = served.post(&path, &infer).await?;
        ensure!(status == StatusCode::BAD_REQUEST, "{problem}");
        ensure!(problem["field"] == "parameters[prompt_name]", "{problem}");
        ensure!(problem.to_string().contains(reason), "{problem}");
    }
    Ok(())
}

#[tokio::test]
async fn the_configuration_of_a_model_names_its_prompts() -> Result<()> {
    let served = Served::start().await?;
    for (model, names, default) in [
        (
            "prompted",
            Some("[\"none\",\"passage\",\"query\"]"),
            Some("query"),
        ),
        ("plain", None, None),
    ] {
        let request = ModelConfigRequest {
            name: model.to_owned(),
            ..Default::default()
        };
        let response = served.grpc.clone().model_config(request).await?;
        let config = response.into_inner().config.context("no configuration")?;
        let value = |name: &str| {
            let parameter = config.parameters.get(name);
            parameter.map(|parameter| parameter.string_value.as_str())
        };
        ensure!(value("prompts") == names, "{:?}", config.parameters);
        ensure!(
            value("default_prompt_name") == default,
            "{:?}",
            config.parameters
        );
    }
    Ok(())
}
