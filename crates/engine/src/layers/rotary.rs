//! Rotary positions (RoFormer, Su and others 2021).

use candle_core::Tensor;

use super::Batch;
use crate::EngineError;
use crate::kernels::Angles;
use crate::load::{Config, Placement, Weights, bad_config};

const NUMBERS_MAX: usize = 1 << 24;

/// Cosines and sines of every position's angles, `[positions, head width / 2]`.
pub(crate) struct Rotary {
    cosines: Vec<f32>,
    sines: Vec<f32>,
    half: usize,
    on_device: Option<(Tensor, Tensor)>,
}

impl Rotary {
    pub(crate) fn new(
        weights: &mut Weights,
        config: &Config,
        theta: f64,
    ) -> Result<Self, EngineError> {
        let half = config.hidden / config.heads / 2;
        // No file backs this table: the configuration alone would size it.
        if config.positions.saturating_mul(half) > NUMBERS_MAX {
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
        let on_device = match weights.placement() {
            Placement::Processor(_) => None,
            Placement::Device { .. } => {
                let mut place =
                    |numbers: &[f32]| weights.place(numbers.to_vec(), &[config.positions, half]);
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

    pub(super) fn angles(&self) -> Angles<'_> {
        Angles {
            cosines: &self.cosines,
            sines: &self.sines,
            half: self.half,
        }
    }

    /// Each token's, `[tokens, head width / 2]`.
    pub(super) fn on_device(&self, batch: &Batch) -> Result<(Tensor, Tensor), EngineError> {
        let Some((cosines, sines)) = &self.on_device else {
            return Err(EngineError::apart());
        };
        let positions = batch.on(&batch.positions)?;
        Ok((cosines.embedding(&positions)?, sines.embedding(&positions)?))
    }
}
