//! The request of a chat completion, and the conversation of any provider that
//! it stands for.

use std::fmt;

use protocol::{Error, Kind};
use serde::de::{self, Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use utoipa::openapi::schema::{ArrayBuilder, OneOfBuilder};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::super::body::{self, Bounded};
use super::super::rerank::NonEmptyText;
use super::super::strict::strict;
use super::messages::{MESSAGES_MAX, Message, TOOLS_MAX, conversation};
use super::more::open;
use gateway::stack::{ChatOption, ChatRequest, Tool};

/// Texts that may end a generated text.
const STOPS_MAX: usize = 16;
/// Alternatives for each token, the limit of OpenAI's API.
const LOGPROBS_MAX: u32 = 20;

/// A chat to be completed.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(example = json!({
    "model": "assistant",
    "messages": [{"role": "user", "content": "What burns in a lantern?"}],
    "max_tokens": 64
}))]
pub struct ChatCompletionRequest {
    /// The model: one of an outside service whose task is generation.
    #[schema(
        min_length = 1,
        max_length = 128,
        pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
    )]
    pub model: String,
    /// The messages of the chat so far.
    #[serde(deserialize_with = "body::list::<MESSAGES_MAX, _, _>")]
    #[schema(min_items = 1, max_items = 4096)]
    pub messages: Vec<Message>,
    /// The maximum number of generated tokens.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub max_tokens: Option<u32>,
    /// The newer name of `max_tokens`, which has precedence.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub max_completion_tokens: Option<u32>,
    /// The sampling temperature.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    /// Nucleus sampling: the probability mass of the tokens to sample from.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// Texts at which generation stops.
    #[serde(default)]
    pub stop: Option<Stop>,
    /// Whether the response is a stream of events.
    #[serde(default)]
    pub stream: Option<bool>,
    /// Options of the stream.
    #[serde(default)]
    pub stream_options: Option<StreamOptions>,
    /// The number of choices.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 128)]
    pub n: Option<u32>,
    /// The end user.
    #[serde(default)]
    user: Option<String>,
    /// The newer name of `user`, which has precedence where a service knows one.
    #[serde(default)]
    safety_identifier: Option<String>,
    /// Whether the service keeps the completion.
    #[serde(default)]
    store: Option<bool>,
    /// Tags of a completion that is kept.
    #[serde(default)]
    #[schema(value_type = Option<Value>)]
    metadata: Option<RawJson>,
    /// How the request is processed, such as `auto` or `priority`.
    #[serde(default)]
    service_tier: Option<String>,
    /// The requests whose prompts probably begin alike.
    #[serde(default)]
    prompt_cache_key: Option<String>,
    /// A text that much of the response probably is.
    #[serde(default)]
    #[schema(value_type = Option<Value>)]
    prediction: Option<RawJson>,
    /// That the service searches the web, and how.
    #[serde(default)]
    #[schema(value_type = Option<Value>)]
    web_search_options: Option<RawJson>,
    /// The tools that the model may call.
    #[serde(default)]
    #[schema(max_items = 128)]
    #[schema(value_type = Option<Vec<Value>>)]
    tools: Option<Tools>,
    /// Which tools the model may or must call: `none`, `auto`, `required` or one.
    #[serde(default)]
    #[schema(value_type = Option<Value>)]
    tool_choice: Option<RawJson>,
    /// Whether the model may call several tools at once.
    #[serde(default)]
    parallel_tool_calls: Option<bool>,
    /// The format of the response: text, JSON, or JSON of a schema.
    #[serde(default)]
    response_format: Option<ResponseFormat>,
    /// The seed of the sampling.
    #[serde(default)]
    seed: Option<i64>,
    /// The penalty of tokens that have occurred.
    #[serde(default)]
    #[schema(minimum = -2, maximum = 2)]
    presence_penalty: Option<f64>,
    /// The penalty of tokens by how often they have occurred.
    #[serde(default)]
    #[schema(minimum = -2, maximum = 2)]
    frequency_penalty: Option<f64>,
    /// How much likelier tokens are made, by their ids.
    #[serde(default)]
    #[schema(value_type = Option<Value>)]
    logit_bias: Option<RawJson>,
    /// Whether the response has the probabilities of its tokens.
    #[serde(default)]
    logprobs: Option<bool>,
    /// Alternatives for each token.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 20)]
    top_logprobs: Option<u32>,
    /// How long a reasoning model thinks, such as `low` or `high`.
    #[serde(default)]
    reasoning_effort: Option<String>,
    /// How long the response is meant to be, such as `low` or `high`.
    #[serde(default)]
    verbosity: Option<String>,
    /// The number of likeliest tokens to sample from.
    #[serde(default)]
    top_k: Option<i64>,
    /// The least probability of a token, relative to the likeliest.
    #[serde(default)]
    min_p: Option<f64>,
    /// The factor that makes tokens less likely that have occurred.
    #[serde(default)]
    repetition_penalty: Option<f64>,
    /// Not supported: must be `["text"]`.
    #[serde(default)]
    #[schema(value_type = Option<Vec<String>>)]
    modalities: Option<RawJson>,
    /// Not supported.
    #[serde(default)]
    #[schema(value_type = Option<Value>)]
    audio: Option<IgnoredAny>,
    /// Not supported: use `tools`.
    #[serde(default)]
    #[schema(value_type = Option<Value>)]
    functions: Option<IgnoredAny>,
    /// Not supported: use `tool_choice`.
    #[serde(default)]
    #[schema(value_type = Option<Value>)]
    function_call: Option<IgnoredAny>,
    /// The other fields.
    #[serde(skip)]
    more: Vec<ChatOption>,
}

