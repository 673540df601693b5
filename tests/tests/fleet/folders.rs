//! Model folders whose files change the numbers: every door has the numbers of the
//! files, and a folder that is refused is refused with what to do.

mod golden;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fleet_tests::process::{Andon, scratch};
use fleet_tests::{calls, link_folder, program, root};
use protocol::inference::ModelInferRequest;
use protocol::tei::v1 as tei;
use serde_json::{Value, json};
use tonic::Request;
use tonic::transport::Channel;

const TIMEOUT: Duration = Duration::from_secs(60);
const TEXT: &str = "A paper lantern hangs over the door.";

/// A model repository of changed copies of tiny checkpoints.
struct Folders(PathBuf);

impl Drop for Folders {
    fn drop(&mut self) {
        // A folder that stays harms nobody.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Folders {
    fn new() -> Result<Self> {
        Ok(Self(scratch("folders")?))
    }

    /// Copies a checkpoint, with these settings in 32 bits, and returns its folder.
    fn add(&self, name: &str, golden: &str, settings: &str) -> Result<PathBuf> {
        let folder = self.0.join(name);
        let version = folder.join("1");
        link_folder(&root().join("tests/golden").join(golden), &version)?;
        let settings = format!("dtype = \"f32\"\n{settings}");
        std::fs::write(folder.join("andon.toml"), settings)?;
        Ok(version)
    }

    async fn serve(&self) -> Result<Served> {
        let flags = ["--repository".to_owned(), self.0.display().to_string()];
        let andon = Andon::start("serve", &flags, None)?;
        andon.ready().await?;
        let channel = Channel::from_shared(format!("http://{}", andon.grpc))?;
        Ok(Served {
            grpc: calls::client(andon.grpc).await?,
            channel: channel.connect().await?,
            web: reqwest::Client::builder().timeout(TIMEOUT).build()?,
            andon,
        })
    }
}

/// Writes a file in place of a link.
fn write(path: &Path, value: &Value) -> Result<()> {
    if path.exists() {
        std::fs::remove_file(path)?;
    }
    Ok(std::fs::write(path, value.to_string())?)
}

/// Sets a key of a JSON file.
fn set(path: &Path, key: &str, value: Value) -> Result<()> {
    let mut file: Value = serde_json::from_slice(&std::fs::read(path)?)?;
    file[key] = value;
    write(path, &file)
}

struct Served {
    andon: Andon,
    grpc: calls::Client,
    channel: Channel,
    web: reqwest::Client,
}

impl Served {
    async fn infer(&self, model: &str, text: &str) -> Result<Vec<f32>> {
        let request = ModelInferRequest {
            model_name: model.to_owned(),
            ..calls::texts(&[text])
        };
        let response = calls::infer(&self.grpc, request, TIMEOUT).await?;
        Ok(calls::rows(&response, 0).swap_remove(0))
    }

    async fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let address = format!("http://{}{path}", self.andon.http);
        let response = self.web.post(address).json(body).send().await?;
        let (status, body): (_, Value) = (response.status(), response.json().await?);
        if !status.is_success() {
            bail!("{path}: {status} {body}");
        }
        Ok(body)
    }
}

fn of_model<T>(model: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    if let Ok(model) = model.parse() {
        request.metadata_mut().insert("andon-model", model);
    }
    request
}

fn floats(value: &Value, place: &str) -> Result<Vec<f32>> {
    let values = value.pointer(place).with_context(|| value.to_string())?;
    Ok(serde_json::from_value(values.clone())?)
}

fn near(actual: &[f32], expected: &[f32]) -> bool {
    let mut pairs = actual.iter().zip(expected);
    actual.len() == expected.len() && pairs.all(|(a, b)| (a - b).abs() < 1e-4)
}

