//! Calls whose bytes the test writes: framed, compressed and cut as it wants.

use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use platform::channel::{Channel, Target};
use tonic::Status;

/// What a raw call brought.
#[derive(Debug)]
pub struct Reply {
    /// The status; OK for a response.
    pub status: Status,
    /// Every byte of the body: messages with their prefixes.
    pub bytes: Bytes,
    /// The bytes of all names and values of headers and trailers.
    pub header_bytes: usize,
}

/// A connection of its own.
pub async fn connect(address: SocketAddr) -> Result<Channel> {
    let target = Target::Tcp(address.to_string());
    Ok(Channel::connect(&target, Duration::from_secs(5)).await?)
}

/// The bytes in gzip.
pub fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

/// A message with its prefix, whose flag says whether it is compressed.
pub fn framed(message: &[u8], compressed: bool) -> Bytes {
    let mut framed = vec![u8::from(compressed)];
    framed.extend((message.len() as u32).to_be_bytes());
    framed.extend(message);
    framed.into()
}

/// Makes a gRPC call of these bytes, which may say that they are in gzip.
pub async fn call(
    channel: &Channel,
    path: &str,
    metadata: &[(&str, &str)],
    framed: Bytes,
) -> Result<Reply> {
    let mut call = http::Request::post(format!("http://andon{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-encoding", "gzip");
    if metadata.iter().all(|(name, _)| *name != "grpc-timeout") {
        call = call.header("grpc-timeout", "30S");
    }
    for (name, value) in metadata {
        call = call.header(*name, *value);
    }
    let (head, body) = channel.send(call.body(())?, framed).await?.into_parts();
    let rest = http_body_util::BodyExt::collect(body).await?;
    let trailers = rest.trailers().cloned().unwrap_or_default();
    let status =
        Status::from_header_map(&head.headers).or_else(|| Status::from_header_map(&trailers));
    let header_bytes = [&head.headers, &trailers]
        .into_iter()
        .flatten()
        .map(|(name, value)| name.as_str().len() + value.len());
    Ok(Reply {
        status: status.unwrap_or_else(|| Status::unknown("no status")),
        header_bytes: header_bytes.sum(),
        bytes: rest.to_bytes(),
    })
}
