//! How long a caller waits, by the headers of a request.

use std::time::Duration;

use http::HeaderMap;
use protocol::Error;

use super::super::problem::Shape;

/// The header that says how long the caller waits, in milliseconds.
const TIMEOUT: &str = "timeout";
/// The same in seconds, as OpenAI's clients say it for each request: the first
/// in Node, the second in Python.
const CLIENT_TIMEOUTS: [&str; 2] = ["x-stainless-timeout", "x-stainless-read-timeout"];

/// How long a caller waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// Until the answer begins.
    pub until_begun: Duration,
    /// Until an answer in parts has ended.
    pub until_ended: Duration,
}

impl Patience {
    /// What the headers say, within what the server allows. OpenAI's clients
    /// stop waiting when an answer has begun: their word does not end one.
    pub fn of(headers: &HeaderMap, shape: Shape, max: Duration) -> Result<Self, Error> {
        let (until_begun, until_ended) = match (timeout(headers)?, shape) {
            (Some(timeout), _) => (Some(timeout), Some(timeout)),
            (None, Shape::OpenAi) => (client_timeout(headers), None),
            (None, Shape::Problem) => (None, None),
        };
        let within = |timeout: Option<Duration>| timeout.unwrap_or(max).min(max);
        Ok(Self {
            until_begun: within(until_begun),
            until_ended: within(until_ended),
        })
    }
}

/// What OpenAI's clients say by themselves. They write less than a second as
/// 0, and what is no number of seconds is nothing that a caller chose.
fn client_timeout(headers: &HeaderMap) -> Option<Duration> {
    let read = |name: &&str| {
        let seconds: f64 = headers.get(*name)?.to_str().ok()?.parse().ok()?;
        let timeout = Duration::try_from_secs_f64(seconds).ok()?;
        (!timeout.is_zero()).then_some(timeout)
    };
    CLIENT_TIMEOUTS.iter().filter_map(read).min()
}

/// The caller's patience.
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
    fn openais_clients_say_how_long_they_wait() {
        let (max, second) = (Duration::from_secs(60), Duration::from_secs(1));
        let begun = |headers: &HeaderMap, shape| {
            let patience = Patience::of(headers, shape, max).unwrap();
            (patience.until_begun, patience.until_ended)
        };
        for (name, value, wanted) in [
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
            assert_eq!(begun(&headers, Shape::OpenAi), (wanted, max), "{value}");
            assert_eq!(begun(&headers, Shape::Problem), (max, max), "{value}");
        }
        let mut both = with(CLIENT_TIMEOUTS[0], "1");
        both.insert(TIMEOUT, HeaderValue::from_static("2000"));
        assert_eq!(begun(&both, Shape::OpenAi), (2 * second, 2 * second));
    }
}
