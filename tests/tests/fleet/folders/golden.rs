//! Folders that the reference libraries saved (`tests/golden/folders`): every door has the numbers
//! of the library.

use anyhow::{Context, Result, ensure};
use fleet_tests::{calls, root};
use protocol::inference::infer_parameter::ParameterChoice;
use protocol::inference::{InferParameter, ModelInferRequest};
use protocol::tei::v1 as tei;
use serde_json::{Value, json};

use super::{Folders, Served, TIMEOUT, floats, near, of_model};

/// All folders, served.
struct Golden {
    served: Served,
    rows: Vec<Row>,
    /// Removed when the test ends.
    _folders: Folders,
}

/// A text or a pair, and what the library makes of it.
struct Row {
    folder: String,
    text: Vec<String>,
    /// The name of the prompt; none for the default.
    prompt: Option<String>,
    /// An embedding or logits.
    output: Vec<f32>,
    /// What the library makes of logits by default.
    scores: Option<Vec<f32>>,
}

impl Golden {
    /// Serves the folders whose rows have so many texts.
    async fn serve(texts: usize) -> Result<Self> {
        let folders = Folders::new()?;
        let mut rows = Vec::new();
        for entry in std::fs::read_dir(root().join("tests/golden/folders"))? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let name = name.context("a folder without a name")?;
            let expected: Value =
                serde_json::from_slice(&std::fs::read(path.join("expected.json"))?)?;
            let expected = expected.as_array().context("expected.json is no list")?;
            let found = expected.iter().map(|row| Row::read(name, row));
            let found = found.collect::<Result<Vec<Row>>>()?;
            if found.iter().all(|row| row.text.len() == texts) {
                folders.add(name, &format!("folders/{name}"), "")?;
                rows.extend(found);
            }
        }
        ensure!(!rows.is_empty(), "no folder has rows of {texts} texts");
        let served = folders.serve().await?;
        Ok(Self {
            served,
            rows,
            _folders: folders,
        })
    }
}

impl Row {
    fn read(folder: &str, row: &Value) -> Result<Self> {
        let scores = row.get("scores").map(|_| floats(row, "/scores"));
        Ok(Self {
            folder: folder.to_owned(),
            text: serde_json::from_value(row["text"].clone())?,
            prompt: row["prompt"].as_str().map(str::to_owned),
            output: floats(row, "/output")?,
            scores: scores.transpose()?,
        })
    }

    /// The embedding with length 1, which every door has.
    fn normalized(&self) -> Vec<f32> {
        let squares = self.output.iter().map(|value| value * value);
        let length = squares.sum::<f32>().sqrt();
        self.output.iter().map(|value| value / length).collect()
    }

    fn check(&self, door: &str, actual: &[f32], expected: &[f32]) -> Result<()> {
        let (folder, text) = (&self.folder, &self.text);
        ensure!(
            near(actual, expected),
            "{folder}, {door}, {text:?}: {actual:?}, not {expected:?}"
        );
        Ok(())
    }

    async fn infer(&self, served: &Served) -> Result<Vec<f32>> {
        let mut request = ModelInferRequest {
            model_name: self.folder.clone(),
            ..calls::texts(&[&self.text[0]])
        };
        let mut choices = vec![
            ("truncate", ParameterChoice::BoolParam(true)),
            ("normalize", ParameterChoice::BoolParam(true)),
        ];
        if let Some(name) = &self.prompt {
            choices.push(("prompt_name", ParameterChoice::StringParam(name.clone())));
        }
        for (name, choice) in choices {
            let parameter_choice = Some(choice);
            let parameter = InferParameter { parameter_choice };
            request.parameters.insert(name.to_owned(), parameter);
        }
        let response = calls::infer(&served.grpc, request, TIMEOUT).await?;
        Ok(calls::rows(&response, 0).swap_remove(0))
    }

    /// The output of REST v2 for inputs of these names.
    async fn rest(
        &self,
        served: &Served,
        names: &[&str],
        mut parameters: Value,
    ) -> Result<Vec<f32>> {
        let inputs = names.iter().zip(&self.text).map(
            |(name, text)| json!({"name": name, "datatype": "BYTES", "shape": [1], "data": [text]}),
        );
        let inputs: Vec<Value> = inputs.collect();
        if let Some(name) = &self.prompt {
            parameters["prompt_name"] = json!(name);
        }
        let path = format!("/v2/models/{}/infer", self.folder);
        let body = json!({"inputs": inputs, "parameters": parameters});
        floats(&served.post(&path, &body).await?, "/outputs/0/data")
    }

