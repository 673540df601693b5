//! Every error of the engine, and whether the request caused it.

/// Why a model did not load, or a forward pass failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The text has more tokens than the model takes, and truncation was not requested.
    #[error("the text has {tokens} tokens, special tokens included: the model takes {tokens_max}")]
    TooManyTokens {
        /// Tokens of the text, special tokens included.
        tokens: usize,
        /// Tokens that the model takes.
        tokens_max: usize,
    },
    /// A token id that the model's vocabulary does not have.
    #[error("token id {id} is not in the model's vocabulary")]
    UnknownTokenId {
        /// The id.
        id: u32,
    },
    /// An input that no model could take, for example features that fill no whole row.
    #[error("{0}")]
    InvalidInput(String),
    /// An output that the model does not have, for example logits of an embedding model.
    #[error("{0}")]
    UnsupportedOutput(&'static str),
    /// The work was cancelled between two layers or two parts of a text, as its caller requested.
    #[error("the work was cancelled")]
    Cancelled,
    /// The load options require something that this build or this machine does not have.
    #[error("{0}")]
    Unsupported(String),
    /// A file of the model folder is missing, malformed, or describes a model that the engine
    /// does not support.
    #[error("{file}: {reason}")]
    InvalidFile {
        /// The name of the file inside the model folder, never its path.
        file: String,
        /// The problem and, where there is one, the remedy.
        reason: String,
    },
    /// The device has not enough memory for this batch or this model.
    #[error("the device is out of memory")]
    OutOfMemory,
    /// The device or its library failed.
    #[error("the device failed: {0}")]
    Device(String),
}

impl EngineError {
    /// Whether the caller's input is at fault, so that a retry does not help.
    pub fn is_callers_input(&self) -> bool {
        matches!(
            self,
            Self::TooManyTokens { .. }
                | Self::UnknownTokenId { .. }
                | Self::InvalidInput(_)
                | Self::UnsupportedOutput(_)
        )
    }

    /// Whether the model folder or the load options are at fault.
    pub fn is_invalid_model(&self) -> bool {
        matches!(self, Self::InvalidFile { .. } | Self::Unsupported(_))
    }

    /// A defect of the engine: tensors of one operation are on different devices.
    pub(crate) fn device_mismatch() -> Self {
        Self::Device("tensors of the model are on different devices".to_owned())
    }

    pub(crate) fn invalid_file(file: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::InvalidFile {
            file: file.into(),
            reason: reason.into(),
        }
    }
}

impl From<candle_core::Error> for EngineError {
    fn from(error: candle_core::Error) -> Self {
        let text = error.to_string();
        let lower = text.to_ascii_lowercase();
        if lower.contains("out of memory") || lower.contains("out_of_memory") {
            return Self::OutOfMemory;
        }
        // A backtrace may follow on further lines and is of no use to a reader of the message.
        Self::Device(text.lines().next().unwrap_or_default().to_owned())
    }
}
