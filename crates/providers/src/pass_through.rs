//! Requests that a service gets as they came, with its own name for the model:
//! the calls of OpenAI's API for which there is no translation.

use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use futures::stream::BoxStream;
use protocol::Error;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

use crate::dialect::HttpRequest;
use crate::error::ProviderError;
use crate::reported::{ReportedUsage, TokenUsage, reported_usage};
use crate::sse::Event;

/// The data of the event that ends a stream.
const DONE: &str = "[DONE]";

/// A call of OpenAI's API that is passed through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PassThroughApi {
    /// The continuation of a text.
    Completions,
    /// Responses, with the service's own tools and state.
    Responses,
}

impl PassThroughApi {
    /// The path after the part of `base_url`, and after the `/v1` of this gateway.
    pub fn path(self) -> &'static str {
        match self {
            Self::Completions => "/completions",
            Self::Responses => "/responses",
        }
    }

    /// The field that an error is about when the service refuses the request.
    pub fn content_field(self) -> &'static str {
        match self {
            Self::Completions => "prompt",
            Self::Responses => "input",
        }
    }
}

/// A request to be passed through. What is not the body is what was read of it.
#[derive(Clone)]
pub struct PassThrough {
    /// The call.
    pub api: PassThroughApi,
    /// The body as it came, an object in JSON.
    pub body: Bytes,
    /// Where the value of `model` is in the body.
    pub model: Range<usize>,
    /// Whether the response is a stream of events.
    pub stream: bool,
    /// The estimated tokens of the content, should the service report none.
    pub prompt_tokens: u64,
    /// Tokens that the response may have, if the caller gives a limit.
    pub max_tokens: Option<u64>,
}

impl fmt::Debug for PassThrough {
    /// Without the body, which is the caller's.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?}: {} bytes", self.api, self.body.len())
    }
}

impl PassThrough {
    /// The call for a model of the service: every other byte stays as it came.
    pub(crate) fn outgoing(&self, model: &str) -> HttpRequest {
        let part = |range: Range<usize>| self.body.get(range).unwrap_or_default();
        // A text is always JSON.
        let model = serde_json::to_vec(model).unwrap_or_default();
        let before = part(0..self.model.start);
        let after = part(self.model.end..self.body.len());
        HttpRequest {
            path: self.api.path().into(),
            body: [before, &model, after].concat().into(),
        }
    }
}

/// The bytes of a stream as they come. An error is the last item.
pub type PassedStream = BoxStream<'static, Result<Bytes, Error>>;

/// Reads the usage of a response in one piece: an object in JSON that is no
/// error.
pub(crate) fn read_whole(body: &[u8]) -> Result<ReportedUsage, ProviderError> {
    #[derive(Deserialize)]
    struct Whole {
        error: Option<IgnoredAny>,
    }
    let invalid = ProviderError::InvalidResponse("it is no object in JSON");
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(invalid);
    }
    let whole: Whole = serde_json::from_slice(body).map_err(|_| invalid)?;
    if whole.error.is_some() {
        return Err(ProviderError::ReportedError);
    }
    Ok(reported_usage(body))
}

/// The usage of a body that is no response; none where the service charges
/// nothing. `most` is what the request may have used.
pub(crate) fn refused_usage(
    body: &[u8],
    error: &ProviderError,
    most: TokenUsage,
) -> Option<TokenUsage> {
    let reported = reported_usage(body);
    // An error that the service reports costs what it says.
    if !reported.is_known() && !error.may_be_charged() {
        return None;
    }
    Some(reported.or_estimate(TokenUsage {
        completion_tokens: (body.len() as u64).div_ceil(4).min(most.completion_tokens),
        ..most
    }))
}

/// What the events of a stream have told so far.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// Events with data.
    pub events: u64,
    /// Parts of what the model wrote, and about their bytes.
    parts: u64,
    written: usize,
    /// The tokens, as far as the service has reported them.
    pub usage: ReportedUsage,
    /// Whether the response is whole, should the stream end here.
    pub finished: bool,
    /// Whether nothing more is to come.
    pub ended: bool,
    /// Whether the service has reported an error.
    pub failed: bool,
}

