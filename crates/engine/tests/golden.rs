//! Golden tests: outputs against those of the reference implementation, which
//! `tests/python/golden.py` wrote into `tests/golden`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may fail, and its helpers with it"
)]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use engine::{
    DeviceChoice, Dtype, EncoderModel, EngineError, InstructionSet, Kernels, LoadOptions, Model,
    TabularModel, Task, Text, TextOutput, TextRow, TokenRow, Truncation, load, normalize,
};
use serde::Deserialize;

/// One text and the outputs of a tiny checkpoint for it, by transformers.
#[derive(Deserialize)]
struct Expected {
    text: Vec<String>,
    ids: Vec<u32>,
    type_ids: Vec<u32>,
    hidden: Option<Vec<f32>>,
    pooled: Option<Vec<f32>>,
    logits: Option<Vec<f32>>,
}

#[derive(Deserialize)]
struct Sentence {
    text: String,
    ids: Vec<u32>,
    vector: Vec<f32>,
}

#[derive(Deserialize)]
struct Digits {
    features: Vec<Vec<f32>>,
    labels: Vec<usize>,
    logits: Vec<Vec<f32>>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn golden<T: for<'a> Deserialize<'a>>(name: &str) -> T {
    let path = root().join("tests/golden").join(name);
    let bytes = std::fs::read(&path)
        .unwrap_or_else(|_| panic!("tests/golden/{name} is missing: run `make golden`"));
    serde_json::from_slice(&bytes).unwrap()
}

fn load_encoder(folder: impl AsRef<Path>, options: &LoadOptions) -> EncoderModel {
    match load(&root().join(folder), options).unwrap() {
        Model::Encoder(model) => *model,
        Model::Tabular(_) => panic!("an encoder is expected"),
    }
}

fn load_tabular(folder: impl AsRef<Path>, options: &LoadOptions) -> TabularModel {
    match load(&root().join(folder), options).unwrap() {
        Model::Tabular(model) => *model,
        Model::Encoder(_) => panic!("a tabular model is expected"),
    }
}

fn options() -> LoadOptions {
    LoadOptions {
        device: DeviceChoice::Cpu,
        dtype: Dtype::F32,
        ..LoadOptions::default()
    }
}

/// Every instruction set that this CPU supports in every dtype, candle's operations, and a CUDA
/// device where the build has CUDA.
fn all_options() -> Vec<LoadOptions> {
    let sets = InstructionSet::ALL
        .into_iter()
        .filter(|set| set.supported());
    let kernels: Vec<Kernels> = sets.map(Kernels::Only).collect();
    assert!(kernels.contains(&Kernels::Only(InstructionSet::Portable)));
    let with = |dtype, kernels| LoadOptions {
        dtype,
        kernels,
        ..options()
    };
    let mut all = vec![with(Dtype::F32, Kernels::Candle)];
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Int8] {
        all.extend(kernels.iter().map(|kernels| with(dtype, *kernels)));
    }
    #[cfg(feature = "cuda")]
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        all.push(LoadOptions {
            device: DeviceChoice::Cuda(0),
            ..with(dtype, Kernels::Auto)
        });
    }
    all
}

/// The tolerance for a tiny checkpoint of random weights: largest difference and least cosine. Its
/// values are as large as a trained model's, but few, so that rounding errors do not average out.
fn tolerance(dtype: Dtype) -> (f32, f64) {
    match dtype {
        Dtype::Auto | Dtype::F32 => (2e-5, 0.999_999),
        Dtype::F16 => (1e-2, 0.999_9),
        Dtype::Bf16 => (1e-1, 0.999),
        Dtype::Int8 => (3e-1, 0.98),
    }
}

fn forward<'a>(model: &mut EncoderModel, rows: &[(&'a TokenRow, TextOutput)]) -> Vec<Vec<f32>> {
    let row = |(tokens, output): &(&'a TokenRow, TextOutput)| TextRow {
        tokens,
        output: *output,
    };
    let rows: Vec<TextRow<'_>> = rows.iter().map(row).collect();
    model.forward(&rows, &|| true).unwrap()
}

