use std::time::Duration;

use protocol::{Error, Kind};

/// Why a model did not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// The request is wrong.
    #[error(transparent)]
    Request(#[from] Error),
    /// The queue is full.
    #[error("the queue of the model is full")]
    QueueFull {
        /// When a place is probably free.
        retry_after: Duration,
    },
    /// The wait in the queue is longer than the caller waits.
    #[error("the model cannot answer before the deadline: too much waits")]
    TooLate {
        /// How long the wait probably is.
        wait: Duration,
    },
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
            ModelError::TooLate { wait } => Self::overloaded(message, wait),
            ModelError::DeadlinePassed => Self::deadline_passed(),
            ModelError::Unloading => Self::new(Kind::NotReady, message),
            ModelError::Engine(_) => {
                tracing::error!(%message, "a batch failed");
                Self::new(Kind::Internal, message)
            }
        }
    }
}
