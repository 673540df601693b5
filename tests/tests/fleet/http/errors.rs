//! Every row of the table of errors that can be caused from outside, at both
//! doors: one condition, one code, one field.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::{call, client, pixels, texts};
use fleet_tests::process::{Andon, free_port};
use fleet_tests::tenants::Tenants;
use fleet_tests::{Fleet, program, until};
use platform::grpc::code_name;
use protocol::inference::infer_parameter::ParameterChoice;
use protocol::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use protocol::inference::{
    InferParameter, ModelInferRequest, RepositoryModelLoadRequest, RepositoryModelUnloadRequest,
    ServerReadyRequest, SystemSharedMemoryStatusRequest,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::{Protocol, Response, digits, get, post, send};

const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";

/// The table.
fn http_status(code: Code, retry: bool) -> u16 {
    match code {
        Code::NotFound => 404,
        Code::Unavailable => 503,
        Code::ResourceExhausted if retry => 429,
        Code::ResourceExhausted => 413,
        Code::InvalidArgument => 400,
        Code::Unauthenticated => 401,
        Code::PermissionDenied => 403,
        Code::DeadlineExceeded => 504,
        Code::Unimplemented => 501,
        _ => 500,
    }
}

/// How the HTTP door calls a field of the gRPC door.
fn at_http(field: &str) -> String {
    let raw = field
        .strip_prefix("raw_input_contents[")
        .and_then(|rest| rest.strip_suffix(']'));
    raw.map_or_else(
        || field.replacen("].contents", "].data", 1),
        |index| format!("inputs[{index}].data"),
    )
}

/// The error that both doors must report.
#[derive(Debug, Clone, Copy)]
struct Expected<'a> {
    code: Code,
    /// As the HTTP door names it.
    field: Option<&'a str>,
}

/// An error that names no field.
fn without_field(code: Code) -> Expected<'static> {
    Expected { code, field: None }
}

/// Whether a status of the gRPC door and a response of the HTTP door are the
/// expected error.
fn agree(what: &str, status: &Status, response: &Response, expected: Expected<'_>) -> Result<()> {
    let Expected { code, field } = expected;
    let details = status.get_error_details();
    let retry = details.retry_info().is_some();
    let named = details
        .bad_request()
        .and_then(|bad| Some(bad.field_violations.first()?.field.clone()));
    ensure!(status.code() == code, "{what}: {status:?}");
    ensure!(
        response.status == http_status(code, retry),
        "{what}: {response:?}"
    );
    ensure!(
        response.text("code")?.as_deref() == Some(code_name(code)),
        "{what}: {response:?}"
    );
    let at_http = named.as_deref().map(at_http);
    ensure!(at_http.as_deref() == field, "{what}: {named:?}");
    ensure!(
        response.text("field")?.as_deref() == field,
        "{what}: {response:?}"
    );
    ensure!(
        response.headers.contains_key("retry-after") == retry,
        "{what}: {response:?}"
    );
    // A body and a message differ in length, and a wait in time.
    if code != Code::ResourceExhausted {
        let message = match (&named, &at_http) {
            // Beside the name of an input stands the rest of the path alone.
            (Some(grpc), Some(http)) => {
                status
                    .message()
                    .replacen(grpc, http, 1)
                    .replacen("': contents[", "': data[", 1)
            }
            _ => status.message().to_owned(),
        };
        ensure!(
            response.text("error")?.as_deref() == Some(&*message),
            "{what}: {response:?} {status:?}"
        );
    }
    Ok(())
}

/// One row of the table at both doors of a gateway.
async fn row(
    gateway: &Andon,
    what: &str,
    request: &ModelInferRequest,
    metadata: &[(&str, &str)],
    expected: Expected<'_>,
) -> Result<()> {
    let status = call(gateway.grpc, INFER, metadata, request).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let response = send(gateway.http, protocol, request, false, metadata).await?;
        agree(what, &status, &response, expected)?;
    }
    Ok(())
}

