//! Answers that several gateways keep in Redis, and a Redis that fails.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fleet_tests::Fleet;
use fleet_tests::calls::pixels;
use fleet_tests::process::{Andon, free_port, scratch};
use fleet_tests::until;

use super::{Answered, Repository, ask, beside, computed, image};

/// A Redis of its own, which keeps nothing on disk and ends with the test.
struct Redis {
    child: Child,
    address: SocketAddr,
    folder: PathBuf,
}

impl Drop for Redis {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Redis {
    async fn start() -> Result<Self> {
        let (address, folder) = (free_port()?, scratch("redis")?);
        std::fs::create_dir_all(&folder)?;
        let child = Command::new("redis-server")
            .args(["--port", &address.port().to_string()])
            .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
            .arg("--dir")
            .arg(&folder)
            .stdout(Stdio::null())
            .spawn()
            .context("redis-server is missing: install it")?;
        let redis = Self {
            child,
            address,
            folder,
        };
        until(Duration::from_secs(20), "Redis answers", || async {
            let answered: String = redis.ask(redis::cmd("PING")).await?;
            Ok(answered == "PONG")
        })
        .await?;
        Ok(redis)
    }

    async fn ask<T: redis::FromRedisValue>(&self, command: redis::Cmd) -> Result<T> {
        let client = redis::Client::open(format!("redis://{}", self.address))?;
        let mut connection = client.get_multiplexed_async_connection().await?;
        Ok(command.query_async(&mut connection).await?)
    }

    async fn names(&self) -> Result<Vec<String>> {
        let mut command = redis::cmd("KEYS");
        command.arg("*");
        self.ask(command).await
    }

    /// Waits until so many rows are kept.
    async fn keeps(&self, rows: usize) -> Result<()> {
        until(Duration::from_secs(20), "Redis keeps the rows", || async {
            Ok(self.names().await?.len() == rows)
        })
        .await
    }

    #[allow(
        unsafe_code,
        reason = "kill(2) takes two integers and touches no memory"
    )]
    fn signal(&self, signal: i32) -> Result<()> {
        let id = i32::try_from(self.child.id())?;
        // SAFETY: the process is our child and has not been waited for, so
        // that its number is still its own.
        ensure!(unsafe { libc::kill(id, signal) } == 0, "no signal was sent");
        Ok(())
    }
}

/// Two gateways over one worker, which share a Redis.
struct Pair {
    redis: Redis,
    fleet: Fleet,
    second: Andon,
    flags: Vec<String>,
    _repository: Repository,
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
            format!("redis://{}", redis.address),
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
            _repository: repository,
        };
        // Nothing is kept before both are connected.
        for gateway in [&pair.fleet.gateway, &pair.second] {
            pair.redis_is(gateway, true).await?;
        }
        Ok(pair)
    }

    /// Waits until a gateway uses Redis, or passes it by.
    async fn redis_is(&self, gateway: &Andon, up: bool) -> Result<()> {
        let wanted = Some(f64::from(u8::from(up)));
        until(Duration::from_secs(20), "Redis is used or not", || async {
            let up = gateway.metric("andon_gateway_cache_redis_up").await?;
            Ok(up == wanted)
        })
        .await
    }

    async fn first(&self, values: &[u8]) -> Result<Answered> {
        let rows: Vec<[f32; 64]> = values.iter().map(|&value| image(value)).collect();
        ask(self.fleet.gateway.grpc, &pixels(&rows), &[]).await
    }

    async fn second(&self, values: &[u8]) -> Result<Answered> {
        let rows: Vec<[f32; 64]> = values.iter().map(|&value| image(value)).collect();
        ask(self.second.grpc, &pixels(&rows), &[]).await
    }
}