/// What is read of an event: other members, and values of other types, are the
/// caller's to read.
#[derive(Default, Deserialize)]
struct EventData<'e> {
    #[serde(borrow)]
    r#type: Option<&'e RawValue>,
    #[serde(borrow)]
    error: Option<&'e RawValue>,
    #[serde(borrow)]
    usage: Option<&'e RawValue>,
    #[serde(borrow)]
    choices: Option<&'e RawValue>,
    #[serde(borrow)]
    delta: Option<&'e RawValue>,
    #[serde(borrow)]
    response: Option<&'e RawValue>,
}

#[derive(Deserialize)]
struct Choice<'e> {
    #[serde(borrow)]
    text: Option<&'e RawValue>,
    #[serde(borrow)]
    finish_reason: Option<&'e RawValue>,
}

impl Told {
    /// Takes the event that came next.
    pub fn take(&mut self, event: &Event) {
        if event.data.trim() == DONE {
            self.finished = true;
            self.ended = true;
            return;
        }
        self.events += 1;
        let data: EventData<'_> = serde_json::from_str(&event.data).unwrap_or_default();
        let kind = data.r#type.map(RawValue::get);
        let kind: Option<&str> = kind.and_then(|kind| serde_json::from_str(kind).ok());
        let kind = kind.unwrap_or(event.name.as_str());
        self.failed |= data.error.is_some() || matches!(kind, "error" | "response.failed");
        if matches!(
            kind,
            "response.completed" | "response.incomplete" | "response.failed"
        ) {
            self.finished = true;
            self.ended = true;
        }
        if let Some(usage) = data.usage {
            let usage: ReportedUsage = serde_json::from_str(usage.get()).unwrap_or_default();
            self.usage.update(usage);
        }
        if let Some(response) = data.response {
            self.usage.update(reported_usage(response.get().as_bytes()));
        }
        self.wrote(data.delta);
        let choices = data.choices.map(RawValue::get).unwrap_or_default();
        let choices: Vec<Choice<'_>> = serde_json::from_str(choices).unwrap_or_default();
        for choice in choices {
            self.wrote(choice.text);
            self.finished |= choice.finish_reason.is_some();
        }
    }

    /// Counts a part of what the model wrote, a text in JSON.
    fn wrote(&mut self, part: Option<&RawValue>) {
        let quotes = 2;
        let bytes = part.map_or(0, |part| part.get().len().saturating_sub(quotes));
        self.written += bytes;
        self.parts += u64::from(bytes > 0);
    }

    /// The tokens until now, for a request of so many: what the service has
    /// reported, and an estimate of what it has not. An event may have one token,
    /// or many.
    pub fn tokens(&self, prompt_tokens: u64) -> TokenUsage {
        self.usage.or_estimate(self.estimate(prompt_tokens))
    }

    /// The same of a response that goes on: at least the tokens that the text
    /// probably has.
    pub fn tokens_so_far(&self, prompt_tokens: u64) -> TokenUsage {
        let (tokens, estimate) = (self.tokens(prompt_tokens), self.estimate(prompt_tokens));
        TokenUsage {
            completion_tokens: tokens.completion_tokens.max(estimate.completion_tokens),
            ..tokens
        }
    }

