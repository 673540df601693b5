//! The body of `/messages`, made of a conversation in the terms of OpenAI's API.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::super::{HttpRequest, ModelOptions};
use crate::chat::{ChatMessage, ChatOption, ChatRequest, Role, Tool};
use crate::error::ProviderError;

/// System messages stand apart there, joined in one text.
pub fn messages(
    model: &ModelOptions<'_>,
    request: &ChatRequest,
    stream: bool,
) -> Result<HttpRequest, ProviderError> {
    if request.choices() > 1 {
        return Err(ProviderError::unsupported("n"));
    }
    let options = Options::read(&request.options)?;
    refuse_options(&request.messages)?;
    let system = request.messages.iter();
    let system = system.filter(|message| message.role == Role::System);
    let system: Vec<&str> = system.map(|message| message.text.as_str()).collect();
    let tools = request.tools.iter().enumerate();
    let tools = tools.map(|(index, tool)| ToolBody::read(index, tool));
    let body = MessagesBody {
        model: model.name,
        max_tokens: request.max_tokens.unwrap_or(model.max_tokens),
        system: system.join("\n\n"),
        messages: message_bodies(&request.messages)?,
        // The scale there ends at 1.
        temperature: request.temperature.map(|value| value.min(1.0)),
        top_p: request.top_p,
        top_k: options.top_k,
        metadata: options.user_id().map(|user_id| Metadata { user_id }),
        stop_sequences: &request.stop,
        tools: tools.collect::<Result<_, _>>()?,
        tool_choice: options.tool_choice(),
        stream,
    };
    Ok(HttpRequest::new("/messages", &body))
}

#[derive(Serialize)]
struct MessagesBody<'a> {
    model: &'a str,
    max_tokens: u32,
    #[serde(skip_serializing_if = "String::is_empty")]
    system: String,
    messages: Vec<MessageBody<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_k: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<Metadata<'a>>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    stop_sequences: &'a [String],
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tools: Vec<ToolBody<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_choice: Option<ToolChoice>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    stream: bool,
}

/// Who makes the request.
#[derive(Serialize)]
struct Metadata<'a> {
    user_id: &'a RawValue,
}

#[derive(Serialize)]
struct MessageBody<'a> {
    role: &'static str,
    content: ContentBody<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum ContentBody<'a> {
    Text(&'a str),
    Blocks(Vec<Block<'a>>),
}

#[derive(Serialize)]
#[serde(untagged)]
enum Block<'a> {
    Text {
        #[serde(rename = "type")]
        kind: &'static str,
        text: &'a str,
    },
    Call {
        #[serde(rename = "type")]
        kind: &'static str,
        id: &'a str,
        name: &'a str,
        input: &'a RawValue,
    },
    Result {
        #[serde(rename = "type")]
        kind: &'static str,
        tool_use_id: &'a str,
        content: &'a str,
    },
}

/// An error for what a message has besides its text and calls. The id of a tool's
/// result says whose it is, so that its name is not needed.
fn refuse_options(messages: &[ChatMessage]) -> Result<(), ProviderError> {
    for (index, message) in messages.iter().enumerate() {
        let is_result = message.role == Role::Tool;
        let mut options = message.options.iter();
        if let Some(option) = options.find(|option| !is_result || option.name != "name") {
            let field = format!("messages[{index}].{}", option.name);
            return Err(ProviderError::unsupported(field));
        }
    }
    Ok(())
}

