//! An HTTP port: HTTP/1.1 and HTTP/2, served by a router.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::runtime::Handle;
use tower_service::Service;

use super::connection::{FRAME_BYTES_MAX, Lifetime, PING_TIMEOUT, Rewound, read_first, run};
use super::half_close::HalfClosed;
use super::readers::{Read, Readers};
use super::{Begun, Io, Place, Protocol, Server, TOO_MANY_STREAMS};
use crate::answer::{Answer, AnswerFor, Parts, Requests};
use crate::body::RequestBody;
use crate::coalesce::Coalesced;
use crate::drain::Drain;
use crate::tasks::TaskScope;

/// Header fields of one request.
const HEADERS_MAX: usize = 100;

/// HTTP requests, served by a router. Each carries its [`Peer`](crate::peer::Peer)
/// as an extension; a response may carry for whom it is ([`AnswerFor`]).
#[derive(Debug, Clone)]
pub struct Http(pub Router);

impl Protocol for Http {
    const ALPN: &'static [&'static [u8]] = &[b"h2", b"http/1.1"];

    async fn serve(self, server: &Server, mut io: impl Io, place: Place, drain: Drain) {
        let settings = &server.settings;
        // hyper has no timeout for the bytes by which it detects the protocol,
        // and its graceful shutdown waits for them as well.
        let first = match server.begin(&place, read_first(&mut io)).await {
            Begun::Done(Ok(first)) if !first.is_empty() => first,
            // A connection without a byte, such as a TCP health check.
            Begun::Done(_) | Begun::Evicted => return,
            Begun::Late => return server.metrics.refuse(server.name, "preface_timeout"),
        };
        let router = self.0;
        let tasks = TaskScope::new(Handle::current());
        let scope = tasks.handle();
        let (place, peer) = (&place, &place.peer);
        // Over HTTP/1.1 a connection has one answer at a time.
        let only = Arc::<Answer>::default();
        only.held_for(peer.holder());
        let io = Read::new(io, only.clone(), server.limits.clone());
        let io = Coalesced::new(Rewound::new(io, first));
        // hyper's own way to serve half-closed connections reads no more of them: it
        // would not notice that a caller has left.
        let requests = Requests::default();
        let io = HalfClosed::new(io, requests.clone());
        let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(peer.clone());
            let mut open = place.open();
            let request = match request.version() {
                Version::HTTP_2 => {
                    request.map(|body| Body::new(RequestBody::new(body, scope.clone())))
                }
                version => {
                    open = open.of(requests.begin(version));
                    // hyper itself discards the rest of a body over HTTP/1.1.
                    request.map(Body::new)
                }
            };
            let responding = open.stream.as_ref().map(|_| router.clone().call(request));
            let (only, peer) = (only.clone(), peer.clone());
            async move {
                let response = match responding {
                    Some(responding) => responding.await?,
                    None => too_many_streams(),
                };
                let answer = Answer::current().unwrap_or_else(|| {
                    only.renew();
                    only
                });
                if let Some(known) = response.extensions().get::<AnswerFor>() {
                    answer.describe(known);
                }
                answer.held_for(peer.holder());
                Ok::<_, Infallible>(response.map(|body| Parts::new(body, answer, open)))
            }
        });
        let builder = builder(server, place);
        let connection = builder.serve_connection(TokioIo::new(io), service);
        let lifetime = Lifetime {
            age: settings.http_connection_age,
            idle: Some(settings.http_idle_timeout),
        };
        run(connection, server, place, lifetime, drain).await;
    }
}

/// What a connection of this place may do.
fn builder(server: &Server, place: &Place) -> auto::Builder<Readers> {
    let settings = &server.settings;
    let mut builder = auto::Builder::new(Readers(server.limits.clone()));
    builder
        .http1()
        .timer(TokioTimer::new())
        // From the end of the last response: hyper knows no other beginning.
        .header_read_timeout(settings.http_idle_timeout)
        .max_buf_size(server.header_bytes_max as usize)
        .max_headers(HEADERS_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(settings.streams_max)
        .max_pending_accept_reset_streams(settings.streams_max as usize)
        .initial_stream_window_size(place.stream_window())
        .initial_connection_window_size(place.connection_window())
        .max_frame_size(FRAME_BYTES_MAX)
        .max_header_list_size(server.header_bytes_max)
        .keep_alive_interval(settings.keepalive_interval)
        .keep_alive_timeout(PING_TIMEOUT);
    builder
}

/// The answer to a request that finds too many in flight.
fn too_many_streams() -> Response<Body> {
    let mut response = Response::new(Body::from(format!("{{\"error\":\"{TOO_MANY_STREAMS}\"}}")));
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
    response
}
