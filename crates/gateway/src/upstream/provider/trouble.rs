//! What goes wrong with an outside service, and what the caller is told: the
//! model's name, and neither key nor address.

use std::time::{Duration, SystemTime};

use http::HeaderMap;
use protocol::{Error, Kind};
use serde::Deserialize;

use super::key::Secret;

/// Characters of a service's own words that a caller is told.
const WORDS_MAX: usize = 200;
/// A service that wants to be called again later is called again then.
const AFTER_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Why a service gave no answer that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// There was no connection.
    NotSent,
    /// The connection broke, or the answer was cut off.
    Broken,
    /// It said so in the middle of an answer.
    Failed,
    /// It answered with a status that is no success.
    Refused {
        /// The status of HTTP.
        status: u16,
        /// When to come back.
        after: Option<Duration>,
    },
    /// It refuses what the caller sent, in these words.
    Callers(String),
    /// It does not make vectors as narrow as the caller wants them.
    Dimensions,
    /// What it answered cannot be read.
    Garbage(&'static str),
    /// What it answered is too long.
    TooLong,
    /// There is no room for the answer among the messages in flight.
    NoRoom,
    /// It is left alone because it failed, for so long.
    LeftAlone(Duration),
    /// It has as many calls as it may.
    Full,
    /// It did not answer in time.
    Late,
}

/// What trouble says of the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// It answers: the trouble is with the call, the key or the quota.
    Well,
    /// It is not well.
    Ill,
    /// Nothing.
    Unknown,
}

impl Trouble {
    /// What a status that is no success means; `secret` was sent.
    pub fn of_status(
        status: u16,
        headers: &HeaderMap,
        body: &[u8],
        secret: Option<&Secret>,
    ) -> Self {
        match status {
            400 | 413 | 422 => Self::Callers(words(body, secret)),
            _ => Self::Refused {
                status,
                after: retry_after(headers, SystemTime::now()),
            },
        }
    }

    /// What a failed sending means.
    pub fn of_error(error: &reqwest::Error) -> Self {
        match error.is_connect() {
            true => Self::NotSent,
            false => Self::Broken,
        }
    }

    /// Whether the same call may succeed a moment later.
    pub fn passes(&self) -> bool {
        match self {
            Self::NotSent | Self::Broken => true,
            Self::Refused { status, .. } => {
                matches!(status, 408 | 409 | 429) || (*status >= 500 && *status != 501)
            }
            _ => false,
        }
    }

    /// When the service wants to be called again.
    pub fn after(&self) -> Option<Duration> {
        match self {
            Self::Refused { after, .. } => *after,
            _ => None,
        }
    }

    /// Whether the service may have computed, and may take something for it.
    pub fn may_cost(&self) -> bool {
        !matches!(
            self,
            Self::NotSent
                | Self::Refused { .. }
                | Self::Callers(_)
                | Self::LeftAlone(_)
                | Self::Full
        )
    }

    /// What it says of the service. What one caller's request brings about
    /// must not keep the others from it.
    pub fn health(&self) -> Health {
        match self {
            Self::Refused { status, .. } if *status < 500 => Health::Well,
            Self::Callers(_) | Self::Dimensions => Health::Well,
            Self::LeftAlone(_) | Self::Full | Self::NoRoom | Self::TooLong => Health::Unknown,
            _ => Health::Ill,
        }
    }

