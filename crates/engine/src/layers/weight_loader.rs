//! From the weights in a model's files to the weights that its layers multiply.

use candle_core::Tensor;

use super::Placement;
use crate::error::EngineError;
use crate::files::Weights;

/// Takes weights by tensor name and shape, puts them where the model is placed, and counts their
/// bytes.
pub(crate) struct WeightLoader {
    weights: Weights,
    placement: Placement,
    /// The prefix of the encoder's tensor names in this checkpoint, for example `bert.`.
    prefix: &'static str,
    /// Bytes of memory that the layers' weights take so far.
    pub(crate) bytes: u64,
}

impl WeightLoader {
    pub(crate) fn new(weights: Weights, placement: Placement) -> Self {
        Self {
            weights,
            placement,
            prefix: "",
            bytes: 0,
        }
    }

    /// Finds the prefix of the encoder's tensor names, by the name of a tensor that every
    /// checkpoint of the family has. Checkpoints with a head have the family's name as a prefix.
    pub(crate) fn find_prefix(&mut self, prefixes: &[&'static str], tensor: &str) {
        self.prefix = prefixes
            .iter()
            .copied()
            .find(|prefix| self.has(&format!("{prefix}{tensor}")))
            .unwrap_or_default();
    }

    /// The full name of one of the encoder's tensors in this checkpoint.
    pub(crate) fn prefixed(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Whether the checkpoint has a tensor of this full name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.weights.has(name)
    }

    pub(crate) fn placement(&self) -> &Placement {
        &self.placement
    }

    /// The values of a tensor by its full name, row-major, before they are placed.
    ///
    /// # Errors
    /// [`EngineError::InvalidFile`] when the tensor is missing or has another shape.
    pub(crate) fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EngineError> {
        self.weights.values(name, shape)
    }

    /// Puts values on the device in the model's dtype.
    pub(crate) fn place(
        &mut self,
        values: Vec<f32>,
        shape: &[usize],
    ) -> Result<Tensor, EngineError> {
        let Placement::Device { device, dtype } = &self.placement else {
            return Err(EngineError::device_mismatch());
        };
        let tensor = Tensor::from_vec(values, shape, device)?.to_dtype(*dtype)?;
        self.bytes += (tensor.elem_count() * dtype.size_in_bytes()) as u64;
        Ok(tensor)
    }
}
