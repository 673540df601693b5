//! How long a caller waits, by the headers of its request.

use std::time::Duration;

use http::HeaderMap;
use protocol::Error;

use super::error::ErrorFormat;

/// The header with the caller's timeout, in milliseconds.
const TIMEOUT: &str = "timeout";
/// The same in seconds, which OpenAI's clients send with each request: the
/// first in Node, the second in Python.
const CLIENT_TIMEOUTS: [&str; 2] = ["x-stainless-timeout", "x-stainless-read-timeout"];

/// How long a caller waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Until the response begins.
    pub response: Duration,
    /// Until a stream of events has ended.
    pub stream: Duration,
}

impl Timeouts {
    /// The timeouts of the headers, at most `max`. The timeout of OpenAI's
    /// clients ends when the response begins, so that it ends no stream.
    pub fn of(headers: &HeaderMap, format: ErrorFormat, max: Duration) -> Result<Self, Error> {
        let (response, stream) = match (timeout(headers)?, format) {
            (Some(timeout), _) => (Some(timeout), Some(timeout)),
            (None, ErrorFormat::OpenAi) => (client_timeout(headers), None),
            (None, ErrorFormat::Problem) => (None, None),
        };
        let within = |timeout: Option<Duration>| timeout.unwrap_or(max).min(max);
        Ok(Self {
            response: within(response),
            stream: within(stream),
        })
    }
}

/// The timeout that OpenAI's clients send by themselves. They round less than a
/// second to 0, which is ignored like every value that is not a positive number.
fn client_timeout(headers: &HeaderMap) -> Option<Duration> {
    let read = |name: &&str| {
        let seconds: f64 = headers.get(*name)?.to_str().ok()?.parse().ok()?;
        let timeout = Duration::try_from_secs_f64(seconds).ok()?;
        (!timeout.is_zero()).then_some(timeout)
    };
    CLIENT_TIMEOUTS.iter().filter_map(read).min()
}

/// The timeout that the caller chose.
fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, Error> {
    let Some(value) = headers.get(TIMEOUT) else {
        return Ok(None);
    };
    let ms = value.to_str().ok().and_then(|text| {
        let digits = text.len() <= 12 && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse::<u64>().ok().filter(|ms| digits && *ms > 0)
    });
    let ms = ms.ok_or_else(|| {
        Error::invalid(TIMEOUT, "must be a positive whole number of milliseconds")
    })?;
    Ok(Some(Duration::from_millis(ms)))
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    fn with(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(
            HeaderName::from_static(name),
            HeaderValue::from_bytes(value.as_bytes()).unwrap(),
        )])
    }

    #[test]
    fn a_timeout_is_read_or_refused() {
        assert_eq!(timeout(&HeaderMap::new()), Ok(None));
        let read = timeout(&with(TIMEOUT, "50"));
        assert_eq!(read, Ok(Some(Duration::from_millis(50))));
        for wrong in ["", "0", "-1", "1.5", "+5", "1s", "9999999999999"] {
            let error = timeout(&with(TIMEOUT, wrong)).unwrap_err();
            assert_eq!(error.violation().unwrap().field, "timeout", "{wrong}");
        }
    }

    #[test]
    fn the_timeouts_of_openais_clients_are_read() {
        let (max, second) = (Duration::from_secs(60), Duration::from_secs(1));
        let of = |headers: &HeaderMap, format| {
            let timeouts = Timeouts::of(headers, format, max).unwrap();
            (timeouts.response, timeouts.stream)
        };
        for (name, value, expected) in [
            (CLIENT_TIMEOUTS[0], "1", second),
            (CLIENT_TIMEOUTS[1], "1.0", second),
            (CLIENT_TIMEOUTS[1], "600", max),
            (CLIENT_TIMEOUTS[0], "0", max),
            (CLIENT_TIMEOUTS[0], "-1", max),
            (CLIENT_TIMEOUTS[0], "inf", max),
            (CLIENT_TIMEOUTS[0], "NaN", max),
            (CLIENT_TIMEOUTS[0], "None", max),
        ] {
            let headers = with(name, value);
            assert_eq!(
                of(&headers, ErrorFormat::OpenAi),
                (expected, max),
                "{value}"
            );
            assert_eq!(of(&headers, ErrorFormat::Problem), (max, max), "{value}");
        }
        let mut both = with(CLIENT_TIMEOUTS[0], "1");
        both.insert(TIMEOUT, HeaderValue::from_static("2000"));
        let timeouts = of(&both, ErrorFormat::OpenAi);
        assert_eq!(timeouts, (2 * second, 2 * second));
    }
}