#[tokio::test]
async fn gateways_share_what_they_know_and_redis_sees_no_input() -> Result<()> {
    let pair = Pair::start().await?;
    let first = pair.first(&[1, 2, 3]).await?;
    ensure!(first.cache == "miss", "{}", first.cache);
    pair.redis.keeps(3).await?;
    let before = computed(&pair.fleet, "digits").await?;
    let second = pair.second(&[3, 4, 2]).await?;
    ensure!(second.cache == "2/3", "{}", second.cache);
    ensure!(computed(&pair.fleet, "digits").await? == before + 1);
    let row =
        |answer: &Answered, row: usize| fleet_tests::calls::rows(&answer.response, 0)[row].clone();
    ensure!(row(&second, 0) == row(&first, 2) && row(&second, 2) == row(&first, 1));
    for name in pair.redis.names().await? {
        ensure!(name.starts_with("andon:row:") && name.len() == 53, "{name}");
        let mut ttl = redis::cmd("PTTL");
        ttl.arg(&name);
        let ttl_ms: i64 = pair.redis.ask(ttl).await?;
        ensure!((1..=3_600_000).contains(&ttl_ms), "{ttl_ms}");
    }
    // A gateway that does not know the secret finds nothing.
    let secret = pair.redis.folder.join("secret");
    std::fs::write(&secret, "another secret that nobody else has, as long")?;
    let path = secret.display().to_string();
    let stranger = beside(
        &pair.fleet,
        &["--redis", &pair.flags[1], "--cache-secret-file", &path],
    );
    let stranger = stranger.await?;
    ensure!(ask(stranger.grpc, &pixels(&[image(1)]), &[]).await?.cache == "miss");
    Ok(())
}

#[tokio::test]
async fn what_was_changed_in_redis_is_not_believed() -> Result<()> {
    let pair = Pair::start().await?;
    pair.first(&[1, 2, 3, 4, 5]).await?;
    pair.redis.keeps(5).await?;
    let names = pair.redis.names().await?;
    let mut values = Vec::new();
    for name in &names {
        let mut get = redis::cmd("GET");
        get.arg(name);
        values.push(pair.redis.ask::<Vec<u8>>(get).await?);
    }
    // Poisoned, cut, emptied, moved to another's place.
    let last = values[0].len() - 1;
    values[0][last] ^= 0x40;
    values[1].truncate(30);
    values[2].clear();
    values.swap(3, 4);
    for (name, value) in names.iter().zip(&values) {
        let mut set = redis::cmd("SET");
        set.arg(name).arg(value);
        let _: String = pair.redis.ask(set).await?;
    }
    let answered = pair.second(&[1, 2, 3, 4, 5]).await?;
    ensure!(answered.cache == "miss", "{}", answered.cache);
    ensure!(answered.response == pair.first(&[1, 2, 3, 4, 5]).await?.response);
    Ok(())
}

#[tokio::test]
async fn a_frozen_or_killed_redis_costs_no_call() -> Result<()> {
    let mut pair = Pair::start().await?;
    pair.redis.signal(libc::SIGSTOP)?;
    let mut slowest = Duration::ZERO;
    for value in 0..17 {
        let started = Instant::now();
        let answered = pair.second(&[value]).await?;
        slowest = slowest.max(started.elapsed());
        ensure!(answered.cache == "miss", "{}", answered.cache);
    }
    // Each waits 20 ms at most; the bound is for slow machines.
    ensure!(slowest < Duration::from_secs(2), "{slowest:?}");
    ensure!(
        pair.second(&[1]).await?.cache == "hit",
        "memory still knows"
    );
    pair.redis.signal(libc::SIGCONT)?;
    // It is used again when it answers.
    pair.redis_is(&pair.second, true).await?;
    pair.redis_is(&pair.fleet.gateway, true).await?;
    let clear: String = pair.redis.ask(redis::cmd("FLUSHALL")).await?;
    ensure!(clear == "OK");
    let half = [[0.5; 64]];
    ensure!(ask(pair.second.grpc, &pixels(&half), &[]).await?.cache == "miss");
    pair.redis.keeps(1).await?;
    ensure!(
        ask(pair.fleet.gateway.grpc, &pixels(&half), &[])
            .await?
            .cache
            == "hit"
    );
    pair.redis.child.kill()?;
    pair.redis.child.wait()?;
    for value in 0..10 {
        ensure!(pair.first(&[value]).await?.cache == "miss");
    }
    pair.redis_is(&pair.fleet.gateway, false).await?;
    ensure!(!pair.second.logged().contains("panicked"));
    Ok(())
}
