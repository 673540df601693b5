//! A port that speaks HTTP/1.1 and HTTP/2 and is answered by a router.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use http::{Request, Version};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
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
use crate::tasks::ConnectionExecutor;
use crate::tls::Peer;

/// How long the head of a request may take to come whole, and how long a
/// connection of HTTP/1.1 may wait for its next request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Headers of a request.
const HEADERS_MAX: usize = 100;

/// Requests that a router answers. Each carries its [`Peer`] as an extension.
#[derive(Debug, Clone)]
pub struct Http(pub Router);

impl Protocol for Http {
    const NAMES: &'static [&'static [u8]] = &[b"h2", b"http/1.1"];

    async fn serve(self, server: &Server, mut io: impl Io, peer: Arc<Peer>, drain: Drain) {
        let settings = &server.settings;
        // hyper waits for what it knows a protocol by for ever, and a graceful
        // end with it.
        let first = match timeout(settings.preface_timeout, read_first(&mut io)).await {
            Ok(Ok(first)) if !first.is_empty() => first,
            // A port that was only looked at.
            Ok(_) => return,
            Err(_) => return server.metrics.refuse(server.name, "preface_timeout"),
        };
        let router = self.0;
        let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(peer.clone());
            let request = match request.version() {
                Version::HTTP_2 => request.map(|body| Body::new(RequestBody::from(body))),
                // hyper itself sees to what is not read.
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
