//! What turns logits into scores, by the files.

use engine::{ModelFolder, ScoreActivation, describe};
use serde_json::{Value, json};

use super::{Folder, options};

#[test]
fn scores_are_what_the_model_was_trained_for() {
    let folder = Folder::copy("bert-classification");
    let activation = |kind: Value| {
        folder.change("config.json", &json!({"problem_type": kind}));
        folder.card().activation
    };
    assert_eq!(activation(Value::Null), ScoreActivation::Softmax);
    assert_eq!(
        activation(json!("single_label_classification")),
        ScoreActivation::Softmax
    );
    assert_eq!(
        activation(json!("multi_label_classification")),
        ScoreActivation::Sigmoid
    );
    assert_eq!(activation(json!("regression")), ScoreActivation::Identity);
    folder.change("config.json", &json!({"problem_type": "poetry"}));
    assert!(folder.refused("config.json").contains("problem_type"));
    let rerank = Folder::copy("bert-rerank");
    assert_eq!(rerank.card().activation, ScoreActivation::Sigmoid);
    rerank.change("config.json", &json!({"problem_type": "regression"}));
    assert_eq!(rerank.card().activation, ScoreActivation::Identity);
}

#[test]
fn scores_of_a_cross_encoder_are_those_of_the_class_that_it_names() {
    let identity = "torch.nn.modules.linear.Identity";
    let sigmoid = "torch.nn.modules.activation.Sigmoid";
    let rerank = Folder::copy("bert-rerank");
    let both = |folder: &Folder| {
        let card = folder.card();
        (card.activation, card.tei_activation)
    };
    let old = json!({"sbert_ce_default_activation_function": identity});
    rerank.change("config.json", &old);
    let raw = (ScoreActivation::Identity, ScoreActivation::Sigmoid);
    assert_eq!(both(&rerank), raw);
    // The newer key, and the newer file, have precedence.
    let newer = json!({"sentence_transformers": {"activation_fn": sigmoid, "version": "5.0.0"}});
    rerank.change("config.json", &newer);
    assert_eq!(rerank.card().activation, ScoreActivation::Sigmoid);
    let newest = json!({"model_type": "CrossEncoder", "activation_fn": identity});
    rerank.write("config_sentence_transformers.json", &newest);
    assert_eq!(both(&rerank), raw);
    let described = describe(&ModelFolder::bare(&rerank.0), &options(|_| ()));
    let mut settings = described.settings.iter();
    let noted = settings.find(|setting| setting.name == "activation");
    let noted = noted.map(|setting| (&*setting.value, &*setting.source));
    assert_eq!(
        noted,
        Some(("identity", "config_sentence_transformers.json"))
    );
    // A person has the last word, at every door.
    let person = rerank.load(|options| {
        options.overrides.activation = Some(ScoreActivation::Softmax);
    });
    let card = person.unwrap().card().clone();
    let softmax = ScoreActivation::Softmax;
    assert_eq!((card.activation, card.tei_activation), (softmax, softmax));
    let classifier = Folder::copy("bert-classification");
    classifier.change(
        "config.json",
        &json!({"sentence_transformers": {"activation_fn": sigmoid}}),
    );
    let labels = (ScoreActivation::Sigmoid, ScoreActivation::Softmax);
    assert_eq!(both(&classifier), labels);
    for other in [
        "torch.nn.modules.activation.Tanh",
        "pylate.Sigmoid",
        "Sigmoid",
    ] {
        let config = json!({"sentence_transformers": {"activation_fn": other}});
        classifier.change("config.json", &config);
        let sentence = classifier.refused("config.json");
        assert!(
            sentence.contains(other) && sentence.contains("set activation"),
            "{sentence}"
        );
    }
}
