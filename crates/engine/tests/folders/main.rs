//! Model folders whose files change the numbers: each is served as what it says, or refused with
//! what to do. A wrong vector looks like a right one.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may fail, and its helpers with it"
)]

mod golden;
mod scores;
mod tokenizers;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use engine::{
    Card, DeviceChoice, Dtype, EncoderModel, EngineError, LoadOptions, Model, ModelFolder,
    Overrides, PoolingMode, ScoreActivation, Side, Task, Text, TextOutput, TextRow, Truncation,
    describe, load, normalize,
};
use serde_json::{Value, json};

const OLD: &str = "sentence_transformers.models.";
const BASE: &str = "sentence_transformers.base.modules.";
const OWN: &str = "sentence_transformers.sentence_transformer.modules.";

/// A copy of a golden folder, removed when the test ends.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Folder {
    /// The files of a Hugging Face folder without those of sentence-transformers.
    fn copy(golden: &str) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("andon-folders-{}-{count}", std::process::id());
        let folder = Self(std::env::temp_dir().join(name));
        fs::create_dir_all(&folder.0).unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
        for file in ["config.json", "tokenizer.json", "model.safetensors"] {
            fs::copy(source.join(golden).join(file), folder.0.join(file)).unwrap();
        }
        folder
    }

    fn write(&self, name: &str, value: &Value) {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, value.to_string()).unwrap();
    }

    /// Changes keys of a JSON file.
    fn change(&self, name: &str, changes: &Value) {
        let bytes = fs::read(self.0.join(name)).unwrap();
        let mut value: Value = serde_json::from_slice(&bytes).unwrap();
        for (key, change) in changes.as_object().unwrap() {
            value[key] = change.clone();
        }
        self.write(name, &value);
    }

    /// Writes `modules.json`: an encoder, and modules by their types and folders.
    fn modules(&self, modules: &[(&str, &str)]) {
        let encoder = [(format!("{OLD}Transformer"), "")];
        let others = modules
            .iter()
            .map(|(kind, path)| ((*kind).to_owned(), *path));
        let all: Vec<Value> = encoder
            .into_iter()
            .chain(others)
            .map(|(kind, path)| json!({"path": path, "type": kind}))
            .collect();
        self.write("modules.json", &json!(all));
    }

    /// Writes a linear layer without a bias that swaps and scales the first two dimensions, and
    /// forgets the others.
    fn dense(&self, path: &str, more: &Value) {
        let mut config = json!({
            "in_features": 32, "out_features": 2, "bias": false,
            "activation_function": "torch.nn.modules.linear.Identity",
        });
        for (key, value) in more.as_object().unwrap() {
            config[key] = value.clone();
        }
        self.write(&format!("{path}/config.json"), &config);
        let header = json!({
            "linear.weight": {"dtype": "F32", "shape": [2, 32], "data_offsets": [0, 256]},
        });
        let header = header.to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        for index in 0..64 {
            let weight = match index {
                1 => 2.0f32,
                32 => 3.0,
                _ => 0.0,
            };
            bytes.extend_from_slice(&weight.to_le_bytes());
        }
        fs::write(self.0.join(path).join("model.safetensors"), bytes).unwrap();
    }

    fn load(&self, change: impl FnOnce(&mut LoadOptions)) -> Result<EncoderModel, EngineError> {
        match load(&self.0, &options(change))? {
            Model::Encoder(model) => Ok(*model),
            Model::Tabular(_) => panic!("an encoder is expected"),
        }
    }

    fn loaded(&self) -> EncoderModel {
        self.load(|_| ()).unwrap()
    }

    fn card(&self) -> Card {
        self.loaded().card().clone()
    }

    /// The sentence of a refusal because of this file, which describing the folder says too.
    fn refused(&self, file: &str) -> String {
        let error = self
            .load(|_| ())
            .err()
            .expect("the folder should be refused");
        let sentence = error.to_string();
        let EngineError::InvalidFile { file: named, .. } = &error else {
            panic!("{sentence}");
        };
        assert_eq!(named, file, "{sentence}");
        let described = describe(&ModelFolder::bare(&self.0), &options(|_| ()));
        assert!(described.problems.contains(&error), "{described:?}");
        sentence
    }
}

