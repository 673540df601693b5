//! What a tenant may call, counted by one gateway and by several with a Redis
//! that may fail, and how tenants share what there is.

mod in_flight;
mod lanes;
mod shares;
mod units;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::{client, texts};
use fleet_tests::process::{Andon, scratch};
use fleet_tests::redis::Redis;
use fleet_tests::tenants::Tenants;
use fleet_tests::{program, until};
use protocol::inference::ModelInferRequest;
use tokio::task::JoinSet;
use tonic::{Code, Status};
use tonic_types::StatusExt;

const UP: &str = "andon_gateway_redis_up";

/// Gateways that hold tenants to a policy, over a worker.
struct QuotaFleet {
    gateways: Vec<Andon>,
    keys: BTreeMap<String, String>,
    worker: Andon,
    tenants: Tenants,
}

impl QuotaFleet {
    /// `policy` names the tenants `a` and perhaps `b`.
    async fn start(policy: &str, gateways: usize, flags: &[&str], delay: &str) -> Result<Self> {
        let echo = ["--delay".to_owned(), delay.to_owned()];
        let worker = Andon::run(&mut Command::new(program("echo-worker")?), &echo, None)?;
        Self::over(worker, policy, gateways, flags).await
    }

    /// The same over another worker.
    async fn over(worker: Andon, policy: &str, gateways: usize, flags: &[&str]) -> Result<Self> {
        let tenants = Tenants::of(policy)?;
        let mut keys = BTreeMap::new();
        for tenant in ["a", "b"] {
            if policy.contains(&format!("[tenants.{tenant}]")) {
                keys.insert(tenant.to_owned(), tenants.key(tenant)?);
            }
        }
        let mut all: Vec<String> = flags.iter().map(ToString::to_string).collect();
        all.extend(["--worker".to_owned(), worker.grpc.to_string()]);
        all.extend(tenants.flags());
        let started = (0..gateways).map(|_| Andon::start("gateway", &all, None));
        let fleet = Self {
            gateways: started.collect::<Result<_>>()?,
            keys,
            worker,
            tenants,
        };
        for gateway in &fleet.gateways {
            gateway.ready().await?;
        }
        Ok(fleet)
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        self.gateways.iter().map(|gateway| gateway.grpc).collect()
    }

    /// Waits until every gateway has, or misses, its Redis.
    async fn redis_is(&self, up: f64) -> Result<()> {
        for gateway in &self.gateways {
            let what = format!("Redis is seen as {up}");
            let holds = || async { Ok(gateway.metric(UP).await? == Some(up)) };
            until(Duration::from_secs(20), &what, holds).await?;
        }
        Ok(())
    }

    /// What a tenant's calls come to: so many at once at each gateway, until a
    /// time is over.
    async fn run_load(&self, tenant: &str, at_once: usize, time: Duration) -> Result<Report> {
        let key = self.keys.get(tenant).context("no such tenant")?;
        let load = Load {
            key: key.clone(),
            at_once,
            end: LoadEnd::Time(time),
        };
        run_load(&self.addresses(), &load).await
    }
}

#[derive(Debug, Clone)]
struct Load {
    key: String,
    at_once: usize,
    end: LoadEnd,
}

#[derive(Debug, Clone, Copy)]
enum LoadEnd {
    /// After so long.
    Time(Duration),
    /// After so many refusals by each slot.
    Refusals(usize),
}

#[derive(Debug, Default)]
struct Report {
    /// How long each call took that passed.
    passed: Vec<Duration>,
    refused: Vec<Status>,
    /// The longest of all, passed or not.
    longest: Duration,
    seconds: f64,
}

impl Report {
    fn quantile(&mut self, part: f64) -> Duration {
        self.passed.sort_unstable();
        let index = (self.passed.len() as f64 * part) as usize;
        let last = self.passed.len().saturating_sub(1);
        self.passed
            .get(index.min(last))
            .copied()
            .unwrap_or_default()
    }

    /// The calls that passed and took so long or longer.
    fn slow(&self, time: Duration) -> usize {
        self.passed.iter().filter(|took| **took >= time).count()
    }

    /// Every refusal has this code and message, and a retry delay.
    fn all_refused(&self, code: Code, text: &str) -> Result<()> {
        for status in &self.refused {
            ensure!(
                status.code() == code && status.message().contains(text),
                "{code:?} {text}: {status:?}"
            );
            let retry = status.get_details_retry_info();
            let after = retry.and_then(|info| info.retry_delay);
            ensure!(after.is_some(), "no RetryInfo: {status:?}");
        }
        Ok(())
    }
}

