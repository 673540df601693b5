//! OpenAI's surface, rerank, classify and the document, as clients meet them.

mod ids;

use std::time::Duration;

use anyhow::{Context, Result, bail};
use base64::Engine;
use fleet_tests::process::Andon;
use fleet_tests::{calls, models, root};
use protocol::tei::v1 as tei;
use reqwest::{Response, StatusCode};
use serde_json::{Value, json};
use tonic::transport::Channel;

const TEXTS: [&str; 3] = [
    "The lantern is lit.",
    "A candle burns.",
    "Über den Dächern 火",
];

/// One process with the demo models, and the small classifier and reranker.
struct Served {
    andon: Andon,
    client: reqwest::Client,
}

impl Served {
    async fn start() -> Result<Self> {
        let golden = root().join("tests/golden");
        let mut flags = Vec::new();
        for (name, folder) in [
            ("minilm", models()?.join("minilm/1")),
            ("digits", models()?.join("digits/1")),
            ("classifier", golden.join("bert-classification")),
            ("reranker", golden.join("bert-rerank")),
        ] {
            if !folder.exists() {
                bail!("{} is missing: run `make test`", folder.display());
            }
            flags.extend(["--model".to_owned(), format!("{name}={}", folder.display())]);
        }
        let andon = Andon::start("serve", &flags, None)?;
        andon.ready().await?;
        let client = reqwest::Client::builder()
            .timeout(Duration::from_secs(60))
            .build()?;
        Ok(Self { andon, client })
    }

    fn address(&self, path: &str) -> String {
        format!("http://{}{path}", self.andon.http)
    }

    async fn get(&self, path: &str) -> Result<Response> {
        Ok(self.client.get(self.address(path)).send().await?)
    }

    async fn post(&self, path: &str, body: &Value) -> Result<Response> {
        Ok(self
            .client
            .post(self.address(path))
            .json(body)
            .send()
            .await?)
    }

    /// The body of a response that must succeed.
    async fn success(&self, path: &str, body: &Value) -> Result<Value> {
        let response = self.post(path, body).await?;
        let status = response.status();
        let body: Value = response.json().await?;
        if status != StatusCode::OK {
            bail!("{path}: {status} {body}");
        }
        Ok(body)
    }

    /// The status and the body of a response that must fail.
    async fn refused(&self, path: &str, body: &Value) -> Result<(u16, Value)> {
        let response = self.post(path, body).await?;
        let status = response.status().as_u16();
        let body: Value = response.json().await?;
        Ok((status, body))
    }