fn parameter(choice: ParameterChoice) -> InferParameter {
    InferParameter {
        parameter_choice: Some(choice),
    }
}

fn with(name: &str, choice: ParameterChoice) -> ModelInferRequest {
    let mut request = pixels(&[[3.0; 64]]);
    let parameters = &mut request.parameters;
    parameters.insert(name.to_owned(), parameter(choice));
    request
}

fn changed(change: impl FnOnce(&mut ModelInferRequest)) -> ModelInferRequest {
    let mut request = pixels(&[[3.0; 64]]);
    change(&mut request);
    request
}

fn input(change: impl FnOnce(&mut InferInputTensor)) -> ModelInferRequest {
    changed(|request| change(&mut request.inputs[0]))
}

/// What is wrong, the request, and the field.
fn invalid() -> Vec<(&'static str, ModelInferRequest, &'static str)> {
    vec![
        (
            "a name",
            changed(|r| r.model_name = "bad name".into()),
            "model_name",
        ),
        (
            "a version",
            changed(|r| r.model_version = "x1".into()),
            "model_version",
        ),
        (
            "a shape",
            input(|i| i.shape = vec![2, 32]),
            "inputs[0].shape",
        ),
        (
            "a negative size",
            input(|i| i.shape = vec![-1, 64]),
            "inputs[0].shape",
        ),
        (
            "a huge shape",
            input(|i| i.shape = vec![i64::MAX, 64]),
            "inputs[0].shape",
        ),
        (
            "a datatype",
            input(|i| i.datatype = "INT32".into()),
            "inputs[0].datatype",
        ),
        (
            "no datatype",
            input(|i| i.datatype = "FLOAT".into()),
            "inputs[0].datatype",
        ),
        (
            "a byte count",
            input(|i| i.shape = vec![1, 65]),
            "inputs[0].data",
        ),
        (
            "no rows",
            changed(|r| {
                r.inputs[0].shape = vec![0, 64];
                r.raw_input_contents[0] = Vec::new().into();
            }),
            "inputs[0].shape",
        ),
        ("a value", pixels(&[[f32::NAN; 64]]), "inputs[0].data[0]"),
        ("an input", input(|i| i.name = "colours".into()), "inputs"),
        (
            "no input",
            changed(|r| {
                r.inputs.clear();
                r.raw_input_contents.clear();
            }),
            "inputs",
        ),
        (
            "an input twice",
            changed(|r| {
                r.inputs.push(r.inputs[0].clone());
                r.raw_input_contents.push(r.raw_input_contents[0].clone());
            }),
            "inputs[1].name",
        ),
    ]
}

/// The same of outputs and parameters.
fn invalid_besides() -> Vec<(&'static str, ModelInferRequest, &'static str)> {
    let shared = parameter(ParameterChoice::StringParam("region".to_owned()));
    vec![
        (
            "an output",
            changed(|r| {
                r.outputs.push(InferRequestedOutputTensor {
                    name: "nothing".into(),
                    ..Default::default()
                });
            }),
            "outputs[0].name",
        ),
        (
            "shared memory",
            input(|i| {
                i.parameters.insert("shared_memory_region".into(), shared);
            }),
            "inputs[0].parameters[shared_memory_region]",
        ),
        (
            "a parameter",
            with("colour", ParameterChoice::BoolParam(true)),
            "parameters[colour]",
        ),
        (
            "a priority",
            with("priority", ParameterChoice::Int64Param(-1)),
            "parameters[priority]",
        ),
        (
            "a type",
            with("timeout", ParameterChoice::DoubleParam(0.5)),
            "parameters[timeout]",
        ),
        (
            "a reserved name",
            with("triton_x", ParameterChoice::BoolParam(true)),
            "parameters[triton_x]",
        ),
        (
            "a number",
            with("priority", ParameterChoice::Uint64Param(u64::MAX)),
            "parameters[priority]",
        ),
    ]
}

