//! A caller's words in errors: a name of megabytes, which is a few kilobytes in
//! gzip, comes back cut, from every door, and ends no connection.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::{pixels, texts};
use fleet_tests::{Fleet, raw};
use prost::Message;
use protocol::inference::infer_parameter::ParameterChoice;
use protocol::inference::model_infer_request::InferRequestedOutputTensor;
use protocol::inference::{InferParameter, ModelInferRequest};
use serde_json::{Value, json};
use tonic::Code;

const LONG: usize = 8 << 20;
/// What an error may take of a header list or of a body, in bytes.
const ERROR_BYTES_MAX: usize = 16 << 10;
const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const STREAM: &str = "/inference.GRPCInferenceService/ModelStreamInfer";

fn parameter() -> InferParameter {
    InferParameter {
        parameter_choice: Some(ParameterChoice::BoolParam(true)),
    }
}

/// Requests for `digits`, each with a word of megabytes where a caller chooses.
fn requests(long: &str) -> Vec<(&'static str, ModelInferRequest)> {
    let mut requests = Vec::new();
    let mut add = |place, change: &dyn Fn(&mut ModelInferRequest)| {
        let mut request = pixels(&[[3.0; 64]]);
        change(&mut request);
        requests.push((place, request));
    };
    add("parameter", &|request| {
        request.parameters.insert(long.to_owned(), parameter());
    });
    add("reserved parameter", &|request| {
        let name = format!("triton_{long}");
        request.parameters.insert(name, parameter());
    });
    add("parameter of an input", &|request| {
        let input = &mut request.inputs[0];
        input.parameters.insert(long.to_owned(), parameter());
    });
    add("input", &|request| {
        long.clone_into(&mut request.inputs[0].name)
    });
    add("datatype", &|request| {
        long.clone_into(&mut request.inputs[0].datatype);
    });
    add("output", &|request| {
        request.outputs.push(InferRequestedOutputTensor {
            name: long.to_owned(),
            ..Default::default()
        });
    });
    add("model", &|request| long.clone_into(&mut request.model_name));
    add("version", &|request| {
        long.clone_into(&mut request.model_version);
    });
    requests
}

/// All calls go over one connection, which must outlive them.
async fn refuses_by_grpc(address: SocketAddr, long: &str) -> Result<()> {
    let channel = raw::connect(address).await?;
    for (place, request) in requests(long) {
        let framed = raw::framed(&raw::gzip(&request.encode_to_vec())?, true);
        let reply = raw::call(&channel, INFER, &[], framed.clone()).await;
        let reply = reply.with_context(|| format!("a long {place}"))?;
        let status = &reply.status;
        ensure!(status.code() == Code::InvalidArgument, "{place}: {status}");
        ensure!(reply.header_bytes < ERROR_BYTES_MAX, "{place}: {status}");
        ensure!(
            !status.message().contains(&long[..200]),
            "{place}: {status}"
        );
        let reply = raw::call(&channel, STREAM, &[], framed).await?;
        let bytes = reply.header_bytes + reply.bytes.len();
        ensure!(
            bytes < ERROR_BYTES_MAX,
            "{place} in a stream: {bytes} bytes"
        );
    }
    let framed = raw::framed(&pixels(&[[3.0; 64]]).encode_to_vec(), false);
    let reply = raw::call(&channel, INFER, &[], framed).await?;
    ensure!(reply.status.code() == Code::Ok, "{:?}", reply.status);
    Ok(())
}

