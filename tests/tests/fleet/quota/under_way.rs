//! Places among a tenant's calls under way, which gateways have together.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use fleet_tests::redis::Redis;
use fleet_tests::until;
use tonic::Code;

use super::{End, Held, Load, Pressed, SECOND, press, tenant};

/// Where gateways keep the places of the tenant `a`.
const KEY: &str = "andon:quota:{a}::in_flight";

/// Two gateways with eight places together, over a worker that takes a second.
async fn two(redis: &Redis, limits: &str) -> Result<Held> {
    let policy = tenant("a", "in_flight = 8") + "[limits]\nreplicas = 2\n" + limits;
    let held = Held::start(&policy, 2, &["--redis", &redis.url()], "1s").await?;
    held.redis_is(1.0).await?;
    Ok(held)
}

/// So many callers at each gateway for a moment: each that finds a place calls
/// once, the others ask again and again.
async fn crowd(held: &Held, addresses: &[SocketAddr], at_once: usize) -> Result<Pressed> {
    let key = held.keys.get("a").context("a key")?.clone();
    let end = End::Time(SECOND / 5);
    press(addresses, &Load { key, at_once, end }).await
}

/// Waits until a crowd finds so many places, and never more.
async fn finds(held: &Held, addresses: &[SocketAddr], places: usize) -> Result<()> {
    let what = format!("{places} places");
    until(30 * SECOND, &what, || async {
        let found = crowd(held, addresses, 16).await?;
        found.all_refused(Code::ResourceExhausted, "limit of 8 calls under way")?;
        Ok(found.passed.len() == places)
    })
    .await
}

#[tokio::test]
async fn gateways_have_their_places_together() -> Result<()> {
    let redis = Redis::start().await?;
    let held = two(&redis, "").await?;
    let addresses = held.addresses();
    // All of them are for one alone, and then for the other.
    finds(&held, &addresses[..1], 8).await?;
    finds(&held, &addresses[1..], 8).await?;
    for _ in 0..3 {
        let both = crowd(&held, &addresses, 8).await?;
        let passed = both.passed.len();
        ensure!(passed <= 8, "{passed} under way at once");
    }
    finds(&held, &addresses, 8).await
}

#[tokio::test]
async fn the_places_of_a_gateway_that_died_come_back() -> Result<()> {
    let redis = Redis::start().await?;
    let held = two(&redis, "").await?;
    let addresses = held.addresses();
    let (before, after) = tokio::join!(crowd(&held, &addresses[..1], 16), async {
        let refused = "andon_gateway_limited_total{limit=\"in_flight\"}";
        let all = || async { Ok(held.gateways[0].metric(refused).await? >= Some(1.0)) };
        until(20 * SECOND, "all places are taken", all).await?;
        held.gateways[0].signal(libc::SIGKILL)?;
        crowd(&held, &addresses[1..], 16).await
    });
    ensure!(before?.passed.is_empty(), "it was not killed in time");
    let passed = after?.passed.len();
    ensure!(passed == 0, "{passed} places of one that may live");
    finds(&held, &addresses[1..], 8).await
}

#[tokio::test]
async fn places_outlive_what_happens_to_redis() -> Result<()> {
    let mut redis = Redis::start().await?;
    let held = two(&redis, "").await?;
    let addresses = held.addresses();
    finds(&held, &addresses[..1], 8).await?;
    redis.kill()?;
    held.redis_is(0.0).await?;
    // Its share: eight of two.
    finds(&held, &addresses[..1], 4).await?;
    redis.again().await?;
    held.redis_is(1.0).await?;
    finds(&held, &addresses[..1], 8).await?;
    finds(&held, &addresses, 8).await?;
    // What none of us wrote keeps nobody out.
    let client = redis::Client::open(redis.url())?;
    let mut connection = client.get_multiplexed_async_connection().await?;
    let mut fields = redis::cmd("HSET");
    fields
        .arg(KEY)
        .arg(&["x", "a word", "y", "7 99999999999999999"]);
    let () = fields.query_async(&mut connection).await?;
    finds(&held, &addresses[1..], 8).await?;
    let mut text = redis::cmd("SET");
    let () = text
        .arg(KEY)
        .arg("a word")
        .query_async(&mut connection)
        .await?;
    finds(&held, &addresses[..1], 8).await
}

