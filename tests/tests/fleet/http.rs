//! The HTTP door: the same responses and the same errors as the gRPC door's.

mod attacks;
mod cache;
mod callers;
mod errors;
mod pages;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::{client, infer, pixels, texts};
use fleet_tests::{Fleet, models};
use protocol::inference::infer_parameter::ParameterChoice;
use protocol::inference::{InferParameter, ModelInferRequest};
use serde_json::{Map, Value, json};

const HEADER_LENGTH: &str = "inference-header-content-length";

/// A response of the HTTP door.
#[derive(Debug)]
struct Response {
    status: u16,
    headers: http::HeaderMap,
    bytes: Vec<u8>,
}

impl Response {
    /// The JSON, without the binary tensors behind it.
    fn json(&self) -> Result<Value> {
        let json = &self.bytes[..self.json_bytes()];
        serde_json::from_slice(json)
            .with_context(|| format!("{}: {}", self.status, String::from_utf8_lossy(&self.bytes)))
    }

    fn json_bytes(&self) -> usize {
        let length = self.headers.get(HEADER_LENGTH);
        let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
        length.unwrap_or(self.bytes.len())
    }

    fn text(&self, name: &str) -> Result<Option<String>> {
        Ok(self.json()?[name].as_str().map(str::to_owned))
    }
}

/// A version of HTTP.
#[derive(Debug, Clone, Copy)]
enum Protocol {
    Http1,
    Http2,
}

fn web(protocol: Protocol) -> Result<reqwest::Client> {
    let builder = reqwest::Client::builder().no_proxy();
    Ok(match protocol {
        Protocol::Http1 => builder.http1_only(),
        Protocol::Http2 => builder.http2_prior_knowledge(),
    }
    .timeout(Duration::from_secs(60))
    .build()?)
}

async fn fetch(request: reqwest::RequestBuilder) -> Result<Response> {
    let response = request.send().await?;
    Ok(Response {
        status: response.status().as_u16(),
        headers: response.headers().clone(),
        bytes: response.bytes().await?.to_vec(),
    })
}

async fn get(address: SocketAddr, path: &str) -> Result<Response> {
    fetch(web(Protocol::Http1)?.get(format!("http://{address}{path}"))).await
}

async fn post(address: SocketAddr, path: &str, body: impl Into<reqwest::Body>) -> Result<Response> {
    let request = web(Protocol::Http1)?.post(format!("http://{address}{path}"));
    fetch(request.body(body)).await
}

fn infer_path(request: &ModelInferRequest) -> String {
    let name = request.model_name.replace(' ', "%20");
    match request.model_version.as_str() {
        "" => format!("/v2/models/{name}/infer"),
        version => format!("/v2/models/{name}/versions/{version}/infer"),
    }
}

fn parameters(given: &std::collections::HashMap<String, InferParameter>) -> Map<String, Value> {
    let value = |parameter: &InferParameter| match parameter.parameter_choice.clone() {
        Some(ParameterChoice::BoolParam(value)) => json!(value),
        Some(ParameterChoice::Int64Param(value)) => json!(value),
        Some(ParameterChoice::StringParam(value)) => json!(value),
        Some(ParameterChoice::DoubleParam(value)) => json!(value),
        Some(ParameterChoice::Uint64Param(value)) => json!(value),
        None => Value::Null,
    };
    let named = given.iter();
    named.map(|(k, v)| (k.clone(), value(v))).collect()
}

/// A request of the gRPC door in JSON; its tensors as text or behind it.
fn in_json(request: &ModelInferRequest, text: bool) -> (Vec<u8>, usize) {
    let mut blobs = Vec::new();
    let inputs = request.inputs.iter().zip(&request.raw_input_contents);
    let inputs = inputs.map(|(input, raw)| {
        let mut written = json!({
            "name": input.name, "datatype": input.datatype, "shape": input.shape,
            "parameters": parameters(&input.parameters),
        });
        if text {
            written["data"] = match input.datatype.as_str() {
                "FP32" => raw
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect(),
                _ => tensor::bytes_elements(raw)
                    .flatten()
                    .map(|element| String::from_utf8_lossy(element).into_owned())
                    .collect(),
            };
        } else {
            written["parameters"]["binary_data_size"] = json!(raw.len());
            blobs.extend_from_slice(raw);
        }
        written
    });
    let inputs: Vec<Value> = inputs.collect();
    let outputs = request.outputs.iter();
    let outputs: Vec<Value> = outputs
        .map(|output| json!({"name": output.name, "parameters": parameters(&output.parameters)}))
        .collect();
    let mut parameters = parameters(&request.parameters);
    if !text {
        parameters.insert("binary_data_output".to_owned(), json!(true));
    }
    let json = json!({
        "id": request.id, "inputs": inputs, "outputs": outputs, "parameters": parameters,
    });
    let mut body = json.to_string().into_bytes();
    let length = body.len();
    body.extend(blobs);
    (body, length)
}

