//! The admin port: metrics, liveness and readiness over HTTP.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::ACCEPT;
use http::{HeaderMap, Request, Response, StatusCode};
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
/// process is ready when the empty name of `health` is.
pub async fn run(listener: TcpListener, metrics: Arc<Metrics>, health: Health) {
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
async fn serve(stream: TcpStream, seat: Seat, metrics: Arc<Metrics>, health: Health) {
    let service = hyper::service::service_fn(|request: Request<Incoming>| {
        seat.touch();
        let response = respond(&request, &metrics, &health);
        async move { Ok::<_, Infallible>(response) }
    });
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        // Answers are made at once: nothing is lost on a peer who has left.
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        served = serving => if let Err(error) = served {
            tracing::debug!(%error, "an admin connection failed");
        },
        () = seat.end().cancelled() => {}
    }
}

fn respond<B>(request: &Request<B>, metrics: &Metrics, health: &Health) -> Response<Full<Bytes>> {
    let (status, content_type, text) = match request.uri().path() {
        "/metrics" => page(request.headers(), metrics),
        "/livez" => plain(StatusCode::OK, "live\n"),
        "/readyz" if health.ready() => plain(StatusCode::OK, "ready\n"),
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

/// The page of metrics, in the format that a scraper asks for.
fn page(headers: &HeaderMap, metrics: &Metrics) -> (StatusCode, &'static str, String) {
    let (content_type, text) = if asks_for_open_metrics(headers) {
        let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        (content_type, metrics.to_open_metrics())
    } else {
        let content_type = "text/plain; version=0.0.4; charset=utf-8";
        (content_type, metrics.to_text())
    };
    match text {
        Ok(text) => (StatusCode::OK, content_type, text),
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

/// Whether a scraper takes OpenMetrics, by RFC 9110: with a weight that is not
/// zero and at least that of plain text.
fn asks_for_open_metrics(headers: &HeaderMap) -> bool {
    let values = headers.get_all(ACCEPT).into_iter();
    let texts = values.filter_map(|value| value.to_str().ok());
    let (mut open, mut plain) = (0.0_f32, 0.0_f32);
    for range in texts.flat_map(|text| text.split(',')) {
        let mut parts = range.split(';').map(str::trim);
        let kind = parts.next().unwrap_or_default();
        let weight = parts.find_map(|part| {
            let (name, value) = part.split_once('=')?;
            let is_weight = name.trim().eq_ignore_ascii_case("q");
            is_weight.then_some(value)?.trim().parse::<f32>().ok()
        });
        let weight = weight.unwrap_or(1.0);
        if kind.eq_ignore_ascii_case("application/openmetrics-text") {
            open = open.max(weight);
        } else if kind.eq_ignore_ascii_case("text/plain") {
            plain = plain.max(weight);
        }
    }
    open > 0.0 && open >= plain
}

fn plain(status: StatusCode, text: &str) -> (StatusCode, &'static str, String) {
    (status, "text/plain; charset=utf-8", text.to_owned())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[test]
    fn metrics_are_in_plain_text_unless_open_metrics_is_asked_for() {
        let metrics = Metrics::default();
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.6,\
            application/openmetrics-text;version=0.0.1;q=0.5,\
            text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        for (accept, open) in [
            (None, false),
            (Some("*/*"), false),
            (Some("text/plain"), false),
            (
                Some("text/plain, application/openmetrics-text; q=0.5"),
                false,
            ),
            (Some("application/openmetrics-text;Q=0"), false),
            (Some("Application/OpenMetrics-Text; version=1.0.0"), true),
            (Some(prometheus), true),
        ] {
            let mut request = Request::builder().uri("/metrics");
            if let Some(accept) = accept {
                request = request.header(ACCEPT, accept);
            }
            let response = respond(&request.body(()).unwrap(), &metrics, &Health::default());
            let kind = response.headers()["content-type"].to_str().unwrap();
            let expected = if open {
                "application/openmetrics-text; version=1.0.0; charset=utf-8"
            } else {
                "text/plain; version=0.0.4; charset=utf-8"
            };
            assert_eq!(kind, expected, "{accept:?}");
        }
    }

    #[tokio::test]
    async fn a_peer_that_has_sent_all_it_will_send_is_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let metrics = Arc::new(Metrics::default());
        let _admin = crate::tasks::spawn_owned(run(listener, metrics, Health::default()));
        let mut probe = TcpStream::connect(address).await.unwrap();
        let request = b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n";
        probe.write_all(request).await.unwrap();
        probe.shutdown().await.unwrap();
        let mut answer = String::new();
        probe.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    }

    #[tokio::test]
    async fn a_probe_is_answered_whatever_else_is_open() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let metrics = Arc::new(Metrics::default());
        let _admin = crate::tasks::spawn_owned(run(listener, metrics, Health::default()));
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
