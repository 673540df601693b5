//! ModernBERT (Warner and others 2024): norms before each part and not after it, rotary
//! positions, layers that see the whole row between layers that see a window, and gated
//! feed-forward networks (GeGLU, Shazeer 2020). No biases.

use candle_core::Tensor;

use super::{Built, Encoder};
use crate::EngineError;
use crate::layers::attention::{Heads, attend, rotate};
use crate::layers::{
    Activation, Batch, ClassificationHead, EmbeddingNames, HeadNames, Linear, Norm, Pooling,
    TokenEmbedding,
};
use crate::load::{Config, RawConfig, RotaryConfig, Weights, bad_config};

const ROTARY_NUMBERS_MAX: usize = 1 << 24;

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

    fn embed(&self, batch: &Batch) -> Result<Tensor, EngineError> {
        self.embedding.forward(batch)
    }

    fn layer(&self, number: usize, hidden: Tensor, batch: &Batch) -> Result<Tensor, EngineError> {
        let Some(block) = self.blocks.get(number) else {
            return Ok(hidden);
        };
        let rotary = match block.window {
            Some(_) => &self.local,
            None => &self.global,
        };
        block.forward(&hidden, batch, rotary)
    }

    fn finish(&self, hidden: Tensor) -> Result<Tensor, EngineError> {
        self.final_norm.forward(&hidden)
    }
}

/// Cosines and sines of every position's angles, `[positions, head width / 2]`.
struct Rotary {
    cosines: Tensor,
    sines: Tensor,
}

impl Rotary {
    fn new(weights: &mut Weights, config: &Config, theta: f64) -> Result<Self, EngineError> {
        let half = config.hidden / config.heads / 2;
        // No file backs this table: the configuration alone would size it.
        if config.positions.saturating_mul(half) > ROTARY_NUMBERS_MAX {
            return Err(bad_config("max_position_embeddings is too large"));
        }
        let frequency = |place: usize| (1.0 / theta.powf(place as f64 / half as f64)) as f32;
        let frequencies: Vec<f32> = (0..half).map(frequency).collect();
        let mut cosines = Vec::new();
        let mut sines = Vec::new();
        for position in 0..config.positions {
            for frequency in &frequencies {
                let angle = position as f32 * frequency;
                cosines.push(angle.cos());
                sines.push(angle.sin());
            }
        }
        Ok(Self {
            cosines: weights.place(cosines, &[config.positions, half])?,
            sines: weights.place(sines, &[config.positions, half])?,
        })
    }
}

struct Block {
    heads: usize,
    /// Tokens to each side that a token sees; none where it sees the whole row.
    window: Option<usize>,
    /// The first block has none: the embedding's norm stands right before it.
    attention_norm: Option<Norm>,
    joined: Linear,
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
        let joined = Linear::load_unbiased(weights, &[&full("attn.Wqkv")], [3 * hidden, hidden])?;
        let output = Linear::load_unbiased(weights, &[&full("attn.Wo")], [hidden, hidden])?;
        let inner_norm = Norm::load_unbiased(weights, &full("mlp_norm"), hidden, config.epsilon)?;
        let both = [2 * inner, hidden];
        let wide = full("mlp.Wi");
        Ok(Self {
            heads: config.heads,
            window,
            attention_norm,
            joined,
            attention_output: output,
            inner_norm,
            inner: Linear::load_slice(weights, &wide, both, 0..inner)?,
            activation: config.activation,
            gate: Linear::load_slice(weights, &wide, both, inner..2 * inner)?,
            output: Linear::load_unbiased(weights, &[&full("mlp.Wo")], [hidden, inner])?,
        })
    }

    fn forward(
        &self,
        hidden: &Tensor,
        batch: &Batch,
        rotary: &Rotary,
    ) -> Result<Tensor, EngineError> {
        let normed = match &self.attention_norm {
            Some(norm) => norm.forward(hidden)?,
            None => hidden.clone(),
        };
        let mut heads = Heads::split(&self.joined.forward(&normed)?, self.heads)?;
        let cosines = rotary.cosines.embedding(&batch.positions)?;
        let sines = rotary.sines.embedding(&batch.positions)?;
        heads.queries = rotate(&heads.queries, &cosines, &sines)?;
        heads.keys = rotate(&heads.keys, &cosines, &sines)?;
        let attended = attend(&heads, batch, self.window)?;
        let hidden = (hidden + self.attention_output.forward(&attended)?)?;
        let normed = self.inner_norm.forward(&hidden)?;
        let inner = self.inner.forward_activated(&normed, self.activation)?;
        let gated = (inner * self.gate.forward(&normed)?)?;
        Ok((hidden + self.output.forward(&gated)?)?)
    }
}
