//! Malformed and hostile model files: each is refused with a message that has its name and not its
//! path, and none makes the engine panic or allocate the sizes that it declares.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may fail, and its helpers with it"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use engine::{
    DeviceChoice, EngineError, LoadOptions, Model, ModelFolder, Task, Text, TextOutput, TextRow,
    Truncation, describe, load, load_from,
};
use proptest::prelude::*;
use serde_json::{Value, json};

const HIDDEN: usize = 4;
const WORDS: usize = 8;

/// A model folder of one test, removed when the test ends.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(self.0.parent().unwrap());
    }
}

impl Folder {
    /// A tiny valid model.
    fn valid() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("hostile-secret-{}-{count}", std::process::id());
        let folder = Self(std::env::temp_dir().join(name).join("model"));
        fs::create_dir_all(&folder.0).unwrap();
        folder.write("config.json", config().to_string());
        folder.write("tokenizer.json", tokenizer().to_string());
        folder.write("model.safetensors", checkpoint(&tensors()));
        folder
    }

    /// The same with all the files that may be beside those.
    fn with_sentence_files() -> Self {
        let folder = Self::valid();
        let types = "sentence_transformers.models.";
        let modules = json!([
            {"path": "", "type": format!("{types}Transformer")},
            {"path": "1_Pooling", "type": format!("{types}Pooling")},
            {"path": "2_Normalize", "type": format!("{types}Normalize")},
        ]);
        folder.write("modules.json", modules.to_string());
        fs::create_dir(folder.0.join("1_Pooling")).unwrap();
        let pooling = json!({"pooling_mode": ["mean", "cls"], "include_prompt": false,
            "embedding_dimension": HIDDEN});
        folder.write("1_Pooling/config.json", pooling.to_string());
        let tokenizer = json!({"model_max_length": 9, "do_lower_case": true,
            "truncation_side": "left", "model_input_names": ["input_ids", "token_type_ids"]});
        folder.write("tokenizer_config.json", tokenizer.to_string());
        let sentence = json!({"max_seq_length": 8, "do_lower_case": true});
        folder.write("sentence_bert_config.json", sentence.to_string());
        let prompts = json!({"model_type": "SentenceTransformer",
            "prompts": {"query": "one "}, "default_prompt_name": "query"});
        folder.write("config_sentence_transformers.json", prompts.to_string());
        folder
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.0.join(name), bytes).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.0.join(name)).unwrap();
    }

    fn load(&self) -> Result<Model, EngineError> {
        let options = LoadOptions {
            device: DeviceChoice::Cpu,
            ..LoadOptions::default()
        };
        load(&self.0, &options)
    }

    /// Asserts that loading fails because of this file, and returns the error message.
    fn refused(&self, file: &str) -> String {
        let error = self.load().err().expect("the folder should be refused");
        let sentence = error.to_string();
        let EngineError::InvalidFile { file: named, .. } = error else {
            panic!("{sentence}");
        };
        assert_eq!(named, file, "{sentence}");
        assert!(!sentence.contains("secret"), "the path is in: {sentence}");
        sentence
    }
}

fn config() -> Value {
    json!({
        "model_type": "bert", "hidden_size": HIDDEN, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 6, "vocab_size": WORDS,
        "max_position_embeddings": 10, "type_vocab_size": 2, "hidden_act": "gelu",
    })
}

fn tokenizer() -> Value {
    let words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "one", "two"];
    let vocabulary: serde_json::Map<String, Value> = words
        .iter()
        .enumerate()
        .map(|(id, word)| ((*word).to_owned(), json!(id)))
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "decoder": null,
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    })
}

fn tensors() -> Vec<(String, Vec<usize>)> {
    let mut tensors = vec![
        (
            "embeddings.word_embeddings.weight".to_owned(),
            vec![WORDS, HIDDEN],
        ),
        (
            "embeddings.position_embeddings.weight".to_owned(),
            vec![10, HIDDEN],
        ),
        (
            "embeddings.token_type_embeddings.weight".to_owned(),
            vec![2, HIDDEN],
        ),
    ];
    let mut pair = |name: &str, outputs: usize, inputs: Option<usize>| {
        let weight = [Some(outputs), inputs].into_iter().flatten().collect();
        tensors.push((format!("{name}.weight"), weight));
        tensors.push((format!("{name}.bias"), vec![outputs]));
    };
    pair("embeddings.LayerNorm", HIDDEN, None);
    for name in ["self.query", "self.key", "self.value", "output.dense"] {
        pair(
            &format!("encoder.layer.0.attention.{name}"),
            HIDDEN,
            Some(HIDDEN),
        );
    }
    pair("encoder.layer.0.attention.output.LayerNorm", HIDDEN, None);
    pair("encoder.layer.0.intermediate.dense", 6, Some(HIDDEN));
    pair("encoder.layer.0.output.dense", HIDDEN, Some(6));
    pair("encoder.layer.0.output.LayerNorm", HIDDEN, None);
    tensors
}

