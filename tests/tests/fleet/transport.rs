//! What a connection is held to.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::{client, infer, pixels, texts};
use fleet_tests::{Fleet, until};
use protocol::inference::ModelInferRequest;
use tonic::Code;

fn digits() -> ModelInferRequest {
    pixels(&[[3.0; 64]])
}

/// Reads until the peer closes; how long that took.
fn closed(mut stream: TcpStream) -> Result<Duration> {
    let started = Instant::now();
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut bytes = [0; 1024];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) | Err(_) => return Ok(started.elapsed()),
            Ok(_) => {}
        }
    }
}

#[tokio::test]
async fn silent_and_foreign_peers_are_closed() -> Result<()> {
    let fleet = Fleet::with(1, &[], &["--preface-timeout", "300ms"]).await?;
    let address = fleet.gateway.grpc;
    let silent = TcpStream::connect(address)?;
    let mut foreign = TcpStream::connect(address)?;
    foreign.write_all(b"GET / HTTP/1.1\r\nhost: andon\r\n\r\n")?;
    let took = tokio::task::spawn_blocking(move || closed(foreign)).await??;
    ensure!(took < Duration::from_secs(5), "{took:?}");
    let took = tokio::task::spawn_blocking(move || closed(silent)).await??;
    ensure!(took < Duration::from_secs(5), "{took:?}");
    // A part of what a client of HTTP/2 says first is as good as nothing.
    let mut part = TcpStream::connect(fleet.gateway.http)?;
    part.write_all(b"PRI * HTTP/2.0\r\n")?;
    let took = tokio::task::spawn_blocking(move || closed(part)).await??;
    ensure!(took < Duration::from_secs(5), "{took:?}");
    let late = "andon_connections_refused_total{listener=\"http\",reason=\"preface_timeout\"}";
    let count = fleet.gateway.metric(late).await?;
    ensure!(count == Some(1.0), "{count:?}");
    let refused = |reason: &str| {
        format!("andon_connections_refused_total{{listener=\"gateway\",reason=\"{reason}\"}}")
    };
    for reason in ["preface_timeout", "not_http2"] {
        let count = fleet.gateway.metric(&refused(reason)).await?;
        ensure!(count == Some(1.0), "{reason}: {count:?}");
    }
    infer(&client(address).await?, digits(), Duration::from_secs(5)).await?;
    Ok(())
}

#[tokio::test]
async fn pages_of_other_sites_change_nothing() -> Result<()> {
    let fleet = Fleet::with(1, &[], &["--cors-origin", "https://pages.example"]).await?;
    let web = reqwest::Client::builder().no_proxy().build()?;
    let status = async |path: &str, header: [&str; 2]| -> Result<u16> {
        let url = format!("http://{}{path}", fleet.gateway.http);
        let response = web.post(url).header(header[0], header[1]).send().await?;
        Ok(response.status().as_u16())
    };
    for header in [
        ["sec-fetch-site", "cross-site"],
        ["sec-fetch-site", "same-site"],
        ["origin", "https://other.example"],
        ["origin", "null"],
        ["host", "rebound.example"],
    ] {
        let found = status("/v2/repository/models/digits/unload", header).await?;
        ensure!(found == 403, "{header:?}: {found}");
    }
    infer(
        &client(fleet.gateway.grpc).await?,
        digits(),
        Duration::from_secs(5),
    )
    .await?;
    let own = format!("http://{}", fleet.gateway.http);
    for header in [
        ["sec-fetch-site", "same-origin"],
        ["origin", "https://pages.example"],
        ["origin", &own],
    ] {
        let found = status("/v2/repository/index", header).await?;
        ensure!(found == 200, "{header:?}: {found}");
    }
    Ok(())
}

#[tokio::test]
async fn connections_over_the_cap_are_closed_and_the_others_serve() -> Result<()> {
    let fleet = Fleet::with(1, &[], &["--connections-max", "4"]).await?;
    let address = fleet.gateway.grpc;
    let client = client(address).await?;
    infer(&client, digits(), Duration::from_secs(5)).await?;
    let open: Vec<TcpStream> = (0..10)
        .map(|_| TcpStream::connect(address))
        .collect::<Result<_, _>>()?;
    // A new connection takes the place of an idle one, or is refused.
    let refused = "andon_connections_refused_total{listener=\"gateway\",reason=\"cap\"}";
    let evicted = "andon_connections_evicted_total{listener=\"gateway\"}";
    until(Duration::from_secs(5), "connections are closed", || async {
        let refused = fleet.gateway.metric(refused).await?.unwrap_or_default();
        let evicted = fleet.gateway.metric(evicted).await?.unwrap_or_default();
        Ok(refused + evicted >= 7.0)
    })
    .await?;
    infer(&client, digits(), Duration::from_secs(5)).await?;
    drop(open);
    Ok(())
}