fn options(change: impl FnOnce(&mut LoadOptions)) -> LoadOptions {
    let mut options = LoadOptions {
        device: DeviceChoice::Cpu,
        dtype: Dtype::F32,
        ..LoadOptions::default()
    };
    change(&mut options);
    options
}

const TEXT: &str = "Workers scale on their own.";

fn output(model: &mut EncoderModel, text: Text<'_>, output: TextOutput) -> Vec<f32> {
    let tokens = model.tokenizer().encode(text, Truncation::Refuse).unwrap();
    let row = TextRow {
        tokens: &tokens,
        output,
    };
    model.forward(&[row], &|| true).unwrap().swap_remove(0)
}

fn embedding(model: &mut EncoderModel) -> Vec<f32> {
    output(model, Text::Single(TEXT), TextOutput::Embedding)
}

fn assert_near(actual: &[f32], expected: &[f32]) {
    assert_eq!(actual.len(), expected.len());
    for (actual, expected) in actual.iter().zip(expected) {
        assert!(
            (actual - expected).abs() < 1e-4,
            "{actual} is not {expected}"
        );
    }
}

#[test]
fn modules_are_known_by_their_whole_names_old_and_new() {
    let folder = Folder::copy("bert-embedding");
    folder.write("1_Pooling/config.json", &json!({"pooling_mode": "cls"}));
    for pooling in [
        format!("{OLD}Pooling"),
        format!("{OWN}pooling.Pooling"),
        format!("{OWN}Pooling"),
    ] {
        folder.modules(&[
            (pooling.as_str(), "1_Pooling"),
            (format!("{BASE}normalize.Normalize").as_str(), "2"),
        ]);
        assert_eq!(folder.card().width, 32);
    }
    for (other, what) in [
        ("pylate.models.Dense.Dense", "ColBERT"),
        (
            "sentence_transformers.sparse_encoder.models.SpladePooling",
            "SPLADE",
        ),
        ("custom_st.Transformer", "code"),
        ("x.Pooling", "code"),
        ("sentence_transformers.models.CNN", "CNN"),
        (
            "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
            "LogitScore",
        ),
    ] {
        folder.modules(&[(other, "1_Pooling")]);
        let sentence = folder.refused("modules.json");
        assert!(sentence.contains(what), "{sentence}");
    }
}