/// The messages of the conversation. The results of tools are blocks of one
/// message of the user, as many as stand together.
fn message_bodies(messages: &[ChatMessage]) -> Result<Vec<MessageBody<'_>>, ProviderError> {
    let mut bodies: Vec<MessageBody<'_>> = Vec::new();
    let mut after_result = false;
    for (index, message) in messages.iter().enumerate() {
        if message.role == Role::System {
            continue;
        }
        let is_result = message.role == Role::Tool;
        if is_result {
            let block = Block::Result {
                kind: "tool_result",
                tool_use_id: message.tool_call_id.as_deref().unwrap_or_default(),
                content: &message.text,
            };
            match bodies.last_mut().map(|body| &mut body.content) {
                Some(ContentBody::Blocks(blocks)) if after_result => blocks.push(block),
                _ => bodies.push(MessageBody {
                    role: Role::User.name(),
                    content: ContentBody::Blocks(vec![block]),
                }),
            }
        } else {
            bodies.push(MessageBody {
                role: message.role.name(),
                content: content(index, message)?,
            });
        }
        after_result = is_result;
    }
    Ok(bodies)
}

/// The content of the message of that number.
fn content(index: usize, message: &ChatMessage) -> Result<ContentBody<'_>, ProviderError> {
    if message.tool_calls.is_empty() {
        return Ok(ContentBody::Text(&message.text));
    }
    let mut blocks = Vec::new();
    if !message.text.is_empty() {
        blocks.push(Block::Text {
            kind: "text",
            text: &message.text,
        });
    }
    for (number, call) in message.tool_calls.iter().enumerate() {
        let arguments = match call.arguments.trim() {
            "" => "{}",
            arguments => arguments,
        };
        let input: Option<&RawValue> = serde_json::from_str(arguments).ok();
        let input = input.filter(|input| input.get().starts_with('{'));
        let input = input.ok_or_else(|| ProviderError::Parameter {
            field: format!("messages[{index}].tool_calls[{number}].function.arguments"),
            reason: "takes an object in JSON there",
        })?;
        blocks.push(Block::Call {
            kind: "tool_use",
            id: &call.id,
            name: &call.name,
            input,
        });
    }
    Ok(ContentBody::Blocks(blocks))
}

#[derive(Serialize)]
struct ToolBody<'a> {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<String>,
    input_schema: Schema<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Schema<'a> {
    Given(&'a RawValue),
    Any {
        #[serde(rename = "type")]
        kind: &'static str,
    },
}

impl<'a> ToolBody<'a> {
    /// A function of OpenAI's API. Other tools of theirs, and the promise that
    /// arguments follow the schema, do not exist here.
    fn read(index: usize, tool: &'a Tool) -> Result<Self, ProviderError> {
        #[derive(Deserialize)]
        struct Given<'a> {
            #[serde(default, rename = "type")]
            kind: Option<String>,
            #[serde(borrow)]
            function: Function<'a>,
        }
        #[derive(Deserialize)]
        struct Function<'a> {
            name: String,
            #[serde(default)]
            description: Option<String>,
            #[serde(default, borrow)]
            parameters: Option<&'a RawValue>,
            #[serde(default)]
            strict: Option<bool>,
        }
        let given: Option<Given<'a>> = serde_json::from_str(tool.0.get()).ok();
        let given = given.filter(|given| given.kind.as_deref().is_none_or(|k| k == "function"));
        let given = given.ok_or_else(|| ProviderError::Parameter {
            field: format!("tools[{index}]"),
            reason: "takes functions alone",
        })?;
        let function = given.function;
        if function.strict == Some(true) {
            let field = format!("tools[{index}].function.strict");
            return Err(ProviderError::unsupported(field));
        }
        Ok(Self {
            name: function.name,
            description: function.description,
            input_schema: match function.parameters {
                Some(schema) => Schema::Given(schema),
                None => Schema::Any { kind: "object" },
            },
        })
    }
}

/// Which tools the model may or must call.
#[derive(Serialize)]
struct ToolChoice {
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    disable_parallel_tool_use: bool,
}

impl ToolChoice {
    fn of(kind: &'static str) -> Self {
        Self {
            kind,
            name: None,
            disable_parallel_tool_use: false,
        }
    }

