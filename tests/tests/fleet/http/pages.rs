//! What web pages of other origins may do.

use anyhow::{Result, ensure};
use fleet_tests::Fleet;

use super::{Spoken, Told, digits, told, web};

const PAGE: &str = "https://pages.example";

/// Asks from a page, and before that whether it may.
async fn both(fleet: &Fleet, origin: &str) -> Result<[Told; 2]> {
    let url = format!("http://{}/v2/models/digits", fleet.gateway.http);
    let web = web(Spoken::One)?;
    let may = web
        .request(http::Method::OPTIONS, &url)
        .header("origin", origin)
        .header("access-control-request-method", "GET")
        .header("access-control-request-headers", "x-api-key");
    let asked = web.get(&url).header("origin", origin);
    Ok([told(may).await?, told(asked).await?])
}

fn allowed(told: &Told) -> Option<&str> {
    let origin = told.headers.get("access-control-allow-origin");
    origin.and_then(|origin| origin.to_str().ok())
}

#[tokio::test]
async fn pages_may_call_where_their_origin_is_named() -> Result<()> {
    let flags = ["--cors-origin", PAGE];
    let fleet = Fleet::with(1, &["--model", &digits()?], &flags).await?;
    let [may, asked] = both(&fleet, PAGE).await?;
    ensure!(may.status == 200 && allowed(&may) == Some(PAGE), "{may:?}");
    let headers = may.headers["access-control-allow-headers"].to_str()?;
    ensure!(headers.contains("x-api-key"), "{may:?}");
    ensure!(
        asked.status == 200 && allowed(&asked) == Some(PAGE),
        "{asked:?}"
    );
    let shown = asked.headers["access-control-expose-headers"].to_str()?;
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
    for told in both(&fleet, "https://others.example").await? {
        ensure!(allowed(&told).is_none(), "{told:?}");
    }
    Ok(())
}

#[tokio::test]
async fn pages_may_not_call_unless_it_is_said() -> Result<()> {
    let fleet = Fleet::with(1, &["--model", &digits()?], &[]).await?;
    let [may, asked] = both(&fleet, PAGE).await?;
    ensure!(may.status == 405 && allowed(&may).is_none(), "{may:?}");
    ensure!(
        asked.status == 200 && allowed(&asked).is_none(),
        "{asked:?}"
    );
    Ok(())
}