#[test]
fn modules_run_in_the_order_of_their_list() {
    let folder = Folder::copy("bert-embedding");
    let pooling = (format!("{OLD}Pooling"), "1_Pooling");
    let dense = (format!("{OLD}Dense"), "2_Dense");
    let scale = (format!("{OLD}Normalize"), "3_Normalize");
    folder.write(
        "1_Pooling/config.json",
        &json!({"pooling_mode_mean_tokens": true}),
    );
    folder.dense("2_Dense", &json!({}));
    let list = |folder: &Folder, order: &[&(String, &'static str)]| {
        let order: Vec<(&str, &str)> = order
            .iter()
            .map(|(kind, path)| (kind.as_str(), *path))
            .collect();
        folder.modules(&order);
        embedding(&mut folder.loaded())
    };
    let mut pooled = list(&folder, &[&pooling]);
    let expected = |pooled: &[f32]| [pooled[1] * 2.0, pooled[0] * 3.0];
    assert_near(&list(&folder, &[&pooling, &dense]), &expected(&pooled));
    // Whether the last vector is scaled is a choice of the request.
    assert_near(
        &list(&folder, &[&pooling, &dense, &scale]),
        &expected(&pooled),
    );
    normalize(&mut pooled);
    assert_near(
        &list(&folder, &[&pooling, &scale, &dense]),
        &expected(&pooled),
    );
    // On tokens, before they are pooled.
    folder.dense("2_Dense", &json!({"module_input_name": "token_embeddings"}));
    let tokens = {
        fs::remove_file(folder.0.join("modules.json")).unwrap();
        output(
            &mut folder.loaded(),
            Text::Single(TEXT),
            TextOutput::TokenEmbeddings,
        )
    };
    let rows: Vec<[f32; 2]> = tokens.chunks(32).map(expected).collect();
    let mean = |index: usize| rows.iter().map(|row| row[index]).sum::<f32>() / rows.len() as f32;
    assert_near(&list(&folder, &[&dense, &pooling]), &[mean(0), mean(1)]);
    let mut model = folder.loaded();
    assert_eq!((model.card().width, model.card().hidden), (2, 2));
    let states = output(&mut model, Text::Single(TEXT), TextOutput::TokenEmbeddings);
    assert_near(&states, &rows.concat());
}

#[test]
fn modules_that_cannot_run_in_their_place_are_refused() {
    let folder = Folder::copy("bert-embedding");
    let (pooling, dense, scale) = (
        format!("{OLD}Pooling"),
        format!("{OLD}Dense"),
        format!("{OLD}Normalize"),
    );
    folder.write("1_Pooling/config.json", &json!({"pooling_mode": "mean"}));
    folder.dense("2_Dense", &json!({}));
    folder.modules(&[(dense.as_str(), "2_Dense"), (pooling.as_str(), "1_Pooling")]);
    assert!(
        folder
            .refused("2_Dense/config.json")
            .contains("token_embeddings")
    );
    folder.modules(&[
        (scale.as_str(), "3_Normalize"),
        (pooling.as_str(), "1_Pooling"),
    ]);
    assert!(
        folder
            .refused("3_Normalize/config.json")
            .contains("before the Pooling")
    );
    folder.modules(&[
        (pooling.as_str(), "1_Pooling"),
        (pooling.as_str(), "1_Pooling"),
    ]);
    assert!(folder.refused("modules.json").contains("two Poolings"));
    folder.modules(&[]);
    assert!(
        folder
            .refused("modules.json")
            .contains("set pooling in andon.toml")
    );
    folder.dense("2_Dense", &json!({"use_residual": true}));
    folder.modules(&[(pooling.as_str(), "1_Pooling"), (dense.as_str(), "2_Dense")]);
    assert!(
        folder
            .refused("2_Dense/config.json")
            .contains("use_residual")
    );
    let entries = json!([{"path": "", "type": pooling}]);
    folder.write("modules.json", &entries);
    assert!(
        folder
            .refused("modules.json")
            .contains("begin with a Transformer")
    );
    for path in ["../1_Pooling", "/etc"] {
        folder.modules(&[(pooling.as_str(), path)]);
        assert!(folder.refused("modules.json").contains("path of a module"));
    }
    // No folder is the model's own, and never the root of all.
    folder.modules(&[(pooling.as_str(), "")]);
    assert!(folder.refused("config.json").contains("pooling_mode"));
    for config in [
        json!({"pooling_mode": "first"}),
        json!({"pooling_mode": []}),
        json!({}),
    ] {
        folder.write("1_Pooling/config.json", &config);
        folder.modules(&[(pooling.as_str(), "1_Pooling")]);
        let sentence = folder.refused("1_Pooling/config.json");
        assert!(sentence.contains("weightedmean"), "{sentence}");
    }
}

#[test]
fn several_poolings_lie_side_by_side_in_the_order_of_the_library() {
    let folder = Folder::copy("bert-embedding");
    folder.modules(&[(format!("{OLD}Pooling").as_str(), "1_Pooling")]);
    let with = |config: Value| {
        folder.write("1_Pooling/config.json", &config);
        embedding(&mut folder.loaded())
    };
    let (mean, cls) = (
        with(json!({"pooling_mode_mean_tokens": true})),
        with(json!({"pooling_mode_cls_token": true})),
    );
    assert_ne!(mean, cls);
    let switches = json!({"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true});
    assert_near(&with(switches), &[cls.clone(), mean.clone()].concat());
    let listed = with(json!({"pooling_mode": ["mean", "cls"]}));
    assert_near(&listed, &[mean, cls].concat());
    assert_eq!(folder.card().width, 64);
}

#[test]
fn a_prompt_is_left_out_of_pooling_where_the_files_say_so() {
    let folder = Folder::copy("bert-embedding");
    folder.modules(&[(format!("{OLD}Pooling").as_str(), "1_Pooling")]);
    let config = json!({"pooling_mode": "mean", "include_prompt": false});
    folder.write("1_Pooling/config.json", &config);
    let mut model = folder.loaded();
    let text = Text::Single("the line stopped when the lamp turned red");
    let skipped = model.tokenizer().skipped("the line stopped").unwrap();
    let mut tokens = model.tokenizer().encode(text, Truncation::Refuse).unwrap();
    assert!(skipped > 3 && skipped < tokens.ids.len() - 1);
    let states = output(&mut model, text, TextOutput::TokenEmbeddings);
    tokens.skipped = skipped;
    let row = TextRow {
        tokens: &tokens,
        output: TextOutput::Embedding,
    };
    let pooled = model.forward(&[row], &|| true).unwrap().swap_remove(0);
    let rows: Vec<&[f32]> = states.chunks(32).skip(skipped).collect();
    let mean = |index: usize| rows.iter().map(|row| row[index]).sum::<f32>() / rows.len() as f32;
    let expected: Vec<f32> = (0..32).map(mean).collect();
    assert_near(&pooled, &expected);
    assert_eq!(
        Folder::copy("bert-embedding")
            .loaded()
            .tokenizer()
            .skipped("red"),
        Ok(0)
    );
}

#[test]
fn cross_encoders_score_whichever_version_saved_them() {
    for (golden, task) in [
        ("bert-rerank", Task::Rerank),
        ("bert-classification", Task::Classification),
    ] {
        let folder = Folder::copy(golden);
        let old = folder.card();
        assert_eq!(old.task, task);
        folder.write(
            "modules.json",
            &json!([{"idx": 0, "name": "0", "path": "", "type": format!("{BASE}transformer.Transformer")}]),
        );
        let config = json!({"model_type": "CrossEncoder", "prompts": {}, "default_prompt_name": null,
            "activation_fn": "torch.nn.modules.activation.Sigmoid"});
        folder.write("config_sentence_transformers.json", &config);
        let new = folder.card();
        assert_eq!((new.task, new.width), (task, old.width));
        assert_eq!(new.outputs, old.outputs);
    }
}

#[test]
fn other_kinds_of_models_are_refused_by_name() {
    let folder = Folder::copy("bert-embedding");
    for (kind, what) in [
        ("SparseEncoder", "SPLADE"),
        ("ColBERT", "ColBERT"),
        ("MultiVectorEncoder", "ColBERT"),
        ("Whatever", "must be SentenceTransformer or CrossEncoder"),
    ] {
        folder.write(
            "config_sentence_transformers.json",
            &json!({"model_type": kind}),
        );
        let sentence = folder.refused("config_sentence_transformers.json");
        assert!(sentence.contains(what), "{sentence}");
    }
    folder.write("config_sentence_transformers.json", &json!({}));
    for (class, what) in [
        ("BertForMaskedLM", "masked language modelling"),
        ("BertForTokenClassification", "token classification"),
        ("BertForQuestionAnswering", "question answering"),
        ("BertForMultipleChoice", "multiple choice"),
        ("BertLMHeadModel", "text generation"),
        ("BertForSomethingNew", "another task"),
        ("HF_ColBERT", "ColBERT"),
    ] {
        folder.change("config.json", &json!({"architectures": [class]}));
        let sentence = folder.refused("config.json");
        assert!(sentence.contains(what), "{class}: {sentence}");
    }
    // A person may serve the encoder without the head, and so do the modules of a folder.
    folder.change(
        "config.json",
        &json!({"architectures": ["BertForMaskedLM"]}),
    );
    let embeds = folder.load(|options| options.task = Some(Task::Embedding));
    assert_eq!(embeds.unwrap().card().task, Task::Embedding);
    folder.modules(&[(format!("{OLD}Pooling").as_str(), "1_Pooling")]);
    folder.write("1_Pooling/config.json", &json!({"pooling_mode": "mean"}));
    assert_eq!(folder.card().task, Task::Embedding);
}

#[test]
fn a_head_without_a_name_is_not_dropped() {
    let folder = Folder::copy("bert-classification");
    folder.change("config.json", &json!({"architectures": null}));
    let sentence = folder.refused("model.safetensors");
    assert!(
        sentence.contains("classifier") && sentence.contains("task"),
        "{sentence}"
    );
    let scores = folder.load(|options| options.task = Some(Task::Classification));
    assert_eq!(scores.unwrap().card().labels.len(), 3);
}

#[test]
fn code_of_a_folder_and_adapters_are_refused() {
    let folder = Folder::copy("bert-embedding");
    folder.change("config.json", &json!({"auto_map": {}}));
    folder.loaded();
    let map = json!({"auto_map": {"AutoModel": "modeling_own.OwnModel"}});
    folder.change("config.json", &map);
    assert!(folder.refused("config.json").contains("auto_map"));
    // An unsupported model is refused as such before anything else of it is looked at.
    folder.change(
        "config.json",
        &json!({"model_type": "nomic_bert", "hidden_size": 0}),
    );
    assert!(
        folder
            .refused("config.json")
            .contains("model_type 'nomic_bert'")
    );
    let folder = Folder::copy("bert-embedding");
    folder.write("tokenizer_config.json", &map);
    assert!(folder.refused("tokenizer_config.json").contains("auto_map"));
    let folder = Folder::copy("bert-embedding");
    folder.write("adapter_config.json", &json!({"peft_type": "LORA"}));
    assert!(folder.refused("adapter_config.json").contains("merge"));
}

#[test]
fn files_that_are_missing_have_a_sentence_with_what_to_do() {
    let folder = Folder::copy("bert-embedding");
    fs::rename(folder.0.join("tokenizer.json"), folder.0.join("vocab.txt")).unwrap();
    let sentence = folder.refused("tokenizer.json");
    assert!(
        sentence.contains("vocab.txt") && sentence.contains("save_pretrained"),
        "{sentence}"
    );
    let folder = Folder::copy("bert-embedding");
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    for name in ["tokenizer.json", "model.safetensors"] {
        fs::write(folder.0.join(name), pointer).unwrap();
        assert!(folder.refused(name).contains("git lfs pull"));
    }
    let folder = Folder::copy("bert-embedding");
    fs::create_dir(folder.0.join("0_Transformer")).unwrap();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        fs::rename(
            folder.0.join(name),
            folder.0.join("0_Transformer").join(name),
        )
        .unwrap();
    }
    assert!(folder.refused("modules.json").contains("0_Transformer"));
    for (kind, path) in [("Transformer", "0_RoBERTa"), ("StaticEmbedding", "")] {
        let module = json!({"path": path, "type": format!("{OLD}{kind}")});
        folder.write("modules.json", &json!([module]));
        let sentence = folder.refused("modules.json");
        assert!(
            sentence.contains(path) && sentence.contains(kind),
            "{sentence}"
        );
    }
}

#[test]
fn a_missing_padding_id_of_roberta_is_one() {
    let folder = Folder::copy("roberta-embedding");
    let with = embedding(&mut folder.loaded());
    let bytes = fs::read(folder.0.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(
        config.as_object_mut().unwrap().remove("pad_token_id"),
        Some(json!(1))
    );
    folder.write("config.json", &config);
    assert_eq!(embedding(&mut folder.loaded()), with);
    folder.change("config.json", &json!({"pad_token_id": 0}));
    assert_ne!(embedding(&mut folder.loaded()), with);
}

#[test]
fn a_person_says_what_the_files_do_not() {
    let folder = Folder::copy("bert-embedding");
    let overrides = Overrides {
        pooling: Some(PoolingMode::Cls),
        prompt: Some("query: ".to_owned()),
        normalize: Some(false),
        truncate: Some(true),
        truncation_side: Some(Side::Left),
        activation: None,
    };
    let mut model = folder
        .load(|options| options.overrides = overrides)
        .unwrap();
    let states = output(&mut model, Text::Single(TEXT), TextOutput::TokenEmbeddings);
    assert_eq!(embedding(&mut model), states[..32]);
    let card = model.card();
    let prompt = card
        .default_prompt
        .as_ref()
        .and_then(|name| card.prompts.get(name));
    assert_eq!(prompt.map(String::as_str), Some("query: "));
    assert!(!card.normalize);
    assert_eq!(
        (card.truncation, card.truncation_side),
        (Truncation::Left, Side::Left)
    );
    // What has no meaning for a task was meant to change something.
    let activation = |options: &mut LoadOptions| {
        options.overrides.activation = Some(ScoreActivation::Identity);
    };
    let error = folder.load(activation).err().unwrap();
    assert!(
        error.is_invalid_model() && error.to_string().contains("activation"),
        "{error}"
    );
    let classifier = Folder::copy("bert-classification");
    let scores = classifier.load(activation).unwrap();
    assert_eq!(scores.card().activation, ScoreActivation::Identity);
    let pooling = |options: &mut LoadOptions| options.overrides.pooling = Some(PoolingMode::Max);
    assert!(classifier.load(pooling).is_err());
}

#[test]
fn a_default_prompt_that_there_is_not_is_refused_unless_a_person_names_one() {
    let folder = Folder::copy("bert-embedding");
    let config = json!({"prompts": {"query": "query: "}, "default_prompt_name": "passage"});
    folder.write("config_sentence_transformers.json", &config);
    let sentence = folder.refused("config_sentence_transformers.json");
    assert!(sentence.contains("default_prompt_name"), "{sentence}");
    let none = folder.load(|options| options.overrides.prompt = Some(String::new()));
    assert_eq!(none.unwrap().card().default_prompt, None);
}

#[test]
fn a_description_has_every_setting_with_its_source() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/bert-dense");
    let described = describe(&ModelFolder::bare(&golden), &options(|_| ()));
    assert!(described.is_served(), "{:?}", described.problems);
    assert_eq!(
        (described.model_type.as_str(), described.task),
        ("bert", Some(Task::Embedding))
    );
    for (name, value, source) in [
        ("task", "embedding", "modules.json"),
        ("pooling", "mean", "1_Pooling/config.json"),
        ("dense", "32 to 12", "2_Dense/config.json"),
        ("normalize", "true", "default"),
        ("prompts", "query", "config_sentence_transformers.json"),
        ("tokens_max", "60", "sentence_bert_config.json"),
    ] {
        let mut settings = described.settings.iter();
        let found = settings.find(|setting| setting.name == name);
        let found = found.unwrap_or_else(|| panic!("{name} is not in {:?}", described.settings));
        assert_eq!(
            (found.value.as_str(), found.source.as_str()),
            (value, source),
            "{name}"
        );
    }
    // Every file that is missing is named at once.
    let folder = Folder::copy("bert-embedding");
    for name in ["tokenizer.json", "model.safetensors"] {
        fs::remove_file(folder.0.join(name)).unwrap();
    }
    let described = describe(&ModelFolder::bare(&folder.0), &options(|_| ()));
    let problems: Vec<String> = described.problems.iter().map(ToString::to_string).collect();
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(
        problems[0].starts_with("tokenizer.json") && problems[1].starts_with("model.safetensors")
    );
}