#[tokio::test]
async fn a_bad_request_fails_alike_at_both_doors() -> Result<()> {
    let limit = ["--message-bytes-max", "256KiB"];
    let fleet = Fleet::with(1, &["--model", &digits()?], &limit).await?;
    let gateway = &fleet.gateway;
    for (what, request, field) in [invalid(), invalid_besides()].concat() {
        let expected = Expected {
            code: Code::InvalidArgument,
            field: Some(field),
        };
        row(gateway, what, &request, &[], expected).await?;
    }
    let unknown = changed(|r| r.model_name = "nobody".into());
    let expected = Expected {
        code: Code::NotFound,
        field: Some("model_name"),
    };
    row(gateway, "an unknown model", &unknown, &[], expected).await?;
    let unknown = changed(|r| r.model_version = "99".into());
    let expected = Expected {
        code: Code::NotFound,
        field: Some("model_version"),
    };
    row(gateway, "an unknown version", &unknown, &[], expected).await?;
    let large = pixels(&[[3.0; 64]; 2000]);
    let expected = without_field(Code::ResourceExhausted);
    row(gateway, "a large message", &large, &[], expected).await?;
    let path = "/inference.GRPCInferenceService/SystemSharedMemoryStatus";
    let message = SystemSharedMemoryStatusRequest::default();
    let status = call(gateway.grpc, path, &[], &message).await?;
    let response = get(gateway.http, "/v2/systemsharedmemory/status").await?;
    agree(
        "shared memory",
        &status,
        &response,
        without_field(Code::Unimplemented),
    )
}

fn echo(delay: &str) -> Result<Andon> {
    let flags = ["--delay".to_owned(), delay.to_owned()];
    Andon::run(&mut Command::new(program("echo-worker")?), &flags, None)
}

async fn gateway(worker: SocketAddr, flags: &[&str]) -> Result<Andon> {
    let mut all: Vec<String> = flags.iter().map(ToString::to_string).collect();
    all.extend(["--worker".to_owned(), worker.to_string()]);
    Andon::start("gateway", &all, None)
}

fn echoed() -> ModelInferRequest {
    let mut request = texts(&["a text"]);
    request.model_name = "echo".to_owned();
    request
}

/// What the gRPC door says to a caller who waits only so long.
async fn impatient(address: SocketAddr, timeout: &str) -> Result<Status> {
    let target = platform::channel::Target::Tcp(address.to_string());
    let channel = platform::channel::Channel::connect(&target, Duration::from_secs(5)).await?;
    let call = http::Request::post(format!("http://{address}{INFER}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", timeout)
        .body(())?;
    let framed = platform::grpc::frame(&echoed());
    let (head, body) = channel.send(call, framed).await?.into_parts();
    let rest = http_body_util::BodyExt::collect(body).await?;
    let trailers = rest.trailers().cloned().unwrap_or_default();
    let status =
        Status::from_header_map(&head.headers).or_else(|| Status::from_header_map(&trailers));
    status.context("no status")
}

#[tokio::test]
async fn a_full_gateway_fails_alike_at_both_doors() -> Result<()> {
    let worker = echo("1h")?;
    let gateway = gateway(worker.grpc, &["--calls-max", "1"]).await?;
    gateway.ready().await?;
    let mut held = JoinSet::new();
    let address = gateway.http;
    held.spawn(async move { send(address, Protocol::Http1, &echoed(), true, &[]).await });
    until(Duration::from_secs(20), "the call is held", || async {
        Ok(gateway.metric("andon_gateway_in_flight").await? == Some(1.0))
    })
    .await?;
    let expected = without_field(Code::Unavailable);
    row(&gateway, "overload", &echoed(), &[], expected).await?;
    // A full gateway is neither dead nor gone.
    for path in ["/v2/health/live", "/v2/health/ready"] {
        let response = get(gateway.http, path).await?;
        ensure!(response.status == 200, "{response:?}");
    }
    // A caller who leaves gives its permit back.
    held.shutdown().await;
    until(Duration::from_secs(20), "the permit is free", || async {
        Ok(gateway.metric("andon_gateway_in_flight").await? == Some(0.0))
    })
    .await?;
    // The worker never answers: whichever timeout passes first has passed here.
    let status = impatient(gateway.grpc, "50m").await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let response = send(address, protocol, &echoed(), false, &[("timeout", "50")]).await?;
        agree(
            "a deadline",
            &status,
            &response,
            without_field(Code::DeadlineExceeded),
        )?;
    }
    let wrong = send(
        address,
        Protocol::Http1,
        &echoed(),
        false,
        &[("timeout", "1s")],
    )
    .await?;
    ensure!(
        wrong.status == 400 && wrong.text("field")?.as_deref() == Some("timeout"),
        "{wrong:?}"
    );
    Ok(())
}

