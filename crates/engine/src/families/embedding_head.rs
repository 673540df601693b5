//! The modules that turn an encoder's hidden states into embeddings, with their weights.

use super::sentence_transformers::{DensePlan, HeadPlan, Stage};
use crate::error::EngineError;
use crate::files::{Folder, Weights};
use crate::layers::{Activation, Batch, HiddenStates, Linear, Placement, Pooling, WeightLoader};

/// What happens to the hidden states of tokens, pooling, and what happens to the vector of a row.
pub(crate) struct EmbeddingHead {
    before: Vec<Step>,
    poolings: Vec<Pooling>,
    after: Vec<Step>,
    /// Bytes of the dense modules' weights.
    pub(crate) weight_bytes: u64,
}

/// A step of vectors to vectors.
enum Step {
    Dense(Box<Linear>, Activation),
    Normalize,
}

impl Step {
    fn forward(&self, vectors: &HiddenStates) -> Result<HiddenStates, EngineError> {
        match self {
            Self::Dense(linear, activation) => linear.forward_activated(vectors, *activation),
            Self::Normalize => vectors.normalized(),
        }
    }
}

impl EmbeddingHead {
    /// The head of a model that has no embeddings.
    pub(crate) fn none() -> Self {
        Self {
            before: Vec::new(),
            poolings: vec![Pooling::Mean],
            after: Vec::new(),
            weight_bytes: 0,
        }
    }

    /// Loads the weights of the modules.
    pub(crate) fn load(
        folder: &Folder,
        plan: &HeadPlan,
        placement: &Placement,
    ) -> Result<Self, EngineError> {
        let mut head = Self {
            before: Vec::new(),
            poolings: plan.poolings.iter().copied().map(Pooling::from).collect(),
            after: Vec::new(),
            weight_bytes: 0,
        };
        head.before = head.steps(folder, &plan.before, placement)?;
        head.after = head.steps(folder, &plan.after, placement)?;
        Ok(head)
    }

    fn steps(
        &mut self,
        folder: &Folder,
        stages: &[Stage],
        placement: &Placement,
    ) -> Result<Vec<Step>, EngineError> {
        let step = |stage: &Stage| -> Result<Step, EngineError> {
            let Stage::Dense(dense) = stage else {
                return Ok(Step::Normalize);
            };
            let mut weights = WeightLoader::new(open(folder, dense)?, placement.clone());
            let shape = [dense.outputs, dense.inputs];
            let linear = if dense.bias {
                Linear::load(&mut weights, "linear", shape)?
            } else {
                Linear::load_unbiased(&mut weights, "linear", shape)?
            };
            self.weight_bytes += weights.bytes;
            Ok(Step::Dense(Box::new(linear), dense.activation))
        };
        stages.iter().map(step).collect()
    }

    /// The vectors of the tokens that are pooled, where they are not the hidden states.
    pub(crate) fn tokens(
        &self,
        hidden: &HiddenStates,
    ) -> Result<Option<HiddenStates>, EngineError> {
        run(&self.before, hidden)
    }

    /// The vectors of tokens, `[tokens, width]`, to embeddings of `[rows, width]`, in the batch's
    /// packed order.
    pub(crate) fn forward(
        &self,
        tokens: &HiddenStates,
        batch: &Batch,
    ) -> Result<HiddenStates, EngineError> {
        let pooled = Pooling::forward_all(&self.poolings, tokens, batch)?;
        Ok(run(&self.after, &pooled)?.unwrap_or(pooled))
    }
}

/// Runs steps one after the other; none where there are none.
fn run(steps: &[Step], vectors: &HiddenStates) -> Result<Option<HiddenStates>, EngineError> {
    let mut current: Option<HiddenStates> = None;
    for step in steps {
        current = Some(step.forward(current.as_ref().unwrap_or(vectors))?);
    }
    Ok(current)
}

/// Opens the weights of a dense module.
pub(crate) fn open(folder: &Folder, dense: &DensePlan) -> Result<Weights, EngineError> {
    let file = format!("{}/model.safetensors", dense.path);
    if !folder.has(&file) && folder.has(&format!("{}/pytorch_model.bin", dense.path)) {
        return Err(EngineError::invalid_file(
            file,
            "is missing, and pytorch_model.bin in its place is a pickle: convert it to safetensors",
        ));
    }
    Weights::open_file(folder, &file)
}