#[tokio::test]
async fn old_connections_are_closed_gracefully() -> Result<()> {
    let fleet = Fleet::with(1, &[], &["--connection-age", "300ms"]).await?;
    let client = client(fleet.gateway.grpc).await?;
    let load = fleet_tests::load::Load::start(&client, &digits(), 4, usize::MAX);
    let accepted = "andon_connections_accepted_total{listener=\"gateway\"}";
    // The client connects again each time that its connection receives GOAWAY.
    until(
        Duration::from_secs(20),
        "the client connects again",
        || async { Ok(fleet.gateway.metric(accepted).await? >= Some(4.0)) },
    )
    .await?;
    let mut outcome = load.stopped().await;
    // The error of tonic's client for a call that it had not sent yet at the
    // GOAWAY; other clients send it on the next connection.
    outcome.failed.remove("Cancelled: operation was canceled");
    ensure!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    Ok(())
}

#[tokio::test]
async fn messages_over_the_limits_are_refused_and_small_ones_served() -> Result<()> {
    let limits = |in_flight| {
        [
            "--message-bytes-max",
            "1MiB",
            "--bytes-in-flight-max",
            in_flight,
        ]
    };
    // A worker also holds what a message becomes: two that fit the gateway do.
    let fleet = Fleet::with(1, &limits("4MiB"), &limits("2MiB")).await?;
    let client = client(fleet.gateway.grpc).await?;
    let large = texts(&[vec![b'a'; 2 << 20]]);
    let refused = infer(&client, large, Duration::from_secs(5)).await;
    let code = refused.err().map(|status| status.code());
    ensure!(code == Some(Code::ResourceExhausted), "{code:?}");
    // Many messages that fit alone but not together: each succeeds or is
    // refused for overload, and nothing else happens.
    let rows = [[1.0; 64]; 3_500];
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (client, request) = (client.clone(), pixels(&rows));
        calls.spawn(async move { infer(&client, request, Duration::from_secs(20)).await });
    }
    let mut succeeded = 0;
    while let Some(call) = calls.join_next().await {
        match call.context("a call")? {
            Ok(_) => succeeded += 1,
            Err(status) => ensure!(status.code() == Code::Unavailable, "{status:?}"),
        }
    }
    ensure!(succeeded > 0, "none succeeded");
    until(
        Duration::from_secs(5),
        "no bytes are left in flight",
        || async {
            Ok(fleet
                .gateway
                .metric("andon_gateway_bytes_in_flight")
                .await?
                == Some(0.0))
        },
    )
    .await?;
    infer(&client, digits(), Duration::from_secs(5)).await?;
    Ok(())
}

#[tokio::test]
async fn calls_over_the_cap_are_shed_at_once() -> Result<()> {
    let fleet = Fleet::with(1, &[], &["--calls-max", "1"]).await?;
    let client = client(fleet.gateway.grpc).await?;
    let slow = texts(&vec!["words that take a while to compute ".repeat(5); 128]);
    let mut busy = tokio::task::JoinSet::new();
    busy.spawn({
        let client = client.clone();
        async move { infer(&client, slow, Duration::from_secs(30)).await }
    });
    until(Duration::from_secs(5), "the permit is taken", || async {
        Ok(fleet.gateway.metric("andon_gateway_in_flight").await? == Some(1.0))
    })
    .await?;
    let refused = infer(&client, digits(), Duration::from_secs(5)).await;
    let status = refused.err().context("it succeeded")?;
    ensure!(status.code() == Code::Unavailable, "{status:?}");
    let details = tonic_types::StatusExt::get_error_details(&status);
    ensure!(details.retry_info().is_some(), "no RetryInfo");
    busy.join_next()
        .await
        .context("the busy call")??
        .context("it failed")?;
    Ok(())
}

/// A connection of HTTP/2 whose calls are refused before they have come whole:
/// an error if it breaks.
async fn refused_early(address: SocketAddr, path: &str, calls: usize) -> Result<()> {
    let stream = tokio::net::TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = h2::client::handshake(stream).await?;
    let driven = platform::tasks::spawn_owned(connection);
    for number in 0..calls {
        let head = http::Request::post(format!("http://{address}{path}"))
            .header("content-type", "application/grpc")
            .body(())?;
        let mut sender = sender.clone().ready().await?;
        let (answer, mut message) = sender.send_request(head, false)?;
        let answer = answer.await.with_context(|| format!("call {number}"))?;
        drop(answer);
        // It was on its way when the answer was made.
        message.send_data(bytes::Bytes::from_static(b"the rest"), true)?;
    }
    drop(sender);
    driven.await.context("it panicked")??;
    Ok(())
}

#[tokio::test]
async fn callers_refused_before_the_end_of_their_body_keep_their_connection() -> Result<()> {
    let fleet = Fleet::with(1, &[], &[]).await?;
    for (address, path) in [
        (fleet.gateway.grpc, "/no.such.Service/Method"),
        (fleet.gateway.http, "/no/such/page"),
    ] {
        refused_early(address, path, 3000).await?;
    }
    Ok(())
}
