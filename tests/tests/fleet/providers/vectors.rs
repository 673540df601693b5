//! Embeddings and scores, through both gRPC surfaces.

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::{self, rows};
use fleet_tests::process::Andon;
use fleet_tests::{models, until};
use protocol::inference::model_infer_request::InferInputTensor;
use protocol::inference::{
    InferParameter, ModelConfigRequest, ModelInferRequest, ModelMetadataRequest, ModelReadyRequest,
    RepositoryIndexRequest, RepositoryModelLoadRequest, infer_parameter::ParameterChoice,
};
use protocol::tei::v1 as tei;
use serde_json::{Value, json};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use wiremock::matchers::header;
use wiremock::{MockServer, Request, ResponseTemplate};

use super::{EMBEDDING, Outside, SECRET, TIMEOUT, embed, embedding, entry, key, posts, quoted};
use super::{texts, vector};

async fn channel(outside: &Outside) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{}", outside.gateway.grpc))?;
    Ok(endpoint.connect().await?)
}

/// A service that wants its key.
async fn guarded() -> MockServer {
    let server = MockServer::start().await;
    posts("/v1/embeddings")
        .and(header("authorization", format!("Bearer {SECRET}").as_str()))
        .respond_with(embed)
        .mount(&server)
        .await;
    server
}

#[tokio::test]
async fn embeddings_are_those_that_the_provider_sent_bit_for_bit() -> Result<()> {
    let (server, key) = (guarded().await, key()?);
    let more = format!("width = 3\nkey_file = {}", quoted(&key));
    let mut outside = Outside::start(&embedding("small", &server, &more)).await?;
    outside.files.push(key);
    let inputs = ["one", "other text", ""];
    let (response, metadata) = outside.call(texts("small", &inputs)).await?;
    ensure!(response.model_version == "1" && response.outputs[0].name == "embedding");
    let expected: Vec<Vec<f32>> = inputs.iter().map(|text| vector(text).to_vec()).collect();
    ensure!(rows(&response, 0) == expected, "{response:?}");
    let tokens = metadata.get("x-compute-tokens").context("no tokens")?;
    ensure!(tokens.to_str()? == "6");

    // The only model that embeds needs no name.
    let mut client = tei::embed_client::EmbedClient::new(channel(&outside).await?);
    let request = tei::EmbedRequest {
        inputs: "one".to_owned(),
        ..Default::default()
    };
    let response = client.embed(request.clone()).await?.into_inner();
    ensure!(response.embeddings == vector("one"));
    ensure!(response.metadata.unwrap_or_default().compute_tokens == 2);
    let sparse = client.embed_all(tei::EmbedAllRequest::default()).await;
    ensure!(sparse.err().map(|status| status.code()) == Some(Code::Unimplemented));

    let unit = tei::EmbedRequest {
        normalize: true,
        ..request
    };
    let response = client.embed(unit).await?.into_inner().embeddings;
    let length: f32 = response.iter().map(|v| v * v).sum();
    ensure!((length - 1.0).abs() < 1e-6, "{response:?}");

    let mut info = tei::info_client::InfoClient::new(channel(&outside).await?);
    let info = info.info(tei::InfoRequest {}).await?.into_inner();
    ensure!(info.model_id == "small" && info.max_concurrent_requests == 64);
    Ok(())
}

#[tokio::test]
async fn a_provider_describes_itself_like_a_local_model() -> Result<()> {
    let server = super::embedder().await;
    let catalogue = format!(
        "{}[chains.any]\nmodels = [\"small\"]\n",
        embedding("small", &server, "width = 3")
    );
    let outside = Outside::start(&catalogue).await?;
    let mut client = outside.client.clone();
    let name = || "small".to_owned();
    let request = ModelMetadataRequest {
        name: name(),
        version: "1".to_owned(),
    };
    let metadata = client.model_metadata(request).await?.into_inner();
    ensure!(metadata.platform == "andon_provider" && metadata.versions == ["1"]);
    ensure!(metadata.inputs[0].name == "text" && metadata.inputs[0].shape == [-1]);
    ensure!(metadata.outputs[0].shape == [-1, 3]);
    let request = ModelConfigRequest {
        name: name(),
        ..Default::default()
    };
    let config = client.model_config(request).await?.into_inner().config;
    ensure!(config.context("no config")?.output[0].dims == [3]);
    for (version, ready) in [("", true), ("1", true), ("2", false)] {
        let request = ModelReadyRequest {
            name: name(),
            version: version.to_owned(),
        };
        ensure!(client.model_ready(request).await?.into_inner().ready == ready);
    }
    let index = client.repository_index(RepositoryIndexRequest::default());
    let index = index.await?.into_inner().models;
    let index: Vec<_> = index
        .iter()
        .map(|m| (m.name.as_str(), m.reason.as_str()))
        .collect();
    ensure!(
        index == [("any", "chain"), ("small", "provider")],
        "{index:?}"
    );
    let load = RepositoryModelLoadRequest {
        model_name: name(),
        ..Default::default()
    };
    let refused = client.repository_model_load(load).await;
    ensure!(refused.err().map(|status| status.code()) == Some(Code::InvalidArgument));
    let mut request = texts("small", &["a"]);
    request.model_version = "2".to_owned();
    ensure!(outside.fails(request).await?.code() == Code::NotFound);
    ensure!(outside.fails(texts("nobody", &["a"])).await?.code() == Code::NotFound);
    Ok(())
}

