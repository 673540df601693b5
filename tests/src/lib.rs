//! Fleets for tests: real processes on loopback ports that the system chose,
//! which end with their test.

pub mod calls;
pub mod certificates;
pub mod costs;
pub mod flood;
pub mod generate;
pub mod load;
pub mod process;
pub mod raw;
pub mod redis;
pub mod scripts;
pub mod tenants;
pub mod tokens;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use process::Andon;

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map(Path::to_path_buf)
        .unwrap_or_default()
}

/// A program of the build, of the profile that this program was built with; or
/// an error that says how to build it.
pub fn program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    // Tests are in `deps`, beside which the programs are.
    let folder = own
        .ancestors()
        .skip(1)
        .find(|folder| !folder.ends_with("deps"));
    let path = folder.context("no folder of this program")?.join(name);
    if path.is_file() {
        return Ok(path);
    }
    let profile = if cfg!(debug_assertions) {
        ""
    } else {
        " --release"
    };
    bail!(
        "{} is missing: run `cargo build{profile} --workspace --bins`",
        path.display()
    )
}

/// Whether the long form of a test is meant to run, as `make soak` asks for.
pub fn soaking() -> bool {
    std::env::var_os("SOAK").is_some()
}

/// The demo models, or an error that says how to get them.
pub fn models() -> Result<PathBuf> {
    let path = root().join("models");
    if path.join("minilm/1/config.json").is_file() && path.join("digits/1/config.json").is_file() {
        return Ok(path);
    }
    bail!("models/ lacks the demo models: run `make models`")
}

/// Copies a folder, by links where that is possible: weights are large. A file of
/// the copy is removed before another one is written in its place.
pub fn link_folder(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if from.is_dir() {
            link_folder(&from, &to)?;
        } else if std::fs::hard_link(&from, &to).is_err() {
            std::fs::copy(&from, &to)?;
        }
    }
    Ok(())
}

/// A gateway and its workers.
#[derive(Debug)]
pub struct Fleet {
    /// The gateway.
    pub gateway: Andon,
    /// The workers; a killed one leaves its slot empty.
    pub workers: Vec<Option<Andon>>,
    worker_flags: Vec<String>,
}

impl Fleet {
    /// A gateway over so many workers of the demo models; ready when all are.
    pub async fn start(workers: usize) -> Result<Self> {
        Self::with(workers, &[], &[]).await
    }

    /// The same with further flags.
    pub async fn with(
        workers: usize,
        worker_flags: &[&str],
        gateway_flags: &[&str],
    ) -> Result<Self> {
        let worker_flags: Vec<String> = worker_flags.iter().map(ToString::to_string).collect();
        let mut started = Vec::new();
        for _ in 0..workers {
            started.push(Some(Andon::worker(&worker_flags, None)?));
        }
        let mut flags: Vec<String> = gateway_flags.iter().map(ToString::to_string).collect();
        for worker in started.iter().flatten() {
            flags.extend(["--worker".to_owned(), worker.grpc.to_string()]);
        }
        let gateway = Andon::start("gateway", &flags, None)?;
        let fleet = Self {
            gateway,
            workers: started,
            worker_flags,
        };
        for worker in fleet.workers.iter().flatten() {
            worker.ready().await?;
        }
        fleet.gateway.ready().await?;
        fleet.all_connected(workers).await?;
        Ok(fleet)
    }

    /// Waits until the gateway counts so many ready workers.
    pub async fn all_connected(&self, workers: usize) -> Result<()> {
        let expected = workers as f64;
        until(
            Duration::from_secs(20),
            "the gateway sees its workers",
            || async {
                let ready = self
                    .gateway
                    .metric("andon_gateway_workers{state=\"ready\"}")
                    .await?;
                Ok(ready == Some(expected))
            },
        )
        .await
    }

    /// Starts a worker again in an empty slot, on the port that it had.
    pub fn restart(&mut self, index: usize, grpc: std::net::SocketAddr) -> Result<()> {
        let slot = self.workers.get_mut(index).context("no such worker")?;
        *slot = Some(Andon::worker(&self.worker_flags, Some(grpc))?);
        Ok(())
    }
}

/// Polls every 20 ms until a condition holds, or fails with what did not.
pub async fn until<F>(timeout: Duration, what: &str, holds: impl Fn() -> F) -> Result<()>
where
    F: Future<Output = Result<bool>>,
{
    let started = Instant::now();
    while started.elapsed() < timeout {
        if holds().await.unwrap_or(false) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    match holds().await {
        Ok(true) => Ok(()),
        Ok(false) => bail!("not within {timeout:?}: {what}"),
        Err(error) => Err(error).with_context(|| format!("not within {timeout:?}: {what}")),
    }
}