async fn run_load(addresses: &[SocketAddr], load: &Load) -> Result<Report> {
    let started = Instant::now();
    let mut slots = JoinSet::new();
    for address in addresses {
        let client = client(*address).await?;
        for _ in 0..load.at_once {
            slots.spawn(slot(client.clone(), load.clone()));
        }
    }
    let mut all = Report::default();
    while let Some(ended) = slots.join_next().await {
        let ended = ended??;
        all.passed.extend(ended.passed);
        all.refused.extend(ended.refused);
        all.longest = all.longest.max(ended.longest);
    }
    all.seconds = started.elapsed().as_secs_f64();
    Ok(all)
}

async fn slot(mut client: fleet_tests::calls::Client, load: Load) -> Result<Report> {
    let message = ModelInferRequest {
        model_name: "echo".to_owned(),
        ..texts(&["a text"])
    };
    let (started, mut out) = (Instant::now(), Report::default());
    loop {
        match load.end {
            LoadEnd::Time(time) if started.elapsed() >= time => return Ok(out),
            LoadEnd::Refusals(count) if out.refused.len() >= count => return Ok(out),
            _ => {}
        }
        let mut request = tonic::Request::new(message.clone());
        request.set_timeout(Duration::from_secs(20));
        request
            .metadata_mut()
            .insert("x-api-key", load.key.parse()?);
        let sent = Instant::now();
        let response = client.model_infer(request).await;
        out.longest = out.longest.max(sent.elapsed());
        match response {
            Ok(_) => out.passed.push(sent.elapsed()),
            Err(status) => {
                out.refused.push(status);
                // A refusal costs little, and two cores have other work.
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
    }
}

fn tenant(name: &str, quota: &str) -> String {
    format!("[tenants.{name}]\nmodels = [\"*\"]\nquota = {{ {quota} }}\n")
}

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test]
async fn a_tenant_is_held_to_its_quota_and_others_are_not() -> Result<()> {
    let policy = tenant("a", "requests_per_second = 50, burst = 10") + &tenant("b", "");
    let fleet = QuotaFleet::start(&policy, 1, &[], "0s").await?;
    let (a, b) = tokio::join!(
        fleet.run_load("a", 4, 3 * SECOND),
        fleet.run_load("b", 1, SECOND)
    );
    let (a, b) = (a?, b?);
    let allowed = 10.0 + 50.0 * a.seconds;
    let passed = a.passed.len() as f64;
    ensure!(passed <= allowed + 1.0, "{passed} of {allowed}");
    ensure!(passed >= 0.8 * allowed, "{passed} of {allowed}");
    ensure!(!a.refused.is_empty(), "nothing was refused");
    a.all_refused(Code::ResourceExhausted, "limit of 50 requests per second")?;
    ensure!(
        b.refused.is_empty() && !b.passed.is_empty(),
        "{:?}",
        b.refused
    );
    let counted = fleet.gateways[0]
        .metric("andon_gateway_limited_total{limit=\"requests_per_second\"}")
        .await?;
    ensure!(counted == Some(a.refused.len() as f64), "{counted:?}");
    Ok(())
}

#[tokio::test]
async fn two_gateways_share_one_quota() -> Result<()> {
    let redis = Redis::with(Some("a-password-of-the-test")).await?;
    let file = scratch("password")?;
    std::fs::write(&file, "a-password-of-the-test\n")?;
    let (url, file) = (redis.url(), file.display().to_string());
    let flags = [
        "--redis",
        &url,
        "--redis-password-file",
        &file,
        "--log",
        "debug",
    ];
    // On a busy machine Redis may be late for a moment: then each counts its half.
    let policy = tenant("a", "items_per_day = 3000")
        + &tenant("b", "requests_per_second = 300, burst = 30")
        + "\n[limits]\nreplicas = 2\n";
    let fleet = QuotaFleet::start(&policy, 2, &flags, "0s").await?;
    fleet.redis_is(1.0).await?;
    // Rows of a day: both gateways call until there are none.
    let key = fleet.keys.get("a").context("a key")?.clone();
    let end = LoadEnd::Refusals(20);
    let addresses = fleet.addresses();
    let load = |at_once| Load {
        key: key.clone(),
        at_once,
        end,
    };
    let (few, many) = (load(1), load(6));
    let (one, other) = tokio::join!(
        run_load(&addresses[..1], &few),
        run_load(&addresses[1..], &many)
    );
    let (one, other) = (one?, other?);
    let sum = one.passed.len() + other.passed.len();
    println!(
        "rows per day: {} + {} of 3000",
        one.passed.len(),
        other.passed.len()
    );
    ensure!((2850..=3000).contains(&sum), "{sum} of 3000");
    one.all_refused(Code::ResourceExhausted, "limit of 3000 items per day")?;
    // Requests per second. One measurement may fall into a moment without Redis.
    let mut shares = Vec::new();
    let within = loop {
        let report = fleet.run_load("b", 4, 4 * SECOND).await?;
        let share = report.passed.len() as f64 / (30.0 + 300.0 * report.seconds);
        println!("requests: {share:.3} of what is allowed");
        shares.push(share);
        let within = (0.95..=1.05).contains(&share);
        if within || shares.len() == 3 {
            break within;
        }
        // The burst comes back.
        tokio::time::sleep(SECOND).await;
    };
    ensure!(within, "{shares:?} of what is allowed");
    for gateway in &fleet.gateways {
        ensure!(
            !gateway.logged().contains("a-password"),
            "a secret is in the log"
        );
    }
    std::fs::remove_file(file)?;
    Ok(())
}

#[tokio::test]
async fn a_lost_redis_leaves_each_gateway_its_share() -> Result<()> {
    let mut redis = Redis::start().await?;
    let url = redis.url();
    let policy = tenant("a", "requests_per_second = 200, burst = 20")
        + "[limits]\nredis_lost = \"open\"\nreplicas = 4\n";
    let fleet = QuotaFleet::start(&policy, 1, &["--redis", &url], "0s").await?;
    fleet.redis_is(1.0).await?;
    fleet.run_load("a", 2, SECOND).await?;
    redis.kill()?;
    fleet.redis_is(0.0).await?;
    let mut report = fleet.run_load("a", 4, 3 * SECOND).await?;
    let (allowed, passed) = (5.0 + 50.0 * report.seconds, report.passed.len() as f64);
    println!(
        "without Redis: {passed} of {allowed:.0}, p99 {:?}",
        report.quantile(0.99)
    );
    ensure!(
        passed <= 1.05 * allowed && passed >= 0.8 * allowed,
        "{passed} of {allowed}"
    );
    report.all_refused(Code::ResourceExhausted, "requests per second")?;
    redis.again().await?;
    fleet.redis_is(1.0).await?;
    // One measurement may fall into a moment without Redis.
    for left in (0..3).rev() {
        let report = fleet.run_load("a", 4, 3 * SECOND).await?;
        let (allowed, passed) = (20.0 + 200.0 * report.seconds, report.passed.len() as f64);
        ensure!(passed <= 1.05 * allowed, "{passed} of {allowed}");
        if passed >= 0.8 * allowed {
            break;
        }
        ensure!(left > 0, "{passed} of {allowed}");
        // The burst comes back.
        tokio::time::sleep(SECOND).await;
    }
    Ok(())
}

#[tokio::test]
async fn a_lost_redis_closes_where_the_policy_says_so() -> Result<()> {
    let mut redis = Redis::start().await?;
    let url = redis.url();
    let policy = tenant("a", "requests_per_second = 1000")
        + &tenant("b", "")
        + "[limits]\nredis_lost = \"closed\"\n";
    let fleet = QuotaFleet::start(&policy, 1, &["--redis", &url], "0s").await?;
    fleet.redis_is(1.0).await?;
    let report = fleet.run_load("a", 1, SECOND).await?;
    ensure!(!report.passed.is_empty(), "{:?}", report.refused);
    redis.kill()?;
    fleet.redis_is(0.0).await?;
    let (a, b) = tokio::join!(
        fleet.run_load("a", 2, SECOND),
        fleet.run_load("b", 2, SECOND)
    );
    let (a, b) = (a?, b?);
    ensure!(
        a.passed.is_empty() && !a.refused.is_empty(),
        "{} passed",
        a.passed.len()
    );
    a.all_refused(Code::Unavailable, "cannot be checked")?;
    // Who has no quota needs no Redis.
    ensure!(
        b.refused.is_empty() && !b.passed.is_empty(),
        "{:?}",
        b.refused
    );
    Ok(())
}

#[tokio::test]
async fn a_frozen_redis_delays_no_call() -> Result<()> {
    let redis = Redis::start().await?;
    let url = redis.url();
    // One at a time is granted: each call would wait for Redis.
    let policy = tenant(
        "a",
        "requests_per_second = 40000, burst = 4, items_per_day = 10000000",
    );
    let fleet = QuotaFleet::start(&policy, 1, &["--redis", &url], "0s").await?;
    fleet.redis_is(1.0).await?;
    let mut before = fleet.run_load("a", 4, 2 * SECOND).await?;
    redis.signal(libc::SIGSTOP)?;
    let mut frozen = fleet.run_load("a", 4, 3 * SECOND).await?;
    fleet.redis_is(0.0).await?;
    let mut after = fleet.run_load("a", 4, 2 * SECOND).await?;
    redis.signal(libc::SIGCONT)?;
    fleet.redis_is(1.0).await?;
    for (when, report) in [
        ("before", &mut before),
        ("frozen", &mut frozen),
        ("passed by", &mut after),
    ] {
        let (half, most) = (report.quantile(0.5), report.quantile(0.99));
        println!(
            "{when}: {} passed, p50 {half:?}, p99 {most:?}, longest {:?}",
            report.passed.len(),
            report.longest
        );
        ensure!(
            report.passed.len() > 100,
            "{when}: {} passed",
            report.passed.len()
        );
        report.all_refused(Code::ResourceExhausted, "requests per second")?;
        // Generous: it is 20 ms and what a busy machine adds.
        ensure!(report.longest < 2 * SECOND, "{when}: {:?}", report.longest);
    }
    // A Redis that hangs is found out once, by the calls that are in flight
    // then: 20 ms for each, and nothing for those in the middle.
    let (usual, half) = (before.quantile(0.5), frozen.quantile(0.5));
    let slack = Duration::from_millis(5);
    ensure!(half <= 2 * usual + slack, "{half:?} after {usual:?}");
    let waited = Duration::from_millis(15);
    let (usual, slow) = (before.slow(waited), frozen.slow(waited));
    let few = 16 + 2 * usual + frozen.passed.len() / 100;
    ensure!(slow <= few, "{slow} waited, {usual} before");
    Ok(())
}

#[tokio::test]
async fn a_url_with_a_password_is_refused_at_the_start() -> Result<()> {
    let flags = [
        "--worker",
        "127.0.0.1:1",
        "--redis",
        "redis://:hidden-one@127.0.0.1:1",
    ];
    let flags: Vec<String> = flags.iter().map(ToString::to_string).collect();
    let mut gateway = Andon::start("gateway", &flags, None)?;
    let status = gateway.ended(20 * SECOND).await?;
    ensure!(!status.success(), "it started");
    let text = gateway.logged();
    ensure!(
        text.contains("--redis-password-file") && !text.contains("hidden-one"),
        "{text}"
    );
    Ok(())
}

#[tokio::test]
async fn tenants_share_what_there_is() -> Result<()> {
    // Four rows at a time, 20 ms each.
    let policy = tenant("a", "") + &tenant("b", "");
    let fleet = QuotaFleet::start(&policy, 1, &["--fair-rows", "4"], "20ms").await?;
    let time = 4 * SECOND;
    let (one, other) = tokio::join!(fleet.run_load("a", 40, time), fleet.run_load("b", 8, time));
    let (one, other) = (one?, other?);
    ensure!(
        one.refused.is_empty() && other.refused.is_empty(),
        "{:?}",
        one.refused
    );
    let share = other.passed.len() as f64 / (one.passed.len() + other.passed.len()) as f64;
    println!("forty at once beside eight: the eight have {share:.3} of the rows");
    ensure!((0.4..0.6).contains(&share), "{share}");
    // A machine that is busy with other tests may need another measurement.
    let mut shares = Vec::new();
    let mut good = false;
    while !good && shares.len() < 3 {
        let (share, flood) = beside(&fleet, time).await?;
        good = flood <= share.mul_f64(1.5) + Duration::from_millis(5);
        shares.push((share, flood));
    }
    ensure!(good, "p99 at its share and beside a flood: {shares:?}");
    let waiting = fleet.gateways[0]
        .metric("andon_gateway_fair_waiting")
        .await?;
    ensure!(waiting == Some(0.0), "{waiting:?} still wait");
    Ok(())
}

/// The p99 of a tenant under overload, beside another that asks for as much
/// and for ten times that.
async fn beside(fleet: &QuotaFleet, time: Duration) -> Result<(Duration, Duration)> {
    let mut p99 = Vec::new();
    for at_once in [4, 40] {
        let (busy, quiet) = tokio::join!(
            fleet.run_load("a", at_once, time),
            fleet.run_load("b", 4, time)
        );
        let (mut busy, mut quiet) = (busy?, quiet?);
        println!(
            "beside {at_once} at once: p50 {:?}, p99 {:?}; theirs {:?}",
            quiet.quantile(0.5),
            quiet.quantile(0.99),
            busy.quantile(0.99)
        );
        ensure!(quiet.refused.is_empty(), "{:?}", quiet.refused);
        p99.push(quiet.quantile(0.99));
    }
    Ok((p99[0], p99[1]))
}