fn assert_close(actual: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}: length");
    for (index, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let difference = (actual - expected).abs();
        assert!(
            difference <= tolerance,
            "{what}[{index}]: {actual} instead of {expected}, {difference:e} apart"
        );
    }
}

fn cosine(first: &[f32], second: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum()
    };
    dot(first, second) / (dot(first, first) * dot(second, second)).sqrt()
}

fn text(parts: &[String]) -> Text<'_> {
    match parts {
        [one] => Text::Single(one),
        [first, second] => Text::Pair(first, second),
        _ => panic!("one or two texts"),
    }
}

/// Compares every output of a tiny checkpoint, in one batch and one by one.
fn compare(name: &str, family: &str, task: Task) {
    for options in all_options() {
        compare_with(name, family, task, &options);
    }
}

fn compare_with(name: &str, family: &str, task: Task, options: &LoadOptions) {
    let expected: Vec<Expected> = golden(&format!("{name}/expected.json"));
    let mut model = load_encoder(Path::new("tests/golden").join(name), options);
    let (largest, least) = tolerance(options.dtype);
    let name = format!("{name} {} {}", options.dtype, options.kernels);
    assert_eq!((model.card().family, model.card().task), (family, task));
    let tokenizer = model.tokenizer().clone();
    let rows: Vec<TokenRow> = expected
        .iter()
        .map(|expected| {
            let row = tokenizer
                .encode(text(&expected.text), Truncation::Refuse)
                .unwrap();
            assert_eq!(row.ids, expected.ids, "{name}: ids of {:?}", expected.text);
            assert_eq!(
                row.type_ids, expected.type_ids,
                "{name}: types of {:?}",
                expected.text
            );
            row
        })
        .collect();
    let kinds: &[TextOutput] = match task {
        Task::Embedding => &[TextOutput::Embedding, TextOutput::TokenEmbeddings],
        _ => &[TextOutput::Logits],
    };
    for requested in kinds {
        let batch: Vec<_> = rows.iter().map(|row| (row, *requested)).collect();
        let together = forward(&mut model, &batch);
        for ((row, expected), output) in batch.iter().zip(&expected).zip(&together) {
            let what = format!("{name} {requested:?} of {:?}", expected.text);
            let reference = match requested {
                TextOutput::Embedding => &expected.pooled,
                TextOutput::TokenEmbeddings => &expected.hidden,
                TextOutput::Logits => &expected.logits,
            };
            let reference = reference.as_ref().unwrap();
            assert_close(output, reference, largest, &what);
            // The cosine of a few values near zero is meaningless.
            let near = cosine(output, reference) >= least;
            assert!(near || output.len() < 8, "{what}: cosine");
            let alone = forward(&mut model, &[*row]);
            assert_close(&alone[0], output, largest / 2.0, &format!("{what}, alone"));
        }
        // A model with the same output for every text would agree with itself in any order.
        if *requested == TextOutput::Embedding {
            assert!(
                cosine(&together[0], &together[4]) < 0.995,
                "{name}: texts look alike"
            );
        }
    }
}

#[test]
fn bert() {
    compare("bert-embedding", "bert", Task::Embedding);
    compare("bert-classification", "bert", Task::Classification);
    compare("bert-rerank", "bert", Task::Rerank);
    compare("bert-dense", "bert", Task::Embedding);
}

#[test]
fn roberta() {
    compare("roberta-embedding", "roberta", Task::Embedding);
    compare("roberta-classification", "roberta", Task::Classification);
    compare("xlm-roberta-embedding", "roberta", Task::Embedding);
    compare("xlm-roberta-rerank", "roberta", Task::Rerank);
}

#[test]
fn distilbert() {
    compare("distilbert-embedding", "distilbert", Task::Embedding);
    compare(
        "distilbert-classification",
        "distilbert",
        Task::Classification,
    );
}

