//! What a caller of [`load`](crate::load) chooses.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device};

use crate::kernels::Precision;
use crate::load::{Placement, Way};
use crate::{EngineError, Instructions};

/// What a model is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Task {
    /// A text to one vector, or to one vector for each token.
    Embedding,
    /// A text to one score for each label.
    Classification,
    /// A query and a text to one score.
    Rerank,
    /// Rows of numbers to one score for each label.
    Tabular,
}

impl Task {
    /// The name that configuration files and metadata write.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Classification => "classification",
            Self::Rerank => "rerank",
            Self::Tabular => "tabular",
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl FromStr for Task {
    type Err = EngineError;

    fn from_str(name: &str) -> Result<Self, EngineError> {
        [
            Self::Embedding,
            Self::Classification,
            Self::Rerank,
            Self::Tabular,
        ]
        .into_iter()
        .find(|task| task.as_str() == name)
        .ok_or_else(|| {
            EngineError::Unsupported(format!(
                "unknown task '{name}': use embedding, classification, rerank or tabular"
            ))
        })
    }
}

/// The device that a model is to run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The processor.
    Cpu,
    /// The NVIDIA device with this index.
    Cuda(usize),
    /// The first NVIDIA device where there is one, else the processor.
    #[default]
    Auto,
}

impl DeviceChoice {
    /// Whether this build and this machine have the device.
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] when they do not.
    pub fn check(self) -> Result<(), EngineError> {
        self.open().map(drop)
    }

    pub(crate) fn open(self) -> Result<Device, EngineError> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Auto => Ok(Device::new_cuda(0).unwrap_or(Device::Cpu)),
            Self::Cuda(_) if !cfg!(feature = "cuda") => Err(EngineError::Unsupported(
                "this build has no CUDA: build it with the engine's `cuda` feature, or use --device cpu"
                    .to_owned(),
            )),
            Self::Cuda(index) => Device::new_cuda(index).map_err(|error| {
                EngineError::Unsupported(format!("device cuda:{index} cannot be opened: {error}"))
            }),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => formatter.write_str("cpu"),
            Self::Cuda(index) => write!(formatter, "cuda:{index}"),
            Self::Auto => formatter.write_str("auto"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = EngineError;

    fn from_str(name: &str) -> Result<Self, EngineError> {
        let cuda = |index: &str| index.parse().ok().map(Self::Cuda);
        match name {
            "cpu" => Some(Self::Cpu),
            "auto" => Some(Self::Auto),
            "cuda" => Some(Self::Cuda(0)),
            _ => name.strip_prefix("cuda:").and_then(cuda),
        }
        .ok_or_else(|| {
            EngineError::Unsupported(format!(
                "unknown device '{name}': use cpu, cuda, cuda:N or auto"
            ))
        })
    }
}

/// The number format that weights are kept and multiplied in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dtype {
    /// bfloat16 where the processor multiplies it itself, else 32-bit floats; on a device 32-bit
    /// floats.
    #[default]
    Auto,
    /// 32-bit floats, everywhere.
    F32,
    /// 16-bit IEEE floats, on CUDA devices.
    F16,
    /// bfloat16, added up in 32 bits.
    Bf16,
    /// 8-bit integers with scales, on the processor.
    Int8,
}

impl Dtype {
    const ALL: [Self; 5] = [Self::Auto, Self::F32, Self::F16, Self::Bf16, Self::Int8];

    /// The name that configuration files and metadata write.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl FromStr for Dtype {
    type Err = EngineError;

    fn from_str(name: &str) -> Result<Self, EngineError> {
        let dtype = Self::ALL.into_iter().find(|dtype| dtype.as_str() == name);
        dtype.ok_or_else(|| {
            EngineError::Unsupported(format!(
                "unknown dtype '{name}': use auto, f32, f16, bf16 or int8"
            ))
        })
    }
}

/// What computes on the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kernels {
    /// Our kernels, in the widest instruction set that the processor has.
    #[default]
    Auto,
    /// Our kernels in this set.
    Only(Instructions),
    /// candle's operations, as on a device: slower, and what the kernels are compared with.
    Candle,
}

impl fmt::Display for Kernels {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => formatter.write_str("auto"),
            Self::Only(set) => set.fmt(formatter),
            Self::Candle => formatter.write_str("candle"),
        }
    }
}

impl FromStr for Kernels {
    type Err = EngineError;

    fn from_str(name: &str) -> Result<Self, EngineError> {
        let mut sets = Instructions::ALL.into_iter();
        match name {
            "auto" => Some(Self::Auto),
            "candle" => Some(Self::Candle),
            _ => sets.find(|set| set.as_str() == name).map(Self::Only),
        }
        .ok_or_else(|| {
            let sets = Instructions::ALL.map(Instructions::as_str).join(", ");
            EngineError::Unsupported(format!(
                "unknown kernels '{name}': use auto, {sets} or candle"
            ))
        })
    }
}

/// What [`load`](crate::load) is to do beyond what the folder says.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Where the model runs.
    pub device: DeviceChoice,
    /// The number format of its weights.
    pub dtype: Dtype,
    /// What computes, where the model runs on the processor.
    pub kernels: Kernels,
    /// The task, where the folder's own is not the wanted one.
    pub task: Option<Task>,
    /// A lower limit of tokens for one row, special tokens included.
    pub tokens_max: Option<usize>,
}

impl LoadOptions {
    /// Where weights go and how they are multiplied, with `auto` decided.
    pub(crate) fn placement(&self) -> Result<(Placement, Dtype), EngineError> {
        let device = self.device.open()?;
        let unsupported = |reason: String| Err(EngineError::Unsupported(reason));
        let on_candle = !device.is_cpu() || self.kernels == Kernels::Candle;
        let dtype = match self.dtype {
            Dtype::Auto if on_candle => Dtype::F32,
            other => other,
        };
        if on_candle {
            let format = match dtype {
                Dtype::F16 if !device.is_cpu() => DType::F16,
                Dtype::Bf16 if !device.is_cpu() => DType::BF16,
                Dtype::F32 => DType::F32,
                other => return unsupported(format!("dtype {other} is not one of this device's")),
            };
            return Ok((
                Placement::Device {
                    device,
                    dtype: format,
                },
                dtype,
            ));
        }
        let instructions = match self.kernels {
            Kernels::Only(set) if !set.supported() => {
                return unsupported(format!("this processor does not have {set}"));
            }
            Kernels::Only(set) => set,
            _ => Instructions::best(),
        };
        let (precision, dtype) = match dtype {
            Dtype::Auto if instructions.multiplies_bf16() => (Precision::Bf16, Dtype::Bf16),
            Dtype::Auto | Dtype::F32 => (Precision::F32, Dtype::F32),
            Dtype::Bf16 => (Precision::Bf16, Dtype::Bf16),
            Dtype::Int8 => (Precision::Int8, Dtype::Int8),
            Dtype::F16 => {
                return unsupported(
                    "dtype f16 needs a CUDA device: use bf16 on the processor".to_owned(),
                );
            }
        };
        let way = Way {
            instructions,
            precision,
        };
        Ok((Placement::Processor(way), dtype))
    }
}
