//! An honest tenant that calls at its own pace, beside whom others mean harm, and
//! what it notices of them.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use fleet_tests::calls::{Client, client, pixels};
use fleet_tests::process::Andon;
use fleet_tests::tenants::Tenants;
use fleet_tests::{Fleet, until};
use tokio::task::JoinSet;

/// Calls of the honest tenant that may be in flight.
const CALLERS: usize = 4;
/// Between two calls of a caller.
const PAUSE: Duration = Duration::from_millis(5);
/// How long its calls are measured before an attack.
const BEFORE: Duration = Duration::from_secs(10);
/// How long after an attack memory is measured.
const AFTER: Duration = Duration::from_secs(30);
/// The deadline of its calls.
const TIMEOUT: Duration = Duration::from_secs(20);

const POLICY: &str = r#"
[tenants.honest]
models = ["*"]
[tenants.hostile]
models = ["*"]
"#;

/// Three workers behind a gateway that knows an honest tenant and a hostile one.
pub struct Attacked {
    /// The processes.
    pub fleet: Fleet,
    /// The hostile tenant's key.
    pub hostile: String,
    honest: String,
    _tenants: Tenants,
}

impl Attacked {
    /// Starts the processes, the gateway with further flags.
    pub async fn start(flags: &[&str]) -> Result<Self> {
        let tenants = Tenants::of(POLICY)?;
        let (honest, hostile) = (tenants.key("honest")?, tenants.key("hostile")?);
        let own = tenants.flags();
        let flags = [&own.each_ref().map(String::as_str)[..], flags].concat();
        let fleet = Fleet::with(3, &[], &flags).await?;
        Ok(Self {
            fleet,
            hostile,
            honest,
            _tenants: tenants,
        })
    }

    /// The honest tenant, who begins to call.
    pub async fn honest(&self) -> Result<Honest> {
        let mut callers = JoinSet::new();
        let noticed = Arc::new(Mutex::new(Noticed::default()));
        for _ in 0..CALLERS {
            let client = client(self.fleet.gateway.grpc).await?;
            callers.spawn(call(client, self.honest.clone(), noticed.clone()));
        }
        let honest = Honest {
            noticed,
            _callers: callers,
        };
        until(
            Duration::from_secs(30),
            "the honest tenant is served",
            || async { Ok(honest.noticed().took.len() > 20) },
        )
        .await?;
        honest.take();
        Ok(honest)
    }

    /// Resident bytes of all processes.
    pub fn resident_bytes(&self) -> u64 {
        // A process that is gone has none.
        let resident = |andon: &Andon| andon.resident_bytes().unwrap_or_default();
        let workers = self.fleet.workers.iter().flatten().map(resident);
        resident(&self.fleet.gateway) + workers.sum::<u64>()
    }

    /// Workers that the gateway ejected or took for lost, and that are not.
    pub async fn lost_workers(&self) -> Result<usize> {
        let ejections = self
            .fleet
            .gateway
            .metric_sum("andon_gateway_ejections_total");
        let ejected = ejections.await? as usize;
        let logged = self.fleet.gateway.logged();
        let lost = logged.lines().filter(|line| line.contains("lost worker"));
        Ok(ejected + lost.count())
    }
}

/// What the honest tenant noticed.
#[derive(Debug, Default)]
pub struct Noticed {
    /// The duration of each call that succeeded.
    pub took: Vec<Duration>,
    /// Calls that failed, by their error.
    pub failed: BTreeMap<String, usize>,
}

impl Noticed {
    /// The duration below which 99 of 100 calls stayed.
    pub fn p99(&mut self) -> Duration {
        self.took.sort();
        let index = (self.took.len() * 99).div_ceil(100).saturating_sub(1);
        self.took.get(index).copied().unwrap_or_default()
    }
}

/// Callers that go on until they are dropped.
pub struct Honest {
    noticed: Arc<Mutex<Noticed>>,
    _callers: JoinSet<()>,
}

impl Honest {
    fn noticed(&self) -> std::sync::MutexGuard<'_, Noticed> {
        self.noticed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was noticed since the last time.
    pub fn take(&self) -> Noticed {
        std::mem::take(&mut self.noticed())
    }
}

async fn call(client: Client, key: String, noticed: Arc<Mutex<Noticed>>) {
    let mut number = 0.0_f32;
    loop {
        // Other rows each time, from 0 to 16: nothing comes from a cache.
        number = (number + 0.001) % 16.0;
        let mut request = tonic::Request::new(pixels(&[[number; 64]]));
        request.set_timeout(TIMEOUT);
        if let Ok(key) = key.parse() {
            request.metadata_mut().insert("x-api-key", key);
        }
        let started = Instant::now();
        let result = client.clone().model_infer(request).await;
        {
            let mut noticed = noticed.lock().unwrap_or_else(PoisonError::into_inner);
            match result {
                Ok(_) => noticed.took.push(started.elapsed()),
                Err(status) => {
                    let error = format!("{:?}: {}", status.code(), status.message());
                    *noticed.failed.entry(error).or_default() += 1;
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Runs an attack beside the honest tenant and prints what it noticed, then what
/// is left 30 s after the attack's connections are closed.
pub async fn measure<A>(
    attacked: &Attacked,
    name: &str,
    attack: impl AsyncFnOnce(&Attacked) -> Result<A>,
) -> Result<()> {
    let honest = attacked.honest().await?;
    tokio::time::sleep(BEFORE).await;
    let before = honest.take().p99();
    let resident = attacked.resident_bytes();
    let lost = attacked.lost_workers().await?;
    let peak = Cell::new(resident);
    let watch = async {
        loop {
            peak.set(peak.get().max(attacked.resident_bytes()));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let connections = tokio::select! {
        connections = attack(attacked) => connections.with_context(|| name.to_owned())?,
        () = watch => bail!("it watches until the attack has ended"),
    };
    let mut during = honest.take();
    drop(connections);
    tokio::time::sleep(AFTER).await;
    let late: usize = honest.take().failed.values().sum();
    let failed: usize = during.failed.values().sum::<usize>() + late;
    let lost = attacked.lost_workers().await? - lost;
    let p99 = during.p99();
    let slower = p99.as_secs_f64() / before.as_secs_f64().max(1e-9);
    let [resident, peak, after] =
        [resident, peak.get(), attacked.resident_bytes()].map(|bytes| bytes >> 20);
    println!(
        "| {name} | {} | {failed} | {before:.1?} | {p99:.1?} | {slower:.1} | {resident} | {peak} | {after} | {lost} |",
        during.took.len(),
    );
    for (error, count) in &during.failed {
        println!("  {count} x {error}");
    }
    Ok(())
}