#[test]
fn modernbert() {
    compare("modernbert-embedding", "modernbert", Task::Embedding);
    compare(
        "modernbert-classification",
        "modernbert",
        Task::Classification,
    );
    compare("modernbert-mean", "modernbert", Task::Classification);
}

#[test]
fn minilm_in_f32() {
    minilm(|dtype| dtype == Dtype::F32);
}

#[test]
fn minilm_in_16_bits() {
    minilm(|dtype| matches!(dtype, Dtype::Bf16 | Dtype::F16));
}

#[test]
fn minilm_in_int8() {
    minilm(|dtype| dtype == Dtype::Int8);
}

fn minilm(of_test: impl Fn(Dtype) -> bool) {
    let expected: Vec<Sentence> = golden("minilm.json");
    let options = all_options();
    for options in options.iter().filter(|options| of_test(options.dtype)) {
        // Plain loops and candle's operations are slow: half of the sentences is enough.
        let slow = [Kernels::Only(InstructionSet::Portable), Kernels::Candle];
        let count = if slow.contains(&options.kernels) {
            expected.len() / 2
        } else {
            expected.len()
        };
        minilm_with(&expected[..count], options);
    }
}

fn minilm_with(expected: &[Sentence], options: &LoadOptions) {
    let mut model = load_encoder("models/minilm/1", options);
    assert_eq!((model.card().tokens_max, model.card().width), (256, 384));
    let tokenizer = model.tokenizer().clone();
    let rows: Vec<TokenRow> = expected
        .iter()
        .map(|sentence| {
            let row = tokenizer
                .encode(Text::Single(&sentence.text), Truncation::Right)
                .unwrap();
            assert_eq!(row.ids, sentence.ids, "ids of {:?}", sentence.text);
            row
        })
        .collect();
    let mut together = Vec::new();
    for rows in rows.chunks(64) {
        let rows: Vec<_> = rows
            .iter()
            .map(|row| (row, TextOutput::Embedding))
            .collect();
        together.extend(forward(&mut model, &rows));
    }
    let mut worst_batch = 0.0f32;
    let mut worst_error = 0.0f32;
    let mut cosines = Vec::new();
    let worst = |worst: f32, first: &[f32], second: &[f32]| {
        let pairs = first.iter().zip(second);
        pairs.fold(worst, |worst, (first, second)| {
            worst.max((first - second).abs())
        })
    };
    let pairs = rows.iter().zip(expected).zip(&mut together);
    for (index, ((row, sentence), batched)) in pairs.enumerate() {
        if index % 4 == 0 {
            let alone = forward(&mut model, &[(row, TextOutput::Embedding)]);
            worst_batch = worst(worst_batch, &alone[0], batched);
        }
        normalize(batched);
        cosines.push(cosine(batched, &sentence.vector));
        worst_error = worst(worst_error, batched, &sentence.vector);
    }
    let references: Vec<&[f32]> = expected.iter().map(|s| s.vector.as_slice()).collect();
    let vectors: Vec<&[f32]> = together.iter().map(Vec::as_slice).collect();
    let ranking = rankings_preserved(&references, &vectors);
    let least = cosines.iter().copied().fold(1.0, f64::min);
    let mean = cosines.iter().sum::<f64>() / cosines.len() as f64;
    let name = format!("{} {}", options.dtype, options.kernels);
    println!(
        "{name}: cosine at least {least:.7}, mean {mean:.7}, error {worst_error:.1e}, \
         ranking {ranking:.5}, batched to single {worst_batch:.1e}"
    );
    let (least_due, mean_due, error_due, batch_due) = match options.dtype {
        Dtype::Auto | Dtype::F32 => (0.999_99, 0.999_999, 1e-4, 1e-5),
        Dtype::F16 | Dtype::Bf16 => (0.999_9, 0.999_9, 5e-3, 1e-2),
        Dtype::Int8 => (0.98, 0.998, 5e-2, 1e-5),
    };
    assert!(least >= least_due && mean >= mean_due, "{name}: cosines");
    assert!(ranking >= 0.99, "{name}: a ranking of {ranking}");
    assert!(worst_error <= error_due, "{name}: {worst_error:e}");
    assert!(worst_batch <= batch_due, "{name}: {worst_batch:e}");
}

