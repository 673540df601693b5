//! What web pages of other origins may do.

use anyhow::{Result, ensure};
use fleet_tests::Fleet;

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