async fn send(
    address: SocketAddr,
    protocol: Protocol,
    request: &ModelInferRequest,
    text: bool,
    headers: &[(&str, &str)],
) -> Result<Response> {
    let (body, length) = in_json(request, text);
    let mut call = web(protocol)?.post(format!("http://{address}{}", infer_path(request)));
    if !text {
        call = call.header(HEADER_LENGTH, length.to_string());
    }
    for (name, value) in headers {
        call = call.header(*name, *value);
    }
    fetch(call.body(body)).await
}

/// The bytes of a response's outputs, in whichever form they came.
fn outputs(response: &Response) -> Result<Vec<Vec<u8>>> {
    let json = response.json()?;
    let mut rest = &response.bytes[response.json_bytes()..];
    let mut raw = Vec::new();
    for output in json["outputs"].as_array().context("no outputs")? {
        if let Some(size) = output["parameters"]["binary_data_size"].as_u64() {
            let (own, after) = rest.split_at(size as usize);
            raw.push(own.to_vec());
            rest = after;
            continue;
        }
        let data = output["data"].as_array().context("no data")?;
        raw.push(match output["datatype"].as_str() {
            Some("INT64") => {
                let values = data.iter().filter_map(Value::as_i64);
                values.flat_map(i64::to_le_bytes).collect()
            }
            _ => {
                let values = data.iter().filter_map(Value::as_f64);
                values.flat_map(|v| (v as f32).to_le_bytes()).collect()
            }
        });
    }
    ensure!(rest.is_empty(), "{} bytes are left", rest.len());
    Ok(raw)
}

#[tokio::test]
async fn both_doors_answer_alike_to_the_bit() -> Result<()> {
    let fleet = Fleet::start(1).await?;
    let gateway = &fleet.gateway;
    let client = client(gateway.grpc).await?;
    let rows: Vec<[f32; 64]> = (0..40).map(|row| [(row % 16) as f32 + 0.1; 64]).collect();
    for mut request in [
        pixels(&rows),
        texts(&["a lantern", "around a \"candle\"\n", "日本語"]),
    ] {
        request.id = "request-7".to_owned();
        let over_grpc = infer(&client, request.clone(), Duration::from_secs(30)).await?;
        for (protocol, text) in [
            (Protocol::Http1, false),
            (Protocol::Http1, true),
            (Protocol::Http2, false),
            (Protocol::Http2, true),
        ] {
            let response = send(gateway.http, protocol, &request, text, &[]).await?;
            let json = response.json()?;
            ensure!(response.status == 200, "{json}");
            ensure!(
                json["id"] == "request-7" && json["model_version"] == "1",
                "{json}"
            );
            ensure!(json["model_name"] == request.model_name.as_str(), "{json}");
            let raw = outputs(&response)?;
            ensure!(raw.len() == over_grpc.raw_output_contents.len(), "{json}");
            for (own, other) in raw.iter().zip(&over_grpc.raw_output_contents) {
                ensure!(own == other, "{}: {protocol:?}, {text}", request.model_name);
            }
            ensure!(response.headers.contains_key("x-request-id"), "no id");
        }
    }
    let taken = [("x-request-id", "mine-1")];
    let response = send(gateway.http, Protocol::Http1, &pixels(&rows), false, &taken).await?;
    ensure!(response.headers["x-request-id"] == "mine-1", "another id");
    Ok(())
}

fn digits() -> Result<String> {
    Ok(format!("digits={}", models()?.join("digits/1").display()))
}

