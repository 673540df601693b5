//! A conversation and its continuation, in the terms of no provider.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use futures::stream::BoxStream;
use protocol::Error;
use serde_json::value::RawValue;

use crate::error::ProviderError;
use crate::reported::{ReportedUsage, TokenUsage};

/// Sequences that may end a response.
const STOPS_MAX: usize = 16;
/// Choices of one response, the limit of OpenAI's API.
const CHOICES_MAX: u32 = 128;

/// The author of a message of a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The author of the instructions.
    System,
    /// The person or program that makes the request.
    User,
    /// The model.
    Assistant,
    /// A tool that the model called: the message is the tool's result.
    Tool,
}

impl Role {
    /// The name that every provider has for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
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
    /// Of the model's messages: the tools that it called.
    pub tool_calls: Vec<ToolCall>,
    /// Of a tool's messages: the call whose result it is.
    pub tool_call_id: Option<String>,
    /// What else it has in OpenAI's API, such as the `name` of its author.
    pub options: Vec<ChatOption>,
}

impl ChatMessage {
    /// A message that is a text.
    pub fn new(role: Role, text: impl Into<String>) -> Self {
        Self {
            role,
            text: text.into(),
            tool_calls: Vec::new(),
            tool_call_id: None,
            options: Vec::new(),
        }
    }
}

impl fmt::Debug for ChatMessage {
    /// Without the text, which is the caller's.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {} bytes", self.role.name(), self.text.len())
    }
}

/// A call of a tool that the model asks for.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ToolCall {
    /// The id that the result refers to.
    pub id: String,
    /// The tool's name.
    pub name: String,
    /// Its arguments, JSON in a text, as the model wrote them.
    pub arguments: String,
}

impl fmt::Debug for ToolCall {
    /// Without its texts, which are the caller's.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "a tool call of {} bytes", self.arguments.len())
    }
}

/// A parameter that is passed on as it came, or refused by its name.
#[derive(Clone)]
pub struct ChatOption {
    /// Its name in OpenAI's API, or the one that its caller has for it.
    pub name: Cow<'static, str>,
    /// Its value.
    pub value: Box<RawValue>,
}

impl PartialEq for ChatOption {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name && self.value.get() == other.value.get()
    }
}

impl Eq for ChatOption {}

impl fmt::Debug for ChatOption {
    /// Without the value, which is the caller's.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.name)
    }
}

/// A conversation to be continued. An option that is none is left to the
/// provider.
#[derive(Debug, Clone, Default)]
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
    /// Responses to choose from, which are made independently; one without it.
    pub n: Option<u32>,
    /// Tools that the model may call, in the format of OpenAI's API.
    pub tools: Vec<Tool>,
    /// Parameters that a service of another dialect may not have.
    pub options: Vec<ChatOption>,
}

/// A tool that the model may call: an object of OpenAI's API, as it came.
#[derive(Clone)]
pub struct Tool(pub Box<RawValue>);

impl fmt::Debug for Tool {
    /// Without the object, which is the caller's.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "a tool of {} bytes", self.0.get().len())
    }
}

impl ChatRequest {
    /// A conversation of one message, the user's.
    pub fn from_prompt(text: impl Into<String>) -> Self {
        Self {
            messages: vec![ChatMessage::new(Role::User, text)],
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
        if self.n.is_some_and(|n| !(1..=CHOICES_MAX).contains(&n)) {
            let reason = format!("must be from 1 to {CHOICES_MAX}");
            return Err(Error::invalid("n", reason));
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

    /// The estimated tokens of the messages and tools, where a provider reports
    /// none.
    pub fn estimated_tokens(&self) -> u64 {
        let texts = self.messages.iter().flat_map(|message| {
            let calls = message.tool_calls.iter();
            let calls = calls.flat_map(|call| [call.name.as_str(), call.arguments.as_str()]);
            calls.chain([message.text.as_str()])
        });
        estimate_tokens(texts.chain(self.tools.iter().map(|tool| tool.0.get())))
    }

    /// How many responses are asked for.
    pub fn choices(&self) -> u32 {
        self.n.unwrap_or(1)
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
    /// The model asks for calls of tools.
    ToolCalls,
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
            Self::ToolCalls => "tool_calls",
            Self::ContentFilter => "content_filter",
        }
    }
}

/// One of the responses to choose from, in one piece.
#[derive(Clone)]
pub struct ChatChoice {
    /// Its text.
    pub text: String,
    /// The tools that the model asks to call.
    pub tool_calls: Vec<ToolCall>,
    /// The probabilities of its tokens, as the service sent them.
    pub logprobs: Option<Box<RawValue>>,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

impl ChatChoice {
    /// The bytes of what the model wrote.
    pub fn bytes(&self) -> usize {
        let calls = self.tool_calls.iter();
        let calls = calls.map(|call| call.name.len() + call.arguments.len());
        self.text.len() + calls.sum::<usize>()
    }
}

impl fmt::Debug for ChatChoice {
    /// Without the text, which is the caller's.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} bytes, {:?}",
            self.bytes(),
            self.finish_reason
        )
    }
}

/// A response in one piece, as a dialect has read it.
#[derive(Debug)]
pub struct ParsedChat {
    /// The responses to choose from, at least one.
    pub choices: Vec<ChatChoice>,
    /// The tokens that the service reported.
    pub usage: ReportedUsage,
}

/// The continuation of a conversation, in one piece.
#[derive(Debug, Clone)]
pub struct ChatResponse {
    /// The responses to choose from, at least one.
    pub choices: Vec<ChatChoice>,
    /// The tokens of all of them.
    pub usage: TokenUsage,
}

impl ChatResponse {
    /// The text of the first choice.
    pub fn into_text(self) -> String {
        let first = self.choices.into_iter().next();
        first.map(|choice| choice.text).unwrap_or_default()
    }
}

/// The next part of a tool call.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ToolCallDelta {
    /// The number of the call in its choice, from 0.
    pub index: u32,
    /// Its id, in its first part.
    pub id: Option<String>,
    /// The tool's name, in its first part.
    pub name: Option<String>,
    /// The text of the arguments that comes next.
    pub arguments: String,
}

