//! Answers that several gateways keep in Redis, and a Redis that fails.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use fleet_tests::calls::pixels;
use fleet_tests::process::Andon;
use fleet_tests::redis::Redis;
use fleet_tests::{Fleet, until};

use super::{Reply, Repository, beside, call, computed, image};

/// The names of the cached rows.
async fn names(redis: &Redis) -> Result<Vec<String>> {
    ask_redis(redis, redis::cmd("KEYS").arg("*")).await
}

async fn ask_redis<T: redis::FromRedisValue>(redis: &Redis, command: &redis::Cmd) -> Result<T> {
    let client = redis::Client::open(redis.url())?;
    let mut connection = client.get_multiplexed_async_connection().await?;
    Ok(command.query_async(&mut connection).await?)
}

/// Waits until so many rows are cached.
async fn keeps(redis: &Redis, rows: usize) -> Result<()> {
    until(Duration::from_secs(20), "Redis keeps the rows", || async {
        Ok(names(redis).await?.len() == rows)
    })
    .await
}

/// Two gateways over one worker, which share a Redis.
struct Pair {
    redis: Redis,
    fleet: Fleet,
    second: Andon,
    flags: Vec<String>,
    repository: Repository,
}

impl Pair {
    async fn start() -> Result<Self> {
        let redis = Redis::start().await?;
        let repository = Repository::of(&["digits"])?;
        let secret = repository.0.join("secret");
        std::fs::write(
            &secret,
            "a secret that both gateways have, of some length\n",
        )?;
        let flags = vec![
            "--redis".to_owned(),
            redis.url(),
            "--cache-secret-file".to_owned(),
            secret.display().to_string(),
        ];
        let given: Vec<&str> = flags.iter().map(String::as_str).collect();
        let fleet = repository.fleet(&given).await?;
        let second = beside(&fleet, &given).await?;
        let pair = Self {
            redis,
            fleet,
            second,
            flags,
            repository,
        };
        // Nothing is cached before both are connected.
        for gateway in [&pair.fleet.gateway, &pair.second] {
            pair.redis_is(gateway, true).await?;
        }
        Ok(pair)
    }

    /// Waits until a gateway uses Redis, or passes it by.
    async fn redis_is(&self, gateway: &Andon, up: bool) -> Result<()> {
        let expected = Some(f64::from(u8::from(up)));
        until(Duration::from_secs(20), "Redis is used or not", || async {
            let up = gateway.metric("andon_gateway_cache_redis_up").await?;
            Ok(up == expected)
        })
        .await
    }

    async fn first(&self, values: &[u8]) -> Result<Reply> {
        let rows: Vec<[f32; 64]> = values.iter().map(|&value| image(value)).collect();
        call(self.fleet.gateway.grpc, &pixels(&rows), &[]).await
    }

    async fn second(&self, values: &[u8]) -> Result<Reply> {
        let rows: Vec<[f32; 64]> = values.iter().map(|&value| image(value)).collect();
        call(self.second.grpc, &pixels(&rows), &[]).await
    }
}

#[tokio::test]
async fn gateways_share_cached_rows_and_redis_sees_no_input() -> Result<()> {
    let pair = Pair::start().await?;
    let first = pair.first(&[1, 2, 3]).await?;
    ensure!(first.cache == "miss", "{}", first.cache);
    keeps(&pair.redis, 3).await?;
    let before = computed(&pair.fleet, "digits").await?;
    let second = pair.second(&[3, 4, 2]).await?;
    ensure!(second.cache == "2/3", "{}", second.cache);
    ensure!(computed(&pair.fleet, "digits").await? == before + 1);
    let row =
        |answer: &Reply, row: usize| fleet_tests::calls::rows(&answer.response, 0)[row].clone();
    ensure!(row(&second, 0) == row(&first, 2) && row(&second, 2) == row(&first, 1));
    for name in names(&pair.redis).await? {
        ensure!(name.starts_with("andon:row:") && name.len() == 53, "{name}");
        let ttl_ms: i64 = ask_redis(&pair.redis, redis::cmd("PTTL").arg(&name)).await?;
        ensure!((1..=3_600_000).contains(&ttl_ms), "{ttl_ms}");
    }
    // A gateway that does not know the secret finds nothing.
    let secret = pair.repository.0.join("another secret");
    std::fs::write(&secret, "another secret that nobody else has, as long")?;
    let path = secret.display().to_string();
    let flags = ["--redis", &pair.flags[1], "--cache-secret-file", &path];
    let stranger = beside(&pair.fleet, &flags).await?;
    pair.redis_is(&stranger, true).await?;
    ensure!(call(stranger.grpc, &pixels(&[image(1)]), &[]).await?.cache == "miss");
    Ok(())
}

#[tokio::test]
async fn changed_entries_in_redis_are_misses() -> Result<()> {
    let pair = Pair::start().await?;
    pair.first(&[1, 2, 3, 4, 5]).await?;
    keeps(&pair.redis, 5).await?;
    let names = names(&pair.redis).await?;
    let mut values = Vec::new();
    for name in &names {
        let value: Vec<u8> = ask_redis(&pair.redis, redis::cmd("GET").arg(name)).await?;
        values.push(value);
    }
    // Poisoned, cut, emptied, moved to another row's name.
    let last = values[0].len() - 1;
    values[0][last] ^= 0x40;
    values[1].truncate(30);
    values[2].clear();
    values.swap(3, 4);
    for (name, value) in names.iter().zip(&values) {
        let set: String = ask_redis(&pair.redis, redis::cmd("SET").arg(name).arg(value)).await?;
        ensure!(set == "OK");
    }
    let reply = pair.second(&[1, 2, 3, 4, 5]).await?;
    ensure!(reply.cache == "miss", "{}", reply.cache);
    ensure!(reply.response == pair.first(&[1, 2, 3, 4, 5]).await?.response);
    Ok(())
}

#[tokio::test]
async fn a_frozen_or_killed_redis_costs_no_call() -> Result<()> {
    let mut pair = Pair::start().await?;
    pair.redis.signal(libc::SIGSTOP)?;
    let mut slowest = Duration::ZERO;
    for value in 0..17 {
        let started = Instant::now();
        let reply = pair.second(&[value]).await?;
        slowest = slowest.max(started.elapsed());
        ensure!(reply.cache == "miss", "{}", reply.cache);
    }
    println!("the slowest call while Redis hung: {slowest:?}");
    ensure!(
        pair.second(&[1]).await?.cache == "hit",
        "memory still knows"
    );
    pair.redis.signal(libc::SIGCONT)?;
    // It is used again when it answers.
    pair.redis_is(&pair.second, true).await?;
    pair.redis_is(&pair.fleet.gateway, true).await?;
    let mut value = 0.0;
    loop {
        value += 0.125;
        ensure!(value < 16.0, "the gateways share nothing any more");
        let request = pixels(&[[value; 64]]);
        call(pair.second.grpc, &request, &[]).await?;
        // It is written a moment later.
        tokio::time::sleep(Duration::from_millis(20)).await;
        if call(pair.fleet.gateway.grpc, &request, &[]).await?.cache == "hit" {
            break;
        }
    }
    pair.redis.kill()?;
    for value in 0..10 {
        let cache = pair.first(&[value, value + 1]).await?.cache;
        ensure!(!cache.is_empty());
    }
    pair.redis_is(&pair.fleet.gateway, false).await?;
    ensure!(!pair.second.logged().contains("panicked"));
    Ok(())
}