    fn read(value: &RawValue) -> Result<Self, ProviderError> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Given {
            Word(String),
            Function { function: Named },
        }
        #[derive(Deserialize)]
        struct Named {
            name: String,
        }
        let given: Option<Given> = serde_json::from_str(value.get()).ok();
        match given {
            Some(Given::Word(word)) if word == "auto" => Ok(Self::of("auto")),
            Some(Given::Word(word)) if word == "none" => Ok(Self::of("none")),
            Some(Given::Word(word)) if word == "required" => Ok(Self::of("any")),
            Some(Given::Function { function }) => Ok(Self {
                name: Some(function.name),
                ..Self::of("tool")
            }),
            _ => Err(ProviderError::unsupported("tool_choice")),
        }
    }
}

/// The parameters that have a counterpart here.
#[derive(Default)]
struct Options<'a> {
    top_k: Option<&'a RawValue>,
    user: Option<&'a RawValue>,
    safety_identifier: Option<&'a RawValue>,
    tool_choice: Option<ToolChoice>,
    one_call: bool,
}

impl<'a> Options<'a> {
    /// An error names the first parameter that has none.
    fn read(given: &'a [ChatOption]) -> Result<Self, ProviderError> {
        let mut options = Self::default();
        for option in given {
            match &*option.name {
                "top_k" => options.top_k = Some(&*option.value),
                "user" => options.user = Some(&*option.value),
                "safety_identifier" => options.safety_identifier = Some(&*option.value),
                // What every service does.
                "store" if option.value.get() == "false" => {}
                "service_tier" if option.value.get() == "\"auto\"" => {}
                "tool_choice" => options.tool_choice = Some(ToolChoice::read(&option.value)?),
                "parallel_tool_calls" => options.one_call = option.value.get() == "false",
                name => return Err(ProviderError::unsupported(name)),
            }
        }
        Ok(options)
    }

