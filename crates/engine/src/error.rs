//! Everything that can go wrong in the engine, and whose fault it is.

/// Why a model did not load or did not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The text has more tokens than the model takes, and truncation was not asked for.
    #[error("the text has {tokens} tokens, special ones included: the model takes {tokens_max}")]
    TooLong {
        /// Tokens of the text, special tokens included.
        tokens: usize,
        /// Tokens that the model takes.
        tokens_max: usize,
    },
    /// A token id that the model's vocabulary does not have.
    #[error("token id {id} is not in the model's vocabulary")]
    BadToken {
        /// The id.
        id: u32,
    },
    /// An input that no model could take, for example features that fill no whole row.
    #[error("{0}")]
    BadInput(String),
    /// The model has no such output, for example scores of an embedding model.
    #[error("{0}")]
    WrongOutput(&'static str),
    /// `go_on` said that nobody waits for the answer any more.
    #[error("the forward pass was abandoned: nobody waits for it")]
    Abandoned,
    /// The load options ask for what this build or this device does not have.
    #[error("{0}")]
    Unsupported(String),
    /// A file of the model folder is missing, hostile, or not what the engine runs.
    #[error("{file}: {reason}")]
    Unusable {
        /// The file's name inside the model folder, never its path.
        file: String,
        /// What is wrong with it.
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
    /// Whether the caller's input is at fault, so that sending it again does not help.
    pub fn is_callers_input(&self) -> bool {
        matches!(
            self,
            Self::TooLong { .. } | Self::BadToken { .. } | Self::BadInput(_) | Self::WrongOutput(_)
        )
    }

    /// Whether the model folder or the load options are at fault.
    pub fn is_unusable_model(&self) -> bool {
        matches!(self, Self::Unusable { .. } | Self::Unsupported(_))
    }

    /// A defect of ours: the parts of one model are in different places.
    pub(crate) fn apart() -> Self {
        Self::Device("parts of the model are on different devices".to_owned())
    }

    pub(crate) fn unusable(file: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unusable {
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
        // A backtrace may follow on further lines: it is of no use to a reader of the sentence.
        Self::Device(text.lines().next().unwrap_or_default().to_owned())
    }
}
