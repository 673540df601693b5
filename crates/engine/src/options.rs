//! The options of [`load`](crate::load()): task, device, dtype and kernels.

use std::fmt;
use std::str::FromStr;

use candle_core::Device;

use crate::error::EngineError;
use crate::kernels::InstructionSet;
use crate::post::ScoreActivation;
use crate::tokenizer::Side;

/// The task that a model does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Task {
    /// A text to one embedding, or to one for each token.
    Embedding,
    /// A text to one score for each label.
    Classification,
    /// A query and a text to one score.
    Rerank,
    /// Rows of numbers to one score for each label.
    Tabular,
}

impl Task {
    /// The name in configuration files and in metadata.
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
                "task '{name}' is not supported: use embedding, classification, rerank or tabular"
            ))
        })
    }
}

/// The device that a model runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The CPU.
    Cpu,
    /// The NVIDIA GPU with this index.
    Cuda(usize),
    /// The first NVIDIA GPU where there is one, else the CPU.
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
                "this build has no CUDA: build it with the engine's `cuda` feature, or use device cpu"
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
                "device '{name}' is not supported: use cpu, cuda, cuda:N or auto"
            ))
        })
    }
}

/// The dtype that weights are stored and multiplied in: quantization (int8) and half precision
/// (f16, bf16) are chosen here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dtype {
    /// bfloat16 where the CPU has instructions for it, else 32-bit floats; on a GPU 32-bit floats.
    #[default]
    Auto,
    /// 32-bit floats, everywhere.
    F32,
    /// 16-bit IEEE floats, on a CUDA device only.
    F16,
    /// bfloat16, accumulated in 32 bits.
    Bf16,
    /// 8-bit integers with scales (int8 quantization), on the CPU only.
    Int8,
}

impl Dtype {
    const ALL: [Self; 5] = [Self::Auto, Self::F32, Self::F16, Self::Bf16, Self::Int8];

    /// The name in configuration files and in metadata.
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
                "dtype '{name}' is not supported: use auto, f32, f16, bf16 or int8"
            ))
        })
    }
}

/// The implementation of the layers on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kernels {
    /// The engine's kernels, in the widest instruction set that the CPU supports.
    #[default]
    Auto,
    /// The engine's kernels in this instruction set.
    Only(InstructionSet),
    /// candle's operations, as on a GPU: slower, and the reference for the kernels.
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
        let mut sets = InstructionSet::ALL.into_iter();
        match name {
            "auto" => Some(Self::Auto),
            "candle" => Some(Self::Candle),
            _ => sets.find(|set| set.as_str() == name).map(Self::Only),
        }
        .ok_or_else(|| {
            let sets = InstructionSet::ALL.map(InstructionSet::as_str).join(", ");
            EngineError::Unsupported(format!(
                "kernels '{name}' are not supported: use auto, {sets} or candle"
            ))
        })
    }
}

/// How the vectors of a text's tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PoolingMode {
    /// The first token's, which is the classification token.
    Cls,
    /// The largest value of each dimension.
    Max,
    /// The mean over the tokens.
    Mean,
    /// The sum over the tokens by the square root of their number.
    MeanSqrtLen,
    /// The mean over the tokens, each weighted by its position from 1.
    WeightedMean,
    /// The last token's.
    LastToken,
}

impl PoolingMode {
    /// All of them, in the order in which several are concatenated.
    pub(crate) const ALL: [Self; 6] = [
        Self::Cls,
        Self::Max,
        Self::Mean,
        Self::MeanSqrtLen,
        Self::WeightedMean,
        Self::LastToken,
    ];

    /// The name in configuration files, as sentence-transformers writes it from version 5.4 on.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cls => "cls",
            Self::Max => "max",
            Self::Mean => "mean",
            Self::MeanSqrtLen => "mean_sqrt_len_tokens",
            Self::WeightedMean => "weightedmean",
            Self::LastToken => "lasttoken",
        }
    }
}

impl fmt::Display for PoolingMode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl FromStr for PoolingMode {
    type Err = EngineError;

    fn from_str(name: &str) -> Result<Self, EngineError> {
        let mode = Self::ALL.into_iter().find(|mode| mode.as_str() == name);
        mode.ok_or_else(|| {
            EngineError::Unsupported(format!(
                "pooling '{name}' is not supported: use {}",
                Self::ALL.map(Self::as_str).join(", ")
            ))
        })
    }
}

/// What a person says of a model in place of its files, because these are silent or wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// The pooling of an embedding model.
    pub pooling: Option<PoolingMode>,
    /// The prompt for callers who choose none: its text, or an empty one for no prompt.
    pub prompt: Option<String>,
    /// Whether embeddings are normalized for callers who do not say.
    pub normalize: Option<bool>,
    /// Whether texts that are too long are truncated for callers who do not say.
    pub truncate: Option<bool>,
    /// The side that is truncated.
    pub truncation_side: Option<Side>,
    /// What turns the logits of a classifier or reranker into its scores.
    pub activation: Option<ScoreActivation>,
}

/// The choices of a caller of [`load`](crate::load()) that the model folder does not make.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// The device.
    pub device: DeviceChoice,
    /// The dtype of the weights.
    pub dtype: Dtype,
    /// The kernels, for a model on the CPU.
    pub kernels: Kernels,
    /// The task; none for the one that the model folder was saved for.
    pub task: Option<Task>,
    /// The maximum number of tokens of one row, special tokens included, where it is to be lower
    /// than the model's own.
    pub tokens_max: Option<usize>,
    /// What is not to be read from the files of the folder.
    pub overrides: Overrides,
}
