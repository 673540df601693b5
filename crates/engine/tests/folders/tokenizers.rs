//! What the files beside `tokenizer.json` say of a tokenizer.

use engine::{Side, Text, Truncation};
use serde_json::json;

use super::Folder;

#[test]
fn tokenizer_config_wins_over_the_tokenizer() {
    let folder = Folder::copy("bert-embedding");
    let ids = |text: &str| {
        let model = folder.loaded();
        let row = model
            .tokenizer()
            .encode(Text::Single(text), Truncation::Refuse);
        row.unwrap().ids
    };
    let small = ids("the red lamp");
    assert_eq!(ids("THE RED LAMP"), small);
    folder.write("tokenizer_config.json", &json!({"do_lower_case": false}));
    assert_ne!(ids("THE RED LAMP"), small);
    // sentence-transformers lowercases before any of that.
    folder.write(
        "sentence_roberta_config.json",
        &json!({"do_lower_case": true}),
    );
    assert_eq!(ids("THE RED LAMP"), small);
}

#[test]
fn token_types_are_zeros_where_the_model_is_given_none() {
    let folder = Folder::copy("bert-embedding");
    let types = || {
        let model = folder.loaded();
        let row = model
            .tokenizer()
            .encode(Text::Pair("a", "red"), Truncation::Refuse);
        row.unwrap().type_ids.into_iter().max()
    };
    assert_eq!(types(), Some(1));
    for config in [
        json!({"model_input_names": ["input_ids", "attention_mask"]}),
        json!({"tokenizer_class": "RobertaTokenizerFast"}),
        json!({"tokenizer_class": "XLMRobertaTokenizer"}),
    ] {
        folder.write("tokenizer_config.json", &config);
        assert_eq!(types(), Some(0), "{config}");
    }
    let named = json!({"tokenizer_class": "RobertaTokenizer",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]});
    folder.write("tokenizer_config.json", &named);
    assert_eq!(types(), Some(1));
}

#[test]
fn the_limit_of_sentence_transformers_wins_over_that_of_the_tokenizer() {
    let folder = Folder::copy("bert-embedding");
    assert_eq!(folder.card().tokens_max, 72);
    folder.write("tokenizer_config.json", &json!({"model_max_length": 20}));
    assert_eq!(folder.card().tokens_max, 20);
    folder.write("sentence_xlnet_config.json", &json!({"max_seq_length": 40}));
    assert_eq!(folder.card().tokens_max, 40);
    // The first of the files by age is read, and the positions are the last word.
    folder.write("sentence_bert_config.json", &json!({"max_seq_length": 400}));
    assert_eq!(folder.card().tokens_max, 72);
    folder.write(
        "sentence_bert_config.json",
        &json!({"max_seq_length": null}),
    );
    assert_eq!(folder.card().tokens_max, 20);
    let output = json!({"module_output_name": "token_embeddings"});
    folder.write("sentence_bert_config.json", &output);
    folder.card();
    let output = json!({"module_output_name": "sentence_embedding"});
    folder.write("sentence_bert_config.json", &output);
    let sentence = folder.refused("sentence_bert_config.json");
    assert!(sentence.contains("module_output_name"), "{sentence}");
    for key in ["query_length", "processing_kwargs"] {
        folder.write(
            "sentence_bert_config.json",
            &json!({key: {"text": {"max_length": 8}}}),
        );
        assert!(folder.refused("sentence_bert_config.json").contains(key));
    }
}

#[test]
fn the_side_of_truncation_is_that_of_the_files() {
    let folder = Folder::copy("bert-embedding");
    assert_eq!(folder.card().truncation_side, Side::Right);
    let truncation = json!({"direction": "Left", "max_length": 16, "strategy": "LongestFirst",
        "stride": 0});
    folder.change("tokenizer.json", &json!({"truncation": truncation}));
    assert_eq!(folder.card().truncation_side, Side::Left);
    folder.write(
        "tokenizer_config.json",
        &json!({"truncation_side": "right"}),
    );
    let card = folder.card();
    assert_eq!(
        (card.truncation_side, card.truncation),
        (Side::Right, Truncation::Refuse)
    );
    folder.write("tokenizer_config.json", &json!({"truncation_side": "up"}));
    assert!(
        folder
            .refused("tokenizer_config.json")
            .contains("truncation_side")
    );
}