    async fn openai(&self, served: &Served) -> Result<Vec<f32>> {
        let mut body = json!({"model": self.folder, "input": self.text[0], "truncate": true});
        if let Some(name) = &self.prompt {
            body["prompt_name"] = json!(name);
        }
        let response = served.post("/v1/embeddings", &body).await?;
        floats(&response, "/data/0/embedding")
    }

    async fn embed(&self, served: &Served) -> Result<Vec<f32>> {
        let request = tei::EmbedRequest {
            inputs: self.text[0].clone(),
            truncate: true,
            normalize: true,
            // Its requests always name a side.
            truncation_direction: i32::from(self.folder == "truncation-left"),
            prompt_name: self.prompt.clone(),
            ..Default::default()
        };
        let mut client = tei::embed_client::EmbedClient::new(served.channel.clone());
        let response = client.embed(of_model(&self.folder, request)).await?;
        Ok(response.into_inner().embeddings)
    }

    /// The scores of a pair, in the order of the labels, which is that of their names.
    async fn predict(&self, served: &Served, raw_scores: bool) -> Result<Vec<f32>> {
        let request = tei::PredictPairRequest {
            inputs: self.text.clone(),
            raw_scores,
            ..Default::default()
        };
        let mut client = tei::predict_client::PredictClient::new(served.channel.clone());
        let response = client.predict_pair(of_model(&self.folder, request)).await?;
        let mut predictions = response.into_inner().predictions;
        predictions.sort_by(|one, other| one.label.cmp(&other.label));
        Ok(predictions.iter().map(|one| one.score).collect())
    }

    async fn rerank(&self, served: &Served, raw_scores: bool) -> Result<Vec<f32>> {
        let request = tei::RerankRequest {
            query: self.text[0].clone(),
            texts: vec![self.text[1].clone()],
            raw_scores,
            ..Default::default()
        };
        let mut client = tei::rerank_client::RerankClient::new(served.channel.clone());
        let response = client.rerank(of_model(&self.folder, request)).await?;
        let ranks = response.into_inner().ranks;
        Ok(ranks.iter().map(|rank| rank.score).collect())
    }

    /// The relevance of the second text, in a list.
    async fn relevance(&self, served: &Served) -> Result<Vec<f32>> {
        let body =
            json!({"model": self.folder, "query": self.text[0], "documents": [self.text[1]]});
        let response = served.post("/v1/rerank", &body).await?;
        let score = response.pointer("/results/0/relevance_score");
        let score = score.with_context(|| response.to_string())?;
        Ok(serde_json::from_value(json!([score]))?)
    }
}

#[tokio::test]
async fn embeddings_are_those_of_the_library_at_every_door() -> Result<()> {
    let golden = Golden::serve(1).await?;
    let served = &golden.served;
    for row in &golden.rows {
        let parameters = json!({"truncate": true, "normalize": true});
        for (door, vector) in [
            ("ModelInfer", row.infer(served).await?),
            ("REST", row.rest(served, &["text"], parameters).await?),
            ("/v1/embeddings", row.openai(served).await?),
            ("Embed", row.embed(served).await?),
        ] {
            row.check(door, &vector, &row.normalized())?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn scores_of_pairs_are_those_of_the_library_at_every_door() -> Result<()> {
    let golden = Golden::serve(2).await?;
    let served = &golden.served;
    for row in &golden.rows {
        if row.folder == "cross-encoder" {
            let scores = row.scores.as_ref().context("no scores")?;
            let rest = row.rest(served, &["query", "text"], json!({})).await?;
            row.check("REST", &rest, scores)?;
            row.check("/v1/rerank", &row.relevance(served).await?, scores)?;
            row.check("Rerank", &row.rerank(served, false).await?, scores)?;
            let raw = row.rerank(served, true).await?;
            row.check("Rerank, raw", &raw, &row.output)?;
        } else {
            let raw = row.predict(served, true).await?;
            row.check("PredictPair, raw", &raw, &row.output)?;
            if let Some(scores) = &row.scores {
                row.check("PredictPair", &row.predict(served, false).await?, scores)?;
            }
        }
    }
    Ok(())
}
