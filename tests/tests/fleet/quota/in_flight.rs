//! Permits for a tenant's calls in flight, which gateways share.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use fleet_tests::redis::Redis;
use fleet_tests::until;
use tonic::Code;

use super::{Load, LoadEnd, QuotaFleet, Report, SECOND, run_load, tenant};

/// Where gateways keep the permits of the tenant `a`.
const KEY: &str = "andon:quota:{a}::in_flight";

/// Two gateways that share eight permits, over a worker that takes a second.
async fn two(redis: &Redis, limits: &str) -> Result<QuotaFleet> {
    let policy = tenant("a", "in_flight = 8") + "[limits]\nreplicas = 2\n" + limits;
    let fleet = QuotaFleet::start(&policy, 2, &["--redis", &redis.url()], "1s").await?;
    fleet.redis_is(1.0).await?;
    Ok(fleet)
}

/// So many callers at each gateway for a moment: each that gets a permit calls
/// once, the others call again and again.
async fn burst(fleet: &QuotaFleet, addresses: &[SocketAddr], at_once: usize) -> Result<Report> {
    let key = fleet.keys.get("a").context("a key")?.clone();
    let end = LoadEnd::Time(SECOND / 5);
    run_load(addresses, &Load { key, at_once, end }).await
}

/// Waits until a burst gets so many permits, and never more.
async fn admits(fleet: &QuotaFleet, addresses: &[SocketAddr], permits: usize) -> Result<()> {
    let what = format!("{permits} permits");
    until(30 * SECOND, &what, || async {
        let found = burst(fleet, addresses, 16).await?;
        found.all_refused(Code::ResourceExhausted, "limit of 8 calls in flight")?;
        Ok(found.passed.len() == permits)
    })
    .await
}

#[tokio::test]
async fn gateways_share_the_limit_of_calls_in_flight() -> Result<()> {
    let redis = Redis::start().await?;
    let fleet = two(&redis, "").await?;
    let addresses = fleet.addresses();
    // All of them are for one alone, and then for the other.
    admits(&fleet, &addresses[..1], 8).await?;
    admits(&fleet, &addresses[1..], 8).await?;
    for _ in 0..3 {
        let both = burst(&fleet, &addresses, 8).await?;
        let passed = both.passed.len();
        ensure!(passed <= 8, "{passed} in flight at once");
    }
    admits(&fleet, &addresses, 8).await
}

#[tokio::test]
async fn the_permits_of_a_dead_gateway_come_back() -> Result<()> {
    let redis = Redis::start().await?;
    let fleet = two(&redis, "").await?;
    let addresses = fleet.addresses();
    let (before, after) = tokio::join!(burst(&fleet, &addresses[..1], 16), async {
        let refused = "andon_gateway_limited_total{limit=\"in_flight\"}";
        let all = || async { Ok(fleet.gateways[0].metric(refused).await? >= Some(1.0)) };
        until(20 * SECOND, "all permits are taken", all).await?;
        fleet.gateways[0].signal(libc::SIGKILL)?;
        burst(&fleet, &addresses[1..], 16).await
    });
    ensure!(before?.passed.is_empty(), "it was not killed in time");
    let passed = after?.passed.len();
    ensure!(passed == 0, "{passed} permits of one that may live");
    admits(&fleet, &addresses[1..], 8).await
}

#[tokio::test]
async fn permits_outlive_failures_of_redis() -> Result<()> {
    let mut redis = Redis::start().await?;
    let fleet = two(&redis, "").await?;
    let addresses = fleet.addresses();
    admits(&fleet, &addresses[..1], 8).await?;
    redis.kill()?;
    fleet.redis_is(0.0).await?;
    // Its share: eight of two.
    admits(&fleet, &addresses[..1], 4).await?;
    redis.again().await?;
    fleet.redis_is(1.0).await?;
    admits(&fleet, &addresses[..1], 8).await?;
    admits(&fleet, &addresses, 8).await?;
    // What none of us wrote keeps nobody out.
    let client = redis::Client::open(redis.url())?;
    let mut connection = client.get_multiplexed_async_connection().await?;
    let mut fields = redis::cmd("HSET");
    fields
        .arg(KEY)
        .arg(&["x", "a word", "y", "7 99999999999999999"]);
    let () = fields.query_async(&mut connection).await?;
    admits(&fleet, &addresses[1..], 8).await?;
    let mut text = redis::cmd("SET");
    let () = text
        .arg(KEY)
        .arg("a word")
        .query_async(&mut connection)
        .await?;
    admits(&fleet, &addresses[..1], 8).await
}

