//! The one error of every door and the one table of its statuses.

use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::{ModelName, ModelVersion};

/// What went wrong, in the terms of the table in [`Kind::code`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The model or version is unknown, or no version of it is ready.
    NotFound,
    /// The version is known but not ready, the server drains, or no worker can
    /// be reached.
    NotReady,
    /// A queue is full: safe to try again elsewhere.
    Overloaded,
    /// A message is over the limit.
    TooLarge,
    /// A field of the request is wrong.
    Invalid,
    /// The deadline passed.
    DeadlinePassed,
    /// The caller went away.
    Cancelled,
    /// The server does not do this.
    Unsupported,
    /// The server is at fault.
    Internal,
}

impl Kind {
    /// The gRPC status of this kind.
    pub fn code(self) -> Code {
        match self {
            Self::NotFound => Code::NotFound,
            Self::NotReady | Self::Overloaded => Code::Unavailable,
            Self::TooLarge => Code::ResourceExhausted,
            Self::Invalid => Code::InvalidArgument,
            Self::DeadlinePassed => Code::DeadlineExceeded,
            Self::Cancelled => Code::Cancelled,
            Self::Unsupported => Code::Unimplemented,
            Self::Internal => Code::Internal,
        }
    }
}

/// A field that is wrong and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The field's path in the request, for example `inputs[0].shape`.
    pub field: String,
    /// What is wrong with it.
    pub description: String,
}

/// Why a request failed: what the caller is told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: Kind,
    message: String,
    violation: Option<Box<Violation>>,
    retry_after: Option<Duration>,
}

impl Error {
    /// An error without a field.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            violation: None,
            retry_after: None,
        }
    }

    /// A field is wrong.
    pub fn invalid(field: impl Into<String>, description: impl Into<String>) -> Self {
        let (field, description) = (field.into(), description.into());
        Self {
            message: format!("{field}: {description}"),
            violation: Some(Box::new(Violation { field, description })),
            ..Self::new(Kind::Invalid, "")
        }
    }

    /// A queue is full; `retry_after` is when a place will probably be free.
    pub fn overloaded(message: impl Into<String>, retry_after: Duration) -> Self {
        Self {
            retry_after: Some(retry_after),
            ..Self::new(Kind::Overloaded, message)
        }
    }

    /// A message is longer than the limit.
    pub fn too_large(bytes: usize, bytes_max: usize) -> Self {
        Self::new(
            Kind::TooLarge,
            format!("the message has {bytes} bytes, over the limit of {bytes_max}"),
        )
    }

    /// The model, or the version asked for, is not known here.
    pub fn unknown_model(name: &ModelName, version: Option<ModelVersion>) -> Self {
        let (field, message) = match version {
            Some(version) => (
                "model_version",
                format!("model '{name}' has no version {version}"),
            ),
            None => ("model_name", format!("unknown model '{name}'")),
        };
        Self {
            violation: Some(Box::new(Violation {
                field: field.into(),
                description: message.clone(),
            })),
            ..Self::new(Kind::NotFound, message)
        }
    }

    /// The deadline passed before there was an answer.
    pub fn deadline_passed() -> Self {
        Self::new(Kind::DeadlinePassed, "the deadline passed")
    }

    /// The kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The field that is wrong.
    pub fn violation(&self) -> Option<&Violation> {
        self.violation.as_deref()
    }

    /// The status that a caller gets, with its details.
    pub fn to_status(&self) -> Status {
        let mut details = ErrorDetails::new();
        if let Some(violation) = &self.violation {
            details.add_bad_request_violation(&violation.field, &violation.description);
        }
        if self.retry_after.is_some() {
            details.set_retry_info(self.retry_after);
        }
        if details.has_bad_request_violations() || self.retry_after.is_some() {
            return Status::with_error_details(self.kind.code(), &self.message, details);
        }
        Status::new(self.kind.code(), &self.message)
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        error.to_status()
    }
}
