//! What a caller of [`load`](crate::load) chooses.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device};

use crate::EngineError;

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
    /// 32-bit floats, on every device.
    #[default]
    F32,
    /// 16-bit IEEE floats, on CUDA devices.
    F16,
    /// bfloat16, on CUDA devices.
    Bf16,
}

impl Dtype {
    /// The name that configuration files and metadata write.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    pub(crate) fn on(self, device: &Device) -> Result<DType, EngineError> {
        match self {
            Self::F32 => Ok(DType::F32),
            _ if device.is_cpu() => Err(EngineError::Unsupported(format!(
                "dtype {self} needs a CUDA device: the processor runs f32"
            ))),
            Self::F16 => Ok(DType::F16),
            Self::Bf16 => Ok(DType::BF16),
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
        [Self::F32, Self::F16, Self::Bf16]
            .into_iter()
            .find(|dtype| dtype.as_str() == name)
            .ok_or_else(|| {
                EngineError::Unsupported(format!("unknown dtype '{name}': use f32, f16 or bf16"))
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
    /// The task, where the folder's own is not the wanted one.
    pub task: Option<Task>,
    /// A lower limit of tokens for one row, special tokens included.
    pub tokens_max: Option<usize>,
}
