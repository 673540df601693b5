//! A conversation and its continuation, in the terms of no provider.

use futures::stream::BoxStream;
use protocol::Error;

/// Who says something in a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Who sets the rules.
    System,
    /// Who asks.
    User,
    /// Who answers.
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

/// What somebody says.
#[derive(Clone, PartialEq, Eq)]
pub struct ChatMessage {
    /// Who.
    pub role: Role,
    /// What.
    pub text: String,
}

impl std::fmt::Debug for ChatMessage {
    /// Without the text, which is the caller's.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}: {} bytes", self.role.name(), self.text.len())
    }
}

/// A conversation to be continued. What is none is the provider's choice.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChatRequest {
    /// What was said so far.
    pub messages: Vec<ChatMessage>,
    /// Tokens that the answer may have.
    pub max_tokens: Option<u32>,
    /// How much chance there is, from 0 to 2.
    pub temperature: Option<f64>,
    /// The mass of likely tokens that are chosen from, up to 1.
    pub top_p: Option<f64>,
    /// Texts that end the answer.
    pub stop: Vec<String>,
}

impl ChatRequest {
    /// A question without a conversation before it.
    pub fn asking(text: impl Into<String>) -> Self {
        Self {
            messages: vec![ChatMessage {
                role: Role::User,
                text: text.into(),
            }],
            ..Self::default()
        }
    }

    /// Checks what holds for every provider; the fields have the names that
    /// callers of every door know.
    pub fn check(&self) -> Result<(), Error> {
        if self.messages.is_empty() {
            return Err(Error::invalid("messages", "there are none"));
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
            return Err(Error::invalid(
                "stop",
                format!("{} texts: there may be {STOPS_MAX}", self.stop.len()),
            ));
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(Error::invalid("stop", "a text cannot be empty"));
        }
        Ok(())
    }

    /// What the conversation so far takes, where a provider does not say.
    pub fn tokens_guessed(&self) -> u64 {
        tokens_of(self.messages.iter().map(|message| message.text.as_str()))
    }
}

/// What texts probably have: a token of English has about four bytes.
pub fn tokens_of<'t>(texts: impl Iterator<Item = &'t str>) -> u64 {
    let bytes: usize = texts.map(str::len).sum();
    (bytes as u64).div_ceil(4)
}

/// Texts that may end an answer.
const STOPS_MAX: usize = 16;

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// It was complete, or one of the texts that end it came.
    Stop,
    /// It has as many tokens as it may.
    Length,
    /// The provider held it back.
    Filter,
    /// The provider has another reason.
    Other,
}

impl Finish {
    /// The name that OpenAI-shaped answers have for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop | Self::Other => "stop",
            Self::Length => "length",
            Self::Filter => "content_filter",
        }
    }
}

/// What an answer took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ChatUsage {
    /// Tokens of the conversation so far.
    pub prompt_tokens: u64,
    /// Tokens of the answer.
    pub completion_tokens: u64,
}

/// Tokens that one answer can take: services may say anything.
const TOKENS_MAX: u64 = 1 << 40;

impl ChatUsage {
    /// What a service said, or a guess where it said nothing.
    #[must_use]
    pub fn or(self, guess: Self) -> Self {
        let said = if self == Self::default() { guess } else { self };
        Self {
            prompt_tokens: said.prompt_tokens.min(TOKENS_MAX),
            completion_tokens: said.completion_tokens.min(TOKENS_MAX),
        }
    }
}

/// A whole answer.
#[derive(Clone, PartialEq)]
pub struct ChatAnswer {
    /// What was said.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// What it took.
    pub usage: ChatUsage,
}

impl std::fmt::Debug for ChatAnswer {
    /// Without the text, which is the caller's.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bytes = self.text.len();
        write!(formatter, "{bytes} bytes, {:?}", self.finish)
    }
}

/// A part of an answer. The last one, and only that, says why it ended and
/// what the answer took; it may have no text.
#[derive(Clone, Default, PartialEq)]
pub struct ChatDelta {
    /// What comes next.
    pub text: String,
    /// Why the answer ended here.
    pub end: Option<(Finish, ChatUsage)>,
}

impl std::fmt::Debug for ChatDelta {
    /// Without the text, which is the caller's.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} bytes, {:?}", self.text.len(), self.end)
    }
}

/// The parts of an answer as they come. An error is the last item; without
/// one, the last has an end.
pub type ChatStream = BoxStream<'static, Result<ChatDelta, Error>>;