    fn estimate(&self, prompt_tokens: u64) -> TokenUsage {
        TokenUsage {
            prompt_tokens,
            completion_tokens: self.parts.max((self.written as u64).div_ceil(4)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(events: &[&str]) -> Told {
        let mut told = Told::default();
        for data in events {
            told.take(&Event {
                data: (*data).to_owned(),
                ..Event::default()
            });
        }
        told
    }

    fn tokens(told: &Told) -> (u64, u64) {
        let tokens = told.tokens(70);
        (tokens.prompt_tokens, tokens.completion_tokens)
    }

    #[test]
    fn only_the_model_is_another() {
        let body = "{\"z\": 1.0e+2,\n \"model\" : \"m\\u0061x\", \"seed\":18446744073709551616}";
        let start = body.find("\"m\\u").unwrap();
        let request = PassThrough {
            api: PassThroughApi::Responses,
            body: Bytes::from(body),
            model: start..start + "\"m\\u0061x\"".len(),
            stream: false,
            prompt_tokens: 1,
            max_tokens: None,
        };
        let outgoing = request.outgoing("a \"b\"");
        assert_eq!(outgoing.path, "/responses");
        let expected = body.replace("\"m\\u0061x\"", "\"a \\\"b\\\"\"");
        assert_eq!(outgoing.body, expected.as_bytes());
    }

    #[test]
    fn a_usage_of_any_form_spoils_no_response() {
        for (usage, known) in [
            (r#"{"prompt_tokens":3,"completion_tokens":2}"#, true),
            (r#"{"input_tokens":3.0,"output_tokens":2}"#, true),
            (r#"{"total_tokens":5}"#, true),
            ("null", false),
            ("[]", false),
            ("7", false),
        ] {
            let body = format!(r#" {{"error":null,"usage":{usage}}}"#);
            let read = read_whole(body.as_bytes()).unwrap();
            assert_eq!(read.is_known(), known, "{usage}");
        }
        assert!(!read_whole(b"{}").unwrap().is_known());
    }

    #[test]
    fn what_is_no_response_is_an_error_and_costs_what_it_reports() {
        let error = r#"{"error":{"message":"no"},"usage":{"input_tokens":5,"output_tokens":0}}"#;
        for (body, used) in [
            (error, Some((5, 0))),
            (r#"{"error":"no"}"#, None),
            ("<html></html>", Some((7, 4))),
            ("[]", Some((7, 1))),
        ] {
            let body = body.as_bytes();
            let failed = read_whole(body).unwrap_err();
            let most = TokenUsage {
                prompt_tokens: 7,
                completion_tokens: 100,
            };
            let usage = refused_usage(body, &failed, most);
            let usage = usage.map(|usage| (usage.prompt_tokens, usage.completion_tokens));
            assert_eq!(usage, used, "{failed}");
        }
    }

    #[test]
    fn the_usage_is_in_the_last_chunk_or_in_the_completed_response() {
        let chunks = told(&[
            r#"{"choices":[{"text":"Good "}],"usage":null}"#,
            r#"{"choices":[{"text":"day","finish_reason":"stop"}]}"#,
            r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}"#,
            "[DONE]",
        ]);
        assert!(chunks.finished && chunks.ended && !chunks.failed);
        assert_eq!((tokens(&chunks), chunks.events), ((3, 2), 3));
        let events = [
            r#"{"type":"response.created","response":{"usage":null,"error":null}}"#,
            r#"{"type":"response.output_text.delta","delta":"Good day"}"#,
        ];
        let begun = told(&events);
        assert!(!begun.finished && !begun.failed);
        assert_eq!(tokens(&begun), (70, 2));
        let last = r#"{"type":"response.completed","response":{"usage":{"input_tokens":3,"output_tokens":0}}}"#;
        let whole = told(&[events[0], events[1], last]);
        assert!(whole.finished && whole.ended);
        assert_eq!(tokens(&whole), (3, 0));
    }

    #[test]
    fn events_that_cannot_be_read_are_not_counted_on() {
        for data in [
            "rubbish",
            "7",
            "[]",
            r#"{"choices":7,"delta":null,"usage":[1]}"#,
        ] {
            let read = told(&[data]);
            assert_eq!((tokens(&read), read.failed), ((70, 0), false), "{data}");
        }
        for data in [
            r#"{"error":{"message":"no"}}"#,
            r#"{"type":"error","message":"no"}"#,
            r#"{"type":"response.failed","response":{}}"#,
        ] {
            assert!(told(&[data]).failed, "{data}");
        }
    }
}
