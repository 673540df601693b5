//! ModernBERT (Warner and others 2024): norms before each part and not after it, rotary
//! positions, layers that see the whole row between layers that see a window, and gated
//! feed-forward networks (GeGLU, Shazeer 2020). No biases.

use super::{Built, Encoder};
use crate::EngineError;
use crate::layers::{
    Activation, Attention, Batch, ClassificationHead, EmbeddingNames, HeadNames, Linear, Norm,
    Pooling, Rotary, States, TokenEmbedding,
};
use crate::load::{Config, RawConfig, RotaryConfig, Weights, bad_config};

const EMBEDDING: EmbeddingNames = EmbeddingNames {
    words: "embeddings.tok_embeddings.weight",
    positions: None,
    token_types: None,
    norm: "embeddings.norm",
};

pub(super) fn build(
    raw: &RawConfig,
    weights: &mut Weights,
    scores: bool,
) -> Result<Built, EngineError> {
    let config = raw.checked()?;
    let rotary = raw.rotary(config.layers)?;
    if (config.hidden / config.heads) % 2 != 0 {
        return Err(bad_config("rotary positions need an even head width"));
    }
    weights.find_prefix(&["", "model."], EMBEDDING.words);
    let encoder = ModernBert::load(weights, &config, &rotary)?;
    let pooling = match rotary.classifier_pooling.as_str() {
        "cls" => Pooling::Cls,
        "mean" => Pooling::Mean,
        _ => return Err(bad_config("classifier_pooling must be cls or mean")),
    };
    let head = HeadNames {
        pooling,
        dense: "head.dense".to_owned(),
        dense_bias: rotary.classifier_bias,
        activation: rotary.classifier_activation,
        norm: Some("head.norm"),
        classifier: "classifier",
    };
    let head = scores.then(|| ClassificationHead::load(weights, &config, &head));
    Ok(Built {
        family: "modernbert",
        encoder: Box::new(encoder),
        head: head.transpose()?,
        tokens_max: config.positions,
        hidden: config.hidden,
        vocabulary: config.vocabulary,
        token_types: None,
    })
}

struct ModernBert {
    embedding: TokenEmbedding,
    blocks: Vec<Block>,
    final_norm: Norm,
    global: Rotary,
    local: Rotary,
}

impl ModernBert {
    fn load(
        weights: &mut Weights,
        config: &Config,
        rotary: &RotaryConfig,
    ) -> Result<Self, EngineError> {
        let embedding = TokenEmbedding::load(weights, config, &EMBEDDING)?;
        let blocks = rotary.global_layers.iter().enumerate();
        let blocks = blocks.map(|(number, is_global)| {
            let window = (!is_global).then_some(rotary.window);
            Block::load(weights, config, number, window)
        });
        let blocks = blocks.collect::<Result<_, _>>()?;
        let norm = weights.backbone("final_norm");
        Ok(Self {
            embedding,
            blocks,
            final_norm: Norm::load_unbiased(weights, &norm, config.hidden, config.epsilon)?,
            global: Rotary::new(weights, config, rotary.global_theta)?,
            local: Rotary::new(weights, config, rotary.local_theta)?,
        })
    }
}

impl Encoder for ModernBert {
    fn depth(&self) -> usize {
        self.blocks.len()
    }

    fn embed(&self, batch: &Batch) -> Result<States, EngineError> {
        self.embedding.forward(batch)
    }

    fn layer(&self, number: usize, hidden: States, batch: &Batch) -> Result<States, EngineError> {
        let Some(block) = self.blocks.get(number) else {
            return Ok(hidden);
        };
        let rotary = if block.is_global {
            &self.global
        } else {
            &self.local
        };
        block.forward(hidden, batch, rotary)
    }

    fn finish(&self, hidden: States) -> Result<States, EngineError> {
        self.final_norm.forward(&hidden)
    }
}

struct Block {
    /// Whether a token sees its whole row, and not a window of it.
    is_global: bool,
    /// The first block has none: the embedding's norm stands right before it.
    attention_norm: Option<Norm>,
    joined: Linear,
    attention: Attention,
    attention_output: Linear,
    inner_norm: Norm,
    inner: Linear,
    activation: Activation,
    gate: Linear,
    output: Linear,
}

impl Block {
    fn load(
        weights: &mut Weights,
        config: &Config,
        number: usize,
        window: Option<usize>,
    ) -> Result<Self, EngineError> {
        let (hidden, inner) = (config.hidden, config.intermediate);
        let prefix = weights.backbone(&format!("layers.{number}."));
        let full = |name: &str| format!("{prefix}{name}");
        let norm = full("attn_norm");
        let attention_norm = (number > 0)
            .then(|| Norm::load_unbiased(weights, &norm, hidden, config.epsilon))
            .transpose()?;
        let joined =
            Linear::load_joined_unbiased(weights, &full("attn.Wqkv"), [3 * hidden, hidden])?;
        let output = Linear::load_unbiased(weights, &full("attn.Wo"), [hidden, hidden])?;
        let inner_norm = Norm::load_unbiased(weights, &full("mlp_norm"), hidden, config.epsilon)?;
        let both = [2 * inner, hidden];
        let wide = full("mlp.Wi");
        Ok(Self {
            is_global: window.is_none(),
            attention_norm,
            joined,
            attention: Attention::new(weights.placement(), config.heads, window),
            attention_output: output,
            inner_norm,
            inner: Linear::load_slice(weights, &wide, both, 0..inner)?,
            activation: config.activation,
            gate: Linear::load_slice(weights, &wide, both, inner..2 * inner)?,
            output: Linear::load_unbiased(weights, &full("mlp.Wo"), [hidden, inner])?,
        })
    }

    fn forward(
        &self,
        hidden: States,
        batch: &Batch,
        rotary: &Rotary,
    ) -> Result<States, EngineError> {
        let joined = match &self.attention_norm {
            Some(norm) => self.joined.forward(&norm.forward(&hidden)?)?,
            None => self.joined.forward(&hidden)?,
        };
        let attended = self.attention.forward(joined, batch, Some(rotary))?;
        let hidden = self.attention_output.forward(&attended)?.add(&hidden)?;
        let normed = self.inner_norm.forward(&hidden)?;
        let inner = self.inner.forward_activated(&normed, self.activation)?;
        let gated = inner.multiply_each(&self.gate.forward(&normed)?)?;
        self.output.forward(&gated)?.add(&hidden)
    }
}