/// Options of a stream.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct StreamOptions {
    /// Whether the last event has the token usage.
    #[serde(default)]
    pub include_usage: Option<bool>,
    /// The other options, which are not supported.
    #[serde(skip)]
    more: Vec<ChatOption>,
}

/// The format of a response.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct ResponseFormat {
    /// The kind of format.
    #[serde(rename = "type")]
    kind: FormatKind,
    /// The schema of the JSON, and its name.
    #[serde(default)]
    #[schema(value_type = Option<Value>)]
    json_schema: Option<RawJson>,
}

/// A kind of format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(remote = "Self", rename_all = "snake_case")]
pub enum FormatKind {
    /// Text.
    Text,
    /// Any object in JSON.
    JsonObject,
    /// JSON of a schema.
    JsonSchema,
}

open!(ChatCompletionRequest, StreamOptions);
strict!(object ResponseFormat);
strict!(word FormatKind);

/// JSON that is passed on as it came.
#[derive(Clone, Deserialize)]
#[serde(transparent)]
struct RawJson(Box<RawValue>);

impl fmt::Debug for RawJson {
    /// Without the text, which is user data.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} bytes", self.0.get().len())
    }
}

/// The tools of a chat, which are counted while they are read.
#[derive(Debug, Clone)]
struct Tools(Vec<RawJson>);

/// One text or several at which generation stops.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop(pub Vec<String>);

impl<'de> Deserialize<'de> for Tools {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let tools = Bounded::new("tools", TOOLS_MAX);
        deserializer.deserialize_seq(tools).map(Self)
    }
}

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StopVisitor)
    }
}

struct StopVisitor;

impl<'de> Visitor<'de> for StopVisitor {
    type Value = Stop;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a text or a list of texts")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Stop, E> {
        Ok(Stop(vec![text.to_owned()]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Stop, A::Error> {
        let texts = Bounded::new("texts", STOPS_MAX).visit_seq(list);
        texts.map(Stop)
    }
}

impl PartialSchema for Stop {
    fn schema() -> RefOr<Schema> {
        let list = ArrayBuilder::new()
            .items(NonEmptyText::schema())
            .max_items(Some(STOPS_MAX));
        let one_of = OneOfBuilder::new()
            .description(Some("One text or several"))
            .item(NonEmptyText::schema())
            .item(list);
        RefOr::T(Schema::from(one_of))
    }
}

impl ToSchema for Stop {
    fn name() -> std::borrow::Cow<'static, str> {
        "StopTexts".into()
    }
}

impl ChatCompletionRequest {
    /// Whether the last event of a stream has the token usage.
    pub fn includes_usage(&self) -> bool {
        let options = self.stream_options.as_ref();
        options.and_then(|options| options.include_usage) == Some(true)
    }

    /// The request for any provider. What would change the response is passed
    /// on, and refused by its name where nobody can.
    pub fn into_chat(self) -> Result<ChatRequest, Error> {
        self.check()?;
        let mut options = self.options()?;
        options.extend(self.more);
        let tools = self.tools.map(|tools| tools.0).unwrap_or_default();
        let chat = ChatRequest {
            messages: conversation(self.messages)?,
            max_tokens: self.max_completion_tokens.or(self.max_tokens),
            temperature: self.temperature,
            top_p: self.top_p,
            stop: self.stop.map(|stop| stop.0).unwrap_or_default(),
            n: self.n,
            tools: tools.into_iter().map(|tool| Tool(tool.0)).collect(),
            options,
        };
        chat.check()?;
        Ok(chat)
    }

