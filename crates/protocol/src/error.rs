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
    /// The caller's own quota is spent.
    QuotaSpent,
    /// The caller does not say who it is, or cannot prove it.
    Unauthenticated,
    /// The caller may not do this.
    Forbidden,
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
            Self::TooLarge | Self::QuotaSpent => Code::ResourceExhausted,
            Self::Unauthenticated => Code::Unauthenticated,
            Self::Forbidden => Code::PermissionDenied,
            Self::Invalid => Code::InvalidArgument,
            Self::DeadlinePassed => Code::DeadlineExceeded,
            Self::Cancelled => Code::Cancelled,
            Self::Unsupported => Code::Unimplemented,
            Self::Internal => Code::Internal,
        }
    }

    /// The HTTP status of this kind.
    pub fn http_status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::Unauthenticated => 401,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::TooLarge => 413,
            Self::QuotaSpent => 429,
            Self::Cancelled => 499,
            Self::Internal => 500,
            Self::Unsupported => 501,
            Self::NotReady | Self::Overloaded => 503,
            Self::DeadlinePassed => 504,
        }
    }

    /// The name of the gRPC status, as answers in JSON have it.
    pub fn name(self) -> &'static str {
        match self.code() {
            Code::NotFound => "NOT_FOUND",
            Code::Unavailable => "UNAVAILABLE",
            Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
            Code::Unauthenticated => "UNAUTHENTICATED",
            Code::PermissionDenied => "PERMISSION_DENIED",
            Code::InvalidArgument => "INVALID_ARGUMENT",
            Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Code::Cancelled => "CANCELLED",
            Code::Unimplemented => "UNIMPLEMENTED",
            _ => "INTERNAL",
        }
    }

    /// The kind that a status of another process stands for. A message over a
    /// limit and a spent quota share a code: only the second says when to come
    /// back.
    fn of(status: &Status, retry: bool) -> Self {
        match status.code() {
            Code::NotFound => Self::NotFound,
            Code::Unavailable if retry => Self::Overloaded,
            Code::Unavailable => Self::NotReady,
            Code::ResourceExhausted if retry => Self::QuotaSpent,
            Code::ResourceExhausted => Self::TooLarge,
            Code::Unauthenticated => Self::Unauthenticated,
            Code::PermissionDenied => Self::Forbidden,
            Code::InvalidArgument | Code::OutOfRange | Code::FailedPrecondition => Self::Invalid,
            Code::DeadlineExceeded => Self::DeadlinePassed,
            Code::Cancelled => Self::Cancelled,
            Code::Unimplemented => Self::Unsupported,
            _ => Self::Internal,
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

    /// A quota of the caller's is spent; the message says which, and
    /// `retry_after` when there is something of it again.
    pub fn quota_spent(message: impl Into<String>, retry_after: Duration) -> Self {
        Self {
            retry_after: Some(retry_after),
            ..Self::new(Kind::QuotaSpent, message)
        }
    }

    /// What a status says, be it our own or a worker's.
    pub fn from_status(status: &Status) -> Self {
        let details = status.get_error_details();
        let retry_after = details.retry_info().and_then(|info| info.retry_delay);
        let violation = details
            .bad_request()
            .and_then(|bad| bad.field_violations.first())
            .map(|violation| {
                Box::new(Violation {
                    field: violation.field.clone(),
                    description: violation.description.clone(),
                })
            });
        Self {
            kind: Kind::of(status, retry_after.is_some()),
            message: status.message().to_owned(),
            violation,
            retry_after,
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

    /// The same error in the terms of another door: `words` gives its field
    /// and what is wrong with it anew, or nothing to leave them.
    #[must_use]
    pub fn renamed(mut self, words: impl FnOnce(&str, &str) -> Option<(String, String)>) -> Self {
        let Some(violation) = self.violation.as_deref_mut() else {
            return self;
        };
        if let Some((field, description)) = words(&violation.field, &violation.description) {
            if self.kind == Kind::Invalid {
                self.message = format!("{field}: {description}");
            }
            *violation = Violation { field, description };
        }
        self
    }

    /// The kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The field that is wrong.
    pub fn violation(&self) -> Option<&Violation> {
        self.violation.as_deref()
    }

    /// When it is worth trying again, if that is known.
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
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