#[tokio::test]
async fn places_close_with_a_lost_redis_where_the_policy_says_so() -> Result<()> {
    let mut redis = Redis::start().await?;
    let held = two(&redis, "redis_lost = \"closed\"\n").await?;
    redis.kill()?;
    held.redis_is(0.0).await?;
    let found = crowd(&held, &held.addresses(), 2).await?;
    ensure!(found.passed.is_empty(), "{} passed", found.passed.len());
    ensure!(found.longest < 20 * SECOND, "{:?}", found.longest);
    found.all_refused(Code::Unavailable, "cannot be checked")
}

/// The gateways' script: calls over a limit are under way and hold their
/// places, and no call after them is let in for it.
#[tokio::test]
async fn what_is_over_the_limit_is_granted_to_nobody() -> Result<()> {
    let redis = Redis::start().await?;
    let client = redis::Client::open(redis.url())?;
    let mut connection = client.get_multiplexed_async_connection().await?;
    let places = include_str!("../../../../crates/gateway/src/limit/places.lua");
    let script = redis::Script::new(places);
    for (gateway, limit, under_way, most, granted) in [
        ("one", 8, 0, 4, 4),
        ("other", 8, 0, 5, 4),
        // It shrinks: eight are under way.
        ("one", 4, 4, 4, 0),
        ("other", 4, 4, 4, 0),
        ("one", 4, 2, 3, 0),
        ("other", 4, 2, 4, 2),
        ("one", 4, 2, 4, 2),
        // One of them has none any more.
        ("other", 4, 0, 0, 0),
        ("one", 4, 2, 9, 4),
    ] {
        let mut call = script.prepare_invoke();
        call.key(KEY)
            .arg(gateway)
            .arg(limit)
            .arg(under_way)
            .arg(most);
        let found: u32 = call.arg(30_000).invoke_async(&mut connection).await?;
        ensure!(
            found == granted,
            "{gateway}, {under_way} under way of {limit}: {found}"
        );
    }
    Ok(())
}

/// Calls that passed at all gateways.
async fn passed(held: &Held) -> Result<f64> {
    let name = "andon_gateway_requests_total{model=\"echo\",method=\"ModelInfer\",code=\"OK\"}";
    let mut sum = 0.0;
    for gateway in &held.gateways {
        sum += gateway.metric(name).await?.unwrap_or_default();
    }
    Ok(sum)
}

#[tokio::test]
async fn a_limit_that_shrinks_takes_hold_under_load() -> Result<()> {
    let redis = Redis::start().await?;
    let held = two(&redis, "").await?;
    let load = held.press("a", 8, 12 * SECOND);
    let (pressed, counted) = tokio::join!(load, async {
        until(20 * SECOND, "calls pass", || async {
            Ok(passed(&held).await? >= 8.0)
        })
        .await?;
        let policy = tenant("a", "in_flight = 4") + "[limits]\nreplicas = 2\n";
        std::fs::write(held.folder.join("policy.toml"), policy)?;
        // The file is looked at every second, and calls take one.
        tokio::time::sleep(4 * SECOND).await;
        let before = passed(&held).await?;
        tokio::time::sleep(4 * SECOND).await;
        anyhow::Ok(passed(&held).await? - before)
    });
    let (pressed, counted) = (pressed?, counted?);
    // Four a second, and those that ended at once; eight a second would be 32.
    ensure!((4.0..=24.0).contains(&counted), "{counted} in four seconds");
    let last = pressed.refused.last().context("nothing was refused")?;
    let said = "limit of 4 calls under way";
    ensure!(last.message().contains(said), "{last:?}");
    Ok(())
}