    fn check(&self) -> Result<(), Error> {
        for (field, tokens) in [
            ("max_tokens", self.max_tokens),
            ("max_completion_tokens", self.max_completion_tokens),
        ] {
            if tokens == Some(0) {
                return Err(Error::invalid(field, "must be at least 1"));
            }
        }
        for (field, penalty) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            if penalty.is_some_and(|penalty| !(-2.0..=2.0).contains(&penalty)) {
                return Err(Error::invalid(field, "must be from -2 to 2"));
            }
        }
        if self.top_logprobs.is_some_and(|count| count > LOGPROBS_MAX) {
            let reason = format!("must be from 0 to {LOGPROBS_MAX}");
            return Err(Error::invalid("top_logprobs", reason));
        }
        for (field, given) in [
            ("audio", self.audio),
            ("functions", self.functions),
            ("function_call", self.function_call),
        ] {
            if given.is_some() {
                return Err(Error::invalid(field, "is not supported"));
            }
        }
        let is_text = |modalities: &RawJson| {
            serde_json::from_str::<[String; 1]>(modalities.0.get()).is_ok_and(|m| m[0] == "text")
        };
        if self.modalities.as_ref().is_some_and(|m| !is_text(m)) {
            return Err(Error::invalid("modalities", "must be [\"text\"]"));
        }
        // The events are written here, and not by the service. What is false asks
        // for nothing.
        let options = self.stream_options.iter().flat_map(|options| &options.more);
        let mut asked = options.filter(|option| option.value.get() != "false");
        if let Some(option) = asked.next() {
            let field = format!("stream_options.{}", option.name);
            return Err(Error::invalid(field, "is not supported"));
        }
        self.check_json()
    }

    /// Checks what is passed on as it came, as far as every service would.
    fn check_json(&self) -> Result<(), Error> {
        let begins = |json: &RawJson, with: &[char]| json.0.get().starts_with(with);
        let choice = self.tool_choice.as_ref();
        if choice.is_some_and(|json| !begins(json, &['"', '{'])) {
            return Err(Error::invalid(
                "tool_choice",
                "must be a string or an object",
            ));
        }
        for (field, given) in [
            ("logit_bias", &self.logit_bias),
            ("metadata", &self.metadata),
            ("prediction", &self.prediction),
            ("web_search_options", &self.web_search_options),
        ] {
            if given.as_ref().is_some_and(|json| !begins(json, &['{'])) {
                return Err(Error::invalid(field, "must be an object"));
            }
        }
        let tools = self.tools.iter().flat_map(|tools| &tools.0);
        for (index, tool) in tools.enumerate() {
            if !begins(tool, &['{']) {
                let field = format!("tools[{index}]");
                return Err(Error::invalid(field, "must be an object"));
            }
        }
        let format = self.response_format.as_ref();
        let is_incomplete =
            |f: &ResponseFormat| f.kind == FormatKind::JsonSchema && f.json_schema.is_none();
        if format.is_some_and(is_incomplete) {
            return Err(Error::invalid("response_format.json_schema", "is required"));
        }
        Ok(())
    }

    /// The parameters that a service may not have. One that asks for nothing, such
    /// as a penalty of zero, is left out: every service does that.
    fn options(&self) -> Result<Vec<ChatOption>, Error> {
        let mut options = Options::default();
        let penalty = |penalty: Option<f64>| penalty.filter(|penalty| *penalty != 0.0);
        options.add("user", self.user.as_ref())?;
        options.add("safety_identifier", self.safety_identifier.as_ref())?;
        options.add("store", self.store)?;
        options.add("metadata", self.metadata.as_ref().map(|json| &json.0))?;
        options.add("service_tier", self.service_tier.as_ref())?;
        options.add("prompt_cache_key", self.prompt_cache_key.as_ref())?;
        options.add("prediction", self.prediction.as_ref().map(|json| &json.0))?;
        options.add(
            "web_search_options",
            self.web_search_options.as_ref().map(|json| &json.0),
        )?;
        options.add("seed", self.seed)?;
        options.add("presence_penalty", penalty(self.presence_penalty))?;
        options.add("frequency_penalty", penalty(self.frequency_penalty))?;
        options.add("logit_bias", self.logit_bias.as_ref().map(|json| &json.0))?;
        options.add("logprobs", self.logprobs.filter(|on| *on))?;
        options.add("top_logprobs", self.top_logprobs.filter(|count| *count > 0))?;
        options.add("reasoning_effort", self.reasoning_effort.as_ref())?;
        options.add("verbosity", self.verbosity.as_ref())?;
        options.add("top_k", self.top_k)?;
        options.add("min_p", self.min_p)?;
        options.add("repetition_penalty", self.repetition_penalty)?;
        let format = self.response_format.as_ref();
        let format = format.and_then(ResponseFormat::written);
        options.add("response_format", format)?;
        // Without tools there is nothing to choose from, and services refuse it.
        if self.tools.as_ref().is_some_and(|tools| !tools.0.is_empty()) {
            options.add("tool_choice", self.tool_choice.as_ref().map(|json| &json.0))?;
            options.add("parallel_tool_calls", self.parallel_tool_calls)?;
        } else if let Some(choice) = &self.tool_choice
            && !matches!(choice.0.get(), "\"none\"" | "\"auto\"")
        {
            return Err(Error::invalid("tool_choice", "needs tools"));
        }
        Ok(options.0)
    }
}