    /// Its name in metrics.
    pub fn outcome(&self) -> &'static str {
        match self {
            Self::NotSent => "not_sent",
            Self::Broken => "broken",
            Self::Failed => "failed",
            Self::Refused { status, .. } => match status {
                401 | 403 => "key_refused",
                408 => "late",
                429 => "limited",
                status if *status >= 500 => "failed",
                _ => "refused",
            },
            Self::Callers(_) | Self::Dimensions => "invalid",
            Self::Garbage(_) | Self::TooLong => "garbage",
            Self::NoRoom | Self::Full => "no_room",
            Self::LeftAlone(_) => "left_alone",
            Self::Late => "late",
        }
    }

    /// What the caller of a model is told; `field` is what it sent.
    pub fn to_error(&self, model: &str, field: &str) -> Error {
        let says = |what: &str| format!("the provider of model '{model}' {what}");
        let unavailable = |what: &str| Error::new(Kind::NotReady, says(what));
        match self {
            Self::NotSent => unavailable("cannot be reached"),
            Self::Broken => unavailable("broke off"),
            Self::Failed => unavailable("failed in the middle of its answer"),
            Self::Refused { status, after } => {
                let what = match status {
                    401 | 403 => "does not accept the gateway's key",
                    404 => "does not know the model",
                    429 => "takes no more calls now",
                    _ => "failed",
                };
                let what = format!("{what} (HTTP {status})");
                match after {
                    Some(after) => Error::overloaded(says(&what), *after),
                    None => unavailable(&what),
                }
            }
            Self::Callers(words) => {
                let what = says("refuses it");
                match words.as_str() {
                    "" => Error::invalid(field, what),
                    words => Error::invalid(field, format!("{what}: {words}")),
                }
            }
            Self::Dimensions => Error::invalid(field, says("does not make such vectors")),
            Self::Garbage(what) => unavailable(&format!("answered what cannot be used: {what}")),
            Self::TooLong => unavailable("answered with too many bytes"),
            Self::NoRoom => {
                let what = "there is no room for the answer of the provider";
                let message = format!("{what} of model '{model}'");
                Error::overloaded(message, Duration::from_millis(100))
            }
            Self::LeftAlone(rest) => {
                Error::overloaded(says("failed repeatedly and is left alone"), *rest)
            }
            Self::Full => {
                let what = "has as many calls as concurrency_max allows";
                Error::overloaded(says(what), Duration::from_millis(100))
            }
            Self::Late => Error::new(Kind::DeadlinePassed, says("did not answer in time")),
        }
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
    Some(after.min(AFTER_MAX))
}

fn bounded(seconds: f64) -> Option<Duration> {
    let after = Duration::try_from_secs_f64(seconds).ok()?;
    Some(after.min(AFTER_MAX))
}

/// What a service says is wrong, without the key and cut short. Services differ
/// in where it stands.
fn words(body: &[u8], secret: Option<&Secret>) -> String {
    #[derive(Deserialize)]
    struct Named {
        message: Option<String>,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Said {
        Text(String),
        Named(Named),
        Else(serde::de::IgnoredAny),
    }
    #[derive(Deserialize)]
    struct Body {
        error: Option<Said>,
        message: Option<Said>,
        detail: Option<Said>,
    }
    let Ok(body) = serde_json::from_slice::<Body>(body) else {
        return String::new();
    };
    let said = [body.error, body.message, body.detail];
    let text = said.into_iter().flatten().find_map(|said| match said {
        Said::Text(text) => Some(text),
        Said::Named(named) => named.message,
        Said::Else(_) => None,
    });
    let text = text.unwrap_or_default();
    let printed = text.chars().filter(|character| !character.is_control());
    let printed: String = printed.collect();
    // Before it is cut: a part of a key is a secret too.
    let hidden = secret.map_or_else(|| printed.clone(), |secret| secret.hidden(&printed));
    hidden.chars().take(WORDS_MAX).collect()
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
    fn services_say_in_many_ways_when_to_come_back() {
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
            assert_eq!(after("retry-after", far), Some(AFTER_MAX), "{far}");
        }
        for wrong in ["-1", "soon", "", "NaN", "1e300"] {
            assert_eq!(after("retry-after", wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_a_service_says_is_found_and_cut() {
        for body in [
            r#"{"error":{"message":"too long","type":"x"}}"#,
            r#"{"error":"too long"}"#,
            r#"{"message":"too long"}"#,
            r#"{"detail":"too long"}"#,
        ] {
            assert_eq!(words(body.as_bytes(), None), "too long", "{body}");
        }
        for body in [
            "",
            "no",
            "[]",
            r#"{"error":7}"#,
            r#"{"detail":[{"loc":1}]}"#,
        ] {
            assert_eq!(words(body.as_bytes(), None), "", "{body}");
        }
        let long = format!(r#"{{"error":"{}"}}"#, "é\\n".repeat(500));
        assert_eq!(words(long.as_bytes(), None), "é".repeat(WORDS_MAX));
    }

    #[test]
    fn no_part_of_the_key_is_passed_on() {
        let secret = super::super::key::secret("sk-0123456789", "").unwrap();
        for before in 180..210 {
            let body = format!(r#"{{"error":"{}sk-01234\n56789"}}"#, "é".repeat(before));
            let said = words(body.as_bytes(), Some(&secret));
            assert!(!said.contains("sk-"), "{said}");
        }
    }

    #[test]
    fn what_one_caller_brings_about_says_nothing_of_the_service() {
        for trouble in [
            Trouble::Callers(String::new()),
            Trouble::Dimensions,
            Trouble::TooLong,
            Trouble::NoRoom,
        ] {
            assert_ne!(trouble.health(), Health::Ill, "{trouble:?}");
        }
        let error = Trouble::Dimensions.to_error("small", "dimensions");
        assert_eq!(error.kind(), Kind::Invalid);
    }
}
