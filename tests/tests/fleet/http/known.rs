//! What is known is not computed again, over HTTP too.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use fleet_tests::calls::pixels;
use fleet_tests::process::scratch;
use fleet_tests::{Fleet, models, root};
use serde_json::json;

use super::{Spoken, Told, outputs, send, told, web};

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
        let repository = Self(scratch("known")?);
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

/// What an answer says of where it came from.
fn source(told: &Told) -> &str {
    let source = told.headers.get("x-andon-cache");
    let source = source.and_then(|source| source.to_str().ok());
    source.unwrap_or_default()
}

#[tokio::test]
async fn tensors_that_are_known_are_not_computed() -> Result<()> {
    let repository = Repository::of(&[("digits", &models()?.join("digits/1"))])?;
    let fleet = repository.fleet().await?;
    let (one, other) = ([1.0; 64], [2.0; 64]);
    let none: &[(&str, &str)] = &[];
    let fresh: &[(&str, &str)] = &[("cache-control", "no-cache")];
    let mut first = None;
    for (rows, headers, wanted) in [
        (&[one][..], none, "miss"),
        (&[one], none, "hit"),
        (&[one], fresh, "miss"),
        (&[one, other], none, "1/2"),
        (&[one, other], none, "hit"),
    ] {
        for (spoken, text, wanted) in [(Spoken::One, false, wanted), (Spoken::Two, true, "hit")] {
            // The second asks for what the first has made known.
            let headers = if text { none } else { headers };
            let told = send(fleet.gateway.http, spoken, &pixels(rows), text, headers).await?;
            ensure!(
                told.status == 200 && source(&told) == wanted,
                "{wanted}: {told:?}"
            );
            ensure!(told.headers.contains_key("x-andon-digest"), "{told:?}");
            let scores = outputs(&told)?[0][..40].to_vec();
            let known = first.get_or_insert_with(|| scores.clone());
            ensure!(*known == scores, "another answer");
        }
    }
    Ok(())
}

#[tokio::test]
async fn labels_say_how_many_texts_were_known() -> Result<()> {
    let golden = root().join("target/golden/bert-classification");
    ensure!(golden.exists(), "it is missing: run `make test`");
    let repository = Repository::of(&[("classifier", &golden)])?;
    let fleet = repository.fleet().await?;
    let url = format!("http://{}/v1/classify", fleet.gateway.http);
    for (input, wanted) in [
        (json!("a lantern"), "miss"),
        (json!(["a lantern", "a candle"]), "1/2"),
        (json!(["a candle", "a lantern"]), "hit"),
        (json!(["a tide", "a bell"]), "miss"),
    ] {
        let asked = web(Spoken::One)?.post(&url).json(&json!({"input": input}));
        let told = told(asked).await?;
        ensure!(
            told.status == 200 && source(&told) == wanted,
            "{wanted}: {told:?}"
        );
    }
    Ok(())
}
