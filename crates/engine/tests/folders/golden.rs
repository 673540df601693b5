//! Folders that the reference libraries saved, and their outputs, which
//! `tests/python/golden_folders.py` wrote into `tests/golden/folders`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use engine::{EncoderModel, Kernels, Model, Task, Text, TextOutput, TextRow, load};
use serde::Deserialize;

use super::options;

const EMBEDDERS: [&str; 13] = [
    "accents-kept",
    "include-prompt",
    "lower-case-off",
    "lower-case-on",
    "normalize-dense",
    "padding-camembert",
    "padding-xlm-roberta",
    "pooling-switches",
    "poolings",
    "sentence-length",
    "sentence-lower-case",
    "token-dense",
    "truncation-left",
];
const CLASSIFIERS: [&str; 5] = [
    "cross-encoder-labels",
    "regression",
    "several-labels",
    "token-types-off",
    "token-types-on",
];
const RERANKERS: [&str; 1] = ["cross-encoder"];

/// A text or a pair, and the library's output for it.
#[derive(Deserialize)]
struct Expected {
    text: Vec<String>,
    /// The name of the prompt; none for the default.
    prompt: Option<String>,
    /// An embedding or logits.
    output: Vec<f32>,
    /// What the library makes of logits by default.
    scores: Option<Vec<f32>>,
}

fn folders() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/folders")
}

/// Compares every row of a folder, with the engine's kernels and with candle's operations.
fn compare(name: &str, task: Task) {
    let folder = folders().join(name);
    let bytes = fs::read(folder.join("expected.json"))
        .unwrap_or_else(|_| panic!("tests/golden/folders/{name} is missing: run `make golden`"));
    let rows: Vec<Expected> = serde_json::from_slice(&bytes).unwrap();
    assert!(rows.len() > usize::from(task != Task::Embedding), "{name}");
    for kernels in [Kernels::Auto, Kernels::Candle] {
        let options = options(|options| options.kernels = kernels);
        let Model::Encoder(mut model) = load(&folder, &options).unwrap() else {
            panic!("{name}: an encoder is expected");
        };
        assert_eq!(model.card().task, task, "{name}");
        for row in &rows {
            let what = format!("{name} {kernels}, {:?} of {:?}", row.prompt, row.text);
            compare_row(&mut model, row, &what);
        }
    }
}

fn compare_row(model: &mut EncoderModel, expected: &Expected, what: &str) {
    let card = model.card();
    let name = expected.prompt.as_ref().or(card.default_prompt.as_ref());
    let prompt = name.map_or("", |name| card.prompts[name].as_str());
    let first = format!("{prompt}{}", expected.text[0]);
    let text = match expected.text.get(1) {
        Some(second) => Text::Pair(&first, second),
        None => Text::Single(&first),
    };
    let tokenizer = model.tokenizer();
    let mut tokens = tokenizer.encode(text, card.truncation_side.into()).unwrap();
    tokens.skipped = tokenizer.skipped(prompt).unwrap();
    let (output, activation) = match card.task {
        Task::Embedding => (TextOutput::Embedding, None),
        _ => (TextOutput::Logits, Some(card.activation)),
    };
    let row = TextRow {
        tokens: &tokens,
        output,
    };
    let mut actual = model.forward(&[row], &|| true).unwrap().swap_remove(0);
    assert_close(&actual, &expected.output, what);
    if let (Some(activation), Some(scores)) = (activation, &expected.scores) {
        activation.apply(&mut actual);
        assert_close(&actual, scores, &format!("{what}, scores"));
    }
}

fn assert_close(actual: &[f32], expected: &[f32], what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}: length");
    let mut pairs = actual.iter().zip(expected);
    assert!(
        pairs.all(|(one, other)| (one - other).abs() <= 1e-4),
        "{what}: {actual:?}, not {expected:?}"
    );
    let dot = |one: &[f32], other: &[f32]| -> f64 {
        let pairs = one.iter().zip(other);
        pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let lengths = dot(actual, actual) * dot(expected, expected);
    let cosine = dot(actual, expected) / lengths.sqrt();
    // The cosine of a few values near zero is meaningless.
    assert!(
        cosine >= 0.9999 || actual.len() < 8,
        "{what}: cosine {cosine}"
    );
}

#[test]
fn embeddings_are_those_of_the_library_that_saved_the_folder() {
    for name in EMBEDDERS {
        compare(name, Task::Embedding);
    }
}

#[test]
fn scores_are_those_of_the_library_that_saved_the_folder() {
    for name in CLASSIFIERS {
        compare(name, Task::Classification);
    }
    for name in RERANKERS {
        compare(name, Task::Rerank);
    }
}

#[test]
fn every_folder_of_the_libraries_is_compared() {
    let lists = EMBEDDERS.iter().chain(&CLASSIFIERS).chain(&RERANKERS);
    let compared: BTreeSet<String> = lists.map(|name| (*name).to_owned()).collect();
    let entries = fs::read_dir(folders()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(names.collect::<BTreeSet<String>>(), compared);
}
