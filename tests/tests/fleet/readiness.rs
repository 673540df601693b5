//! What the doors say of a process that is starting, ready or leaving: all the same.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::{client, infer, pixels};
use fleet_tests::process::{Andon, free_port, scratch};
use fleet_tests::{Fleet, models, raw};
use protocol::inference::ModelInferRequest;
use tonic::Code;
use tonic_types::StatusExt;

/// So many models take long enough to load that callers come meanwhile.
const MODELS: usize = 400;

/// Whether a method without fields in its request answers with its first field
/// set to 1: `ready`, or SERVING.
async fn says_yes(address: SocketAddr, path: &str) -> Result<bool> {
    let channel = raw::connect(address).await?;
    let reply = raw::call(&channel, path, &[], raw::framed(&[], false)).await?;
    ensure!(reply.status.code() == Code::Ok, "{path}: {reply:?}");
    Ok(reply.bytes.ends_with(&[0x08, 0x01]))
}

/// A process and its probes.
struct Probed<'a> {
    what: &'a str,
    andon: &'a Andon,
    /// Whether it has an HTTP port.
    http: bool,
}

impl Probed<'_> {
    /// Readiness by every probe.
    async fn answers(&self) -> Result<Vec<bool>> {
        let andon = self.andon;
        let mut answers = vec![
            andon.get("/readyz").await?.starts_with("ready"),
            says_yes(andon.grpc, "/grpc.health.v1.Health/Check").await?,
            says_yes(andon.grpc, "/inference.GRPCInferenceService/ServerReady").await?,
        ];
        if self.http {
            let response = get(andon.http, "/v2/health/ready").await?;
            answers.push(response.status() == 200);
        }
        Ok(answers)
    }

    /// Waits until all probes say whether the process is ready; as long as it
    /// takes, no two of them may differ.
    async fn all_say(&self, expected: bool) -> Result<()> {
        let what = self.what;
        let begun = Instant::now();
        loop {
            // A process that starts or ends has no open ports.
            if let (Ok(before), Ok(after)) = (self.answers().await, self.answers().await)
                // Else it changed meanwhile.
                && before == after
            {
                let same = before.iter().all(|one| *one == before[0]);
                ensure!(same, "{what}: {before:?}");
                if before[0] == expected {
                    return Ok(());
                }
            }
            ensure!(
                begun.elapsed() < Duration::from_secs(60),
                "{what}: never {expected}\n{}",
                self.andon.logged()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

async fn get(address: SocketAddr, path: &str) -> Result<reqwest::Response> {
    let client = reqwest::Client::builder().no_proxy().build()?;
    let url = format!("http://{address}{path}");
    Ok(client.get(url).send().await?)
}

/// A repository of many copies of a small model: `m000` and so on.
fn repository(root: &Path) -> Result<()> {
    let from = models()?.join("digits/1");
    for number in 0..MODELS {
        let to = root.join(format!("m{number:03}/1"));
        std::fs::create_dir_all(&to)?;
        for entry in std::fs::read_dir(&from)? {
            let entry = entry?;
            std::fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

/// A request for the model that is loaded last.
fn for_last() -> ModelInferRequest {
    ModelInferRequest {
        model_name: format!("m{:03}", MODELS - 1),
        ..pixels(&[[1.0; 64]])
    }
}

/// Calls the model that is loaded last until it is said to load. Until then it may
/// not be known yet which worker has it, and a retry must be worth it all the same.
async fn is_loading(andon: &Andon) -> Result<()> {
    let client = client(andon.grpc).await?;
    loop {
        let called = infer(&client, for_last(), Duration::from_secs(5)).await;
        let status = called.err().context("it is loaded already")?;
        ensure!(status.code() == Code::Unavailable, "{status:?}");
        ensure!(status.get_details_retry_info().is_some(), "{status:?}");
        if status.message().contains("LOADING") {
            return Ok(());
        }
    }
}

/// Every probe of every role in every state.
#[tokio::test]
async fn every_probe_says_the_same_in_every_state() -> Result<()> {
    let nowhere = ["--worker".to_owned(), free_port()?.to_string()];
    let providers = scratch("providers.toml")?;
    let model = "[models.small]\nmodel = \"theirs\"\nbase_url = \"http://127.0.0.1:1/v1\"\n\
        kind = \"openai\"\ntask = \"embedding\"\n";
    std::fs::write(&providers, model)?;
    let provided = ["--providers".to_owned(), providers.display().to_string()];
    let digits = format!("digits={}", models()?.join("digits/1").display());
    let mut fleet = Fleet::with(1, &["--model", &digits], &[]).await?;
    let worker = fleet.workers[0].take().context("a worker")?;
    let digits = ["--model".to_owned(), digits];
    let states = [
        ("no worker", Andon::start("gateway", &nowhere, None)?, false),
        ("providers", Andon::start("gateway", &provided, None)?, true),
        ("serve", Andon::start("serve", &digits, None)?, true),
        ("worker", worker, true),
    ];
    let probed = |what, andon| Probed {
        what,
        andon,
        http: what != "worker",
    };
    for (what, andon, expected) in &states {
        probed(*what, andon).all_say(*expected).await?;
    }
    let gateway = probed("a gateway", &fleet.gateway);
    gateway.all_say(true).await?;
    for (what, andon, _) in &states {
        andon.signal(libc::SIGTERM)?;
        probed(*what, andon).all_say(false).await?;
    }
    // Its worker has left.
    gateway.all_say(false).await?;
    std::fs::remove_file(&providers)?;
    Ok(())
}

#[tokio::test]
async fn callers_of_a_model_that_loads_are_told_to_come_back() -> Result<()> {
    let root = scratch("repository")?;
    repository(&root)?;
    let flags = ["--repository".to_owned(), root.display().to_string()];
    for role in ["worker", "serve"] {
        let andon = Andon::start(role, &flags, None)?;
        let probed = Probed {
            what: role,
            andon: &andon,
            http: role == "serve",
        };
        probed.all_say(false).await?;
        is_loading(&andon).await?;
        if probed.http {
            let path = format!("/v2/models/{}", for_last().model_name);
            let response = get(andon.http, &path).await?;
            ensure!(response.status() == 503, "{response:?}");
            ensure!(response.headers().contains_key("retry-after"));
            let text = response.text().await?;
            ensure!(text.contains("LOADING"), "{text}");
        }
        probed.all_say(true).await?;
        let client = client(andon.grpc).await?;
        infer(&client, for_last(), Duration::from_secs(5)).await?;
    }
    std::fs::remove_dir_all(&root)?;
    Ok(())
}