/// JSON with a word of megabytes, one for each path.
fn bodies(long: &str) -> Vec<(&'static str, Value)> {
    let input = json!({"name": "pixels", "datatype": "FP32", "shape": [1, 64], "data": [[0]]});
    let changed = |key: &str, value: Value| {
        let mut input = input.clone();
        input[key] = value;
        json!({"inputs": [input]})
    };
    let infer = "/v2/models/digits/infer";
    vec![
        (
            infer,
            json!({"inputs": [input], "parameters": {long: true}}),
        ),
        (infer, json!({"inputs": [input], "parameters": {long: []}})),
        (infer, json!({"inputs": [input], long: 1})),
        (infer, changed("name", json!(long))),
        (infer, changed("datatype", json!(long))),
        (infer, changed("shape", json!([1, long]))),
        (infer, changed("data", json!([long]))),
        (infer, changed("parameters", json!({long: 1}))),
        (
            infer,
            json!({"inputs": [input], "outputs": [{"name": long}]}),
        ),
        ("/v2/repository/index", json!({"repository_name": long})),
        (
            "/v2/repository/models/digits/load",
            json!({"parameters": {long: []}}),
        ),
        ("/v2/logging", json!({long: true})),
        ("/v2/trace/setting", json!({long: "1"})),
        (
            "/v2/models/digits/generate",
            json!({"text_input": "a", long: 1}),
        ),
        ("/v1/embeddings", json!({"model": long, "input": "a"})),
        (
            "/v1/embeddings",
            json!({"model": "digits", "input": "a", "encoding_format": long}),
        ),
        (
            "/v1/embeddings",
            json!({"model": "minilm", "input": "a", "prompt_name": long}),
        ),
        (
            "/v1/embeddings",
            json!({"model": "minilm", "input": "a", "prompt": long}),
        ),
        (
            "/v1/chat/completions",
            json!({"model": long, "messages": []}),
        ),
        (
            "/v1/chat/completions",
            json!({"model": "digits", "messages": [{"role": long}]}),
        ),
        ("/v1/completions", json!({"model": long, "prompt": "a"})),
        ("/v1/responses", json!({"model": "digits", "stream": long})),
        (
            "/v1/rerank",
            json!({"model": long, "query": "a", "documents": ["b"]}),
        ),
        (
            "/rerank",
            json!({"query": "a", "texts": ["b"], "truncation_direction": long}),
        ),
        ("/v1/classify", json!({"model": long, "input": "a"})),
    ]
}

async fn refuses_by_http(address: SocketAddr, long: &str) -> Result<()> {
    let client = reqwest::Client::builder().no_proxy().build()?;
    for (path, body) in bodies(long) {
        let request = client
            .post(format!("http://{address}{path}"))
            .header("content-encoding", "gzip")
            .body(raw::gzip(body.to_string().as_bytes())?);
        let response = request.send().await?;
        let status = response.status().as_u16();
        let text = response.text().await?;
        ensure!((400..500).contains(&status), "{path}: {status}");
        ensure!(text.len() < ERROR_BYTES_MAX, "{path}: {} bytes", text.len());
        ensure!(!text.contains(&long[..200]), "{path}: {text}");
    }
    Ok(())
}

#[tokio::test]
async fn words_of_callers_come_back_cut_at_every_door() -> Result<()> {
    let fleet = Fleet::start(1).await?;
    let worker = fleet.workers[0].as_ref().context("a worker")?;
    let long = "w".repeat(LONG);
    refuses_by_grpc(fleet.gateway.grpc, &long).await?;
    refuses_by_grpc(worker.grpc, &long).await?;
    refuses_by_http(fleet.gateway.http, &long).await?;
    for name in [
        "andon_gateway_retries_total",
        "andon_gateway_ejections_total",
    ] {
        ensure!(fleet.gateway.metric_sum(name).await? == 0.0, "{name}");
    }
    Ok(())
}

/// A response over the gateway's limit is an error that is about a worker.
#[tokio::test]
async fn callers_are_told_no_address_of_a_worker() -> Result<()> {
    let fleet = Fleet::with(1, &[], &["--message-bytes-max", "1KiB", "--log", "debug"]).await?;
    let worker = fleet.workers[0].as_ref().context("a worker")?;
    let port = worker.grpc.port().to_string();
    let channel = raw::connect(fleet.gateway.grpc).await?;
    let framed = raw::framed(&texts(&["a lantern"]).encode_to_vec(), false);
    let status = raw::call(&channel, INFER, &[], framed).await?.status;
    ensure!(status.code() == Code::ResourceExhausted, "{status}");
    let url = format!("http://{}/v1/embeddings", fleet.gateway.http);
    let body = json!({"model": "minilm", "input": "a lantern"}).to_string();
    let client = reqwest::Client::builder().no_proxy().build()?;
    let text = client.post(url).body(body).send().await?.text().await?;
    for message in [status.message(), &text] {
        ensure!(message.contains("the response has over"), "{message}");
        ensure!(
            !message.contains(&port) && !message.contains("127.0.0.1"),
            "{message}"
        );
    }
    let logged = fleet.gateway.logged();
    let mut lines = logged.lines().filter(|line| line.contains("a call failed"));
    ensure!(lines.any(|line| line.contains(&port)), "{logged}");
    Ok(())
}
