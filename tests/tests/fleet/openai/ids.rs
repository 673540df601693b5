//! Embeddings by token ids: the ids are computed as they are, in one call.

use anyhow::{Context, Result, ensure};
use fleet_tests::calls;
use protocol::inference::ModelInferRequest;
use protocol::inference::model_infer_request::InferInputTensor;
use protocol::tei::v1 as tei;
use serde_json::{Value, json};
use std::time::Duration;

use super::{Served, TEXTS, bits, floats};

/// The ids of a text, without the special tokens around it.
async fn ids(served: &Served, text: &str) -> Result<Vec<u32>> {
    let mut tokenize = tei::tokenize_client::TokenizeClient::new(served.grpc().await?);
    let mut request = tonic::Request::new(tei::EncodeRequest {
        inputs: text.to_owned(),
        add_special_tokens: false,
        prompt_name: None,
    });
    let metadata = request.metadata_mut();
    metadata.insert("andon-model", "minilm".parse()?);
    let tokens = tokenize.tokenize(request).await?.into_inner().tokens;
    Ok(tokens.iter().map(|token| token.id).collect())
}

async fn embedded(served: &Served, input: &Value) -> Result<Vec<f32>> {
    let request = json!({"model": "minilm", "input": input});
    let response = served.success("/v1/embeddings", &request).await?;
    floats(&response["data"][0]["embedding"])
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The embedding of ids that go to the worker without the HTTP door.
async fn by_grpc(served: &Served, ids: &[u32]) -> Result<Vec<f32>> {
    let longs = |values: Vec<i64>| -> Vec<u8> {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes());
        bytes.collect()
    };
    let tensor = |name: &str, count: usize| InferInputTensor {
        name: name.to_owned(),
        datatype: "INT64".to_owned(),
        shape: vec![count as i64],
        ..Default::default()
    };
    let request = ModelInferRequest {
        model_name: "minilm".to_owned(),
        inputs: vec![tensor("input_lengths", 1), tensor("input_ids", ids.len())],
        raw_input_contents: vec![
            longs(vec![ids.len() as i64]).into(),
            longs(ids.iter().map(|id| i64::from(*id)).collect()).into(),
        ],
        ..Default::default()
    };
    let client = calls::client(served.andon.grpc).await?;
    let answer = calls::infer(&client, request, Duration::from_secs(30)).await?;
    let rows = calls::rows(&answer, 0);
    rows.into_iter().next().context("a row")
}

#[tokio::test]
async fn ids_have_the_embedding_of_their_text() -> Result<()> {
    let served = Served::start().await?;
    // The last has characters that no token has.
    for text in [TEXTS[0], TEXTS[2], "a \u{13000}\u{13001} lantern"] {
        let ids = ids(&served, text).await?;
        let of_text = embedded(&served, &json!(text)).await?;
        let of_ids = embedded(&served, &json!(ids)).await?;
        let cosine = cosine(&of_text, &of_ids);
        ensure!((cosine - 1.0).abs() < 1e-5, "{text}: {cosine}");
    }
    let unknown = ids(&served, "\u{13000}").await?;
    ensure!(unknown == [100], "no [UNK]: {unknown:?}");
    // A list that begins within a word is no text's.
    let word = ids(&served, "lanternlessness").await?;
    ensure!(word.len() > 1, "{word:?}");
    let within = &word[1..];
    let of_ids = embedded(&served, &json!([within])).await?;
    assert_eq!(bits(&of_ids), bits(&by_grpc(&served, within).await?));
    Ok(())
}

#[tokio::test]
async fn all_lists_of_ids_are_one_call_of_the_worker() -> Result<()> {
    let served = Served::start().await?;
    embedded(&served, &json!([2000])).await?;
    let called = || served.andon.metric_sum("andon_worker_requests_total");
    let before = called().await?;
    let lists: Vec<[u32; 2]> = (0..2048).map(|index| [2000 + index, 2001]).collect();
    let request = json!({"model": "minilm", "input": lists, "encoding_format": "base64"});
    let response = served.success("/v1/embeddings", &request).await?;
    assert_eq!(response["data"].as_array().map(Vec::len), Some(2048));
    assert_eq!(called().await? - before, 1.0);
    Ok(())
}

#[tokio::test]
async fn ids_outside_the_vocabulary_are_refused_by_their_place() -> Result<()> {
    let served = Served::start().await?;
    for (input, field) in [
        (
            json!([[2000], [2000, 2001, 4_000_000_000_u32]]),
            "input[1][2]",
        ),
        (json!([2000, 30_522]), "input[1]"),
        (json!([[2000], []]), "input[1]"),
    ] {
        let request = json!({"model": "minilm", "input": input});
        let (status, body) = served.refused("/v1/embeddings", &request).await?;
        ensure!(status == 400, "{status} {body}");
        assert_eq!(body["error"]["param"], field, "{body}");
    }
    Ok(())
}