#[derive(Default)]
struct Options(Vec<ChatOption>);

impl Options {
    /// Adds a parameter that was given.
    fn add(&mut self, name: &'static str, value: Option<impl Serialize>) -> Result<(), Error> {
        if let Some(value) = value {
            let value = to_raw_value(&value)
                .map_err(|_| Error::new(Kind::Internal, "a parameter cannot be written"))?;
            self.0.push(ChatOption {
                name: name.into(),
                value,
            });
        }
        Ok(())
    }
}

/// A format as it is passed on.
#[derive(Serialize)]
struct WrittenFormat<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    json_schema: Option<&'a RawValue>,
}

impl ResponseFormat {
    /// None for text, which is the format of every service.
    fn written(&self) -> Option<WrittenFormat<'_>> {
        let kind = match self.kind {
            FormatKind::Text => return None,
            FormatKind::JsonObject => "json_object",
            FormatKind::JsonSchema => "json_schema",
        };
        let json_schema = self.json_schema.as_ref().map(|schema| &*schema.0);
        Some(WrittenFormat { kind, json_schema })
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::body::json;
    use super::*;
    use gateway::stack::Role;

    fn read(text: &str) -> Result<ChatRequest, Error> {
        json::<ChatCompletionRequest>(text.as_bytes())?.into_chat()
    }

    const CHAT: &str = r#""messages": [{"role": "user", "content": "a"}]"#;