#[tokio::test]
async fn a_regression_has_its_values_at_every_door() -> Result<()> {
    let folders = Folders::new()?;
    let version = folders.add("values", "bert-classification", "")?;
    set(
        &version.join("config.json"),
        "problem_type",
        json!("regression"),
    )?;
    let served = folders.serve().await?;
    let expected = logits()?;
    for (door, values) in scores(&served, false).await? {
        ensure!(
            near(&values, &expected),
            "{door}: {values:?}, not {expected:?}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn the_class_of_a_cross_encoder_makes_the_scores_of_its_library_alone() -> Result<()> {
    let folders = Folders::new()?;
    let version = folders.add("values", "bert-classification", "")?;
    let class = json!({"activation_fn": "torch.nn.modules.linear.Identity"});
    set(&version.join("config.json"), "sentence_transformers", class)?;
    let served = folders.serve().await?;
    let logits = logits()?;
    let sum: f32 = logits.iter().map(|logit| logit.exp()).sum();
    let probabilities: Vec<f32> = logits.iter().map(|logit| logit.exp() / sum).collect();
    ensure!(!near(&logits, &probabilities), "{logits:?}");
    for raw in [false, true] {
        for (door, values) in scores(&served, raw).await? {
            let is_library = matches!(door, "ModelInfer" | "REST");
            let expected = if raw || is_library {
                &logits
            } else {
                &probabilities
            };
            ensure!(
                near(&values, expected),
                "{door}, {raw}: {values:?}, not {expected:?}"
            );
        }
    }
    Ok(())
}

/// The logits of the text by the reference implementation.
fn logits() -> Result<Vec<f32>> {
    let golden = std::fs::read(root().join("tests/golden/bert-classification/expected.json"))?;
    let golden: Value = serde_json::from_slice(&golden)?;
    ensure!(
        golden.pointer("/0/text/0") == Some(&json!(TEXT)),
        "{golden}"
    );
    floats(&golden, "/0/logits")
}

/// What each door gives for the text by the model `values`, in the order of the
/// labels. Raw scores are asked for where a door has them.
async fn scores(served: &Served, raw_scores: bool) -> Result<[(&'static str, Vec<f32>); 4]> {
    let input = json!({"name": "text", "datatype": "BYTES", "shape": [1], "data": [TEXT]});
    let rest = json!({"inputs": [input]});
    let rest = served.post("/v2/models/values/infer", &rest).await?;
    let classify = json!({"model": "values", "input": TEXT, "raw_scores": raw_scores});
    let classify = served.post("/v1/classify", &classify).await?;
    let mut client = tei::predict_client::PredictClient::new(served.channel.clone());
    let request = tei::PredictRequest {
        inputs: TEXT.to_owned(),
        raw_scores,
        ..Default::default()
    };
    let predicted = client.predict(of_model("values", request)).await?;
    let mut predicted = predicted.into_inner().predictions;
    predicted.sort_by(|one, other| one.label.cmp(&other.label));
    Ok([
        ("ModelInfer", served.infer("values", TEXT).await?),
        ("REST", floats(&rest, "/outputs/0/data")?),
        ("/v1/classify", floats(&classify, "/data/0/probs")?),
        ("Predict", predicted.iter().map(|one| one.score).collect()),
    ])
}

#[tokio::test]
async fn a_cross_encoder_of_any_version_ranks_at_every_door() -> Result<()> {
    let folders = Folders::new()?;
    folders.add("old", "bert-rerank", "")?;
    let version = folders.add("new", "bert-rerank", "")?;
    let transformer = "sentence_transformers.base.modules.transformer.Transformer";
    let modules = json!([{"idx": 0, "name": "0", "path": "", "type": transformer}]);
    write(&version.join("modules.json"), &modules)?;
    let config = json!({"model_type": "CrossEncoder", "prompts": {}, "default_prompt_name": null});
    write(&version.join("config_sentence_transformers.json"), &config)?;
    let served = folders.serve().await?;
    let texts = ["when the lamp turned red", "nobody blamed the worker"];
    let mut all = Vec::new();
    for model in ["old", "new"] {
        let request = tei::RerankRequest {
            query: "the line stopped".to_owned(),
            texts: texts.map(str::to_owned).to_vec(),
            ..Default::default()
        };
        let mut client = tei::rerank_client::RerankClient::new(served.channel.clone());
        let ranked = client.rerank(of_model(model, request)).await?.into_inner();
        let body = json!({"model": model, "query": "the line stopped", "documents": texts});
        let body = served.post("/v1/rerank", &body).await?;
        for (index, rank) in ranked.ranks.iter().enumerate() {
            let place = format!("/results/{index}/relevance_score");
            let score = body.pointer(&place).and_then(Value::as_f64);
            let score = score.with_context(|| body.to_string())? as f32;
            ensure!((score - rank.score).abs() < 1e-6, "{body}, {ranked:?}");
        }
        let ranks = ranked.ranks.iter().map(|rank| (rank.index, rank.score));
        all.push(ranks.collect::<Vec<_>>());
    }
    ensure!(all[0].len() == texts.len() && all[0] == all[1], "{all:?}");
    Ok(())
}

#[tokio::test]
async fn a_person_says_how_a_model_is_served() -> Result<()> {
    let folders = Folders::new()?;
    folders.add("plain", "bert-embedding", "normalize = false\n")?;
    let settings =
        "normalize = false\npooling = \"cls\"\nprompt = \"the line: \"\ntruncate = true\n";
    folders.add("own", "bert-embedding", settings)?;
    folders.add(
        "first",
        "bert-embedding",
        "normalize = false\npooling = \"cls\"\n",
    )?;
    let served = folders.serve().await?;
    let prompted = format!("the line: {TEXT}");
    let own = served.infer("own", TEXT).await?;
    let first = served.infer("first", &prompted).await?;
    ensure!(near(&own, &first), "{own:?}, not {first:?}");
    let plain = served.infer("plain", &prompted).await?;
    ensure!(!near(&own, &plain), "pooling changes nothing");
    // OpenAI's embeddings have length 1, unless a request says otherwise.
    let body = json!({"model": "plain", "input": prompted, "normalize": false});
    let vector = floats(
        &served.post("/v1/embeddings", &body).await?,
        "/data/0/embedding",
    )?;
    ensure!(near(&vector, &plain), "{vector:?}, not {plain:?}");
    let body = json!({"model": "plain", "input": prompted});
    let vector = floats(
        &served.post("/v1/embeddings", &body).await?,
        "/data/0/embedding",
    )?;
    let length = vector.iter().map(|value| value * value).sum::<f32>().sqrt();
    ensure!(
        (length - 1.0).abs() < 1e-4,
        "the vector has length {length}"
    );
    let length = plain.iter().map(|value| value * value).sum::<f32>().sqrt();
    ensure!(
        (length - 1.0).abs() > 1e-3,
        "the vector has length {length}"
    );
    // A text that is too long is truncated where the settings say so.
    let long = "Workers scale on their own. ".repeat(40);
    ensure!(served.infer("own", &long).await.is_ok(), "a long text");
    let refused = served.infer("plain", &long).await;
    let error = refused.err().context("a long text is not refused")?;
    ensure!(error.to_string().contains("tokens"), "{error}");
    Ok(())
}

#[test]
fn a_folder_is_checked_without_being_served() -> Result<()> {
    let folders = Folders::new()?;
    let version = folders.add("lantern", "bert-dense", "pooling = \"cls\"\n")?;
    let check = |folder: &Path, format: &str| -> Result<(Option<i32>, String, String)> {
        let output = Command::new(program("andon")?)
            .args(["models", "check", "--output", format])
            .arg(folder)
            .output()?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        ))
    };
    let (code, shown, error) = check(&version, "json")?;
    ensure!(code == Some(0), "{code:?} {error}");
    let shown: Value = serde_json::from_str(&shown)?;
    ensure!(
        shown["served"] == json!(true) && shown["task"] == json!("embedding"),
        "{shown}"
    );
    let settings = shown["settings"].as_array().context("settings")?;
    let pooling = json!({"name": "pooling", "value": "cls", "source": "andon.toml"});
    ensure!(settings.contains(&pooling), "{shown}");
    set(
        &version.join("config.json"),
        "auto_map",
        json!({"AutoModel": "own.Model"}),
    )?;
    let (code, shown, error) = check(&version, "table")?;
    ensure!(
        code == Some(1) && error.contains("refused"),
        "{code:?} {error}"
    );
    ensure!(
        shown.contains("auto_map") && shown.contains("never run"),
        "{shown}"
    );
    let (code, _, error) = check(&folders.0.join("nowhere"), "table")?;
    ensure!(
        code == Some(1) && error.contains("cannot be opened"),
        "{code:?} {error}"
    );
    Ok(())
}
