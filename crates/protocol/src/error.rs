//! The one error of every door and the one table of its statuses.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::MODEL_KEY;
use crate::field::{FieldPath, Segment};
use crate::words::{DESCRIPTION_BYTES_MAX, MESSAGE_BYTES_MAX, cut, cut_bytes};

/// The kind of an error. [`Kind::code`] and its siblings read one table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The model or version is unknown, or was unloaded.
    NotFound,
    /// The model is known but not ready, the server drains, or no worker is
    /// reachable.
    NotReady,
    /// A queue is full: safe to retry elsewhere.
    Overloaded,
    /// A message is over the limit.
    TooLarge,
    /// The caller's own quota is spent.
    QuotaSpent,
    /// The credential is missing or invalid.
    Unauthenticated,
    /// The caller may not do this.
    Forbidden,
    /// A field of the request is invalid.
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

/// The party that caused an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The caller's: the same request fails everywhere.
    Caller,
    /// This process's.
    Server,
    /// That of a worker or provider behind this process.
    Upstream,
}

/// A row of the table of errors.
struct Row {
    code: Code,
    http_status: u16,
    fault: Fault,
    retryable: bool,
}

impl Kind {
    /// The table of errors: the gRPC status, the HTTP status, whose fault it
    /// is, and whether the same request may succeed later.
    const fn row(self) -> Row {
        use Fault::{Caller, Server};
        let (code, http_status, fault, retryable) = match self {
            Self::NotFound => (Code::NotFound, 404, Caller, false),
            Self::NotReady => (Code::Unavailable, 503, Server, true),
            Self::Overloaded => (Code::Unavailable, 503, Server, true),
            Self::TooLarge => (Code::ResourceExhausted, 413, Caller, false),
            Self::QuotaSpent => (Code::ResourceExhausted, 429, Caller, true),
            Self::Unauthenticated => (Code::Unauthenticated, 401, Caller, false),
            Self::Forbidden => (Code::PermissionDenied, 403, Caller, false),
            Self::Invalid => (Code::InvalidArgument, 400, Caller, false),
            Self::DeadlinePassed => (Code::DeadlineExceeded, 504, Server, false),
            Self::Cancelled => (Code::Cancelled, 499, Caller, false),
            Self::Unsupported => (Code::Unimplemented, 501, Caller, false),
            Self::Internal => (Code::Internal, 500, Server, false),
        };
        Row {
            code,
            http_status,
            fault,
            retryable,
        }
    }

    /// The gRPC status.
    pub const fn code(self) -> Code {
        self.row().code
    }

    /// The HTTP status.
    pub const fn http_status(self) -> u16 {
        self.row().http_status
    }

    /// The party that caused an error of this kind, if this process made it.
    pub const fn fault(self) -> Fault {
        self.row().fault
    }

    /// Whether the same request may succeed later.
    pub const fn retryable(self) -> bool {
        self.row().retryable
    }

    /// The kind that a code of another process stands for.
    pub const fn from_code(code: Code) -> Self {
        match code {
            Code::NotFound => Self::NotFound,
            Code::Unavailable => Self::NotReady,
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

    /// The kind of a status of another process. Two codes stand for two kinds
    /// each: only one of these says when to retry.
    fn of(status: &Status, retry: bool) -> Self {
        match status.code() {
            Code::Unavailable if retry => Self::Overloaded,
            Code::ResourceExhausted if retry => Self::QuotaSpent,
            code => Self::from_code(code),
        }
    }
}

/// A field that is invalid and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The field's path in the request, for example `inputs[0].shape`.
    pub field: FieldPath,
    /// The name of the model's input that the field belongs to, if any.
    pub input: Option<String>,
    /// The problem, a predicate of the field, such as `must be FP32`.
    pub description: String,
}

impl Violation {
    /// The sentence that a caller reads: `inputs[0] 'pixels': shape is [128],
    /// but must be [-1, 64]`.
    fn sentence(&self) -> String {
        let Self {
            field, description, ..
        } = self;
        if let (Some(input), [Segment::Name("inputs"), Segment::Index(index), rest @ ..]) =
            (&self.input, field.segments().as_slice())
        {
            let part: FieldPath = rest.iter().copied().collect();
            let space = if rest.is_empty() { "" } else { " " };
            return format!("inputs[{index}] '{input}': {part}{space}{description}");
        }
        format!("{field}: {description}")
    }
}

/// Why a request failed: a message for people, and a kind for programs. A program
/// never parses the message. Whatever a caller sent, an error is short: its
/// fields are bounded where it is made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: Kind,
    fault: Fault,
    message: String,
    violation: Option<Box<Violation>>,
    retry_after: Option<Duration>,
}

