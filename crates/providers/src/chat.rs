//! A conversation and its continuation, in the terms of no provider.

use std::collections::VecDeque;
use std::fmt;

use futures::stream::BoxStream;
use protocol::Error;

/// Sequences that may end a response.
const STOPS_MAX: usize = 16;
/// Tokens that one response can be charged for: services may report anything.
const TOKENS_MAX: u64 = 1 << 40;

/// The author of a message of a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The author of the instructions.
    System,
    /// The person or program that makes the request.
    User,
    /// The model.
    Assistant,
}

impl Role {
    /// The name that every provider has for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One message of a conversation.
#[derive(Clone, PartialEq, Eq)]
pub struct ChatMessage {
    /// The author of the message.
    pub role: Role,
    /// Its text.
    pub text: String,
}

impl fmt::Debug for ChatMessage {
    /// Without the text, which is the caller's.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {} bytes", self.role.name(), self.text.len())
    }
}

/// A conversation to be continued. An option that is none is left to the
/// provider.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChatRequest {
    /// The messages so far.
    pub messages: Vec<ChatMessage>,
    /// Tokens that the response may have.
    pub max_tokens: Option<u32>,
    /// The sampling temperature, from 0 to 2.
    pub temperature: Option<f64>,
    /// The probability mass of nucleus sampling, from 0 to 1.
    pub top_p: Option<f64>,
    /// Sequences that end the response.
    pub stop: Vec<String>,
}

impl ChatRequest {
    /// A conversation of one message, the user's.
    pub fn from_prompt(text: impl Into<String>) -> Self {
        Self {
            messages: vec![ChatMessage {
                role: Role::User,
                text: text.into(),
            }],
            ..Self::default()
        }
    }

    /// Checks the rules of every provider; the fields have the names that callers of
    /// every API know.
    pub fn check(&self) -> Result<(), Error> {
        if self.messages.is_empty() {
            return Err(Error::invalid("messages", "must not be empty"));
        }
        if self.max_tokens == Some(0) {
            return Err(Error::invalid("max_tokens", "must be at least 1"));
        }
        let outside = |value: Option<f64>, most: f64| {
            // Written so that NaN is outside too.
            value.is_some_and(|value| !(0.0..=most).contains(&value))
        };
        if outside(self.temperature, 2.0) {
            return Err(Error::invalid("temperature", "must be from 0 to 2"));
        }
        if outside(self.top_p, 1.0) {
            return Err(Error::invalid("top_p", "must be from 0 to 1"));
        }
        if self.stop.len() > STOPS_MAX {
            let reason = format!(
                "must have at most {STOPS_MAX} sequences, but has {}",
                self.stop.len()
            );
            return Err(Error::invalid("stop", reason));
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(Error::invalid("stop", "a sequence must not be empty"));
        }
        Ok(())
    }

    /// The estimated tokens of the messages, where a provider reports none.
    pub fn estimated_tokens(&self) -> u64 {
        estimate_tokens(self.messages.iter().map(|message| message.text.as_str()))
    }
}

/// The tokens that texts probably have: a token of English has about four
/// bytes.
pub fn estimate_tokens<'t>(texts: impl Iterator<Item = &'t str>) -> u64 {
    let bytes: usize = texts.map(str::len).sum();
    (bytes as u64).div_ceil(4)
}

/// Why a response ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// It was complete, or a stop sequence came.
    Stop,
    /// It reached the limit of tokens.
    Length,
    /// The provider's content filter held it back.
    ContentFilter,
    /// The provider has another reason.
    Other,
}

impl FinishReason {
    /// The name that OpenAI's API has for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop | Self::Other => "stop",
            Self::Length => "length",
            Self::ContentFilter => "content_filter",
        }
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

impl TokenUsage {
    /// The usage that the service reported, bounded, or an estimate where it
    /// reported none.
    #[must_use]
    pub fn or_estimate(self, estimate: Self) -> Self {
        let usage = if self == Self::default() {
            estimate
        } else {
            self
        };
        Self {
            prompt_tokens: usage.prompt_tokens.min(TOKENS_MAX),
            completion_tokens: usage.completion_tokens.min(TOKENS_MAX),
        }
    }
}

/// The continuation of a conversation, in one piece.
#[derive(Clone, PartialEq)]
pub struct ChatResponse {
    /// Its text.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Its tokens.
    pub usage: TokenUsage,
}

impl fmt::Debug for ChatResponse {
    /// Without the text, which is the caller's.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.text.len();
        write!(formatter, "{bytes} bytes, {:?}", self.finish_reason)
    }
}

/// A part of a streamed response. The last one, and only that, has an end; it
/// may have no text.
#[derive(Clone, Default, PartialEq)]
pub struct ChatDelta {
    /// The text that comes next.
    pub text: String,
    /// Why the response ended here, and its tokens.
    pub end: Option<(FinishReason, TokenUsage)>,
}

impl fmt::Debug for ChatDelta {
    /// Without the text, which is the caller's.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} bytes, {:?}", self.text.len(), self.end)
    }
}

/// The received part of a streamed response. A dialect fills it event by event.
#[derive(Debug, Default)]
pub struct StreamProgress {
    /// Texts that have not been passed on.
    pub texts: VecDeque<String>,
    /// Why the response ended.
    pub finish_reason: Option<FinishReason>,
    /// Its tokens, as far as the service has reported them.
    pub usage: Option<TokenUsage>,
    /// Whether the service marked the end of the stream.
    pub done: bool,
}

impl StreamProgress {
    /// Adds the text that comes next.
    pub fn push_text(&mut self, text: String) {
        if !text.is_empty() {
            self.texts.push_back(text);
        }
    }
}

/// The parts of a response as they come. An error is the last item; without
/// one, the last has an end.
pub type ChatStream = BoxStream<'static, Result<ChatDelta, Error>>;
