//! Cached rows are not computed again, and never passed off as another
//! version's or another tenant's.

mod shared;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::{client, pixels, texts};
use fleet_tests::process::{Andon, scratch};
use fleet_tests::{Fleet, link_folder, program, until};
use futures::future::try_join_all;
use protocol::inference::{
    ModelInferRequest, ModelInferResponse, ModelStatisticsRequest, RepositoryModelLoadRequest,
};
use protocol::tei::v1::EmbedRequest;
use protocol::tei::v1::embed_client::EmbedClient;
use tonic::metadata::MetadataMap;
use tonic::transport::Endpoint;

/// A repository of the demo models, declared deterministic.
struct Repository(PathBuf);

impl Drop for Repository {
    fn drop(&mut self) {
        // A folder that stays harms nobody.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Repository {
    fn of(models: &[&str]) -> Result<Self> {
        let repository = Self(scratch("deterministic")?);
        for model in models {
            let folder = repository.0.join(model);
            link_folder(
                &fleet_tests::models()?.join(model).join("1"),
                &folder.join("1"),
            )?;
            let settings = "deterministic = true\nversions = \"all\"\n";
            std::fs::write(folder.join("andon.toml"), settings)?;
        }
        Ok(repository)
    }

    fn flags(&self) -> [String; 2] {
        ["--repository".to_owned(), self.0.display().to_string()]
    }

    /// A fleet of one worker.
    async fn fleet(&self, gateway_flags: &[&str]) -> Result<Fleet> {
        let flags = self.flags();
        Fleet::with(1, &[&flags[0], &flags[1]], gateway_flags).await
    }
}

/// A response and where it came from.
struct Reply {
    response: ModelInferResponse,
    /// Empty without the entry.
    cache: String,
    tokens: u64,
}

async fn call(
    gateway: SocketAddr,
    request: &ModelInferRequest,
    metadata: &[(&'static str, &str)],
) -> Result<Reply> {
    let mut request = tonic::Request::new(request.clone());
    request.set_timeout(Duration::from_secs(20));
    for (name, value) in metadata {
        request.metadata_mut().insert(*name, value.parse()?);
    }
    let reply = client(gateway).await?.model_infer(request).await?;
    let entries = reply.metadata();
    Ok(Reply {
        cache: entry(entries, "x-andon-cache"),
        tokens: entry(entries, "x-compute-tokens")
            .parse()
            .unwrap_or_default(),
        response: reply.into_inner(),
    })
}

/// An entry of a response's metadata; empty when it is not there.
fn entry(metadata: &MetadataMap, name: &str) -> String {
    let value = metadata.get(name).and_then(|value| value.to_str().ok());
    value.unwrap_or_default().to_owned()
}

/// Rows that a worker has computed of a model.
async fn computed(fleet: &Fleet, model: &str) -> Result<u64> {
    let worker = fleet.workers[0].as_ref().context("a worker")?;
    let message = ModelStatisticsRequest {
        name: model.to_owned(),
        ..Default::default()
    };
    let reply = client(worker.grpc).await?.model_statistics(message).await?;
    let statistics = reply.into_inner().model_stats;
    Ok(statistics.iter().map(|one| one.inference_count).sum())
}

fn numbered(numbers: std::ops::Range<usize>) -> Vec<String> {
    numbers
        .map(|number| format!("text number {number}"))
        .collect()
}

fn image(value: u8) -> [f32; 64] {
    [f32::from(value % 17); 64]
}

#[tokio::test]
async fn of_32_texts_with_30_cached_two_are_computed() -> Result<()> {
    let repository = Repository::of(&["minilm"])?;
    let fleet = repository.fleet(&[]).await?;
    let gateway = fleet.gateway.grpc;
    let first = call(gateway, &texts(&numbered(0..30)), &[]).await?;
    ensure!(
        first.cache == "miss" && first.tokens > 60,
        "{}",
        first.cache
    );
    let before = computed(&fleet, "minilm").await?;

    let mut numbers = numbered(0..32);
    numbers.reverse();
    let mut request = texts(&numbers);
    request.id = "the second".to_owned();
    let second = call(gateway, &request, &[]).await?;
    ensure!(second.cache == "30/32", "{}", second.cache);
    ensure!((1..20).contains(&second.tokens), "{}", second.tokens);
    ensure!(computed(&fleet, "minilm").await? == before + 2);
    ensure!(second.response.id == "the second");
    ensure!(second.response.outputs[0].shape == [32, 384]);

    let (mut rows, known) = (
        fleet_tests::calls::rows(&second.response, 0),
        fleet_tests::calls::rows(&first.response, 0),
    );
    rows.reverse();
    ensure!(rows[..30] == known[..], "the cached rows are as they were");
    let worker = fleet.workers[0].as_ref().context("a worker")?;
    let direct = call(worker.grpc, &request, &[]).await?;
    let mut direct = fleet_tests::calls::rows(&direct.response, 0);
    direct.reverse();
    for (row, direct) in rows.iter().flatten().zip(direct.iter().flatten()) {
        ensure!((row - direct).abs() < 1e-5, "{row} {direct}");
    }

    let third = call(gateway, &request, &[]).await?;
    ensure!(third.cache == "hit" && third.tokens == 0, "{}", third.cache);
    ensure!(third.response == second.response);
    let rows = |outcome: &str| format!("andon_gateway_cache_rows_total{{outcome=\"{outcome}\"}}");
    ensure!(fleet.gateway.metric(&rows("computed")).await? == Some(32.0));
    ensure!(fleet.gateway.metric(&rows("hit_memory")).await? == Some(62.0));
    ensure!(fleet.gateway.metric("andon_gateway_cache_entries").await? == Some(32.0));
    Ok(())
}

#[tokio::test]
async fn a_text_call_is_a_hit_the_second_time() -> Result<()> {
    let repository = Repository::of(&["minilm"])?;
    let fleet = repository.fleet(&[]).await?;
    let gateway = Endpoint::from_shared(format!("http://{}", fleet.gateway.grpc))?;
    let mut client = EmbedClient::new(gateway.connect().await?);
    let message = EmbedRequest {
        inputs: "a text".to_owned(),
        normalize: true,
        ..Default::default()
    };
    let mut answers = Vec::new();
    for expected in ["miss", "hit"] {
        let reply = client.embed(message.clone()).await?;
        let entry = |name| entry(reply.metadata(), name);
        ensure!(entry("x-andon-cache") == expected);
        ensure!(entry("x-compute-type") == "cpu");
        ensure!((entry("x-compute-tokens") == "0") == (expected == "hit"));
        answers.push(reply.into_inner());
    }
    ensure!(answers[0].embeddings == answers[1].embeddings);
    let took = answers[1].metadata.context("metadata")?;
    ensure!(took.total_time_ns == 0 && took.compute_chars == 6);
    ensure!(computed(&fleet, "minilm").await? == 1);
    Ok(())
}

#[tokio::test]
async fn cache_control_bypasses_the_cache() -> Result<()> {
    let repository = Repository::of(&["digits"])?;
    let fleet = repository.fleet(&[]).await?;
    let gateway = fleet.gateway.grpc;
    let fresh = [("cache-control", "no-cache")];
    let unkept = [("cache-control", "no-store")];
    for (value, metadata, expected, rows) in [
        (1, &unkept[..], "miss", 1),
        (1, &[][..], "miss", 2),
        (1, &[], "hit", 2),
        (1, &fresh, "miss", 3),
        (1, &unkept, "miss", 4),
        (2, &fresh, "miss", 5),
        (2, &[], "hit", 5),
    ] {
        let reply = call(gateway, &pixels(&[image(value)]), metadata).await?;
        ensure!(
            reply.cache == expected,
            "{value} {metadata:?}: {}",
            reply.cache
        );
        ensure!(
            computed(&fleet, "digits").await? == rows,
            "{value} {metadata:?}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_thousand_identical_requests_are_one_computation() -> Result<()> {
    let repository = Repository::of(&["minilm"])?;
    let fleet = repository.fleet(&[]).await?;
    let client = client(fleet.gateway.grpc).await?;
    let request = texts(&["what everybody requests"]);
    let calls = (0..1000)
        .map(|_| fleet_tests::calls::infer(&client, request.clone(), Duration::from_secs(30)));
    let answers = try_join_all(calls).await?;
    ensure!(answers.iter().all(|answer| *answer == answers[0]));
    ensure!(computed(&fleet, "minilm").await? == 1);
    Ok(())
}

#[tokio::test]
async fn errors_name_elements_as_the_caller_sent_them() -> Result<()> {
    let repository = Repository::of(&["digits"])?;
    let fleet = repository.fleet(&[]).await?;
    let (gateway, worker) = (
        fleet.gateway.grpc,
        fleet.workers[0].as_ref().context("a worker")?.grpc,
    );
    call(gateway, &pixels(&[image(1), image(2)]), &[]).await?;
    // The third row is wrong, and the first two are cached.
    let request = pixels(&[image(1), image(2), [99.0; 64]]);
    let mut errors = Vec::new();
    for address in [gateway, worker] {
        let refused = client(address).await?.model_infer(request.clone()).await;
        let status = refused.err().context("it should be refused")?;
        errors.push((status.code(), status.message().to_owned()));
    }
    ensure!(errors[0] == errors[1], "{errors:?}");
    ensure!(errors[0].1.contains("contents[128]"), "{errors:?}");
    Ok(())
}

#[tokio::test]
async fn a_model_that_is_not_declared_deterministic_is_always_computed() -> Result<()> {
    let fleet = Fleet::start(1).await?;
    let before = computed(&fleet, "digits").await?;
    for _ in 0..2 {
        let reply = call(fleet.gateway.grpc, &pixels(&[image(1)]), &[]).await?;
        ensure!(reply.cache.is_empty());
    }
    ensure!(computed(&fleet, "digits").await? == before + 2);
    Ok(())
}

#[tokio::test]
async fn a_new_version_never_gets_an_old_ones_answers() -> Result<()> {
    let repository = Repository::of(&["digits"])?;
    let fleet = repository.fleet(&[]).await?;
    let gateway = fleet.gateway.grpc;
    let request = pixels(&[image(1), image(2)]);
    let old = call(gateway, &request, &[]).await?.response;
    ensure!(call(gateway, &request, &[]).await?.cache == "hit");

    // Another bias of the first label: the file ends with ten of them and
    // with their weights, 10 by 32.
    let folder = repository.0.join("digits/2");
    link_folder(&repository.0.join("digits/1"), &folder)?;
    let weights = folder.join("model.safetensors");
    let mut bytes = std::fs::read(&weights)?;
    let offset = bytes.len() - 4 * (10 + 10 * 32);
    bytes[offset..offset + 4].copy_from_slice(&9.5_f32.to_le_bytes());
    std::fs::remove_file(&weights)?;
    std::fs::write(&weights, bytes)?;
    let load = RepositoryModelLoadRequest {
        model_name: "digits".to_owned(),
        ..Default::default()
    };
    client(gateway).await?.repository_model_load(load).await?;
    until(
        Duration::from_secs(20),
        "the new version responds",
        || async {
            let reply = call(gateway, &request, &[]).await?;
            // Meanwhile each response is wholly of one version.
            let one = reply.response.model_version == "1";
            assert_eq!(one, reply.response == old);
            Ok(!one)
        },
    )
    .await?;
    let mut direct = request.clone();
    direct.model_version = "2".to_owned();
    let worker = fleet.workers[0].as_ref().context("a worker")?;
    let direct = call(worker.grpc, &direct, &[]).await?.response;
    let new = call(gateway, &request, &[]).await?;
    ensure!(new.cache == "hit" && new.response == direct);
    // The old version can still be requested by its number.
    let mut pinned = request;
    pinned.model_version = "1".to_owned();
    let pinned = call(gateway, &pinned, &[]).await?;
    ensure!(pinned.cache == "hit" && pinned.response == old);
    Ok(())
}

#[tokio::test]
async fn tenants_share_only_on_purpose() -> Result<()> {
    let repository = Repository::of(&["digits"])?;
    let policy = repository.0.join("policy.toml");
    let keys = repository.0.join("keys.toml");
    std::fs::write(&keys, "")?;
    std::fs::write(
        &policy,
        r#"
        [tenants.alone]
        models = ["*"]
        [tenants.one]
        models = ["*"]
        cache_scope = "together"
        [tenants.other]
        models = ["*"]
        cache_scope = "together"
        "#,
    )?;
    let key = |tenant: &str| -> Result<String> {
        let made = Command::new(program("andon")?)
            .args(["keys", "create", "--tenant", tenant, "--keys"])
            .arg(&keys)
            .output()?;
        ensure!(made.status.success(), "{made:?}");
        Ok(String::from_utf8(made.stdout)?.trim().to_owned())
    };
    let (alone, one, other) = (key("alone")?, key("one")?, key("other")?);
    let (policy, keys) = (policy.display().to_string(), keys.display().to_string());
    let fleet = repository
        .fleet(&["--policy", &policy, "--keys", &keys])
        .await?;
    for (key, expected) in [
        (&one, "miss"),
        (&alone, "miss"),
        (&other, "hit"),
        (&alone, "hit"),
    ] {
        let metadata = [("x-api-key", key.as_str())];
        let reply = call(fleet.gateway.grpc, &pixels(&[image(1)]), &metadata).await?;
        ensure!(reply.cache == expected, "{expected}: {}", reply.cache);
    }
    ensure!(computed(&fleet, "digits").await? == 2);
    Ok(())
}

/// A second gateway over the workers of a fleet.
async fn beside(fleet: &Fleet, flags: &[&str]) -> Result<Andon> {
    let worker = fleet.workers[0].as_ref().context("a worker")?;
    let mut all = vec!["--worker".to_owned(), worker.grpc.to_string()];
    all.extend(flags.iter().map(ToString::to_string));
    let gateway = Andon::start("gateway", &all, None)?;
    gateway.ready().await?;
    Ok(gateway)
}
