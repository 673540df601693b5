use std::time::Duration;

use engine::EngineError;
use protocol::{Error, Kind};

/// Why a model did not respond.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// The request is invalid.
    #[error(transparent)]
    Request(#[from] Error),
    /// The queue is full.
    #[error("the model's queue is full")]
    QueueFull {
        /// When the queue probably has room.
        retry_after: Duration,
    },
    /// The wait in the queue is longer than the deadline allows.
    #[error("the deadline is shorter than the probable wait in the model's queue")]
    TooLate,
    /// The deadline passed.
    #[error("the deadline passed")]
    DeadlinePassed,
    /// The model is being unloaded.
    #[error("the model is being unloaded")]
    Unloading,
    /// The engine failed.
    #[error("the model failed: {0}")]
    Engine(String),
}

impl From<ModelError> for Error {
    fn from(error: ModelError) -> Self {
        let message = error.to_string();
        match error {
            ModelError::Request(error) => error,
            ModelError::QueueFull { retry_after } => {
                Self::overloaded(message, retry_after.max(Duration::from_millis(10)))
            }
            // The caller's deadline is the reason, whatever the worker's load: a
            // later or other attempt has no more time.
            ModelError::TooLate => Self::new(Kind::DeadlinePassed, message),
            ModelError::DeadlinePassed => Self::deadline_passed(),
            ModelError::Unloading => Self::not_ready(message),
            ModelError::Engine(_) => {
                tracing::error!(%message, "a batch failed");
                Self::new(Kind::Internal, message)
            }
        }
    }
}

/// The problem of a text that the engine refused: a predicate of the text.
pub fn text_problem(error: &EngineError) -> String {
    match error {
        EngineError::TooManyTokens { tokens, tokens_max } => format!(
            "has {tokens} tokens, special tokens included, but the model takes {tokens_max}: \
             set 'truncate' to truncate it"
        ),
        error => format!("cannot be tokenized: {error}"),
    }
}