/// Spearman's rank correlation of a search, averaged over the first 20 texts as queries among all
/// others: 1 where the vectors put them in the reference's order.
fn rankings_preserved(references: &[&[f32]], vectors: &[&[f32]]) -> f64 {
    let queries = 20;
    let ranks = |vectors: &[&[f32]], query: usize| -> Vec<f64> {
        let found = vectors[queries..].iter();
        let scores: Vec<f64> = found.map(|text| cosine(vectors[query], text)).collect();
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        let mut ranks = vec![0.0; scores.len()];
        for (rank, text) in order.into_iter().enumerate() {
            ranks[text] = rank as f64;
        }
        ranks
    };
    let correlation = |query: usize| {
        let pairs = ranks(references, query).into_iter();
        let squares = pairs.zip(ranks(vectors, query));
        let squares: f64 = squares.map(|(a, b)| (a - b) * (a - b)).sum();
        let texts = (references.len() - queries) as f64;
        1.0 - 6.0 * squares / (texts * (texts * texts - 1.0))
    };
    (0..queries).map(correlation).sum::<f64>() / queries as f64
}

#[test]
fn digits() {
    let expected: Digits = golden("digits.json");
    let mut model = load_tabular("demo/digits/1", &options());
    assert_eq!(model.card().feature_range, Some((0.0, 16.0)));
    let rows = expected.features.len();
    let features = expected.features.concat();
    let logits = model.forward(&features, rows, &|| true).unwrap();
    assert_close(&logits, &expected.logits.concat(), 1e-3, "digits");
    let scores = logits.chunks(10);
    let right = scores
        .zip(&expected.labels)
        .filter(|(scores, label)| engine::argmax(scores) == **label);
    let accuracy = right.count() as f64 / rows as f64;
    assert!(accuracy >= 0.97, "accuracy {accuracy}");
    let uneven = model.forward(&features[1..], rows, &|| true);
    assert!(uneven.is_err_and(|error| error.is_callers_input()));
}

#[test]
fn a_cancelled_forward_pass_stops_between_layers() {
    let mut model = load_encoder("tests/golden/bert-embedding", &options());
    let tokenizer = model.tokenizer().clone();
    let tokens = tokenizer
        .encode(Text::Single("red"), Truncation::Refuse)
        .unwrap();
    let row = TextRow {
        tokens: &tokens,
        output: TextOutput::Embedding,
    };
    let calls = AtomicUsize::new(0);
    let should_continue = || calls.fetch_add(1, Ordering::Relaxed) < 2;
    let outcome = model.forward(&[row], &should_continue);
    assert_eq!(outcome, Err(EngineError::Cancelled));
    assert_eq!(calls.into_inner(), 3, "it stops at the first false");
}

#[test]
fn input_that_the_model_does_not_support_is_the_callers_error() {
    let mut model = load_encoder("tests/golden/bert-embedding", &options());
    let mut refused = |ids: Vec<u32>, output| {
        let type_ids = vec![0; ids.len()];
        let tokens = TokenRow {
            ids,
            type_ids,
            skipped: 0,
        };
        let row = TextRow {
            tokens: &tokens,
            output,
        };
        model.forward(&[row], &|| true).unwrap_err()
    };
    assert_eq!(
        refused(vec![2, 400, 3], TextOutput::Embedding),
        EngineError::UnknownTokenId { id: 400 }
    );
    assert!(matches!(
        refused(vec![], TextOutput::Embedding),
        EngineError::InvalidInput(_)
    ));
    assert!(matches!(
        refused(vec![2; 73], TextOutput::Embedding),
        EngineError::TooManyTokens { .. }
    ));
    assert!(matches!(
        refused(vec![2, 3], TextOutput::Logits),
        EngineError::UnsupportedOutput(_)
    ));
    assert!(refused(vec![], TextOutput::Embedding).is_callers_input());
}

