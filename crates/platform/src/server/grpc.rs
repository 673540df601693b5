//! A gRPC port: HTTP/2 only, whose preface must arrive in time.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::runtime::Handle;

use super::connection::{
    FRAME_BYTES_MAX, Lifetime, PING_TIMEOUT, PREFACE, Rewound, read_preface, run,
};
use super::readers::{Read, Readers};
use super::{Begun, Handler, Io, Place, Protocol, Server, TOO_MANY_STREAMS};
use crate::answer::{Answer, Parts};
use crate::body::RequestBody;
use crate::coalesce::Coalesced;
use crate::drain::Drain;
use crate::grpc::{Call, is_grpc, not_grpc, reject};
use crate::streams::refused;
use crate::tasks::TaskScope;

/// gRPC calls, served by a handler.
#[derive(Debug, Clone)]
pub struct Grpc<H>(pub H);

impl<H: Handler> Protocol for Grpc<H> {
    const ALPN: &'static [&'static [u8]] = &[b"h2"];

    async fn serve(self, server: &Server, mut io: impl Io, place: Place, drain: Drain) {
        let settings = &server.settings;
        // hyper has no timeout for the preface, and its graceful shutdown waits
        // for it as well.
        match server.begin(&place, read_preface(&mut io)).await {
            Begun::Done(Ok(())) => {}
            Begun::Done(Err(_)) => return server.metrics.refuse(server.name, "not_http2"),
            Begun::Late => return server.metrics.refuse(server.name, "preface_timeout"),
            Begun::Evicted => return,
        }
        let deadline_max = settings.deadline_max;
        let tasks = TaskScope::new(Handle::current());
        let scope = tasks.handle();
        let (place, peer) = (&place, &place.peer);
        let service = hyper::service::service_fn(move |request: Request<Incoming>| {
            let (handler, peer) = (self.0.clone(), peer.clone());
            let open = place.open();
            let is_call = is_grpc(&request);
            let request = request.map(|body| RequestBody::new(body, scope.clone()));
            // Boxed, since hyper moves it several times before it runs.
            Box::pin(async move {
                let answer = Answer::current().unwrap_or_default();
                let holder = peer.holder();
                let reply = match Call::new(request, peer, deadline_max) {
                    _ if !is_call => not_grpc(),
                    Ok(_) if open.stream.is_none() => reject(&refused(TOO_MANY_STREAMS)),
                    Ok(call) => {
                        let deadline = call.deadline;
                        let reply = handler.handle(call).await;
                        reply.body().describe(&answer, deadline);
                        reply
                    }
                    Err(status) => reject(&status),
                };
                answer.held_for(holder);
                Ok::<_, Infallible>(reply.map(|body| Parts::new(body, answer, open)))
            })
        });
        let limits = &server.limits;
        let io = Read::new(io, Arc::default(), limits.clone());
        let connection = http2::Builder::new(Readers(limits.clone()))
            .timer(TokioTimer::new())
            .max_concurrent_streams(settings.streams_max)
            // Callers who cancel reset their streams, and a gateway's connection
            // carries the streams of many callers.
            .max_pending_accept_reset_streams(settings.streams_max as usize)
            .initial_stream_window_size(place.stream_window())
            .initial_connection_window_size(place.connection_window())
            .max_frame_size(FRAME_BYTES_MAX)
            .max_header_list_size(server.header_bytes_max)
            .keep_alive_interval(settings.keepalive_interval)
            .keep_alive_timeout(PING_TIMEOUT)
            .serve_connection(
                TokioIo::new(Coalesced::new(Rewound::new(
                    io,
                    Bytes::from_static(PREFACE),
                ))),
                service,
            );
        let lifetime = Lifetime {
            age: settings.connection_age,
            // Clients keep theirs for the next call.
            idle: None,
        };
        run(connection, server, place, lifetime, drain).await;
    }
}
