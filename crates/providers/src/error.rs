//! The errors of calls of outside services, and their messages for callers,
//! which have the model's name, and neither credential nor address.

use std::time::{Duration, SystemTime};

use http::HeaderMap;
use protocol::{Error, Kind};

/// A longer `retry-after` is cut to this.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// The delay before the retry of a caller that exceeded a limit of this gateway.
const BUSY_RETRY_AFTER: Duration = Duration::from_millis(100);

/// Why there is no response that can be used. Each message continues "the
/// provider of model '…'".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProviderError {
    /// No connection could be made.
    #[error("cannot be reached")]
    Unreachable,
    /// The connection was lost before the response was complete.
    #[error("closed the connection before its response was complete")]
    ConnectionLost,
    /// The service reported an error in a response of status 200, whole or in
    /// the middle of a stream.
    #[error("reported an error in its response")]
    ReportedError,
    /// The response ended without a finish reason.
    #[error("ended its response before it was complete")]
    Incomplete,
    /// The service has no such parameter, or not with this value.
    #[error("{reason}")]
    Parameter {
        /// The parameter, by the path that its caller knows.
        field: String,
        /// What the service does with it.
        reason: &'static str,
    },
    /// A status that is no success, for which the request is not to blame.
    #[error("{} (HTTP {status})", status_reason(*.status))]
    Status {
        /// The HTTP status.
        status: u16,
        /// When the service wants to be called again.
        retry_after: Option<Duration>,
    },
    /// The service rejected the caller's request, with this message.
    #[error("rejected the request{}", after_colon(.0))]
    Rejected(String),
    /// The vectors do not have the requested dimensions.
    #[error("does not support this number of dimensions")]
    UnsupportedDimensions,
    /// The dialect has no call for this task.
    #[error("does not support this task")]
    UnsupportedTask,
    /// The response cannot be read, or does not fit the request.
    #[error("sent a response that cannot be used: {0}")]
    InvalidResponse(&'static str),
    /// The response is over the size limit.
    #[error("sent a response over the size limit")]
    ResponseTooLarge,
    /// The response does not fit among the bytes that this gateway may have
    /// in flight.
    #[error("sent a response while too many bytes were in flight")]
    BytesInFlight,
    /// The circuit breaker is open, for so long.
    #[error("failed repeatedly and is ejected: its circuit breaker is open")]
    CircuitOpen(Duration),
    /// As many calls are in flight as `concurrency_max` allows.
    #[error("has as many calls in flight as concurrency_max allows")]
    ConcurrencyLimit,
    /// The response did not come in time.
    #[error("did not respond in time")]
    Timeout,
}

/// The outcome of a call for the circuit breaker of the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Health {
    /// It responds: the call, the credential or the quota is to blame.
    Healthy,
    /// It fails.
    Unhealthy,
    /// Nothing.
    Unknown,
}

impl ProviderError {
    /// A response with an error status; `message` is that of its body, without the
    /// credential.
    pub(crate) fn from_status(status: u16, headers: &HeaderMap, message: String) -> Self {
        match status {
            400 | 413 | 422 => Self::Rejected(message),
            _ => Self::Status {
                status,
                retry_after: retry_after(headers, SystemTime::now()),
            },
        }
    }

    /// A parameter that the service does not have.
    pub(crate) fn unsupported(field: impl Into<String>) -> Self {
        Self::Parameter {
            field: field.into(),
            reason: "does not support it",
        }
    }

    /// A call that could not be sent, or whose connection was lost.
    pub(crate) fn from_transport(error: &reqwest::Error) -> Self {
        if error.is_connect() {
            Self::Unreachable
        } else {
            Self::ConnectionLost
        }
    }

    /// Whether the same call may succeed when it is retried.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unreachable | Self::ConnectionLost => true,
            Self::Status { status, .. } => {
                matches!(status, 408 | 409 | 429) || (*status >= 500 && *status != 501)
            }
            _ => false,
        }
    }

    /// When to call again, if that is known.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            Self::CircuitOpen(ejection) => Some(*ejection),
            Self::BytesInFlight | Self::ConcurrencyLimit => Some(BUSY_RETRY_AFTER),
            _ => None,
        }
    }

    /// Whether the service may have computed, and may charge for it.
    pub fn may_be_charged(&self) -> bool {
        !matches!(
            self,
            Self::Unreachable
                | Self::Status { .. }
                | Self::Rejected(_)
                | Self::ReportedError
                | Self::Incomplete
                | Self::Parameter { .. }
                | Self::UnsupportedTask
                | Self::CircuitOpen(_)
                | Self::ConcurrencyLimit
        )
    }

    /// The outcome for the circuit breaker. An error that one caller's request
    /// causes must not eject the service for the others.
    pub(crate) fn health(&self) -> Health {
        match self {
            Self::Status { status, .. } if *status < 500 => Health::Healthy,
            Self::Rejected(_) | Self::UnsupportedDimensions => Health::Healthy,
            Self::Parameter { .. } => Health::Unknown,
            Self::UnsupportedTask
            | Self::CircuitOpen(_)
            | Self::ConcurrencyLimit
            | Self::BytesInFlight
            | Self::ResponseTooLarge => Health::Unknown,
            _ => Health::Unhealthy,
        }
    }

    /// Its value of the label `outcome` in metrics.
    pub fn outcome(&self) -> &'static str {
        match self {
            Self::Unreachable => "not_sent",
            Self::ConnectionLost | Self::Incomplete => "broken",
            Self::ReportedError => "failed",
            Self::Status { status, .. } => match status {
                401 | 403 => "key_refused",
                408 => "late",
                429 => "limited",
                status if *status >= 500 => "failed",
                _ => "refused",
            },
            Self::Rejected(_)
            | Self::UnsupportedDimensions
            | Self::UnsupportedTask
            | Self::Parameter { .. } => "invalid",
            Self::InvalidResponse(_) | Self::ResponseTooLarge => "garbage",
            Self::BytesInFlight | Self::ConcurrencyLimit => "no_room",
            Self::CircuitOpen(_) => "left_alone",
            Self::Timeout => "late",
        }
    }

    /// The error for the caller of a model; `field` is the part of its request that
    /// was sent to the service.
    pub fn to_error(&self, model: &str, field: &str) -> Error {
        let message = format!("the provider of model '{model}' {self}");
        // It was not sent: the caller's own words are at fault.
        if let Self::Parameter { field, .. } = self {
            return Error::invalid(field.as_str(), message);
        }
        let error = match (self, self.retry_after()) {
            (Self::Rejected(_) | Self::UnsupportedDimensions, _) => Error::invalid(field, message),
            (Self::UnsupportedTask, _) => Error::new(Kind::Unsupported, message),
            (Self::Timeout, _) => Error::new(Kind::DeadlinePassed, message),
            (_, Some(retry_after)) => Error::overloaded(message, retry_after),
            (_, None) => Error::new(Kind::NotReady, message),
        };
        error.from_upstream()
    }
}

