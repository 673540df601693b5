//! The services that every role serves beside its own: health, and reflection in
//! both versions.

use std::sync::Arc;

use futures::future::BoxFuture;
use http::{Request, Response};
use tonic::Status;
use tonic_reflection::pb::{v1, v1alpha};
use tonic_reflection::server::{Builder, Error};
use tower_service::Service;

use crate::grpc::{Body, Call, Reply, reject};
use crate::health::Health;
use crate::streams::Streams;
use crate::telemetry::UNKNOWN_PATH;

/// A reflection request: a name, or a list of extension names.
const REFLECTION_BYTES_MAX: usize = 4096;

/// The methods that are served here.
const PATHS: [&str; 4] = [
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];

/// The path of a call of health or reflection as its name in traces; any other is
/// [`UNKNOWN_PATH`].
pub fn common_path(path: &str) -> &'static str {
    let known = PATHS.into_iter().find(|known| *known == path);
    known.unwrap_or(UNKNOWN_PATH)
}

type Handle = dyn Fn(Request<tonic::body::Body>) -> BoxFuture<'static, Response<tonic::body::Body>>
    + Send
    + Sync;

/// Health and reflection, routed by their paths.
#[derive(Clone)]
pub struct CommonServices {
    health: Health,
    streams: Streams,
    reflection_v1: Arc<Handle>,
    reflection_v1alpha: Arc<Handle>,
}

impl CommonServices {
    /// Serves `health`, and the descriptors of `descriptors`, an encoded
    /// `FileDescriptorSet`, with their comments. Their streams are some of
    /// `streams`.
    pub fn new(health: &Health, descriptors: &[u8], streams: &Streams) -> Result<Self, Error> {
        let builder = || {
            Builder::configure()
                .register_encoded_file_descriptor_set(descriptors)
                .include_reflection_service(false)
                .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(v1alpha::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        Ok(Self {
            health: health.clone(),
            streams: streams.clone(),
            reflection_v1: handle(
                builder()
                    .build_v1()?
                    .max_decoding_message_size(REFLECTION_BYTES_MAX),
            ),
            reflection_v1alpha: handle(
                builder()
                    .build_v1alpha()?
                    .max_decoding_message_size(REFLECTION_BYTES_MAX),
            ),
        })
    }

    /// Whether the empty name of health is serving.
    pub fn ready(&self) -> bool {
        self.health.ready()
    }

    /// Serves a call of health or reflection; any other is UNIMPLEMENTED.
    pub async fn serve(&self, call: Call) -> Reply {
        let service = call.path().split('/').nth(1).unwrap_or_default();
        let reply = match service {
            "grpc.health.v1.Health" => self.health.serve(call, &self.streams).await,
            "grpc.reflection.v1.ServerReflection" => self.reflect(&self.reflection_v1, call).await,
            "grpc.reflection.v1alpha.ServerReflection" => {
                self.reflect(&self.reflection_v1alpha, call).await
            }
            _ => Err(Status::unimplemented("unknown method")),
        };
        reply.unwrap_or_else(|status| reject(&status))
    }

    /// A stream of reflection, which waits for questions.
    async fn reflect(&self, reflection: &Arc<Handle>, call: Call) -> Result<Reply, Status> {
        let open = self.streams.open(&call.peer, &call.peer.holder())?;
        let response = reflection(call.into_tonic()).await;
        Ok(response.map(|body| Body::tonic_stream(body, open)))
    }
}

impl std::fmt::Debug for CommonServices {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("CommonServices")
    }
}

/// Erases the type of a generated service, which tonic does not name.
fn handle<S>(service: S) -> Arc<Handle>
where
    S: Service<
            Request<tonic::body::Body>,
            Response = Response<tonic::body::Body>,
            Error = std::convert::Infallible,
        > + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    Arc::new(move |request| {
        let response = service.clone().call(request);
        Box::pin(async move {
            let Ok(response) = response.await;
            response
        })
    })
}