    /// The newer name has precedence.
    fn user_id(&self) -> Option<&'a RawValue> {
        self.safety_identifier.or(self.user)
    }

    fn tool_choice(self) -> Option<ToolChoice> {
        if !self.one_call {
            return self.tool_choice;
        }
        let mut choice = self.tool_choice.unwrap_or_else(|| ToolChoice::of("auto"));
        choice.disable_parallel_tool_use = choice.kind != "none";
        Some(choice)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::chat::ToolCall;
    use crate::dialect::tests::{MODEL, json as read};

    fn raw(value: &Value) -> Box<RawValue> {
        RawValue::from_string(value.to_string()).unwrap()
    }

    fn option(name: &'static str, value: Value) -> ChatOption {
        ChatOption {
            name: name.into(),
            value: raw(&value),
        }
    }

    #[test]
    fn system_messages_stand_apart() {
        let mut request = ChatRequest::from_prompt("a");
        request
            .messages
            .insert(0, ChatMessage::new(Role::System, "be kind"));
        let body = read(messages(&MODEL, &request, false));
        let expected = json!({
            "model": "big", "max_tokens": 1024, "system": "be kind",
            "messages": [{"role": "user", "content": "a"}],
        });
        assert_eq!(body, expected);
    }

    #[test]
    fn tools_and_their_results_are_translated() {
        let schema = json!({"type": "object", "properties": {}});
        let tools = [
            json!({"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}),
            json!({"type": "function", "function": {"name": "g"}}),
        ];
        let call = |id: &str| ToolCall {
            id: id.to_owned(),
            name: "f".to_owned(),
            arguments: r#"{"b":2,"a":1}"#.to_owned(),
        };
        let result = |id: &str| ChatMessage {
            tool_call_id: Some(id.to_owned()),
            ..ChatMessage::new(Role::Tool, "r")
        };
        let mut request = ChatRequest {
            tools: tools.iter().map(|tool| Tool(raw(tool))).collect(),
            options: vec![
                option(
                    "tool_choice",
                    json!({"type": "function", "function": {"name": "f"}}),
                ),
                option("parallel_tool_calls", json!(false)),
                option("top_k", json!(3)),
            ],
            ..ChatRequest::from_prompt("a")
        };
        request.messages.push(ChatMessage {
            tool_calls: vec![call("1"), call("2")],
            ..ChatMessage::new(Role::Assistant, "t")
        });
        request.messages.extend([result("1"), result("2")]);
        let body = read(messages(&MODEL, &request, true));
        let block = |id: &str| json!({"type": "tool_use", "id": id, "name": "f", "input": {"a": 1, "b": 2}});
        let result = |id: &str| json!({"type": "tool_result", "tool_use_id": id, "content": "r"});
        let expected = json!({
            "model": "big", "max_tokens": 1024, "stream": true, "top_k": 3,
            "tools": [
                {"name": "f", "description": "d", "input_schema": schema},
                {"name": "g", "input_schema": {"type": "object"}},
            ],
            "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": true},
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [{"type": "text", "text": "t"}, block("1"), block("2")]},
                {"role": "user", "content": [result("1"), result("2")]},
            ],
        });
        assert_eq!(body, expected);
    }

    #[test]
    fn the_end_user_is_translated() {
        let body = |options: Vec<ChatOption>| {
            let request = ChatRequest {
                options,
                ..ChatRequest::from_prompt("a")
            };
            read(messages(&MODEL, &request, false))
        };
        let user = || option("user", json!("anna"));
        assert_eq!(body(vec![user()])["metadata"], json!({"user_id": "anna"}));
        let newer = option("safety_identifier", json!("a1"));
        let both = body(vec![newer, user()]);
        assert_eq!(both["metadata"], json!({"user_id": "a1"}));
        let nothing = [
            option("store", json!(false)),
            option("service_tier", json!("auto")),
        ];
        assert_eq!(body(nothing.into()), body(Vec::new()));
    }

    #[test]
    fn a_choice_of_tools_is_translated() {
        for (given, kind) in [("auto", "auto"), ("none", "none"), ("required", "any")] {
            let choice = ToolChoice::read(&raw(&json!(given))).unwrap();
            assert_eq!(choice.kind, kind);
        }
    }

    #[test]
    fn what_has_no_counterpart_is_refused_by_its_name() {
        let with = |change: &dyn Fn(&mut ChatRequest)| {
            let mut request = ChatRequest::from_prompt("a");
            change(&mut request);
            match messages(&MODEL, &request, false) {
                Err(ProviderError::Parameter { field, .. }) => field,
                other => format!("{other:?}"),
            }
        };
        assert_eq!(with(&|request| request.n = Some(2)), "n");
        for name in [
            "seed",
            "logit_bias",
            "logprobs",
            "response_format",
            "store",
            "metadata",
            "service_tier",
            "prompt_cache_key",
            "prediction",
            "web_search_options",
            "of_another_server",
        ] {
            let refused = with(&|request| request.options = vec![option(name, json!(1))]);
            assert_eq!(refused, name);
        }
        let refused = with(&|request| {
            request.messages[0].options = vec![option("name", json!("anna"))];
        });
        assert_eq!(refused, "messages[0].name");
        let result = with(&|request| {
            request.messages[0] = ChatMessage {
                tool_call_id: Some("1".to_owned()),
                options: vec![option("name", json!("f"))],
                ..ChatMessage::new(Role::Tool, "b")
            };
        });
        assert!(result.starts_with("Ok("), "{result}");
        let refused = with(&|request| request.options = vec![option("tool_choice", json!("some"))]);
        assert_eq!(refused, "tool_choice");
        let custom = json!({"type": "custom", "custom": {"name": "f"}});
        let refused = with(&|request| request.tools = vec![Tool(raw(&custom))]);
        assert_eq!(refused, "tools[0]");
        let strict = json!({"type": "function", "function": {"name": "f", "strict": true}});
        let refused = with(&|request| request.tools = vec![Tool(raw(&strict))]);
        assert_eq!(refused, "tools[0].function.strict");
        let refused = with(&|request| {
            request.messages[0].tool_calls = vec![ToolCall {
                arguments: "[1".to_owned(),
                ..ToolCall::default()
            }];
        });
        assert_eq!(refused, "messages[0].tool_calls[0].function.arguments");
    }
}
