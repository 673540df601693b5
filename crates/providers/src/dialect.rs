//! What differs between kinds of outside services: paths, headers, bodies,
//! events of a stream and where an error's message stands. A further kind is
//! one file in `dialect/`, which implements [`Dialect`], and its line in
//! [`DIALECTS`].

mod anthropic;
mod cohere;
mod openai;
mod text;

pub use openai::MaxTokensField;

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use http::HeaderName;
use http::header::AUTHORIZATION;
use protocol::Task;
use serde::{Deserialize, Serialize};

use crate::chat::{ChatRequest, ParsedChat, StreamProgress};
use crate::embedding::{EmbeddingRequest, Embeddings};
use crate::error::ProviderError;
use crate::rerank::{RerankRequest, RerankScores};
use crate::sse::Event;

/// The dialects that the providers file can name.
pub static DIALECTS: &[&dyn Dialect] = &[&openai::Openai, &anthropic::Anthropic, &cohere::Cohere];

/// How services of one kind are called. A dialect implements the methods of
/// its tasks; the settings are refused when they name another task.
pub trait Dialect: fmt::Debug + Send + Sync {
    /// The value of `kind` in the providers file.
    fn kind(&self) -> &'static str;

    /// The tasks that services of this kind have calls for.
    fn tasks(&self) -> &'static [Task];

    /// Rows of one request that the service after which the dialect is named
    /// accepts. The providers file may say another number.
    fn rows_max(&self, task: Task) -> usize;

    /// The authentication of a call.
    fn authentication(&self) -> Authentication {
        Authentication {
            header: AUTHORIZATION,
            prefix: "Bearer ",
        }
    }

    /// Whether the calls of OpenAI's API for which there is no translation are
    /// passed through as they come.
    fn passes_through(&self) -> bool {
        false
    }

    /// Headers of every call, besides the content type and the credential.
    fn headers(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }

    /// The call that embeds texts.
    fn embedding_request(
        &self,
        _model: &ModelOptions<'_>,
        _request: &EmbeddingRequest<'_>,
    ) -> Result<HttpRequest, ProviderError> {
        Err(ProviderError::UnsupportedTask)
    }

    /// Reads the response with the embeddings of so many texts.
    fn parse_embeddings(&self, _body: &[u8], _texts: usize) -> Result<Embeddings, ProviderError> {
        Err(ProviderError::UnsupportedTask)
    }

    /// The call that scores texts for one query.
    fn rerank_request(
        &self,
        _model: &ModelOptions<'_>,
        _request: &RerankRequest<'_>,
    ) -> Result<HttpRequest, ProviderError> {
        Err(ProviderError::UnsupportedTask)
    }

    /// Reads the response with the scores of so many texts.
    fn parse_rerank(&self, _body: &[u8], _texts: usize) -> Result<RerankScores, ProviderError> {
        Err(ProviderError::UnsupportedTask)
    }

    /// The call that continues a conversation, in one piece or as a stream.
    fn chat_request(
        &self,
        _model: &ModelOptions<'_>,
        _request: &ChatRequest,
        _stream: bool,
    ) -> Result<HttpRequest, ProviderError> {
        Err(ProviderError::UnsupportedTask)
    }

    /// Reads the response to a conversation in one piece.
    fn parse_chat(&self, _body: &[u8]) -> Result<ParsedChat, ProviderError> {
        Err(ProviderError::UnsupportedTask)
    }

    /// Reads one event of a streamed response to a conversation.
    fn parse_chat_event(
        &self,
        _event: &Event,
        _progress: &mut StreamProgress,
    ) -> Result<(), ProviderError> {
        Err(ProviderError::UnsupportedTask)
    }

    /// The message in the body of a response that is no success, if it has
    /// one. By default it is looked for where services commonly put it.
    fn error_message(&self, body: &[u8]) -> Option<String> {
        common_error_message(body)
    }
}

/// The dialect of a `kind` in the providers file.
pub fn find(kind: &str) -> Option<&'static dyn Dialect> {
    DIALECTS
        .iter()
        .find(|dialect| dialect.kind() == kind)
        .copied()
}

