//! Rotary position embeddings (RoPE; RoFormer, Su and others 2021).

use candle_core::Tensor;

use super::{Batch, Placement, WeightLoader};
use crate::error::EngineError;
use crate::files::bad_config;
use crate::kernels::RotaryAngles;

/// Elements of a table of cosines or sines.
const ELEMENTS_MAX: usize = 1 << 24;

/// The sizes of a rotary embedding.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RotaryConfig {
    pub(crate) positions: usize,
    /// Width of an attention head, an even number.
    pub(crate) head_width: usize,
    /// The base of the angles' frequencies.
    pub(crate) theta: f64,
}

/// Cosines and sines of the angles of each position, `[positions, head width / 2]`.
pub(crate) struct RotaryEmbedding {
    cosines: Vec<f32>,
    sines: Vec<f32>,
    half: usize,
    on_device: Option<(Tensor, Tensor)>,
}

impl RotaryEmbedding {
    pub(crate) fn new(
        weights: &mut WeightLoader,
        config: RotaryConfig,
    ) -> Result<Self, EngineError> {
        let RotaryConfig {
            positions,
            head_width,
            theta,
        } = config;
        let half = head_width / 2;
        // The table is in no file: the configuration alone would size it.
        if positions.saturating_mul(half) > ELEMENTS_MAX {
            return Err(bad_config(format!(
                "max_position_embeddings is {positions}, but may be at most {} with heads of width {head_width}",
                ELEMENTS_MAX / half
            )));
        }
        let frequency = |index: usize| (1.0 / theta.powf(index as f64 / half as f64)) as f32;
        let frequencies: Vec<f32> = (0..half).map(frequency).collect();
        let mut cosines = Vec::new();
        let mut sines = Vec::new();
        for position in 0..positions {
            for frequency in &frequencies {
                let angle = position as f32 * frequency;
                cosines.push(angle.cos());
                sines.push(angle.sin());
            }
        }
        let on_device = match weights.placement() {
            Placement::Cpu(_) => None,
            Placement::Device { .. } => {
                let mut place = |values: &[f32]| weights.place(values.to_vec(), &[positions, half]);
                Some((place(&cosines)?, place(&sines)?))
            }
        };
        Ok(Self {
            cosines,
            sines,
            half,
            on_device,
        })
    }

    pub(super) fn angles(&self) -> RotaryAngles<'_> {
        RotaryAngles {
            cosines: &self.cosines,
            sines: &self.sines,
            half: self.half,
        }
    }

    /// Cosines and sines of each token of a batch, `[tokens, head width / 2]`.
    pub(super) fn on_device(&self, batch: &Batch) -> Result<(Tensor, Tensor), EngineError> {
        let Some((cosines, sines)) = &self.on_device else {
            return Err(EngineError::device_mismatch());
        };
        let positions = batch.on_device(&batch.positions)?;
        Ok((cosines.embedding(&positions)?, sines.embedding(&positions)?))
    }
}