fn status_reason(status: u16) -> &'static str {
    match status {
        401 | 403 => "does not accept the gateway's API key",
        404 => "does not know the model",
        429 => "is rate limiting the gateway",
        _ => "failed",
    }
}

fn after_colon(message: &str) -> String {
    if message.is_empty() {
        String::new()
    } else {
        format!(": {message}")
    }
}

/// When a service wants to be called again: `retry-after-ms`, or `retry-after`
/// in seconds or as a date.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
    let number = |text: &str| text.parse::<f64>().ok().filter(|number| *number >= 0.0);
    if let Some(ms) = text("retry-after-ms").and_then(number) {
        return bounded(ms / 1000.0);
    }
    let text = text("retry-after")?;
    if let Some(seconds) = number(text) {
        return bounded(seconds);
    }
    let date = httpdate::parse_http_date(text).ok()?;
    let after = date.duration_since(now).unwrap_or_default();
    Some(after.min(RETRY_AFTER_MAX))
}

fn bounded(seconds: f64) -> Option<Duration> {
    let after = Duration::try_from_secs_f64(seconds).ok()?;
    Some(after.min(RETRY_AFTER_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn after(name: &'static str, value: &str) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::try_from(value).unwrap());
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        retry_after(&headers, now)
    }

    #[test]
    fn retry_after_is_read_in_each_of_its_forms() {
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        assert_eq!(after("retry-after", "7"), seconds(7));
        assert_eq!(
            after("retry-after", "0.5"),
            Some(Duration::from_millis(500))
        );
        assert_eq!(
            after("retry-after-ms", "250"),
            Some(Duration::from_millis(250))
        );
        assert_eq!(
            after("retry-after", "Sun, 06 Nov 1994 08:49:40 GMT"),
            seconds(3)
        );
        assert_eq!(
            after("retry-after", "Sun, 06 Nov 1994 08:49:00 GMT"),
            seconds(0)
        );
        for far in ["1e19", "86401", "Fri, 31 Dec 9999 23:59:59 GMT"] {
            assert_eq!(after("retry-after", far), Some(RETRY_AFTER_MAX), "{far}");
        }
        for wrong in ["-1", "soon", "", "NaN", "1e300"] {
            assert_eq!(after("retry-after", wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_rejection_repeats_the_message_of_the_service_if_there_is_one() {
        let rejected = ProviderError::Rejected("too long".to_owned());
        assert_eq!(rejected.to_string(), "rejected the request: too long");
        let rejected = ProviderError::Rejected(String::new());
        assert_eq!(rejected.to_string(), "rejected the request");
    }

    #[test]
    fn an_error_that_one_caller_brings_about_says_nothing_of_the_service() {
        for error in [
            ProviderError::Rejected(String::new()),
            ProviderError::UnsupportedDimensions,
            ProviderError::ResponseTooLarge,
            ProviderError::BytesInFlight,
        ] {
            assert_ne!(error.health(), Health::Unhealthy, "{error:?}");
        }
        let error = ProviderError::UnsupportedDimensions.to_error("small", "dimensions");
        assert_eq!(error.kind(), Kind::Invalid);
    }

    #[test]
    fn a_parameter_that_a_service_does_not_have_is_refused_by_its_name() {
        let error = ProviderError::unsupported("seed").to_error("big", "messages");
        assert_eq!(error.kind(), Kind::Invalid);
        assert_eq!(error.violation().unwrap().field, "seed");
        assert!(error.to_string().contains("'big' does not support it"));
    }

    #[test]
    fn an_error_names_the_model_and_says_when_to_retry() {
        let status = |status, retry_after| ProviderError::Status {
            status,
            retry_after,
        };
        let error = status(401, None).to_error("small", "inputs");
        assert_eq!(error.kind(), Kind::NotReady);
        assert_eq!(
            error.to_string(),
            "the provider of model 'small' does not accept the gateway's API key (HTTP 401)"
        );
        let error = status(429, Some(Duration::from_secs(1))).to_error("small", "inputs");
        assert_eq!(error.kind(), Kind::Overloaded);
        let error = ProviderError::Timeout.to_error("small", "inputs");
        assert_eq!(error.kind(), Kind::DeadlinePassed);
    }
}