    async fn grpc(&self) -> Result<Channel> {
        let address = format!("http://{}", self.andon.grpc);
        Ok(Channel::from_shared(address)?.connect().await?)
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn floats(json: &Value) -> Result<Vec<f32>> {
    Ok(serde_json::from_value(json.clone())?)
}

fn decoded(json: &Value) -> Result<Vec<f32>> {
    let text = json.as_str().context("no base64")?;
    let bytes = base64::engine::general_purpose::STANDARD.decode(text)?;
    let numbers = bytes.chunks_exact(4);
    Ok(numbers
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect())
}

#[tokio::test]
async fn a_vector_has_the_same_bits_through_every_door() -> Result<()> {
    let served = Served::start().await?;
    let request = json!({"model": "minilm", "input": TEXTS});
    let as_numbers = served.success("/v1/embeddings", &request).await?;
    let mut with_format = request.clone();
    with_format["encoding_format"] = json!("base64");
    let as_base64 = served.success("/v1/embeddings", &with_format).await?;
    let client = calls::client(served.andon.grpc).await?;
    let answer = calls::infer(&client, calls::texts(&TEXTS), Duration::from_secs(30)).await?;
    let by_grpc = calls::rows(&answer, 0);
    let mut embed = tei::embed_client::EmbedClient::new(served.grpc().await?);
    for (index, text) in TEXTS.iter().enumerate() {
        let mut request = tonic::Request::new(tei::EmbedRequest {
            inputs: (*text).to_owned(),
            normalize: true,
            ..Default::default()
        });
        request
            .metadata_mut()
            .insert("andon-model", "minilm".parse()?);
        let by_tei = embed.embed(request).await?.into_inner().embeddings;
        let number = floats(&as_numbers["data"][index]["embedding"])?;
        let encoded = decoded(&as_base64["data"][index]["embedding"])?;
        assert_eq!(number.len(), 384);
        assert_eq!(bits(&number), bits(&encoded));
        assert_eq!(bits(&number), bits(&by_grpc[index]));
        assert_eq!(bits(&number), bits(&by_tei));
        assert_eq!(as_numbers["data"][index]["index"], json!(index));
    }
    assert_eq!(as_numbers["object"], "list");
    assert_eq!(as_numbers["data"][0]["object"], "embedding");
    assert_eq!(as_numbers["model"], "minilm");
    let usage = &as_numbers["usage"];
    assert_eq!(usage["prompt_tokens"], usage["total_tokens"]);
    Ok(())
}

#[tokio::test]
async fn inputs_of_every_form_are_taken() -> Result<()> {
    let served = Served::start().await?;
    let single = json!({"model": "minilm", "input": TEXTS[0], "user": "a", "extra": {"any": 1}});
    let single = served.success("/v1/embeddings", &single).await?;
    let of_text = floats(&single["data"][0]["embedding"])?;
    let mut tokenize = tei::tokenize_client::TokenizeClient::new(served.grpc().await?);
    let mut request = tonic::Request::new(tei::EncodeRequest {
        inputs: TEXTS[0].to_owned(),
        add_special_tokens: true,
        prompt_name: None,
    });
    request
        .metadata_mut()
        .insert("andon-model", "minilm".parse()?);
    let tokens = tokenize.tokenize(request).await?.into_inner().tokens;
    let ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
    let one = served
        .success("/v1/embeddings", &json!({"model": "minilm", "input": ids}))
        .await?;
    let of_tokens = floats(&one["data"][0]["embedding"])?;
    assert_eq!(bits(&of_text), bits(&of_tokens));
    let request = json!({"model": "minilm", "input": [ids, ids]});
    let several = served.success("/v1/embeddings", &request).await?;
    assert_eq!(several["data"].as_array().map(Vec::len), Some(2));
    let request = json!({"model": "minilm", "input": TEXTS[0], "dimensions": 64});
    let short = served.success("/v1/embeddings", &request).await?;
    let short = floats(&short["data"][0]["embedding"])?;
    let length: f32 = short.iter().map(|value| value * value).sum();
    assert_eq!(short.len(), 64);
    assert!((length - 1.0).abs() < 1e-4, "{length}");
    let long = "lantern ".repeat(600);
    let request = json!({"model": "minilm", "input": long, "truncate": true});
    served.success("/v1/embeddings", &request).await?;
    Ok(())
}

#[tokio::test]
async fn errors_have_the_shape_of_openai_and_name_the_field() -> Result<()> {
    let served = Served::start().await?;
    let long = "lantern ".repeat(600);
    for (body, status, param) in [
        (json!({"model": "minilm", "input": []}), 400, "input"),
        (json!({"model": "minilm", "input": ""}), 400, "input"),
        (
            json!({"model": "minilm", "input": ["a", ""]}),
            400,
            "input[1]",
        ),
        (
            json!({"model": "minilm", "input": ["a", 1]}),
            400,
            "input[1]",
        ),
        (
            json!({"model": "minilm", "input": ["a", long]}),
            400,
            "input[1]",
        ),
        (
            json!({"model": "minilm", "input": [[4_000_000]]}),
            400,
            "input[0][0]",
        ),
        (json!({"model": "minilm"}), 400, "input"),
        (
            json!({"model": "minilm", "input": "a", "dimensions": 0}),
            400,
            "dimensions",
        ),
        (
            json!({"model": "minilm", "input": "a", "dimensions": 4000}),
            400,
            "dimensions",
        ),
        (
            json!({"model": "minilm", "input": "a", "encoding_format": "hex"}),
            400,
            "encoding_format",
        ),
        (json!({"model": "nobody", "input": "a"}), 404, "model"),
        (json!({"model": "digits", "input": "a"}), 400, "model"),
        (json!({"model": "../etc", "input": "a"}), 400, "model"),
    ] {
        let (found, error) = served.refused("/v1/embeddings", &body).await?;
        assert_eq!(found, status, "{body}: {error}");
        assert_eq!(error["error"]["param"], param, "{body}: {error}");
        assert_eq!(error["error"]["type"], "invalid_request_error", "{error}");
        assert!(error["error"]["message"].is_string());
    }
    Ok(())
}

#[tokio::test]
async fn broken_bodies_and_models_that_do_not_generate_are_refused() -> Result<()> {
    let served = Served::start().await?;
    let broken = served.client.post(served.address("/v1/embeddings"));
    let broken = broken
        .header("content-type", "application/json")
        .body("{\"model\": ");
    let response = broken.send().await?;
    assert_eq!(response.status(), 400);
    assert!(response.headers().contains_key("x-request-id"));
    let error: Value = response.json().await?;
    let message = error["error"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("line 1, column"), "{error}");
    let chat = json!({"model": "minilm", "messages": [{"role": "user", "content": "a"}]});
    let (status, error) = served.refused("/v1/chat/completions", &chat).await?;
    assert_eq!(status, 501, "{error}");
    let generate = json!({"text_input": "a"});
    let (status, error) = served
        .refused("/v2/models/minilm/generate", &generate)
        .await?;
    assert_eq!(status, 501, "{error}");
    assert_eq!(error["code"], "UNIMPLEMENTED");
    Ok(())
}

#[tokio::test]
async fn models_are_listed_and_shown() -> Result<()> {
    let served = Served::start().await?;
    let list: Value = served.get("/v1/models").await?.json().await?;
    let data = list["data"].as_array().context("data")?;
    let names: Vec<&str> = data
        .iter()
        .filter_map(|model| model["id"].as_str())
        .collect();
    assert_eq!(names, ["classifier", "digits", "minilm", "reranker"]);
    let shown: Value = served.get("/v1/models/minilm").await?.json().await?;
    assert_eq!(shown, data[2]);
    assert_eq!(shown["object"], "model");
    let missing = served.get("/v1/models/nobody").await?;
    assert_eq!(missing.status(), 404);
    let error: Value = missing.json().await?;
    assert_eq!(error["error"]["code"], "model_not_found");
    Ok(())
}

#[tokio::test]
async fn documents_are_ranked_in_both_shapes() -> Result<()> {
    let served = Served::start().await?;
    let mut rerank = tei::rerank_client::RerankClient::new(served.grpc().await?);
    let texts = [
        "A candle stands in it.",
        "The tide is low.",
        "Paper and light.",
    ];
    let request = tei::RerankRequest {
        query: "What burns in a lantern?".to_owned(),
        texts: texts.map(str::to_owned).to_vec(),
        truncate: true,
        ..Default::default()
    };
    let ranks = rerank.rerank(request).await?.into_inner().ranks;
    let request = json!({"query": "What burns in a lantern?", "documents": [texts[0], {"text": texts[1]}, texts[2]],
        "return_documents": true});
    for path in ["/rerank", "/v1/rerank", "/v2/rerank"] {
        let response = served.success(path, &request).await?;
        let results = response["results"].as_array().context("results")?;
        assert_eq!(results.len(), 3, "{response}");
        for (result, rank) in results.iter().zip(&ranks) {
            assert_eq!(result["index"], json!(rank.index));
            let score: f32 = serde_json::from_value(result["relevance_score"].clone())?;
            assert_eq!(score.to_bits(), rank.score.to_bits());
            assert_eq!(result["document"]["text"], texts[rank.index as usize]);
        }
        assert!(
            response["meta"]["tokens"]["input_tokens"].as_u64() > Some(0),
            "{response}"
        );
        let best = json!({"model": "reranker", "query": "q", "documents": texts, "top_n": 1});
        let best = served.success(path, &best).await?;
        assert_eq!(best["results"].as_array().map(Vec::len), Some(1));
        assert!(best["results"][0].get("document").is_none());
    }
    let request = json!({"query": "What burns in a lantern?", "texts": texts, "return_text": true,
        "raw_scores": false, "truncate": true});
    let response = served.success("/rerank", &request).await?;
    let list = response.as_array().context("a list")?;
    for (text, rank) in list.iter().zip(&ranks) {
        assert_eq!(text["index"], json!(rank.index));
        let score: f32 = serde_json::from_value(text["score"].clone())?;
        assert_eq!(score.to_bits(), rank.score.to_bits());
        assert_eq!(text["text"], texts[rank.index as usize]);
    }
    Ok(())
}

#[tokio::test]
async fn errors_in_rankings_name_their_field() -> Result<()> {
    let served = Served::start().await?;
    for (path, body, field) in [
        (
            "/rerank",
            json!({"query": "q", "documents": []}),
            "documents",
        ),
        (
            "/rerank",
            json!({"query": "q", "texts": ["a", ""]}),
            "texts[1]",
        ),
        (
            "/v2/rerank",
            json!({"query": "q", "documents": ["a"], "top": 1}),
            "top",
        ),
        (
            "/v2/rerank",
            json!({"query": "", "documents": ["a"]}),
            "query",
        ),
        (
            "/v2/rerank",
            json!({"model": "minilm", "query": "q", "documents": ["a"]}),
            "model",
        ),
    ] {
        let (status, error) = served.refused(path, &body).await?;
        assert_eq!(
            (status, &error["field"]),
            (400, &json!(field)),
            "{body}: {error}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn texts_are_classified_as_by_tei() -> Result<()> {
    let served = Served::start().await?;
    let mut predict = tei::predict_client::PredictClient::new(served.grpc().await?);
    let request = json!({"model": "classifier", "input": TEXTS});
    let response = served.success("/v1/classify", &request).await?;
    assert_eq!(response["object"], "list");
    assert!(response["usage"]["total_tokens"].as_u64() > Some(0));
    for (index, text) in TEXTS.iter().enumerate() {
        let request = tei::PredictRequest {
            inputs: (*text).to_owned(),
            ..Default::default()
        };
        let expected = predict.predict(request).await?.into_inner().predictions;
        let data = &response["data"][index];
        assert_eq!(data["label"], expected[0].label);
        assert_eq!(data["num_classes"], json!(expected.len()));
        let probs = floats(&data["probs"])?;
        assert_eq!(probs.len(), expected.len());
        for (prediction, expected) in data["predictions"]
            .as_array()
            .context("list")?
            .iter()
            .zip(&expected)
        {
            assert_eq!(prediction["label"], expected.label);
            let score: f32 = serde_json::from_value(prediction["score"].clone())?;
            assert_eq!(score.to_bits(), expected.score.to_bits());
            assert!(bits(&probs).contains(&score.to_bits()));
        }
    }
    let one = served
        .success(
            "/v1/classify",
            &json!({"input": TEXTS[0], "raw_scores": true}),
        )
        .await?;
    assert_eq!(one["data"].as_array().map(Vec::len), Some(1));
    let (status, error) = served
        .refused("/v1/classify", &json!({"input": "a", "inputs": "b"}))
        .await?;
    assert_eq!(
        (status, &error["error"]["param"]),
        (400, &json!("inputs")),
        "{error}"
    );
    Ok(())
}

#[tokio::test]
async fn the_document_and_its_page_are_in_the_binary() -> Result<()> {
    let served = Served::start().await?;
    let document: Value = served.get("/openapi.json").await?.json().await?;
    assert_eq!(document["openapi"], "3.1.0");
    let paths = document["paths"].as_object().context("paths")?;
    for path in [
        "/v1/embeddings",
        "/v1/models",
        "/rerank",
        "/v1/classify",
        "/v2/models/{model}/infer",
    ] {
        assert!(paths.contains_key(path), "{path}");
    }
    let page = served.get("/docs").await?;
    assert_eq!(page.status(), 200);
    let policy = page.headers()["content-security-policy"]
        .to_str()?
        .to_owned();
    assert!(policy.starts_with("default-src 'none'"), "{policy}");
    assert_eq!(page.url().path(), "/docs/");
    // This client accepts no coding.
    assert!(!page.headers().contains_key("content-encoding"));
    let page = page.text().await?;
    for file in [
        "index.css",
        "swagger-ui.css",
        "swagger-ui-bundle.js",
        "swagger-initializer.js",
    ] {
        assert!(page.contains(file), "{file}");
        assert_eq!(served.get(&format!("/docs/{file}")).await?.status(), 200);
    }
    let wrong = served
        .client
        .put(served.address("/v1/embeddings"))
        .send()
        .await?;
    assert_eq!(wrong.status(), 405);
    assert!(wrong.headers().contains_key("allow"));
    Ok(())
}
