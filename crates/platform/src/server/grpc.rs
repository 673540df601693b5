//! A gRPC port: HTTP/2 only, whose preface must arrive in time.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::runtime::Handle;
use tokio::time::timeout;

use super::connection::{
    CONNECTION_WINDOW_BYTES, FRAME_BYTES_MAX, HEADER_BYTES_MAX, PING_TIMEOUT, PREFACE, Rewound,
    STREAM_WINDOW_BYTES, read_preface, run,
};
use super::{Handler, Io, Protocol, Server};
use crate::body::RequestBody;
use crate::coalesce::Coalesced;
use crate::drain::Drain;
use crate::grpc::{Call, reject};
use crate::tasks::{ConnectionExecutor, TaskScope};
use crate::tls::Peer;

/// gRPC calls, served by a handler.
#[derive(Debug, Clone)]
pub struct Grpc<H>(pub H);

impl<H: Handler> Protocol for Grpc<H> {
    const ALPN: &'static [&'static [u8]] = &[b"h2"];

    async fn serve(self, server: &Server, mut io: impl Io, peer: Arc<Peer>, drain: Drain) {
        let settings = &server.settings;
        // hyper has no timeout for the preface, and its graceful shutdown waits
        // for it as well.
        let preface = timeout(settings.preface_timeout, read_preface(&mut io)).await;
        match preface {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return server.metrics.refuse(server.name, "not_http2"),
            Err(_) => return server.metrics.refuse(server.name, "preface_timeout"),
        }
        let deadline_max = settings.deadline_max;
        let tasks = TaskScope::new(Handle::current());
        let scope = tasks.handle();
        let service = hyper::service::service_fn(move |request: Request<Incoming>| {
            let (handler, peer) = (self.0.clone(), peer.clone());
            let request = request.map(|body| RequestBody::new(body, scope.clone()));
            // Boxed, since hyper moves it several times before it runs.
            Box::pin(async move {
                let reply = match Call::new(request, peer, deadline_max) {
                    Ok(call) => handler.handle(call).await,
                    Err(status) => reject(&status),
                };
                Ok::<_, Infallible>(reply)
            })
        });
        let connection = http2::Builder::new(ConnectionExecutor)
            .timer(TokioTimer::new())
            .max_concurrent_streams(settings.streams_max)
            // Callers who cancel reset their streams, and a gateway's connection
            // carries the streams of many callers.
            .max_pending_accept_reset_streams(settings.streams_max as usize)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES_MAX)
            .max_header_list_size(HEADER_BYTES_MAX)
            .keep_alive_interval(settings.keepalive_interval)
            .keep_alive_timeout(PING_TIMEOUT)
            .serve_connection(
                TokioIo::new(Coalesced::new(Rewound::new(
                    io,
                    Bytes::from_static(PREFACE),
                ))),
                service,
            );
        run(connection, server, drain).await;
    }
}