fn header(tensors: &[(String, Vec<usize>)]) -> (Value, usize) {
    let mut end = 0;
    let mut header = serde_json::Map::new();
    for (name, shape) in tensors {
        let begin = end;
        end += 4 * shape.iter().product::<usize>();
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]});
        header.insert(name.clone(), entry);
    }
    (Value::Object(header), end)
}

fn safetensors(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend((0..data_bytes / 4).flat_map(|index| ((index % 7) as f32 * 0.1).to_le_bytes()));
    bytes
}

fn checkpoint(tensors: &[(String, Vec<usize>)]) -> Vec<u8> {
    let (header, data_bytes) = header(tensors);
    safetensors(&header.to_string(), data_bytes)
}

#[test]
fn a_valid_folder_loads_and_computes() {
    let Model::Encoder(mut model) = Folder::valid().load().unwrap() else {
        panic!("an encoder is expected");
    };
    let tokens = model
        .tokenizer()
        .encode(Text::Single("one a two"), Truncation::Refuse)
        .unwrap();
    assert_eq!(tokens.ids, [2, 6, 4, 7, 3]);
    let row = TextRow {
        tokens: &tokens,
        output: TextOutput::Embedding,
    };
    let output = model.forward(&[row], &|| true).unwrap();
    assert_eq!(output[0].len(), HIDDEN);
    assert!(output[0].iter().all(|value| value.is_finite()));
}

#[test]
fn the_files_that_are_mutated_are_valid() {
    let Model::Encoder(model) = Folder::with_sentence_files().load().unwrap() else {
        panic!("an encoder is expected");
    };
    let card = model.card();
    assert_eq!((card.width, card.tokens_max), (2 * HIDDEN, 8));
}

#[test]
fn pickles_are_refused_by_their_first_bytes() {
    let archive = b"PK\x03\x04archive/data.pkl".as_slice();
    let old = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.".as_slice();
    for pickle in [archive, old] {
        let folder = Folder::valid();
        folder.write("model.safetensors", pickle);
        assert!(folder.refused("model.safetensors").contains("pickle"));
        folder.remove("model.safetensors");
        folder.write("pytorch_model.bin", pickle);
        assert!(folder.refused("pytorch_model.bin").contains("safetensors"));
        let folder = Folder::valid();
        folder.write("config.json", pickle);
        assert!(folder.refused("config.json").contains("pickle"));
    }
}

#[test]
fn missing_files_are_named() {
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let folder = Folder::valid();
        folder.remove(name);
        folder.refused(name);
    }
    let nowhere = Folder::valid().0.join("nowhere");
    let error = load(&nowhere, &LoadOptions::default()).err().unwrap();
    assert!(!error.to_string().contains("secret"), "{error}");
}

#[test]
fn malformed_headers_are_refused() {
    let valid = tensors();
    let (whole, data_bytes) = header(&valid);
    let word = "embeddings.word_embeddings.weight";
    let changed = |key: &str, value: Value| {
        let mut header = whole.clone();
        header[word][key] = value;
        safetensors(&header.to_string(), data_bytes)
    };
    let huge = u64::MAX;
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("short", vec![1, 2, 3]),
        ("length past the end", huge.to_le_bytes().to_vec()),
        ("length and nothing", 8u64.to_le_bytes().to_vec()),
        ("no json", safetensors("not json", 0)),
        ("an array", safetensors("[]", 0)),
        (
            "bytes behind the tensors",
            safetensors(&whole.to_string(), data_bytes + 4),
        ),
        (
            "bytes missing",
            safetensors(&whole.to_string(), data_bytes - 4),
        ),
        ("overflowing shape", changed("shape", json!([huge, huge]))),
        (
            "shape and offsets disagree",
            changed("shape", json!([WORDS, HIDDEN + 1])),
        ),
        ("negative shape", changed("shape", json!([-1, HIDDEN]))),
        (
            "too many dimensions",
            changed("shape", json!([1, 1, 1, 1, 1, 1, 1, WORDS, HIDDEN])),
        ),
        ("unknown format", changed("dtype", json!("F7"))),
        ("another format's size", changed("dtype", json!("F16"))),
        ("reversed offsets", changed("data_offsets", json!([128, 0]))),
        (
            "offsets past the end",
            changed("data_offsets", json!([huge - 128, huge])),
        ),
        ("shared bytes", changed("data_offsets", json!([4, 132]))),
        ("deep nesting", safetensors(&"[".repeat(200_000), 0)),
    ];
    for (what, bytes) in cases {
        let folder = Folder::valid();
        folder.write("model.safetensors", bytes);
        println!("{what}: {}", folder.refused("model.safetensors"));
    }
}