#[tokio::test]
async fn a_caller_who_has_sent_everything_gets_its_answer() -> Result<()> {
    let worker = echo("1s")?;
    let gateway = gateway(worker.grpc, &[]).await?;
    gateway.ready().await?;
    let (body, _) = super::in_json(&echoed(), true);
    let head = format!(
        "POST /v2/models/echo/infer HTTP/1.1\r\nhost: {}\r\ncontent-length: {}\r\n\r\n",
        gateway.http,
        body.len()
    );
    let mut caller = tokio::net::TcpStream::connect(gateway.http).await?;
    caller
        .write_all(&[head.as_bytes(), &body[..]].concat())
        .await?;
    caller.shutdown().await?;
    let mut answer = String::new();
    let reading = caller.read_to_string(&mut answer);
    tokio::time::timeout(Duration::from_secs(20), reading).await??;
    // It has been asked whether it is there.
    let last = answer.rsplit("100 Continue\r\n\r\n").next();
    ensure!(
        last.is_some_and(|last| last.starts_with("HTTP/1.1 200 OK")),
        "{answer}"
    );
    Ok(())
}

#[tokio::test]
async fn a_gateway_without_workers_fails_alike_at_both_doors() -> Result<()> {
    let gateway = gateway(free_port()?, &[]).await?;
    until(Duration::from_secs(20), "it serves", || async {
        Ok(get(gateway.http, "/v2/health/live").await?.status == 200)
    })
    .await?;
    let expected = without_field(Code::Unavailable);
    row(&gateway, "no worker", &pixels(&[[3.0; 64]]), &[], expected).await?;
    let response = get(gateway.http, "/v2/health/ready").await?;
    ensure!(response.status == 503, "{response:?}");
    let response = get(gateway.http, "/v2/models/digits/ready").await?;
    ensure!(response.status == 503, "{response:?}");
    Ok(())
}

#[tokio::test]
async fn a_model_that_is_not_ready_fails_alike_at_both_doors() -> Result<()> {
    let mut fleet = Fleet::with(1, &["--model", &digits()?], &[]).await?;
    let unload = RepositoryModelUnloadRequest {
        model_name: "digits".to_owned(),
        ..Default::default()
    };
    let path = "/inference.GRPCInferenceService/RepositoryModelUnload";
    let status = call(fleet.gateway.grpc, path, &[], &unload).await?;
    ensure!(status.code() == Code::Ok, "{status:?}");
    let request = pixels(&[[3.0; 64]]);
    let address = fleet.gateway.grpc;
    until(Duration::from_secs(20), "it is unloaded", || async {
        let status = call(address, INFER, &[], &request).await?;
        Ok(status.code() == Code::NotFound)
    })
    .await?;
    let expected = without_field(Code::NotFound);
    row(&fleet.gateway, "no ready version", &request, &[], expected).await?;
    let named = changed(|r| r.model_version = "1".into());
    let expected = without_field(Code::Unavailable);
    row(&fleet.gateway, "an unready version", &named, &[], expected).await?;

    // A model whose workers are gone stays known.
    let load = RepositoryModelLoadRequest {
        model_name: "digits".to_owned(),
        ..Default::default()
    };
    let path = "/inference.GRPCInferenceService/RepositoryModelLoad";
    let status = call(address, path, &[], &load).await?;
    ensure!(status.code() == Code::Ok, "{status:?}");
    until(Duration::from_secs(20), "it is loaded", || async {
        Ok(call(address, INFER, &[], &request).await?.code() == Code::Ok)
    })
    .await?;
    fleet.workers[0] = None;
    fleet.all_connected(0).await?;
    let expected = without_field(Code::Unavailable);
    row(&fleet.gateway, "no worker", &request, &[], expected).await
}