/// The field that a status names.
fn field(status: &tonic::Status) -> Option<String> {
    use tonic_types::StatusExt;
    let details = status.get_error_details();
    let violation = details.bad_request()?.field_violations.first()?.clone();
    Some(violation.field)
}

#[tokio::test]
async fn errors_in_a_request_name_their_field_like_a_local_models() -> Result<()> {
    let server = super::embedder().await;
    let more = "width = 3\nrows_max = 2";
    let outside = Outside::start(&embedding("small", &server, more)).await?;
    let good = || texts("small", &["a"]);
    let parameter = |name: &str, choice: ParameterChoice| {
        let mut request = good();
        let value = InferParameter {
            parameter_choice: Some(choice),
        };
        request.parameters.insert(name.to_owned(), value);
        request
    };
    let mut datatype = good();
    datatype.inputs[0].datatype = "FP32".to_owned();
    datatype.raw_input_contents = vec![vec![0; 4].into()];
    let mut input = good();
    input.inputs[0].name = "words".to_owned();
    let mut text = good();
    text.raw_input_contents = vec![vec![1, 0, 0, 0, 0xff].into()];
    for (request, expected) in [
        (
            parameter("dimensions", ParameterChoice::Int64Param(4)),
            "parameters[dimensions]",
        ),
        (
            parameter("normalize", ParameterChoice::Int64Param(1)),
            "parameters[normalize]",
        ),
        (
            parameter("color", ParameterChoice::BoolParam(true)),
            "parameters[color]",
        ),
        (
            parameter("prompt_name", ParameterChoice::StringParam("query".into())),
            "parameters[prompt_name]",
        ),
        (
            parameter("prompt", ParameterChoice::StringParam("query: ".into())),
            "parameters[prompt]",
        ),
        (texts("small", &["a", "b", "c"]), "inputs[0].shape"),
        (texts("small", &[]), "inputs[0].shape"),
        (datatype, "inputs[0].datatype"),
        (input, "inputs"),
        (text, "inputs[0].contents[0]"),
    ] {
        let status = outside.fails(request).await?;
        ensure!(
            status.code() == Code::InvalidArgument,
            "{expected}: {status:?}"
        );
        ensure!(
            field(&status).as_deref() == Some(expected),
            "{expected}: {status:?}"
        );
    }
    ensure!(
        server
            .received_requests()
            .await
            .unwrap_or_default()
            .is_empty()
    );
    Ok(())
}

fn pairs(model: &str, pairs: &[(&str, &str)]) -> ModelInferRequest {
    let column = |name: &str| InferInputTensor {
        name: name.to_owned(),
        datatype: "BYTES".to_owned(),
        shape: vec![pairs.len() as i64],
        ..Default::default()
    };
    let raw = |texts: Vec<&str>| {
        tensor::encode_bytes_elements(&texts)
            .unwrap_or_default()
            .into()
    };
    ModelInferRequest {
        model_name: model.to_owned(),
        inputs: vec![column("query"), column("text")],
        raw_input_contents: vec![
            raw(pairs.iter().map(|(query, _)| *query).collect()),
            raw(pairs.iter().map(|(_, text)| *text).collect()),
        ],
        ..Default::default()
    }
}

/// Scores texts by their length, the best first.
pub(super) fn score(request: &Request) -> ResponseTemplate {
    let body: Value = request.body_json().unwrap_or_default();
    let texts = body["documents"].as_array().cloned().unwrap_or_default();
    let mut results: Vec<(usize, f64)> = texts
        .iter()
        .enumerate()
        .map(|(index, text)| (index, text.as_str().map_or(0.0, |t| t.len() as f64) / 16.0))
        .collect();
    results.sort_by(|a, b| b.1.total_cmp(&a.1));
    let results: Vec<Value> = results
        .into_iter()
        .map(|(index, score)| json!({"index": index, "relevance_score": score}))
        .collect();
    ResponseTemplate::new(200).set_body_json(json!({
        "results": results, "meta": {"billed_units": {"search_units": 1}},
    }))
}