#[tokio::test]
async fn permits_end_with_a_lost_redis_where_the_policy_says_so() -> Result<()> {
    let mut redis = Redis::start().await?;
    let fleet = two(&redis, "redis_lost = \"closed\"\n").await?;
    redis.kill()?;
    fleet.redis_is(0.0).await?;
    let found = burst(&fleet, &fleet.addresses(), 2).await?;
    ensure!(found.passed.is_empty(), "{} passed", found.passed.len());
    ensure!(found.longest < 20 * SECOND, "{:?}", found.longest);
    found.all_refused(Code::Unavailable, "cannot be checked")
}

/// The gateways' script: calls over a limit are in flight and hold their
/// permits, and no further call gets one.
#[tokio::test]
async fn no_permits_are_granted_over_the_limit() -> Result<()> {
    let redis = Redis::start().await?;
    let client = redis::Client::open(redis.url())?;
    let mut connection = client.get_multiplexed_async_connection().await?;
    let source = include_str!("../../../../crates/gateway/src/limit/slots.lua");
    let script = redis::Script::new(source);
    for (gateway, limit, in_flight, most, granted) in [
        ("one", 8, 0, 4, 4),
        ("other", 8, 0, 5, 4),
        // It shrinks: eight are in flight.
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
            .arg(in_flight)
            .arg(most);
        let found: u32 = call.arg(30_000).invoke_async(&mut connection).await?;
        ensure!(
            found == granted,
            "{gateway}, {in_flight} in flight of {limit}: {found}"
        );
    }
    Ok(())
}

/// Calls that passed at all gateways.
async fn passed(fleet: &QuotaFleet) -> Result<f64> {
    let name = "andon_gateway_requests_total{model=\"echo\",method=\"ModelInfer\",code=\"OK\"}";
    let mut sum = 0.0;
    for gateway in &fleet.gateways {
        sum += gateway.metric(name).await?.unwrap_or_default();
    }
    Ok(sum)
}

#[tokio::test]
async fn a_limit_that_shrinks_takes_hold_under_load() -> Result<()> {
    let redis = Redis::start().await?;
    let fleet = two(&redis, "").await?;
    let load = fleet.run_load("a", 8, 12 * SECOND);
    let (report, counted) = tokio::join!(load, async {
        until(20 * SECOND, "calls pass", || async {
            Ok(passed(&fleet).await? >= 8.0)
        })
        .await?;
        let policy = tenant("a", "in_flight = 4") + "[limits]\nreplicas = 2\n";
        std::fs::write(fleet.tenants.policy(), policy)?;
        // Both gateways refuse, and what was over the limit has ended.
        let refused = "andon_gateway_limited_total{limit=\"in_flight\"}";
        let shrunk = || async {
            let (mut in_flight, mut all_refuse) = (0.0, true);
            for gateway in &fleet.gateways {
                let own = gateway.metric("andon_gateway_in_flight").await?;
                in_flight += own.unwrap_or_default();
                all_refuse &= gateway.metric(refused).await? >= Some(1.0);
            }
            Ok(all_refuse && in_flight <= 4.0)
        };
        until(20 * SECOND, "the limit has shrunk", shrunk).await?;
        let before = passed(&fleet).await?;
        // A rate needs a time to be measured in.
        tokio::time::sleep(4 * SECOND).await;
        anyhow::Ok(passed(&fleet).await? - before)
    });
    let (report, counted) = (report?, counted?);
    // Four a second, and those that ended at once; eight a second would be 32.
    ensure!((4.0..=24.0).contains(&counted), "{counted} in four seconds");
    let last = report.refused.last().context("nothing was refused")?;
    let text = "limit of 4 calls in flight";
    ensure!(last.message().contains(text), "{last:?}");
    Ok(())
}
