//! The usage that services report. They write it in many ways, and none of
//! them may spoil a response that is good otherwise: whatever is no count is as
//! if it were missing, and an explicit zero is a zero.

use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

/// Tokens that one response can be charged for: services may report anything.
const TOKENS_MAX: u64 = 1 << 40;
/// A longer text than this is no usage, and is not read.
const USAGE_BYTES_MAX: usize = 16 << 10;

/// A count as services write it: an integer, a float, or either in a text. None
/// for null and for whatever is no count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count(pub Option<u64>);

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Ok(Self(small(from)?.as_ref().and_then(count)))
    }
}

/// The tokens of a conversation and its continuation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TokenUsage {
    /// Tokens of the messages so far.
    pub prompt_tokens: u64,
    /// Tokens of the response.
    pub completion_tokens: u64,
}

/// The tokens that a service reported, as far as it did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReportedUsage {
    /// Tokens that it read, those of its caches included.
    pub prompt_tokens: Option<u64>,
    /// Tokens that it wrote.
    pub completion_tokens: Option<u64>,
    /// Both together.
    pub total_tokens: Option<u64>,
}

impl<'de> Deserialize<'de> for ReportedUsage {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Ok(small(from)?.as_ref().map(Self::read).unwrap_or_default())
    }
}

impl ReportedUsage {
    /// Reads the names of OpenAI's and of Anthropic's API.
    fn read(usage: &Value) -> Self {
        let field = |name: &str| usage.get(name).and_then(count);
        let cached = ["cache_creation_input_tokens", "cache_read_input_tokens"];
        let cached = cached.into_iter().filter_map(field);
        let input = field("input_tokens");
        let input = input.map(|input| cached.fold(input, u64::saturating_add));
        Self {
            prompt_tokens: field("prompt_tokens").or(input),
            completion_tokens: field("completion_tokens").or_else(|| field("output_tokens")),
            total_tokens: field("total_tokens"),
        }
    }

    /// A later report replaces what it names of an earlier one.
    pub fn update(&mut self, later: Self) {
        self.prompt_tokens = later.prompt_tokens.or(self.prompt_tokens);
        self.completion_tokens = later.completion_tokens.or(self.completion_tokens);
        self.total_tokens = later.total_tokens.or(self.total_tokens);
    }

    /// Whether anything was reported.
    pub fn is_known(self) -> bool {
        self != Self::default()
    }

    /// The tokens that were reported, bounded, and an estimate of those that were
    /// not.
    #[must_use]
    pub fn or_estimate(self, estimate: TokenUsage) -> TokenUsage {
        let reported = (
            self.prompt_tokens,
            self.completion_tokens,
            self.total_tokens,
        );
        let (prompt, completion) = match reported {
            (Some(prompt), Some(completion), _) => (prompt, completion),
            (Some(prompt), None, Some(total)) => (prompt, total.saturating_sub(prompt)),
            (None, Some(completion), Some(total)) => (total.saturating_sub(completion), completion),
            (None, None, Some(total)) => {
                let prompt = estimate.prompt_tokens.min(total);
                (prompt, total - prompt)
            }
            (prompt, completion, None) => (
                prompt.unwrap_or(estimate.prompt_tokens),
                completion.unwrap_or(estimate.completion_tokens),
            ),
        };
        TokenUsage {
            prompt_tokens: prompt.min(TOKENS_MAX),
            completion_tokens: completion.min(TOKENS_MAX),
        }
    }
}

/// The usage in a body that is no response: services report it in one place
/// whatever the rest is.
pub fn reported_usage(body: &[u8]) -> ReportedUsage {
    #[derive(Deserialize)]
    struct Body {
        #[serde(default)]
        usage: ReportedUsage,
    }
    let body: Option<Body> = serde_json::from_slice(body).ok();
    body.map(|body| body.usage).unwrap_or_default()
}

/// A value that is short enough to be read whole.
fn small<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Value>, D::Error> {
    let text = Box::<RawValue>::deserialize(from)?;
    let text = Some(text.get()).filter(|text| text.len() <= USAGE_BYTES_MAX);
    Ok(text.and_then(|text| serde_json::from_str(text).ok()))
}

fn count(value: &Value) -> Option<u64> {
    match value {
        Value::Number(number) => number.as_u64().or_else(|| whole(number.as_f64()?)),
        Value::String(text) => whole(text.trim().parse().ok()?),
        _ => None,
    }
}

/// A part of a token is a token; the cast saturates.
fn whole(number: f64) -> Option<u64> {
    (number.is_finite() && number >= 0.0).then(|| number.ceil() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ESTIMATE: TokenUsage = TokenUsage {
        prompt_tokens: 70,
        completion_tokens: 90,
    };

    #[test]
    fn usage_is_read_however_it_is_written() {
        for (usage, expected) in [
            (r#"{"prompt_tokens":5,"completion_tokens":2}"#, (5, 2)),
            (
                r#"{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}"#,
                (0, 0),
            ),
            (r#"{"prompt_tokens":12.0,"completion_tokens":2.5}"#, (12, 3)),
            (
                r#"{"prompt_tokens":"12.0","completion_tokens":"2"}"#,
                (12, 2),
            ),
            (
                r#"{"prompt_tokens":null,"completion_tokens":null,"total_tokens":100}"#,
                (70, 30),
            ),
            (r#"{"total_tokens":7}"#, (7, 0)),
            (r#"{"total_tokens":0}"#, (0, 0)),
            (r#"{"prompt_tokens":5,"total_tokens":9}"#, (5, 4)),
            (r#"{"completion_tokens":5,"total_tokens":9}"#, (4, 5)),
            (r#"{"prompt_tokens":5}"#, (5, 90)),
            (r#"{"completion_tokens":5}"#, (70, 5)),
            (
                r#"{"input_tokens":5,"cache_read_input_tokens":2,"output_tokens":1}"#,
                (7, 1),
            ),
            (r#"{"prompt_tokens":-1,"completion_tokens":[2]}"#, (70, 90)),
            ("null", (70, 90)),
            ("{}", (70, 90)),
            ("[1,2]", (70, 90)),
            ("\"none\"", (70, 90)),
            ("true", (70, 90)),
        ] {
            let body = format!(r#"{{"usage":{usage}}}"#);
            let read = reported_usage(body.as_bytes()).or_estimate(ESTIMATE);
            let read = (read.prompt_tokens, read.completion_tokens);
            assert_eq!(read, expected, "{usage}");
        }
        for body in ["", "no", "{}", r#"{"usage":"#] {
            assert!(!reported_usage(body.as_bytes()).is_known(), "{body}");
        }
        let huge = reported_usage(br#"{"usage":{"prompt_tokens":1e300,"completion_tokens":1}}"#);
        assert_eq!(huge.or_estimate(ESTIMATE).prompt_tokens, TOKENS_MAX);
    }

    #[test]
    fn a_later_report_replaces_what_it_names() {
        let mut usage = reported_usage(br#"{"usage":{"input_tokens":5,"output_tokens":1}}"#);
        usage.update(reported_usage(br#"{"usage":{"output_tokens":7}}"#));
        usage.update(reported_usage(br#"{"usage":null}"#));
        let usage = usage.or_estimate(ESTIMATE);
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (5, 7));
    }
}