#[tokio::test]
async fn a_gateway_that_drains_is_not_ready_at_either_door() -> Result<()> {
    let fleet = Fleet::with(1, &["--model", &digits()?], &[]).await?;
    let client = client(fleet.gateway.grpc).await?;
    let (web, address) = (super::web(Protocol::Http1)?, fleet.gateway.http);
    let readiness = || super::fetch(web.get(format!("http://{address}/v2/health/ready")));
    ensure!(readiness().await?.status == 200, "not ready");
    fleet.gateway.signal(libc::SIGTERM)?;
    until(
        Duration::from_secs(20),
        "it reports that it drains",
        || async {
            let response = readiness().await?;
            let ready = client.clone().server_ready(ServerReadyRequest {}).await?;
            let code = response.text("code")?;
            Ok(response.status == 503
                && code.as_deref() == Some("UNAVAILABLE")
                && !ready.into_inner().ready)
        },
    )
    .await
}

const POLICY: &str = r#"
    [tenants.a]
    models = ["echo"]
    [tenants.a.quota]
    requests_per_second = 0.001
    burst = 6
"#;

#[tokio::test]
async fn a_caller_without_permission_fails_alike_at_both_doors() -> Result<()> {
    let tenants = Tenants::of(POLICY)?;
    let key = tenants.key("a")?;
    let worker = echo("0s")?;
    let flags = tenants.flags();
    let gateway = gateway(worker.grpc, &flags.each_ref().map(String::as_str)).await?;
    gateway.ready().await?;
    let request = echoed();
    let expected = without_field(Code::Unauthenticated);
    row(&gateway, "no credential", &request, &[], expected).await?;
    row(
        &gateway,
        "no key",
        &request,
        &[("x-api-key", "x")],
        expected,
    )
    .await?;
    let response = send(gateway.http, Protocol::Http1, &request, true, &[]).await?;
    ensure!(
        response.headers.contains_key("www-authenticate"),
        "{response:?}"
    );
    let own = [("x-api-key", key.as_str())];
    // Three of six.
    let expected = without_field(Code::PermissionDenied);
    let other = changed(|r| r.model_name = "digits".into());
    row(&gateway, "another model", &other, &own, expected).await?;
    // Two that are refused before the rate is counted.
    let load = "/inference.GRPCInferenceService/RepositoryModelLoad";
    let message = RepositoryModelLoadRequest {
        model_name: "echo".to_owned(),
        ..Default::default()
    };
    let status = call(gateway.grpc, load, &own, &message).await?;
    let url = format!("http://{}/v2/repository/models/echo/load", gateway.http);
    let loading = super::web(Protocol::Http1)?
        .post(url)
        .header("x-api-key", &key);
    let response = super::fetch(loading).await?;
    agree(
        "to load",
        &status,
        &response,
        without_field(Code::PermissionDenied),
    )?;
    let mut spent = send(gateway.http, Protocol::Http1, &request, false, &own).await?;
    ensure!(spent.status == 200, "{spent:?}");
    for _ in 0..10 {
        spent = send(gateway.http, Protocol::Http1, &request, false, &own).await?;
    }
    ensure!(spent.status == 429, "{spent:?}");
    let expected = without_field(Code::ResourceExhausted);
    row(&gateway, "the quota", &request, &own, expected).await?;
    let response = post(gateway.http, "/v2/repository/index", "").await?;
    ensure!(response.status == 401, "{response:?}");
    ensure!(
        get(gateway.http, "/v2/health/ready").await?.status == 200,
        "not ready"
    );
    Ok(())
}