#[tokio::test]
async fn texts_are_ranked_by_a_cohere_shaped_service() -> Result<()> {
    let server = MockServer::start().await;
    posts("/v2/rerank").respond_with(score).mount(&server).await;
    let url = format!("{}/v2", server.uri());
    let more = "kind = \"cohere\"\ntask = \"rerank\"\nprice = { per_search = 0.25 }";
    let outside = Outside::start(&entry("judge", &url, more)).await?;
    // Two queries are two searches.
    let inputs = [("q", "four"), ("r", "eight888"), ("q", "")];
    let (response, _) = outside.call(pairs("judge", &inputs)).await?;
    ensure!(
        rows(&response, 0) == [[0.25f32], [0.5], [0.0]],
        "{response:?}"
    );
    let cost = "andon_gateway_provider_cost_total{tenant=\"anyone\",model=\"judge\"}";
    ensure!(outside.gateway.metric(cost).await? == Some(0.5));

    let mut client = tei::rerank_client::RerankClient::new(channel(&outside).await?);
    let request = tei::RerankRequest {
        query: "q".to_owned(),
        texts: ["", "eight888", "four"].map(str::to_owned).to_vec(),
        return_text: true,
        ..Default::default()
    };
    let ranks = client.rerank(request).await?.into_inner().ranks;
    let ranks: Vec<_> = ranks
        .iter()
        .map(|r| (r.index, r.text.as_deref(), r.score))
        .collect();
    let expected = [
        (1, Some("eight888"), 0.5),
        (2, Some("four"), 0.25),
        (0, Some(""), 0.0),
    ];
    ensure!(ranks == expected, "{ranks:?}");
    Ok(())
}

#[tokio::test]
async fn a_cohere_shaped_service_embeds() -> Result<()> {
    let server = MockServer::start().await;
    let response = json!({
        "embeddings": {"float": [[0.5, 0.25]]}, "meta": {"billed_units": {"input_tokens": 3}},
    });
    posts("/v2/embed")
        .and(wiremock::matchers::body_partial_json(json!({
            "texts": ["a"], "truncate": "NONE", "input_type": "search_query",
        })))
        .respond_with(ResponseTemplate::new(200).set_body_json(response))
        .mount(&server)
        .await;
    let url = format!("{}/v2/", server.uri());
    let more = "kind = \"cohere\"\ntask = \"embedding\"\ninput_type = \"search_query\"";
    let outside = Outside::start(&entry("words", &url, more)).await?;
    let (response, _) = outside.call(texts("words", &["a"])).await?;
    ensure!(rows(&response, 0) == [[0.5f32, 0.25]]);
    Ok(())
}

#[tokio::test]
async fn another_andon_is_a_provider_and_answers_bit_for_bit() -> Result<()> {
    let flags = ["--repository".to_owned(), models()?.display().to_string()];
    let other = Andon::start("serve", &flags, None)?;
    other.ready().await?;
    let more = format!("{EMBEDDING}\nwidth = 384");
    let catalogue = entry("minilm", &format!("http://{}/v1", other.http), &more);
    let outside = Outside::start(&catalogue.replace("theirs", "minilm")).await?;
    let request = calls::texts(&["A lantern around a candle", "日本語"]);
    let direct = calls::client(other.grpc).await?;
    let expected = calls::infer(&direct, request.clone(), TIMEOUT).await?;
    let (response, _) = outside.call(request).await?;
    ensure!(response.raw_output_contents == expected.raw_output_contents);
    drop(other);
    until(TIMEOUT, "the other Andon is missed", || async {
        let status = outside.fails(calls::texts(&["a"])).await?;
        Ok(status.code() == Code::Unavailable && status.message().contains("'minilm'"))
    })
    .await
}

#[tokio::test]
async fn dimensions_that_a_service_passes_over_are_the_callers_fault() -> Result<()> {
    let server = MockServer::start().await;
    posts("/v1/embeddings")
        .respond_with(embed)
        .mount(&server)
        .await;
    let outside = Outside::start(&embedding("small", &server, "")).await?;
    let mut narrow = texts("small", &["a"]);
    let parameter_choice = Some(ParameterChoice::Int64Param(2));
    let parameter = InferParameter { parameter_choice };
    narrow.parameters.insert("dimensions".to_owned(), parameter);
    for _ in 0..10 {
        let status = outside.fails(narrow.clone()).await?;
        ensure!(status.code() == Code::InvalidArgument, "{status:?}");
        let message = status.message();
        ensure!(message.contains("parameters[dimensions]"), "{status:?}");
    }
    // Nobody else is kept from the service.
    let (response, _) = outside.call(texts("small", &["a"])).await?;
    ensure!(rows(&response, 0) == [vector("a")]);
    Ok(())
}