/// The settings of a model that a dialect uses.
#[derive(Debug, Clone, Copy)]
pub struct ModelOptions<'a> {
    /// The service's name for the model.
    pub name: &'a str,
    /// Tokens of a response where the caller gives no limit.
    pub max_tokens: u32,
    /// The field that limits the tokens of a response, of OpenAI's dialect.
    pub max_tokens_field: MaxTokensField,
    /// The `input_type` of Cohere's dialect.
    pub input_type: &'a str,
}

/// The header that carries a credential.
#[derive(Debug, Clone)]
pub struct Authentication {
    /// Its name.
    pub header: HeaderName,
    /// The prefix of the credential, including a trailing space.
    pub prefix: &'static str,
}

/// A call of a service: a POST with a JSON body.
#[derive(Debug, Clone)]
pub struct HttpRequest {
    /// The path after the part of `base_url`.
    pub path: Cow<'static, str>,
    /// The body, in JSON.
    pub body: Bytes,
}

impl HttpRequest {
    /// A call with a body.
    pub fn new(path: impl Into<Cow<'static, str>>, body: &impl Serialize) -> Self {
        Self {
            path: path.into(),
            // These bodies hold strings, numbers and JSON that was read: writing
            // cannot fail.
            body: serde_json::to_vec(body).unwrap_or_default().into(),
        }
    }
}

/// `error`, `error.message`, `message` or `detail`.
fn common_error_message(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Object {
        message: Option<String>,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Field {
        Text(String),
        Object(Object),
        Other(serde::de::IgnoredAny),
    }
    #[derive(Deserialize)]
    struct Body {
        error: Option<Field>,
        message: Option<Field>,
        detail: Option<Field>,
    }
    let body: Body = serde_json::from_slice(body).ok()?;
    let fields = [body.error, body.message, body.detail];
    fields.into_iter().flatten().find_map(|field| match field {
        Field::Text(text) => Some(text),
        Field::Object(object) => object.message,
        Field::Other(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    /// A model `big`.
    pub(super) const MODEL: ModelOptions<'_> = ModelOptions {
        name: "big",
        max_tokens: 1024,
        max_tokens_field: MaxTokensField::MaxTokens,
        input_type: "clustering",
    };

    /// The body of a call, read again.
    pub(super) fn json(request: Result<HttpRequest, ProviderError>) -> serde_json::Value {
        serde_json::from_slice(&request.unwrap().body).unwrap()
    }

    #[test]
    fn kinds_are_distinct_and_each_has_a_task() {
        for dialect in DIALECTS {
            let found = find(dialect.kind()).unwrap();
            assert_eq!(format!("{found:?}"), format!("{dialect:?}"));
            assert!(!dialect.tasks().is_empty(), "{dialect:?}");
        }
        assert!(find("else").is_none());
    }

    #[test]
    fn a_task_that_is_declared_is_implemented_and_no_other() {
        let pairs = DIALECTS
            .iter()
            .flat_map(|d| Task::ALL.map(|task| (d, task)));
        for (dialect, task) in pairs {
            let unsupported = Some(ProviderError::UnsupportedTask);
            let parsed = match task {
                Task::Embedding => dialect.parse_embeddings(b"", 1).err(),
                Task::Rerank => dialect.parse_rerank(b"", 1).err(),
                Task::Generation => dialect.parse_chat(b"").err(),
                _ => unsupported.clone(),
            };
            let declared = dialect.tasks().contains(&task);
            assert_eq!(parsed != unsupported, declared, "{dialect:?} {task:?}");
        }
    }

    #[test]
    fn the_message_of_an_error_is_found_where_services_put_it() {
        for body in [
            r#"{"error":{"message":"too long","type":"x"}}"#,
            r#"{"error":"too long"}"#,
            r#"{"message":"too long"}"#,
            r#"{"detail":"too long"}"#,
        ] {
            let found = common_error_message(body.as_bytes());
            assert_eq!(found.as_deref(), Some("too long"), "{body}");
        }
        for body in [
            "",
            "no",
            "[]",
            r#"{"error":7}"#,
            r#"{"detail":[{"loc":1}]}"#,
        ] {
            assert_eq!(common_error_message(body.as_bytes()), None, "{body}");
        }
    }
}
