//! The admin port: metrics, liveness and readiness over HTTP.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::health::Health;
use crate::metrics::Metrics;
use crate::pot::Holder;
use crate::seats::{Occupant, Seat, Seats};

/// Enough for probes and scrapers. A further connection takes the place of the
/// idlest: a probe must get its answer whatever else is open.
const CONNECTIONS_MAX: usize = 64;
/// How long the head of a request may take to arrive.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// The pause after a connection could not be accepted.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Serves `/metrics`, `/livez` and `/readyz` for as long as it is polled. The
/// process is ready when all of `health` are.
pub async fn run(listener: TcpListener, metrics: Arc<Metrics>, health: Vec<Health>) {
    let seats = Seats::new(CONNECTIONS_MAX);
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, address)) = accepted else {
            tokio::time::sleep(ACCEPT_BACKOFF).await;
            continue;
        };
        // Closed at once when those that were told to go have not gone yet.
        let holder = Holder::peer(address.ip());
        if let Ok(seat) = seats.take_or_evict(&holder, Occupant::default()) {
            connections.spawn(serve(stream, seat, metrics.clone(), health.clone()));
        }
    }
}

/// Serves one connection until it closes, or others need its place.
async fn serve(stream: TcpStream, seat: Seat, metrics: Arc<Metrics>, health: Vec<Health>) {
    let service = hyper::service::service_fn(|request: Request<Incoming>| {
        seat.touch();
        let response = respond(request.uri().path(), &metrics, &health);
        async move { Ok::<_, Infallible>(response) }
    });
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        served = serving => if let Err(error) = served {
            tracing::debug!(%error, "an admin connection failed");
        },
        () = seat.end().cancelled() => {}
    }
}

fn respond(path: &str, metrics: &Metrics, health: &[Health]) -> Response<Full<Bytes>> {
    let (status, content_type, text) = match path {
        "/metrics" => match metrics.to_text() {
            Ok(text) => (
                StatusCode::OK,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                text,
            ),
            Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        },
        "/livez" => plain(StatusCode::OK, "live\n"),
        "/readyz" if health.iter().all(Health::ready) => plain(StatusCode::OK, "ready\n"),
        "/readyz" => plain(StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
        _ => plain(
            StatusCode::NOT_FOUND,
            "not found: the paths are /metrics, /livez and /readyz\n",
        ),
    };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(
        http::header::CONTENT_TYPE,
        http::HeaderValue::from_static(content_type),
    );
    response
}

fn plain(status: StatusCode, text: &str) -> (StatusCode, &'static str, String) {
    (status, "text/plain; charset=utf-8", text.to_owned())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_probe_is_answered_whatever_else_is_open() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let metrics = Arc::new(Metrics::default());
        let _admin = crate::tasks::spawn_owned(run(listener, metrics, Vec::new()));
        let mut silent = Vec::new();
        for number in 0..CONNECTIONS_MAX * 2 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            // Some have sent a part of a request.
            if number % 2 == 0 {
                stream
                    .write_all(b"GET /livez HTTP/1.1\r\nhost: a\r\n")
                    .await
                    .unwrap();
            }
            silent.push(stream);
        }
        let mut probe = TcpStream::connect(address).await.unwrap();
        for _ in 0..3 {
            let request = b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n";
            probe.write_all(request).await.unwrap();
            let mut answer = [0; 15];
            probe.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"HTTP/1.1 200 OK");
            let mut rest = Vec::new();
            while !rest.ends_with(b"live\n") {
                probe.read_buf(&mut rest).await.unwrap();
            }
        }
    }
}
