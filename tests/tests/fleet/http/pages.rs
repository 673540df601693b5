//! What web pages of other origins may do.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleet_tests::Fleet;
use fleet_tests::process::Andon;

use super::{Protocol, Response, digits, fetch, web};

const PAGE: &str = "https://pages.example";

/// Asks from a page, and before that whether it may.
async fn both(fleet: &Fleet, origin: &str) -> Result<[Response; 2]> {
    let url = format!("http://{}/v2/models/digits", fleet.gateway.http);
    let web = web(Protocol::Http1)?;
    let may = web
        .request(http::Method::OPTIONS, &url)
        .header("origin", origin)
        .header("access-control-request-method", "GET")
        .header("access-control-request-headers", "x-api-key");
    let request = web.get(&url).header("origin", origin);
    Ok([fetch(may).await?, fetch(request).await?])
}

fn allowed(response: &Response) -> Option<&str> {
    let origin = response.headers.get("access-control-allow-origin");
    origin.and_then(|origin| origin.to_str().ok())
}

#[tokio::test]
async fn pages_may_call_where_their_origin_is_named() -> Result<()> {
    let flags = ["--cors-origin", PAGE];
    let fleet = Fleet::with(1, &["--model", &digits()?], &flags).await?;
    let [may, response] = both(&fleet, PAGE).await?;
    ensure!(may.status == 200 && allowed(&may) == Some(PAGE), "{may:?}");
    let headers = may.headers["access-control-allow-headers"].to_str()?;
    ensure!(headers.contains("x-api-key"), "{may:?}");
    ensure!(
        response.status == 200 && allowed(&response) == Some(PAGE),
        "{response:?}"
    );
    let shown = response.headers["access-control-expose-headers"].to_str()?;
    for name in [
        "x-request-id",
        "retry-after",
        "retry-after-ms",
        "x-andon-cache",
    ] {
        ensure!(
            shown.split(',').any(|shown| shown.trim() == name),
            "{shown}"
        );
    }
    for response in both(&fleet, "https://others.example").await? {
        ensure!(allowed(&response).is_none(), "{response:?}");
    }
    Ok(())
}

#[tokio::test]
async fn pages_may_read_why_a_request_was_refused() -> Result<()> {
    let flags = ["--cors-origin", PAGE];
    let fleet = Fleet::with(1, &["--model", &digits()?], &flags).await?;
    let url = |path: &str| format!("http://{}{path}", fleet.gateway.http);
    let web = web(Protocol::Http1)?;
    let infer = url("/v2/models/digits/infer");
    for (request, status) in [
        (web.get(url("/v2/nowhere")), 404),
        (web.get(url("/v1/nowhere")), 404),
        (web.get(&infer), 405),
        (web.post(&infer).header("content-encoding", "br"), 415),
        (web.post(&infer).body("{}"), 400),
    ] {
        let response = fetch(request.header("origin", PAGE)).await?;
        ensure!(response.status == status, "{response:?}");
        ensure!(allowed(&response) == Some(PAGE), "{response:?}");
    }
    Ok(())
}

#[tokio::test]
async fn an_origin_that_can_never_match_does_not_start() -> Result<()> {
    for origin in [
        "pages.example",
        "https://pages.example/",
        "https://*.example",
    ] {
        let flags = ["--worker", "127.0.0.1:1", "--cors-origin", origin];
        let mut gateway = Andon::start("gateway", &flags.map(str::to_owned), None)?;
        let ended = gateway.ended(Duration::from_secs(20)).await?;
        ensure!(!ended.success(), "{origin}");
        let logged = gateway.logged();
        ensure!(logged.contains("--cors-origin"), "{logged}");
    }
    Ok(())
}

/// The status of a request with this method and these headers, as it is.
async fn status(fleet: &Fleet, head: &str, headers: &[(&str, &str)]) -> Result<u16> {
    let mut request = format!("{head} HTTP/1.1\r\nconnection: close\r\ncontent-length: 0\r\n");
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str("\r\n");
    let answer = super::attacks::raw(fleet.gateway.http, request.as_bytes()).await?;
    let status = answer.split(' ').nth(1).context("no status")?;
    Ok(status.parse()?)
}

/// A page of another site unloads no model, whether or not the pages of a third
/// may call, and whether or not its browser names the site.
#[tokio::test]
async fn pages_of_other_origins_write_nothing() -> Result<()> {
    for flags in [&[][..], &["--cors-origin", PAGE]] {
        let fleet = Fleet::with(1, &["--model", &digits()?], flags).await?;
        let own = format!("http://{}", fleet.gateway.http);
        let host = fleet.gateway.http.to_string();
        let unload = "POST /v2/repository/models/digits/unload";
        for origin in [
            "http://evil.example",
            "https://pages.example.evil.example",
            "null",
            &own.replace("http:", "https:"),
        ] {
            for kind in ["text/plain", "application/json"] {
                let headers = [("host", &*host), ("origin", origin), ("content-type", kind)];
                let found = status(&fleet, unload, &headers).await?;
                ensure!(found == 403, "{origin}: {found}");
            }
        }
        let site = [("host", &*host), ("sec-fetch-site", "cross-site")];
        ensure!(status(&fleet, unload, &site).await? == 403, "{flags:?}");
        let page = [("host", &*host), ("origin", PAGE)];
        let index = "POST /v2/repository/index";
        let expected = if flags.is_empty() { 403 } else { 200 };
        ensure!(status(&fleet, index, &page).await? == expected, "{flags:?}");
        for headers in [
            &[("host", &*host)][..],
            &[("host", &*host), ("origin", &*own)],
        ] {
            ensure!(status(&fleet, index, headers).await? == 200, "{headers:?}");
        }
        let response = super::get(fleet.gateway.http, "/v2/models/digits/ready").await?;
        ensure!(response.status == 200, "{response:?}");
    }
    Ok(())
}

/// A page whose name resolves to this machine has its own name as the host.
#[tokio::test]
async fn names_of_other_sites_do_not_reach_an_open_loopback_port() -> Result<()> {
    let flags = ["--http-host", "andon.test"];
    let fleet = Fleet::with(1, &["--model", &digits()?], &flags).await?;
    let port = fleet.gateway.http.port();
    for (host, expected) in [
        ("rebound.example", 403),
        ("localhost.rebound.example", 403),
        ("127.0.0.1.rebound.example", 403),
        ("localhost", 200),
        ("127.0.0.1", 200),
        ("[::1]", 200),
        ("andon.test", 200),
    ] {
        let host = format!("{host}:{port}");
        let origin = format!("http://{host}");
        let headers = [("host", &*host), ("origin", &*origin)];
        for head in ["GET /v2/models/digits", "POST /v2/repository/index"] {
            let found = status(&fleet, head, &headers).await?;
            ensure!(found == expected, "{head} {host}: {found}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn pages_may_not_call_unless_a_flag_allows_it() -> Result<()> {
    let fleet = Fleet::with(1, &["--model", &digits()?], &[]).await?;
    let [may, response] = both(&fleet, PAGE).await?;
    ensure!(may.status == 405 && allowed(&may).is_none(), "{may:?}");
    ensure!(
        response.status == 200 && allowed(&response).is_none(),
        "{response:?}"
    );
    Ok(())
}
