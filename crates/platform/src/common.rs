//! The services that every role serves beside its own: health, and reflection in
//! both versions.

use std::sync::Arc;

use futures::future::BoxFuture;
use http::{Request, Response};
use tonic::Status;
use tonic_health::pb::health_server::HealthServer;
use tonic_reflection::pb::{v1, v1alpha};
use tonic_reflection::server::{Builder, Error};
use tower_service::Service;

use crate::grpc::{Body, Call, Reply};
use crate::health::Health;

/// A reflection request: a name, or a list of extension names.
const REFLECTION_BYTES_MAX: usize = 4096;

type Handle = dyn Fn(Request<tonic::body::Body>) -> BoxFuture<'static, Response<tonic::body::Body>>
    + Send
    + Sync;

/// Health and reflection, routed by their paths.
#[derive(Clone)]
pub struct CommonServices {
    health: HealthServer<Health>,
    reflection_v1: Arc<Handle>,
    reflection_v1alpha: Arc<Handle>,
}

impl CommonServices {
    /// Serves `health`, and the descriptors of `descriptors`, an encoded
    /// `FileDescriptorSet`, with their comments.
    pub fn new(health: &Health, descriptors: &[u8]) -> Result<Self, Error> {
        let builder = || {
            Builder::configure()
                .register_encoded_file_descriptor_set(descriptors)
                .include_reflection_service(false)
                .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(v1alpha::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        Ok(Self {
            health: health.service(),
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

    /// Serves a call of health or reflection; any other is UNIMPLEMENTED.
    pub async fn serve(&self, call: Call) -> Reply {
        let service = call.path().split('/').nth(1).unwrap_or_default();
        let response = match service {
            "grpc.health.v1.Health" => {
                let Ok(response) = self.health.clone().call(call.into_tonic()).await;
                response
            }
            "grpc.reflection.v1.ServerReflection" => (self.reflection_v1)(call.into_tonic()).await,
            "grpc.reflection.v1alpha.ServerReflection" => {
                (self.reflection_v1alpha)(call.into_tonic()).await
            }
            _ => Status::unimplemented(format!("unknown method {}", call.path())).into_http(),
        };
        response.map(Body::tonic)
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
