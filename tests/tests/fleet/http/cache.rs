//! Cached rows are not computed again, over HTTP too.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use fleet_tests::calls::pixels;
use fleet_tests::process::scratch;
use fleet_tests::{Fleet, models, root};
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
    let golden = root().join("target/golden/bert-classification");
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
