//! Cached rows are not computed again, over HTTP too.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::pixels;
use fleet_tests::process::scratch;
use fleet_tests::{Fleet, models, root, until};
use serde_json::json;

use super::{Protocol, Response, fetch, outputs, send, web};

/// A repository of models that are declared deterministic.
struct Repository(PathBuf);

impl Drop for Repository {
    fn drop(&mut self) {
        // A folder that stays harms nobody.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Repository {
    fn of(models: &[(&str, &Path)]) -> Result<Self> {
        let repository = Self(scratch("cached")?);
        for (name, from) in models {
            let folder = repository.0.join(name);
            let to = folder.join("1");
            std::fs::create_dir_all(&to)?;
            for entry in std::fs::read_dir(from)? {
                let entry = entry?;
                std::fs::copy(entry.path(), to.join(entry.file_name()))?;
            }
            std::fs::write(folder.join("andon.toml"), "deterministic = true\n")?;
        }
        Ok(repository)
    }

    async fn fleet(&self) -> Result<Fleet> {
        Fleet::with(1, &["--repository", &self.0.display().to_string()], &[]).await
    }
}

/// What a response reports of the cache.
fn source(response: &Response) -> &str {
    let source = response.headers.get("x-andon-cache");
    let source = source.and_then(|source| source.to_str().ok());
    source.unwrap_or_default()
}

#[tokio::test]
async fn cached_tensors_are_not_computed() -> Result<()> {
    let repository = Repository::of(&[("digits", &models()?.join("digits/1"))])?;
    let fleet = repository.fleet().await?;
    let (one, other) = ([1.0; 64], [2.0; 64]);
    let none: &[(&str, &str)] = &[];
    let fresh: &[(&str, &str)] = &[("cache-control", "no-cache")];
    let mut first = None;
    for (rows, headers, expected) in [
        (&[one][..], none, "miss"),
        (&[one], none, "hit"),
        (&[one], fresh, "miss"),
        (&[one, other], none, "1/2"),
        (&[one, other], none, "hit"),
    ] {
        for (protocol, text, expected) in [
            (Protocol::Http1, false, expected),
            (Protocol::Http2, true, "hit"),
        ] {
            // The first has cached what the second requests.
            let headers = if text { none } else { headers };
            let response = send(fleet.gateway.http, protocol, &pixels(rows), text, headers).await?;
            ensure!(
                response.status == 200 && source(&response) == expected,
                "{expected}: {response:?}"
            );
            ensure!(
                response.headers.contains_key("x-andon-digest"),
                "{response:?}"
            );
            let scores = outputs(&response)?[0][..40].to_vec();
            let first_scores = first.get_or_insert_with(|| scores.clone());
            ensure!(*first_scores == scores, "another response");
        }
    }
    Ok(())
}

#[tokio::test]
async fn classify_reports_how_many_texts_were_cached() -> Result<()> {
    let golden = root().join("tests/golden/bert-classification");
    ensure!(golden.exists(), "it is missing: run `make test`");
    let repository = Repository::of(&[("classifier", &golden)])?;
    let fleet = repository.fleet().await?;
    let url = format!("http://{}/v1/classify", fleet.gateway.http);
    for (input, expected) in [
        (json!("a lantern"), "miss"),
        (json!(["a lantern", "a candle"]), "1/2"),
        (json!(["a candle", "a lantern"]), "hit"),
        (json!(["a tide", "a bell"]), "miss"),
    ] {
        let request = web(Protocol::Http1)?
            .post(&url)
            .json(&json!({"input": input}));
        let response = fetch(request).await?;
        ensure!(
            response.status == 200 && source(&response) == expected,
            "{expected}: {response:?}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_reloaded_classifier_has_its_new_labels() -> Result<()> {
    let golden = root().join("tests/golden/bert-classification");
    ensure!(golden.exists(), "it is missing: run `make test`");
    let repository = Repository::of(&[("classifier", &golden)])?;
    let fleet = repository.fleet().await?;
    let post = async |path: &str, body: serde_json::Value| -> Result<Response> {
        let url = format!("http://{}{path}", fleet.gateway.http);
        let response = fetch(web(Protocol::Http1)?.post(url).json(&body)).await?;
        ensure!(response.status == 200, "{response:?}");
        Ok(response)
    };
    let label = async || -> Result<String> {
        let response = post("/v1/classify", json!({"input": "a lantern"})).await?;
        let label = response.json()?["data"][0]["label"].clone();
        Ok(label.as_str().unwrap_or_default().to_owned())
    };
    let before = label().await?;
    ensure!(!before.starts_with("renamed "), "{before}");
    // Only the labels change: the version stays ready under the same number.
    let path = repository.0.join("classifier/1/config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    let labels = config["id2label"].as_object_mut().context("labels")?;
    for label in labels.values_mut() {
        *label = json!(format!("renamed {}", label.as_str().unwrap_or_default()));
    }
    std::fs::write(&path, config.to_string())?;
    post("/v2/repository/models/classifier/load", json!({})).await?;
    let expected = format!("renamed {before}");
    until(Duration::from_secs(10), "the labels are new", || async {
        Ok(label().await? == expected)
    })
    .await
}

#[tokio::test]
async fn many_texts_are_classified_in_few_calls() -> Result<()> {
    let golden = root().join("tests/golden/bert-classification");
    ensure!(golden.exists(), "it is missing: run `make test`");
    let repository = Repository::of(&[("classifier", &golden)])?;
    let fleet = repository.fleet().await?;
    let worker = fleet.workers[0].as_ref().context("a worker")?;
    let calls = async || {
        let of_infer =
            r#"andon_worker_requests_total{model="classifier",version="1",method="ModelInfer""#;
        worker.metric_sum(of_infer).await
    };
    let texts: Vec<String> = (0..300).map(|number| format!("lantern {number}")).collect();
    let before = calls().await?;
    let url = format!("http://{}/v1/classify", fleet.gateway.http);
    let request = web(Protocol::Http1)?.post(&url);
    let response = fetch(request.json(&json!({"input": texts}))).await?;
    ensure!(response.status == 200, "{response:?}");
    let data = response.json()?["data"].as_array().map(Vec::len);
    ensure!(data == Some(300), "{data:?}");
    // Two calls of at most 256 rows.
    let made = calls().await? - before;
    ensure!(made == 2.0, "{made} calls");
    Ok(())
}