impl fmt::Debug for ToolCallDelta {
    /// Without the arguments, which are the caller's.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "call {}: {} bytes",
            self.index,
            self.arguments.len()
        )
    }
}

/// A part of a streamed response. A choice ends with its finish reason; the
/// last part, and only that, has the usage, and a finish reason too.
#[derive(Clone, Default)]
pub struct ChatDelta {
    /// The number of the choice, from 0.
    pub choice: u32,
    /// The text that comes next.
    pub text: String,
    /// What comes next of tool calls.
    pub tool_calls: Vec<ToolCallDelta>,
    /// The probabilities of the part's tokens, as the service sent them.
    pub logprobs: Option<Box<RawValue>>,
    /// Why the choice ended here.
    pub finish_reason: Option<FinishReason>,
    /// The tokens of the whole response.
    pub usage: Option<TokenUsage>,
}

impl ChatDelta {
    /// A part of the first choice that is a text.
    pub fn from_text(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            ..Self::default()
        }
    }

    /// The bytes of what the model wrote.
    pub fn bytes(&self) -> usize {
        let calls = self.tool_calls.iter();
        let calls =
            calls.map(|call| call.name.as_ref().map_or(0, String::len) + call.arguments.len());
        self.text.len() + calls.sum::<usize>()
    }
}

impl fmt::Debug for ChatDelta {
    /// Without the text, which is the caller's.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bytes, end) = (self.bytes(), self.finish_reason.zip(self.usage));
        write!(formatter, "{bytes} bytes, {end:?}")
    }
}

/// The received part of a streamed response. A dialect fills it event by event.
#[derive(Debug, Default)]
pub struct StreamProgress {
    /// Parts that have not been passed on.
    pub parts: VecDeque<ChatDelta>,
    /// The choices that have begun, and why those that ended did.
    pub choices: BTreeMap<u32, Option<FinishReason>>,
    /// The tokens, as far as the service has reported them.
    pub usage: ReportedUsage,
    /// Whether the service marked the end of the stream.
    pub done: bool,
    /// Of Anthropic's dialect: the blocks that are tool calls, in their order.
    pub tool_blocks: Vec<u64>,
}

impl StreamProgress {
    /// Adds the part that comes next. One that has nothing only begins its
    /// choice.
    pub fn push(&mut self, part: ChatDelta) -> Result<(), ProviderError> {
        if part.choice >= CHOICES_MAX {
            let reason = "the index of a choice is out of range";
            return Err(ProviderError::InvalidResponse(reason));
        }
        self.choices.entry(part.choice).or_default();
        if !part.text.is_empty() || !part.tool_calls.is_empty() || part.logprobs.is_some() {
            self.parts.push_back(part);
        }
        Ok(())
    }

    /// A choice that has begun has ended.
    pub fn finish(&mut self, choice: u32, reason: FinishReason) {
        if let Some(finished) = self.choices.get_mut(&choice) {
            *finished = Some(reason);
        }
    }

    /// Whether there is a choice, and all of them have ended.
    pub fn is_complete(&self) -> bool {
        !self.choices.is_empty() && self.choices.values().all(Option::is_some)
    }

    /// Takes a response that came in one piece though a stream was requested.
    pub fn take_whole(&mut self, response: ParsedChat) -> Result<(), ProviderError> {
        for (number, choice) in (0..).zip(response.choices) {
            let calls = (0..)
                .zip(choice.tool_calls)
                .map(|(index, call)| ToolCallDelta {
                    index,
                    id: Some(call.id),
                    name: Some(call.name),
                    arguments: call.arguments,
                });
            self.push(ChatDelta {
                choice: number,
                text: choice.text,
                tool_calls: calls.collect(),
                logprobs: choice.logprobs,
                ..ChatDelta::default()
            })?;
            self.finish(number, choice.finish_reason);
        }
        self.usage.update(response.usage);
        self.done = true;
        Ok(())
    }
}

/// The parts of a response as they come. An error is the last item; without
/// one, the last has the usage.
pub type ChatStream = BoxStream<'static, Result<ChatDelta, Error>>;