    #[test]
    fn a_chat_is_read() {
        let chat = read(
            r#"{"model": "a", "messages": [
                {"role": "developer", "content": "Be short."},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
            ], "stop": "x", "max_tokens": 1, "max_completion_tokens": 2, "more": 3}"#,
        );
        let chat = chat.unwrap();
        assert_eq!(chat.messages[0].role, Role::System);
        assert_eq!(chat.messages[1].text, "ab");
        assert_eq!((chat.max_tokens, chat.stop.len()), (Some(2), 1));
    }

    #[test]
    fn parameters_are_passed_on() {
        for (name, value) in [
            ("seed", "-7"),
            ("presence_penalty", "-1.5"),
            ("frequency_penalty", "0.5"),
            ("logit_bias", r#"{"50256": -100}"#),
            ("logprobs", "true"),
            ("top_logprobs", "5"),
            ("reasoning_effort", r#""high""#),
            ("verbosity", r#""low""#),
            ("top_k", "40"),
            ("min_p", "0.05"),
            ("repetition_penalty", "1.1"),
            ("response_format", r#"{"type":"json_object"}"#),
            (
                "response_format",
                r#"{"type":"json_schema","json_schema":{"name": "a"}}"#,
            ),
            ("tool_choice", r#""required""#),
            ("parallel_tool_calls", "false"),
            ("user", r#""anna""#),
            ("safety_identifier", r#""a1""#),
            ("store", "false"),
            ("metadata", r#"{"a": "b"}"#),
            ("service_tier", r#""flex""#),
            ("prompt_cache_key", r#""a""#),
            ("prediction", r#"{"type": "content", "content": "a"}"#),
            ("web_search_options", "{}"),
            ("of_another_server", r#"[{"a": 1.50}]"#),
        ] {
            let text = format!(r#"{{"model": "a", {CHAT}, "tools": [{{}}], "{name}": {value}}}"#);
            let chat = read(&text).unwrap();
            assert_eq!(chat.options.len(), 1, "{text}");
            assert_eq!(
                (&*chat.options[0].name, chat.options[0].value.get()),
                (name, value)
            );
            assert_eq!(chat.tools[0].0.get(), "{}");
        }
        assert_eq!(
            read(&format!(r#"{{"model": "a", {CHAT}, "n": 3}}"#))
                .unwrap()
                .n,
            Some(3)
        );
    }

    #[test]
    fn what_asks_for_nothing_is_not_passed_on() {
        for rest in [
            r#""logprobs": false"#,
            r#""top_logprobs": 0"#,
            r#""presence_penalty": 0"#,
            r#""frequency_penalty": 0.0"#,
            r#""response_format": {"type": "text"}"#,
            r#""modalities": ["text"]"#,
            r#""tools": [], "tool_choice": "auto", "parallel_tool_calls": true"#,
            r#""seed": null, "tools": null, "logit_bias": null, "functions": null"#,
            r#""user": null, "store": null, "metadata": null, "of_another_server": null"#,
            r#""stream_options": {"include_usage": true, "include_obfuscation": false}"#,
        ] {
            let chat = read(&format!(r#"{{"model": "a", {CHAT}, {rest}}}"#)).unwrap();
            assert!(chat.options.is_empty() && chat.tools.is_empty(), "{rest}");
        }
    }

    #[test]
    fn what_is_wrong_is_refused_by_its_name() {
        for (rest, field) in [
            (r#""n": 0"#, "n"),
            (r#""n": 129"#, "n"),
            (r#""max_tokens": 0"#, "max_tokens"),
            (r#""temperature": 3"#, "temperature"),
            (r#""presence_penalty": 2.5"#, "presence_penalty"),
            (r#""frequency_penalty": -3"#, "frequency_penalty"),
            (r#""top_logprobs": 21"#, "top_logprobs"),
            (r#""seed": 1.5"#, "seed"),
            (r#""logit_bias": []"#, "logit_bias"),
            (r#""metadata": "a""#, "metadata"),
            (r#""prediction": "a""#, "prediction"),
            (r#""web_search_options": true"#, "web_search_options"),
            (r#""user": 1"#, "user"),
            (r#""store": "a""#, "store"),
            (
                r#""stream_options": {"include_usage": true, "more": 1}"#,
                "stream_options.more",
            ),
            (
                r#""response_format": {"type": "json_object", "schema": {}}"#,
                "response_format.schema",
            ),
            (r#""tools": [1]"#, "tools[0]"),
            (r#""tools": {}"#, "tools"),
            (r#""tools": [{}], "tool_choice": 1"#, "tool_choice"),
            (r#""tool_choice": "required""#, "tool_choice"),
            (
                r#""response_format": {"type": "xml"}"#,
                "response_format.type",
            ),
            (r#""response_format": ["text"]"#, "response_format"),
            (
                r#""response_format": {"type": "json_schema"}"#,
                "response_format.json_schema",
            ),
            (r#""modalities": ["text", "audio"]"#, "modalities"),
            (r#""audio": {}"#, "audio"),
            (r#""functions": []"#, "functions"),
            (r#""function_call": "auto""#, "function_call"),
        ] {
            let error = read(&format!(r#"{{"model": "a", {CHAT}, {rest}}}"#)).unwrap_err();
            assert_eq!(error.violation().unwrap().field, field, "{rest}");
        }
    }

    #[test]
    fn every_list_is_counted_while_it_is_read() {
        let list = |entry: &str, count: usize| format!("[{}]", vec![entry; count].join(","));
        let user = |content: &str| format!(r#"{{"role": "user", "content": {content}}}"#);
        let refused = |messages: &str, tools: &str| {
            let text = format!(r#"{{"model": "a", "messages": {messages}, "tools": {tools}}}"#);
            read(&text).unwrap_err().to_string()
        };
        let (one, parts) = (user("\"a\""), r#"{"type": "text", "text": "a"}"#);
        let tools = refused(&list(&one, 1), &list("{}", TOOLS_MAX + 1));
        assert!(tools.starts_with("tools: ") && tools.contains("has 129 tools, but"));
        let messages = refused(&list(&one, MESSAGES_MAX + 1), "[]");
        assert!(messages.contains("has 4097 entries, but"), "{messages}");
        let parts = user(&list(parts, MESSAGES_MAX + 1));
        let parts = refused(&list(&parts, 1), "null");
        assert!(parts.contains("has 4097 parts, but"), "{parts}");
        let call = r#"{"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}"#;
        let calls = list(call, TOOLS_MAX + 1);
        let calls = format!(r#"[{{"role": "assistant", "tool_calls": {calls}}}]"#);
        let calls = refused(&calls, "null");
        assert!(calls.contains("has 129 tool calls, but"), "{calls}");
    }
}