#[test]
fn truncation_refuses_or_cuts_and_keeps_special_tokens() {
    let model = load_encoder("models/minilm/1", &options());
    let tokenizer = model.tokenizer();
    let long = format!("first {}last", "word ".repeat(400));
    let refused = tokenizer.encode(Text::Single(&long), Truncation::Refuse);
    assert_eq!(
        refused,
        Err(EngineError::TooManyTokens {
            tokens: 404,
            tokens_max: 256
        })
    );
    let ids = |truncation| {
        tokenizer
            .encode(Text::Single(&long), truncation)
            .unwrap()
            .ids
    };
    let word = |text| {
        tokenizer
            .encode(Text::Single(text), Truncation::Refuse)
            .unwrap()
            .ids[1]
    };
    let (right, left) = (ids(Truncation::Right), ids(Truncation::Left));
    assert_eq!(
        (right.len(), right[1], right[255]),
        (256, word("first"), 102)
    );
    assert_eq!((left.len(), left[0], left[254]), (256, 101, word("last")));
    let pair = tokenizer
        .encode(Text::Pair("short", &long), Truncation::Right)
        .unwrap();
    assert_eq!((pair.ids.len(), pair.ids[1]), (256, word("short")));
    assert_eq!(pair.type_ids[2..4], [0, 1]);
}

#[test]
fn tokens_have_offsets_and_decode_back() {
    let model = load_encoder("models/minilm/1", &options());
    let tokenizer = model.tokenizer();
    let text = "Paper 日本 lanterns";
    let tokens = tokenizer.tokens(text, true, &|| true).unwrap();
    let parts: Vec<_> = tokens
        .iter()
        .map(|token| (token.text.as_str(), token.start, token.stop))
        .collect();
    assert_eq!(parts[0], ("[CLS]", None, None));
    assert_eq!(parts[1], ("Paper", Some(0), Some(5)));
    assert_eq!(parts[3], ("本", Some(7), Some(8)));
    assert_eq!(parts[4], ("lanterns", Some(9), Some(17)));
    assert!(tokens[0].special && !tokens[1].special);
    let plain = tokenizer.tokens(text, false, &|| true).unwrap();
    assert_eq!(plain.len() + 2, tokens.len());
    let ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
    assert_eq!(
        tokenizer.decode(&ids, true).unwrap(),
        "paper 日 本 lanterns"
    );
    assert!(tokenizer.decode(&ids, false).unwrap().starts_with("[CLS]"));
    assert_eq!(
        tokenizer.decode(&[99_999], true),
        Err(EngineError::UnknownTokenId { id: 99_999 })
    );
}

#[test]
fn files_and_options_of_a_folder_are_honoured() {
    let folder = root().join("tests/golden/bert-dense");
    let model = load(&folder, &options()).unwrap();
    let card = model.card();
    assert_eq!((card.width, card.hidden, card.tokens_max), (12, 32, 60));
    assert_eq!(card.prompts["query"], "query: ");
    let lowered = LoadOptions {
        tokens_max: Some(8),
        ..options()
    };
    assert_eq!(load(&folder, &lowered).unwrap().card().tokens_max, 8);
    let other = LoadOptions {
        device: DeviceChoice::Cuda(0),
        ..options()
    };
    #[cfg(not(feature = "cuda"))]
    assert!(load(&folder, &other).is_err_and(|error| error.to_string().contains("no CUDA")));
    let other = LoadOptions {
        dtype: engine::Dtype::F16,
        ..other
    };
    let other = LoadOptions {
        device: DeviceChoice::Cpu,
        ..other
    };
    assert!(load(&folder, &other).is_err_and(|error| error.is_invalid_model()));
}