#[test]
fn tensors_that_are_missing_or_of_another_shape_are_named() {
    for index in 0..tensors().len() {
        let mut fewer = tensors();
        let (name, _) = fewer.remove(index);
        let folder = Folder::valid();
        folder.write("model.safetensors", checkpoint(&fewer));
        assert!(folder.refused("model.safetensors").contains(&name));

        let mut other = tensors();
        other[index].1[0] += 1;
        folder.write("model.safetensors", checkpoint(&other));
        assert!(folder.refused("model.safetensors").contains(&name));
    }
}

#[test]
fn absurd_sizes_in_the_configuration_are_refused_before_they_are_used() {
    let huge = json!(u64::MAX);
    for (key, value) in [
        ("hidden_size", json!(0)),
        ("hidden_size", huge.clone()),
        ("hidden_size", json!(-4)),
        ("hidden_size", json!("4")),
        ("num_hidden_layers", json!(1_000_000_000)),
        ("num_hidden_layers", json!(0)),
        ("num_attention_heads", json!(0)),
        ("num_attention_heads", json!(3)),
        ("intermediate_size", huge.clone()),
        ("vocab_size", huge.clone()),
        ("vocab_size", Value::Null),
        ("max_position_embeddings", huge.clone()),
        ("max_position_embeddings", json!(2)),
        ("type_vocab_size", huge),
        ("layer_norm_eps", json!(-1.0)),
        ("hidden_act", json!("nonsense")),
        ("model_type", json!("gpt9")),
        ("is_decoder", json!(true)),
        ("id2label", json!({"7": "seven"})),
        ("position_embedding_type", json!("relative_key")),
    ] {
        // The position table must agree with the smaller limit, so that it is the limit that fails.
        let mut tensors = tensors();
        if key == "max_position_embeddings" {
            tensors[1].1[0] = 2;
        }
        let folder = Folder::valid();
        folder.write("model.safetensors", checkpoint(&tensors));
        let mut config = config();
        config[key] = value.clone();
        folder.write("config.json", config.to_string());
        let sentence = folder.refused("config.json");
        println!("{key} {value}: {sentence}");
        assert!(sentence.contains(key), "the key is named: {sentence}");
    }
    // An unsupported model is refused as such, whatever its other keys hold.
    let folder = Folder::valid();
    for config in [
        json!({"model_type": "gpt9", "hidden_size": "many", "id2label": [], "is_decoder": true}),
        json!({"model_type": "gpt9"}),
        json!({"hidden_size": 0}),
    ] {
        folder.write("config.json", config.to_string());
        let sentence = folder.refused("config.json");
        assert!(sentence.contains("model_type"), "{sentence}");
        assert!(
            sentence.contains("bert, roberta, xlm-roberta"),
            "{sentence}"
        );
    }
    // A family refuses by the names that it has for its own keys.
    let distilbert = json!({
        "model_type": "distilbert", "dim": HIDDEN, "n_layers": 1, "n_heads": 3, "hidden_dim": 6,
        "vocab_size": WORDS, "max_position_embeddings": 10,
    });
    folder.write("config.json", distilbert.to_string());
    assert!(
        folder
            .refused("config.json")
            .contains("multiple of n_heads")
    );
    folder.write("config.json", vec![b' '; 5 << 20]);
    assert!(folder.refused("config.json").contains("at most"));
}

