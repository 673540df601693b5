//! An HTTP port: HTTP/1.1 and HTTP/2, served by a router.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use http::{Request, Version};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::runtime::Handle;
use tokio::time::timeout;
use tower_service::Service;

use super::connection::{
    CONNECTION_WINDOW_BYTES, FRAME_BYTES_MAX, HEADER_BYTES_MAX, PING_TIMEOUT, Rewound,
    STREAM_WINDOW_BYTES, read_first, run,
};
use super::{Io, Protocol, Server};
use crate::body::RequestBody;
use crate::coalesce::Coalesced;
use crate::drain::Drain;
use crate::tasks::{ConnectionExecutor, TaskScope};
use crate::tls::Peer;

/// How long the head of a request may take to arrive, and how long an HTTP/1.1
/// connection may idle between requests.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Header fields of one request.
const HEADERS_MAX: usize = 100;

/// HTTP requests, served by a router. Each carries its [`Peer`] as an extension.
#[derive(Debug, Clone)]
pub struct Http(pub Router);

impl Protocol for Http {
    const ALPN: &'static [&'static [u8]] = &[b"h2", b"http/1.1"];

    async fn serve(self, server: &Server, mut io: impl Io, peer: Arc<Peer>, drain: Drain) {
        let settings = &server.settings;
        // hyper has no timeout for the bytes by which it detects the protocol,
        // and its graceful shutdown waits for them as well.
        let first = match timeout(settings.preface_timeout, read_first(&mut io)).await {
            Ok(Ok(first)) if !first.is_empty() => first,
            // A connection without a byte, such as a TCP health check.
            Ok(_) => return,
            Err(_) => return server.metrics.refuse(server.name, "preface_timeout"),
        };
        let router = self.0;
        let tasks = TaskScope::new(Handle::current());
        let scope = tasks.handle();
        let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(peer.clone());
            let request = match request.version() {
                Version::HTTP_2 => {
                    request.map(|body| Body::new(RequestBody::new(body, scope.clone())))
                }
                // hyper itself discards the rest of a body over HTTP/1.1.
                _ => request.map(Body::new),
            };
            router.clone().call(request)
        });
        let mut builder = auto::Builder::new(ConnectionExecutor);
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(HEADER_BYTES_MAX as usize)
            .max_headers(HEADERS_MAX);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(settings.streams_max)
            .max_pending_accept_reset_streams(settings.streams_max as usize)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES_MAX)
            .max_header_list_size(HEADER_BYTES_MAX)
            .keep_alive_interval(settings.keepalive_interval)
            .keep_alive_timeout(PING_TIMEOUT);
        let io = TokioIo::new(Coalesced::new(Rewound::new(io, first)));
        run(builder.serve_connection(io, service), server, drain).await;
    }
}