/// When to retry what is not ready yet: loads take seconds, and a caller who asks
/// more often learns nothing sooner.
const NOT_READY_RETRY_AFTER: Duration = Duration::from_secs(1);

/// `google.rpc.ErrorInfo` carries the name of the input that is invalid: the
/// reason and domain by which it is known, and its key.
const INPUT_REASON: &str = "INVALID_INPUT";
const INPUT_DOMAIN: &str = "andon";
const INPUT_KEY: &str = "input";

impl Error {
    /// An error without a field.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            fault: kind.fault(),
            message: cut_bytes(message.into(), DESCRIPTION_BYTES_MAX),
            violation: None,
            retry_after: None,
        }
    }

    /// A field is invalid. The description is a predicate of the field, such
    /// as `must be FP32`.
    pub fn invalid(field: impl Into<FieldPath>, description: impl Into<String>) -> Self {
        let violation = Violation {
            field: field.into(),
            input: None,
            description: cut_bytes(description.into(), DESCRIPTION_BYTES_MAX),
        };
        Self {
            message: violation.sentence(),
            violation: Some(Box::new(violation)),
            ..Self::new(Kind::Invalid, "")
        }
    }

    /// An input of a model is invalid: [`Self::invalid`] with the input's name.
    pub fn invalid_input(
        name: &str,
        field: impl Into<FieldPath>,
        description: impl Into<String>,
    ) -> Self {
        let mut error = Self::invalid(field, description);
        if let Some(violation) = &mut error.violation {
            violation.input = Some(cut(name).into_owned());
            error.message = violation.sentence();
        }
        error
    }

    /// A model or server is known and cannot be called now; a retry is worth it a
    /// little later.
    pub fn not_ready(message: impl Into<String>) -> Self {
        Self {
            retry_after: Some(NOT_READY_RETRY_AFTER),
            ..Self::new(Kind::NotReady, message)
        }
    }

    /// A queue is full; `retry_after` is when it probably has room.
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

    /// The error that a status stands for, be it this process's or a worker's.
    pub fn from_status(status: &Status) -> Self {
        let details = status.get_error_details();
        let retry_after = details.retry_info().and_then(|info| info.retry_delay);
        let input = details
            .error_info()
            .filter(|info| info.domain == INPUT_DOMAIN && info.reason == INPUT_REASON)
            .and_then(|info| info.metadata.get(INPUT_KEY))
            .map(|input| cut(input).into_owned());
        let violation = details
            .bad_request()
            .and_then(|bad| bad.field_violations.first())
            .map(|violation| {
                Box::new(Violation {
                    field: violation.field.as_str().into(),
                    input,
                    description: cut_bytes(violation.description.clone(), DESCRIPTION_BYTES_MAX),
                })
            });
        let kind = Kind::of(status, retry_after.is_some());
        Self {
            kind,
            fault: kind.fault(),
            message: cut_bytes(status.message().to_owned(), MESSAGE_BYTES_MAX),
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

    /// A field names something that is unknown here. The message is a sentence
    /// of its own.
    pub fn not_found(field: impl Into<FieldPath>, message: impl Into<String>) -> Self {
        let error = Self::new(Kind::NotFound, message);
        Self {
            violation: Some(Box::new(Violation {
                field: field.into(),
                input: None,
                description: error.message.clone(),
            })),
            ..error
        }
    }

    /// No model for the task is ready.
    pub fn no_model(task: &str) -> Self {
        let message = format!("no model for the task '{task}' is ready");
        Self::new(Kind::NotFound, message)
    }

    /// No model for the task is ready, but one of those that load may be for it.
    pub fn no_model_yet(task: &str) -> Self {
        Self::not_ready(format!(
            "no model for the task '{task}' is ready yet: models are LOADING"
        ))
    }

    /// Several models are for the task, and the call names none of them.
    pub fn several_models(task: &str, names: &[&str]) -> Self {
        let names = names.join(", ");
        let description = format!("must name one of the models for the task '{task}': {names}");
        Self::invalid(MODEL_KEY, description)
    }

    /// The named model is for another task.
    pub fn wrong_task(
        field: impl Into<FieldPath>,
        name: &str,
        task: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Self {
        let description = format!("model '{name}' is for the task '{task}', not '{expected}'");
        Self::invalid(field, description)
    }

    /// The deadline passed before there was a response.
    pub fn deadline_passed() -> Self {
        Self::new(Kind::DeadlinePassed, "the deadline passed")
    }

    /// The same error as an upstream's: an internal error of this process becomes
    /// one of the upstream.
    #[must_use]
    pub fn from_upstream(mut self) -> Self {
        if self.fault == Fault::Server {
            self.fault = Fault::Upstream;
        }
        self
    }

    /// The same error with the field that another door has for it; `field`
    /// returns none to keep the path.
    #[must_use]
    pub fn map_field(mut self, field: impl FnOnce(&FieldPath) -> Option<FieldPath>) -> Self {
        if let Some(violation) = self.violation.as_deref_mut()
            && let Some(field) = field(&violation.field)
        {
            violation.field = field;
            if self.kind == Kind::Invalid {
                self.message = violation.sentence();
            }
        }
        self
    }

    /// The kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The party that caused it.
    pub fn fault(&self) -> Fault {
        self.fault
    }

    /// The field that is invalid, and why.
    pub fn violation(&self) -> Option<&Violation> {
        self.violation.as_deref()
    }

    /// The path of the field that is invalid.
    pub fn field(&self) -> Option<&FieldPath> {
        self.violation.as_ref().map(|violation| &violation.field)
    }

    /// The index of the element that is invalid, where the error is about one
    /// element of a list or tensor.
    pub fn element(&self) -> Option<usize> {
        self.field().and_then(FieldPath::element)
    }

    /// Whether the same request may succeed later.
    pub fn retryable(&self) -> bool {
        self.kind.retryable() || self.retry_after.is_some()
    }

    /// When a retry is worth it, if that is known.
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    /// The status that a caller gets, with its details.
    pub fn to_status(&self) -> Status {
        let mut details = ErrorDetails::new();
        if let Some(violation) = &self.violation {
            details.add_bad_request_violation(violation.field.as_str(), &violation.description);
            if let Some(input) = &violation.input {
                let metadata = HashMap::from([(INPUT_KEY.to_owned(), input.clone())]);
                details.set_error_info(INPUT_REASON, INPUT_DOMAIN, metadata);
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Kind; 12] = [
        Kind::NotFound,
        Kind::NotReady,
        Kind::Overloaded,
        Kind::TooLarge,
        Kind::QuotaSpent,
        Kind::Unauthenticated,
        Kind::Forbidden,
        Kind::Invalid,
        Kind::DeadlinePassed,
        Kind::Cancelled,
        Kind::Unsupported,
        Kind::Internal,
    ];

    #[test]
    fn a_status_carries_the_whole_error() {
        let retry_after = Duration::from_millis(250);
        let mut errors: Vec<Error> = KINDS.map(|kind| Error::new(kind, "why")).to_vec();
        errors.extend([
            Error::overloaded("full", retry_after),
            Error::quota_spent("spent", retry_after),
            Error::invalid("inputs[0].shape", "must be [1]"),
            Error::invalid_input("pixels", FieldPath::input(0).field("shape"), "is wrong"),
            Error::not_found("model_name", "unknown model 'x'"),
        ]);
        for error in errors {
            let again = Error::from_status(&error.to_status());
            // Without a time, these two share their codes with others.
            let alone = matches!(error.kind, Kind::Overloaded | Kind::QuotaSpent);
            if !alone || error.retry_after.is_some() {
                assert_eq!(again, error);
            }
        }
    }

    #[test]
    fn an_error_is_short_whatever_its_words_are() {
        let long = "é".repeat(4 << 20);
        let field = FieldPath::parameter(&long);
        let errors = [
            Error::new(Kind::Unsupported, format!("output '{long}' is not JSON")),
            Error::invalid(field.clone(), &long),
            Error::invalid(&long, format!("must be one of: {long}")),
            Error::invalid_input(&long, FieldPath::input(0).field(&long), &long),
            Error::invalid("a", "b").map_field(|_| Some(long.as_str().into())),
            Error::not_found(&long, format!("unknown model '{long}'")),
            Error::overloaded(&long, Duration::from_secs(1)),
            Error::quota_spent(&long, Duration::from_secs(1)),
            Error::no_model(&long),
            Error::several_models(&long, &[&long]),
            Error::wrong_task(&long, &long, &long, &long),
            Error::from_status(&Status::new(Code::Internal, &long)),
        ];
        for error in errors {
            assert!(error.to_string().len() <= MESSAGE_BYTES_MAX + 3, "{error}");
            let violation = error.violation();
            let parts = violation.map_or(0, |violation| {
                let input = violation.input.as_ref().map_or(0, String::len);
                violation.field.as_str().len() + violation.description.len() + input
            });
            assert!(parts <= 3 * DESCRIPTION_BYTES_MAX, "{error}");
        }
        // Another process may be of another version, or hostile.
        let mut details = ErrorDetails::new();
        details.add_bad_request_violation(&long, &long);
        let foreign = Status::with_error_details(Code::InvalidArgument, &long, details);
        let again = Error::from_status(&foreign);
        assert!(again.field().unwrap().as_str().len() <= 300);
        let again = again.to_status();
        assert!(again.message().len() + again.details().len() <= 3 * MESSAGE_BYTES_MAX);
    }

    #[test]
    fn an_error_about_an_input_has_its_name_and_element() {
        let field = FieldPath::input(0).field("shape");
        let error = Error::invalid_input("pixels", field, "is [128], but must be [-1, 64]");
        assert_eq!(
            error.to_string(),
            "inputs[0] 'pixels': shape is [128], but must be [-1, 64]"
        );
        assert_eq!(error.field().unwrap(), "inputs[0].shape");
        assert_eq!(error.element(), None);
        let field = FieldPath::input(1).field("contents").index(3);
        let error = Error::invalid_input("text", field, "is not UTF-8");
        assert_eq!(
            error.to_string(),
            "inputs[1] 'text': contents[3] is not UTF-8"
        );
        assert_eq!(error.element(), Some(3));
        let whole = Error::invalid_input("text", FieldPath::input(1), "is wrong");
        assert_eq!(whole.to_string(), "inputs[1] 'text': is wrong");
    }

    #[test]
    fn another_door_names_the_field_its_own_way() {
        let field = FieldPath::input(0).field("contents").index(3);
        let error = Error::invalid_input("text", field, "is not UTF-8");
        let rest = error.clone().map_field(|field| {
            assert_eq!(field, &"inputs[0].contents[3]");
            Some("inputs[0].data[3]".into())
        });
        assert_eq!(rest.to_string(), "inputs[0] 'text': data[3] is not UTF-8");
        let openai = error.clone().map_field(|_| Some("input[3]".into()));
        assert_eq!(openai.to_string(), "input[3]: is not UTF-8");
        assert_eq!(error.clone().map_field(|_| None), error);
        let unknown = Error::not_found("model_name", "unknown model 'x'");
        let unknown = unknown.map_field(|_| Some("model".into()));
        assert_eq!(unknown.to_string(), "unknown model 'x'");
        assert_eq!(unknown.field().unwrap(), "model");
    }

    #[test]
    fn faults_and_retries_follow_from_the_kind() {
        for kind in KINDS {
            let error = Error::new(kind, "why");
            assert_eq!(error.fault(), kind.fault());
            assert_eq!(error.retryable(), kind.retryable());
            let of_server = matches!(kind.http_status(), 500 | 503 | 504);
            assert_eq!(kind.fault() == Fault::Server, of_server, "{kind:?}");
            let upstream = error.from_upstream().fault();
            let expected = if of_server {
                Fault::Upstream
            } else {
                Fault::Caller
            };
            assert_eq!(upstream, expected, "{kind:?}");
        }
        let later = Error::overloaded("full", Duration::from_secs(1));
        assert!(later.retryable() && !Error::invalid("a", "b").retryable());
    }
}