#[tokio::test]
async fn a_compressed_request_gets_a_compressed_response() -> Result<()> {
    let fleet = Fleet::with(
        1,
        &["--model", &digits()?],
        &["--message-bytes-max", "1MiB"],
    )
    .await?;
    let address = fleet.gateway.http;
    let (body, length) = in_json(&pixels(&[[3.0; 64]; 100]), true);
    ensure!(length == body.len(), "text has blobs");
    let pack = |body: &[u8]| -> Result<Vec<u8>> {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(body)?;
        Ok(packed.finish()?)
    };
    let url = format!("http://{address}/v2/models/digits/infer");
    let call = |body: Vec<u8>, encoding: &'static str| {
        let request = web(Protocol::Http1).map(|web| {
            web.post(&url)
                .header("content-encoding", encoding)
                .header("accept-encoding", "gzip")
                .body(body)
        });
        async move { fetch(request?).await }
    };
    let mut response = call(pack(&body)?, "gzip").await?;
    ensure!(response.status == 200, "{response:?}");
    ensure!(
        response.headers["content-encoding"] == "gzip",
        "{response:?}"
    );
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(&*response.bytes).read_to_end(&mut bytes)?;
    response.bytes = bytes;
    ensure!(outputs(&response)?[0].len() == 100 * 10 * 4, "{response:?}");
    // The limit holds for what it becomes, not for what it is.
    let bomb = call(pack(&vec![b' '; 8 << 20])?, "gzip").await?;
    ensure!(bomb.status == 413, "{bomb:?}");
    let garbage = call(b"no gzip".to_vec(), "gzip").await?;
    ensure!(garbage.status == 400, "{garbage:?}");
    let unknown = call(b"{}".to_vec(), "zstd").await?;
    ensure!(
        unknown.status == 415 && unknown.text("field")?.as_deref() == Some("content-encoding"),
        "{unknown:?}"
    );
    Ok(())
}

#[tokio::test]
async fn every_page_of_rest_v2_answers() -> Result<()> {
    let fleet = Fleet::with(1, &["--model", &digits()?], &[]).await?;
    let address = fleet.gateway.http;
    for path in [
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/digits",
        "/v2/models/digits/versions/1",
        "/v2/models/digits/ready",
        "/v2/models/digits/versions/1/ready",
        "/v2/models/digits/config",
        "/v2/models/digits/versions/1/config",
        "/v2/models/digits/stats",
        "/v2/models/digits/versions/1/stats",
        "/v2/models/stats",
        "/v2/logging",
        "/v2/trace/setting",
    ] {
        let response = get(address, path).await?;
        ensure!(response.status == 200, "{path}: {response:?}");
    }
    let ready = json!({"name": "digits", "ready": true});
    for (path, expected) in [
        ("/v2/health/live", json!({"live": true})),
        ("/v2/health/ready", json!({"ready": true})),
        ("/v2/models/digits/ready", ready.clone()),
        ("/v2/models/digits/versions/1/ready", ready),
    ] {
        let json = get(address, path).await?.json()?;
        ensure!(json == expected, "{path}: {json}");
    }
    let json = get(address, "/v2/models/digits").await?.json()?;
    ensure!(json["inputs"][0]["shape"] == json!([-1, 64]), "{json}");
    let json = get(address, "/v2/models/digits/config").await?.json()?;
    ensure!(json["input"][0]["data_type"] == "TYPE_FP32", "{json}");
    for body in ["", "null", "{\"ready\": null, \"repository_name\": null}"] {
        let json = post(address, "/v2/repository/index", body).await?.json()?;
        let first = &json[0];
        ensure!(first["name"] == "digits", "{body}: {json}");
        ensure!(first["state"] == "READY", "{body}: {json}");
    }
    let json = get(address, "/v2/models/stats").await?.json()?;
    ensure!(json["model_stats"][0]["inference_count"].is_u64(), "{json}");
    let json = post(address, "/v2/logging", "{\"log_info\": false}")
        .await?
        .json()?;
    ensure!(json["log_info"] == false, "{json}");
    Ok(())
}

#[tokio::test]
async fn errors_of_rest_v2_are_problem_documents() -> Result<()> {
    let fleet = Fleet::with(1, &["--model", &digits()?], &[]).await?;
    let address = fleet.gateway.http;
    for (response, status, field) in [
        (get(address, "/v2/nowhere").await?, 404, None),
        (post(address, "/v2", "{}").await?, 405, None),
        (get(address, "/v2/models/digits/infer").await?, 405, None),
        (
            get(address, "/v2/models/nobody/ready").await?,
            404,
            Some("model_name"),
        ),
        (
            get(address, "/v2/models/digits/versions/0x1").await?,
            400,
            Some("model_version"),
        ),
        (
            get(address, "/v2/systemsharedmemory/status").await?,
            501,
            None,
        ),
        (
            post(address, "/v2/logging", "{\"log_info\": 3}").await?,
            400,
            Some("settings[log_info]"),
        ),
        (
            post(address, "/v2/repository/index", "{\"red\": 1}").await?,
            400,
            Some("red"),
        ),
        (
            post(address, "/v2/models/digits/trace/setting", "{}").await?,
            400,
            Some("model_name"),
        ),
    ] {
        ensure!(response.status == status, "{response:?}");
        ensure!(response.text("field")?.as_deref() == field, "{response:?}");
        ensure!(response.text("error")?.is_some(), "{response:?}");
        let kind = response.headers["content-type"].to_str()?;
        ensure!(kind == "application/problem+json", "{kind}");
    }
    Ok(())
}
