//! Where a model's weights are, and in which dtype: in CPU memory for the kernels, or on a
//! candle device.

use candle_core::{DType, Device, DeviceLocation};

use crate::error::EngineError;
use crate::kernels::{InstructionSet, WeightDtype};
use crate::options::{Dtype, Kernels, LoadOptions};

/// The location and dtype of weights, and of the hidden states that are multiplied with them.
#[derive(Clone)]
pub(crate) enum Placement {
    /// In CPU memory, packed for the kernels.
    Cpu(CpuPlacement),
    /// On a device of candle's: a GPU, or the CPU with candle's own operations.
    Device { device: Device, dtype: DType },
}

/// The kernels that multiply the weights, and the dtype that they are packed in.
#[derive(Clone, Copy)]
pub(crate) struct CpuPlacement {
    pub(crate) instructions: InstructionSet,
    pub(crate) dtype: WeightDtype,
}

impl Placement {
    /// The placement and the dtype for the options, with `auto` resolved.
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] for a device, a dtype or kernels that this build or this
    /// machine does not have.
    pub(crate) fn choose(options: &LoadOptions) -> Result<(Self, Dtype), EngineError> {
        let device = options.device.open()?;
        if !device.is_cpu() || options.kernels == Kernels::Candle {
            Self::on_device(device, options.dtype)
        } else {
            Self::on_cpu(options)
        }
    }

    fn on_device(device: Device, dtype: Dtype) -> Result<(Self, Dtype), EngineError> {
        let (candle_dtype, dtype) = match dtype {
            Dtype::Auto | Dtype::F32 => (DType::F32, Dtype::F32),
            Dtype::F16 if !device.is_cpu() => (DType::F16, Dtype::F16),
            Dtype::Bf16 if !device.is_cpu() => (DType::BF16, Dtype::Bf16),
            other => {
                return Err(EngineError::Unsupported(format!(
                    "dtype {other} is not supported by candle on this device: use f32, or on a GPU f16 or bf16"
                )));
            }
        };
        let placement = Self::Device {
            device,
            dtype: candle_dtype,
        };
        Ok((placement, dtype))
    }

    fn on_cpu(options: &LoadOptions) -> Result<(Self, Dtype), EngineError> {
        let instructions = match options.kernels {
            Kernels::Only(set) if !set.supported() => {
                return Err(EngineError::Unsupported(format!(
                    "kernels {set} are not supported by this CPU: use auto"
                )));
            }
            Kernels::Only(set) => set,
            Kernels::Auto | Kernels::Candle => InstructionSet::best(),
        };
        let (weight_dtype, dtype) = match options.dtype {
            Dtype::Auto if instructions.multiplies_bf16() => (WeightDtype::Bf16, Dtype::Bf16),
            Dtype::Auto | Dtype::F32 => (WeightDtype::F32, Dtype::F32),
            Dtype::Bf16 => (WeightDtype::Bf16, Dtype::Bf16),
            Dtype::Int8 => (WeightDtype::Int8, Dtype::Int8),
            Dtype::F16 => {
                return Err(EngineError::Unsupported(
                    "dtype f16 requires a CUDA device: use bf16 on the CPU".to_owned(),
                ));
            }
        };
        let placement = CpuPlacement {
            instructions,
            dtype: weight_dtype,
        };
        Ok((Self::Cpu(placement), dtype))
    }

    /// `cpu`, or `cuda:` and the index of the device.
    pub(crate) fn device_name(&self) -> String {
        let location = match self {
            Self::Cpu(_) => DeviceLocation::Cpu,
            Self::Device { device, .. } => device.location(),
        };
        match location {
            DeviceLocation::Cpu => "cpu".to_owned(),
            DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
            DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
        }
    }

    /// The instruction set of the kernels, or `candle`.
    pub(crate) fn kernels_name(&self) -> &'static str {
        match self {
            Self::Cpu(placement) => placement.instructions.as_str(),
            Self::Device { .. } => "candle",
        }
    }
}