#[test]
fn tokenizers_that_disagree_with_the_model_are_refused() {
    let folder = Folder::valid();
    let mut other = tokenizer();
    other["model"]["vocab"]["beyond"] = json!(4_000_000_000u32);
    folder.write("tokenizer.json", other.to_string());
    assert!(folder.refused("tokenizer.json").contains("vocabulary"));

    let mut other = tokenizer();
    other["post_processor"]["cls"] = json!(["[CLS]", 99]);
    folder.write("tokenizer.json", other.to_string());
    folder.refused("tokenizer.json");

    for bytes in ["", "{}", "null", "{\"version\":\"1.0\",\"model\":{}}"] {
        folder.write("tokenizer.json", bytes);
        folder.refused("tokenizer.json");
    }
}

#[cfg(unix)]
#[test]
fn links_out_of_the_repository_and_odd_files_are_refused() {
    use std::os::unix::fs::symlink;
    let outside = Folder::valid();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let folder = Folder::valid();
        folder.remove(name);
        symlink(outside.0.join(name), folder.0.join(name)).unwrap();
        assert!(folder.refused(name).contains("link out of"));
        folder.remove(name);
        fs::create_dir(folder.0.join(name)).unwrap();
        folder.refused(name);
    }
}

/// The files that a model has to have.
const FILES: [&str; 3] = ["config.json", "tokenizer.json", "model.safetensors"];

/// A folder whose files link to those of a valid one.
#[cfg(unix)]
fn linked(valid: &Path, folder: &Path) -> ModelFolder {
    fs::create_dir_all(folder).unwrap();
    for name in FILES {
        std::os::unix::fs::symlink(valid.join(name), folder.join(name)).unwrap();
    }
    ModelFolder::bare(folder)
}

#[cfg(unix)]
#[test]
fn links_lead_as_far_as_the_repository_and_no_further() {
    let root = Folder::valid();
    let options = LoadOptions::default();
    // A version may link to another model of its own repository.
    let mut version = linked(&root.0, &root.0.join("other").join("1"));
    version.boundary = Some(root.0.clone());
    assert!(load_from(&version, &options).is_ok());
    version.boundary = Some(root.0.join("other"));
    let refused = |folder: &ModelFolder| load_from(folder, &options).err().unwrap().to_string();
    assert!(refused(&version).contains("link out of"));
    // A bare folder may not, whatever its name and those above it.
    for name in ["1", "model/1", "snapshots/1", "else/snapshots/1"] {
        let bare = linked(&root.0, &root.0.join("bare").join(name));
        assert!(refused(&bare).contains("link out of"), "{name}");
    }
    // But in a Hub's cache, to the files of its own model.
    let cache = Folder::valid();
    let blobs = cache.0.join("models--own--model/blobs");
    fs::create_dir_all(&blobs).unwrap();
    for name in FILES {
        fs::rename(cache.0.join(name), blobs.join(name)).unwrap();
    }
    let own = cache.0.join("models--own--model/snapshots/0a1b");
    assert!(load_from(&linked(&blobs, &own), &options).is_ok());
    let other = cache.0.join("models--other/snapshots/0a1b");
    assert!(refused(&linked(&blobs, &other)).contains("link out of"));
}

/// What was read of each file: offsets and bytes.
type Reads = BTreeMap<String, Vec<(u64, Vec<u8>)>>;

#[test]
fn everything_that_is_read_is_observed() {
    let folder = Folder::valid();
    let all: Arc<Mutex<Reads>> = Arc::default();
    let seen = all.clone();
    let source = ModelFolder {
        observe: Some(Arc::new(move |name, offset, bytes| {
            let mut seen = seen.lock().unwrap();
            let reads = seen.entry(name.to_owned()).or_default();
            reads.push((offset, bytes.to_vec()));
        })),
        ..ModelFolder::bare(&folder.0)
    };
    load_from(&source, &LoadOptions::default()).unwrap();
    let all = all.lock().unwrap();
    for name in FILES {
        let file = fs::read(folder.0.join(name)).unwrap();
        let mut covered = vec![false; file.len()];
        for (offset, bytes) in &all[name] {
            let offset = usize::try_from(*offset).unwrap();
            let range = offset..offset + bytes.len();
            assert_eq!(file[range.clone()], bytes[..], "{name}");
            covered[range].fill(true);
        }
        // The length of a header is in the offsets of all others.
        let from = if name == "model.safetensors" { 8 } else { 0 };
        assert!(covered[from..].iter().all(|it| *it), "{name}");
    }
}

