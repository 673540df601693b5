//! Calls that tests make, with the generated client of tonic.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use protocol::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use protocol::inference::model_infer_request::InferInputTensor;
use protocol::inference::{ModelInferRequest, ModelInferResponse};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// The generated client.
pub type Client = GrpcInferenceServiceClient<Channel>;

/// A client of a server.
pub async fn client(address: SocketAddr) -> Result<Client> {
    let channel = Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(Duration::from_secs(5))
        .connect()
        .await?;
    Ok(Client::new(channel).max_decoding_message_size(1 << 30))
}

/// A request for vectors of texts.
pub fn texts<T: AsRef<[u8]>>(texts: &[T]) -> ModelInferRequest {
    let raw = tensor::encode_bytes_elements(texts).unwrap_or_default();
    ModelInferRequest {
        model_name: "minilm".to_owned(),
        inputs: vec![InferInputTensor {
            name: "text".to_owned(),
            datatype: "BYTES".to_owned(),
            shape: vec![texts.len() as i64],
            ..Default::default()
        }],
        raw_input_contents: vec![raw.into()],
        ..Default::default()
    }
}

/// A request for the labels of images of 8 by 8 pixels.
pub fn pixels(rows: &[[f32; 64]]) -> ModelInferRequest {
    let raw: Vec<u8> = rows
        .iter()
        .flatten()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    ModelInferRequest {
        model_name: "digits".to_owned(),
        inputs: vec![InferInputTensor {
            name: "pixels".to_owned(),
            datatype: "FP32".to_owned(),
            shape: vec![rows.len() as i64, 64],
            ..Default::default()
        }],
        raw_input_contents: vec![raw.into()],
        ..Default::default()
    }
}

/// Sends a request with a deadline.
pub async fn infer(
    client: &Client,
    request: ModelInferRequest,
    timeout: Duration,
) -> Result<ModelInferResponse, Status> {
    let mut request = tonic::Request::new(request);
    request.set_timeout(timeout);
    let response = client.clone().model_infer(request).await?;
    Ok(response.into_inner())
}

/// Sends a request on a connection of its own and waits for the server's status
/// alone: tonic's client would end the call by its own clock.
pub async fn infer_by_server_deadline(
    address: SocketAddr,
    request: &ModelInferRequest,
    timeout: Duration,
) -> Result<Code> {
    let target = platform::channel::Target::Tcp(address.to_string());
    let channel = platform::channel::Channel::connect(&target, Duration::from_secs(5)).await?;
    let call = http::Request::post(format!(
        "http://{address}/inference.GRPCInferenceService/ModelInfer"
    ))
    .header("content-type", "application/grpc")
    .header("te", "trailers")
    .header("grpc-timeout", format!("{}u", timeout.as_micros()))
    .body(())?;
    let framed = platform::grpc::frame(request);
    let (head, body) = channel.send(call, framed).await?.into_parts();
    let rest = http_body_util::BodyExt::collect(body).await?;
    let trailers = rest.trailers().cloned().unwrap_or_default();
    let status =
        Status::from_header_map(&head.headers).or_else(|| Status::from_header_map(&trailers));
    Ok(status.map_or(Code::Unknown, |status| status.code()))
}

/// Makes a call on a connection of its own and returns its status, which
/// is OK for a response.
pub async fn call(
    address: SocketAddr,
    path: &str,
    metadata: &[(&str, &str)],
    message: &impl prost::Message,
) -> Result<Status> {
    let target = platform::channel::Target::Tcp(address.to_string());
    let channel = platform::channel::Channel::connect(&target, Duration::from_secs(5)).await?;
    let mut call = http::Request::post(format!("http://{address}{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", "20S");
    for (name, value) in metadata {
        call = call.header(*name, *value);
    }
    let framed = platform::grpc::frame(message);
    let (head, body) = channel.send(call.body(())?, framed).await?.into_parts();
    let rest = http_body_util::BodyExt::collect(body).await?;
    let trailers = rest.trailers().cloned().unwrap_or_default();
    let status =
        Status::from_header_map(&head.headers).or_else(|| Status::from_header_map(&trailers));
    Ok(status.unwrap_or_else(|| Status::unknown("no status")))
}

/// The FP32 values of an output, row by row.
pub fn rows(response: &ModelInferResponse, output: usize) -> Vec<Vec<f32>> {
    let width = response.outputs[output].shape.last().copied().unwrap_or(1);
    let raw = &response.raw_output_contents[output];
    let values: Vec<f32> = raw
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    values.chunks(width as usize).map(<[f32]>::to_vec).collect()
}
