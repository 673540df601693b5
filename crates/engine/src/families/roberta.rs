//! RoBERTa (Liu and others 2019) and XLM-R (Conneau and others 2019): BERT's blocks under BERT's
//! names, with positions counted from past the padding id and a head of their own.

use super::{Built, bert};
use crate::EngineError;
use crate::layers::{Activation, ClassificationHead, Counting, HeadNames, Pooling, Transformer};
use crate::load::{RawConfig, Weights, bad_config};

pub(super) fn build(
    raw: &RawConfig,
    weights: &mut Weights,
    scores: bool,
) -> Result<Built, EngineError> {
    let config = raw.checked()?;
    let padding = config.padding_id;
    let tokens_max = usize::try_from(padding)
        .ok()
        .and_then(|padding| config.positions.checked_sub(padding.checked_add(1)?))
        .ok_or_else(|| bad_config("pad_token_id leaves no position for a token"))?;
    weights.find_prefix(&["", "roberta."], bert::EMBEDDING.words);
    let encoder = Transformer::load(weights, &config, &bert::EMBEDDING, &bert::BLOCK)?
        .counting(Counting::PastPadding(padding));
    let head = HeadNames {
        pooling: Pooling::Cls,
        dense: "classifier.dense".to_owned(),
        dense_bias: true,
        activation: Activation::Tanh,
        norm: None,
        classifier: "classifier.out_proj",
    };
    let head = scores.then(|| ClassificationHead::load(weights, &config, &head));
    Ok(Built {
        family: "roberta",
        encoder: Box::new(encoder),
        head: head.transpose()?,
        tokens_max,
        hidden: config.hidden,
        vocabulary: config.vocabulary,
        token_types: Some(config.token_types),
    })
}