#[test]
fn shards_are_plain_names_of_the_same_folder() {
    let all = tensors();
    let (first, second) = all.split_at(9);
    let names = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ];
    let index = |name: &str| {
        let map: serde_json::Map<String, Value> = all
            .iter()
            .enumerate()
            .map(|(index, (tensor, _))| {
                (
                    tensor.clone(),
                    json!(if index < 9 { name } else { names[1] }),
                )
            })
            .collect();
        json!({"metadata": {}, "weight_map": map}).to_string()
    };
    let folder = Folder::valid();
    folder.remove("model.safetensors");
    folder.write(names[0], checkpoint(first));
    folder.write(names[1], checkpoint(second));
    folder.write("model.safetensors.index.json", index(names[0]));
    folder.load().unwrap();
    for bad in [
        "../model.safetensors",
        "/etc/model.safetensors",
        "..",
        "a/b.safetensors",
        "x.bin",
        "",
    ] {
        folder.write("model.safetensors.index.json", index(bad));
        folder.refused("model.safetensors.index.json");
    }
    folder.write("model.safetensors.index.json", index("gone.safetensors"));
    folder.refused("gone.safetensors");
}

#[test]
fn tasks_that_the_model_does_not_support_are_refused() {
    let folder = Folder::valid();
    for (task, file) in [
        (Task::Rerank, "config.json"),
        (Task::Tabular, "config.json"),
        (Task::Classification, "model.safetensors"),
    ] {
        let options = LoadOptions {
            task: Some(task),
            ..LoadOptions::default()
        };
        match load(&folder.0, &options) {
            Err(EngineError::InvalidFile { file: named, .. }) => assert_eq!(named, file),
            _ => panic!("{task} should be refused"),
        }
    }
}

/// Loads a folder that may be malformed; if it loads, a forward pass must succeed or fail with an
/// error.
fn load_and_run(folder: &Folder) {
    let loaded = folder.load();
    let described = describe(&ModelFolder::bare(&folder.0), &LoadOptions::default());
    // The tensors are not read for a description, which is served or not as the rest is.
    assert!(described.is_served() || loaded.is_err(), "{described:?}");
    let Ok(Model::Encoder(mut model)) = loaded else {
        return;
    };
    let pair = Text::Pair("one a", "two b");
    let Ok(tokens) = model.tokenizer().encode(pair, Truncation::Right) else {
        return;
    };
    for output in [TextOutput::Embedding, TextOutput::Logits] {
        let row = TextRow {
            tokens: &tokens,
            output,
        };
        let _ = model.forward(&[row], &|| true);
    }
}

fn mutate(path: &Path, edits: &[(prop::sample::Index, u8)], cut: Option<prop::sample::Index>) {
    let mut bytes = fs::read(path).unwrap();
    for (index, value) in edits {
        let index = index.index(bytes.len());
        bytes[index] = *value;
    }
    if let Some(cut) = cut {
        bytes.truncate(cut.index(bytes.len()));
    }
    fs::write(path, bytes).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_mutation_makes_a_panic(
        file in prop::sample::select(vec![
            "config.json", "tokenizer.json", "model.safetensors", "modules.json",
            "1_Pooling/config.json", "tokenizer_config.json", "sentence_bert_config.json",
            "config_sentence_transformers.json",
        ]),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in prop::option::weighted(0.3, any::<prop::sample::Index>()),
    ) {
        let folder = Folder::with_sentence_files();
        mutate(&folder.0.join(file), &edits, cut);
        load_and_run(&folder);
    }

    #[test]
    fn no_number_in_the_configuration_makes_a_panic(
        key in prop::sample::select(vec![
            "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "vocab_size", "max_position_embeddings", "type_vocab_size", "pad_token_id",
        ]),
        value in prop_oneof![0u64..20, any::<u64>(), Just(u64::from(u32::MAX))],
        family in prop::sample::select(vec!["bert", "roberta", "distilbert", "modernbert"]),
    ) {
        let folder = Folder::valid();
        let mut config = config();
        config["model_type"] = json!(family);
        // The one key that DistilBERT knows by its own name alone.
        if family == "distilbert" {
            config["hidden_dim"] = config["intermediate_size"].clone();
        }
        let key = if family == "distilbert" && key == "intermediate_size" { "hidden_dim" } else { key };
        config[key] = json!(value);
        folder.write("config.json", config.to_string());
        load_and_run(&folder);
    }
}
