//! A request as the layers below the doors pass it on: read once, checked once,
//! its tensor bytes never decoded.

use http::{HeaderMap, HeaderName, HeaderValue};
use platform::grpc::{Call, Message, MessageLimits, frame_bytes};
use protocol::{Error, MODEL_KEY, Method, Outline, Service, Task, VERSION_KEY, peek, renamed};
use tokio::time::Instant;
use tonic::Status;

use crate::policy::Caller;

/// The bytes of a gRPC frame before its message: a flag and the length.
const FRAME_PREFIX_BYTES: usize = 5;

/// A message for a model, with its metadata, deadline and caller.
#[derive(Debug)]
pub struct Request {
    /// The method that is called.
    pub method: Method,
    /// The metadata that is forwarded.
    pub headers: HeaderMap,
    /// The message; its bytes count as in flight as long as it is held.
    pub message: Message,
    /// When the caller stops waiting.
    pub deadline: Instant,
    /// The caller.
    pub caller: Caller,
    /// How the tenant's quotas count it.
    pub unit: QuotaUnit,
    /// What the message has.
    outline: Outline,
}

/// The model that a request names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSelector {
    /// A model by its name.
    Named {
        /// The name, not validated yet.
        name: String,
        /// The version; empty for the newest.
        version: String,
        /// The field or metadata key that holds the name.
        field: &'static str,
    },
    /// No name: the only model for one of these tasks.
    Tasks(&'static [Task]),
}

/// Where a method's requests name their model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SelectorSource {
    /// In the first fields of the message.
    Message,
    /// In the metadata; without it, the only model for one of these tasks.
    Metadata(&'static [Task]),
}

/// How quotas count a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuotaUnit {
    /// A request and its rows.
    Request,
    /// The rows alone: one of several calls for a request that has been
    /// counted.
    Part,
}

/// The usage of a response.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// Computed tokens, without those of cached rows.
    pub tokens: u64,
    /// The price of an outside provider, in the currency of the price table.
    pub cost: f64,
}

impl Request {
    /// A request of a caller; an error when its message is no request of the
    /// method, or has more parts than any model takes.
    pub fn new(
        method: Method,
        headers: HeaderMap,
        message: Message,
        deadline: Instant,
        caller: Caller,
    ) -> Result<Self, Error> {
        let outline = method.outline(unframed(&message))?;
        Ok(Self {
            method,
            headers,
            message,
            deadline,
            caller,
            unit: QuotaUnit::Request,
            outline,
        })
    }

    /// A request that the gateway makes itself, to one worker.
    pub fn internal(method: Method, message: &impl prost::Message, deadline: Instant) -> Self {
        Self {
            method,
            headers: default_headers(),
            message: Message::encode(message),
            deadline,
            caller: Caller::gateway(),
            unit: QuotaUnit::Request,
            outline: Outline::default(),
        }
    }

    /// Reads the only message of a unary call.
    pub async fn read(
        call: Call,
        method: Method,
        limits: &MessageLimits,
        caller: Caller,
    ) -> Result<Self, Status> {
        let deadline = call.deadline;
        let (head, messages) = call.into_parts(&limits.held_by(caller.holder()));
        let headers = forwarded_headers(head.headers);
        let message = messages.only().await?;
        Ok(Self::new(method, headers, message, deadline, caller)?)
    }

    /// The model that the request names.
    pub fn selector(&self, source: SelectorSource) -> Result<ModelSelector, Error> {
        match source {
            SelectorSource::Message => {
                let peeked = peek(self.bytes())?;
                Ok(ModelSelector::Named {
                    name: peeked.name.to_owned(),
                    version: peeked.version.to_owned(),
                    field: "model_name",
                })
            }
            SelectorSource::Metadata(tasks) => selector_of_metadata(&self.headers, tasks),
        }
    }

    /// The rows of the request; 0 for a method that computes nothing.
    pub fn rows(&self) -> u64 {
        self.outline.rows
    }

    /// What its message has.
    pub fn outline(&self) -> Outline {
        self.outline
    }

    /// The same request with another message, for some of its rows.
    #[must_use]
    pub fn with_message(&self, message: Message) -> Self {
        let outline = self.method.outline(unframed(&message));
        Self {
            outline: outline.unwrap_or(self.outline),
            method: self.method,
            headers: self.headers.clone(),
            message,
            deadline: self.deadline,
            caller: self.caller.clone(),
            unit: self.unit,
        }
    }

    /// The same request for the newest version of another model, with another
    /// deadline.
    #[must_use]
    pub fn for_model(&self, name: &str, deadline: Instant) -> Self {
        let in_message = self.method.service() == Service::Inference;
        let message = if in_message {
            Message::from_framed(frame_bytes(&renamed(self.bytes(), name)))
        } else {
            Message::from_framed(self.message.framed().clone())
        };
        let mut request = Self {
            method: self.method,
            headers: self.headers.clone(),
            message,
            deadline,
            caller: self.caller.clone(),
            unit: self.unit,
            outline: self.outline,
        };
        request.headers.remove(VERSION_KEY);
        if let Ok(value) = HeaderValue::try_from(name)
            && !in_message
        {
            request.headers.insert(MODEL_KEY, value);
        }
        request
    }

    /// The encoded message, without its frame.
    pub fn bytes(&self) -> &[u8] {
        unframed(&self.message)
    }
}

fn unframed(message: &Message) -> &[u8] {
    let framed = message.framed();
    framed.get(FRAME_PREFIX_BYTES..).unwrap_or_default()
}

fn selector_of_metadata(
    headers: &HeaderMap,
    tasks: &'static [Task],
) -> Result<ModelSelector, Error> {
    let text = |key: &'static str| {
        let read = |value: &HeaderValue| match value.to_str() {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(Error::invalid(key, "must be ASCII text")),
        };
        headers.get(key).map(read).transpose()
    };
    match text(MODEL_KEY)? {
        Some(name) => Ok(ModelSelector::Named {
            name,
            version: text(VERSION_KEY)?.unwrap_or_default(),
            field: MODEL_KEY,
        }),
        None if headers.contains_key(VERSION_KEY) => {
            Err(Error::invalid(VERSION_KEY, "name the model too"))
        }
        None => Ok(ModelSelector::Tasks(tasks)),
    }
}

/// The metadata of a request that did not come over gRPC.
pub fn default_headers() -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(4);
    headers.insert(
        http::header::CONTENT_TYPE,
        HeaderValue::from_static("application/grpc"),
    );
    headers.insert(http::header::TE, HeaderValue::from_static("trailers"));
    headers
}

/// The headers that identify the caller.
pub const CREDENTIALS: [&str; 3] = ["authorization", "x-api-key", "api-key"];

/// The most bytes of a caller's metadata that are forwarded, as HTTP/2 counts them
/// (RFC 9113, 6.5.2). It is far below the limit of workers, which also get what
/// the gateway adds.
const METADATA_BYTES_MAX: usize = 16 << 10;
/// What HTTP/2 counts for each entry besides its name and value.
const ENTRY_BYTES: usize = 32;
/// The metadata of this program's own: no caller sets it for a worker.
const OWN_PREFIX: &str = "x-andon-";
/// What is forwarded of metadata that is over the limit.
const ESSENTIAL: [&str; 6] = [
    "content-type",
    "te",
    "cache-control",
    "traceparent",
    MODEL_KEY,
    VERSION_KEY,
];

/// The longest of those values, but for a model's name and version, which are
/// checked before they are forwarded.
const ESSENTIAL_BYTES_MAX: usize = 256;

/// The headers of the caller's connection, and those that are secret.
const NOT_FORWARDED: [&str; 7] = [
    "grpc-encoding",
    "grpc-accept-encoding",
    "content-length",
    "authorization",
    "x-api-key",
    "api-key",
    "cookie",
];

/// The caller's metadata without the headers of its own connection. The trace
/// continues as the caller's, or as the span of this call.
pub fn forwarded_headers(mut headers: HeaderMap) -> HeaderMap {
    // Most calls have none of them, or one.
    let is_forwarded = |name: &HeaderName| !NOT_FORWARDED.contains(&name.as_str());
    while let Some(name) = headers.keys().find(|name| !is_forwarded(name)).cloned() {
        headers.remove(name);
    }
    let (mut bytes, mut own) = (0, false);
    for (name, value) in &headers {
        bytes += name.as_str().len() + value.len() + ENTRY_BYTES;
        own |= name.as_str().starts_with(OWN_PREFIX);
    }
    if own || bytes > METADATA_BYTES_MAX {
        let is_long = bytes > METADATA_BYTES_MAX;
        headers = only_forwardable(headers, is_long);
    }
    let (span, from) = (tracing::Span::current(), HeaderMap::new());
    platform::telemetry::forward_trace(&span, &from, &mut headers);
    headers
}

/// The metadata without this program's own; of long metadata the essential
/// entries alone, each once: what is unknown is left out.
fn only_forwardable(headers: HeaderMap, is_long: bool) -> HeaderMap {
    let mut forwarded = HeaderMap::with_capacity(headers.len());
    let keys = headers
        .keys()
        .filter(|name| !name.as_str().starts_with(OWN_PREFIX));
    for name in keys {
        if !is_long {
            for value in headers.get_all(name) {
                forwarded.append(name, value.clone());
            }
        } else if ESSENTIAL.contains(&name.as_str())
            && let Some(value) = headers.get(name)
            && (value.len() <= ESSENTIAL_BYTES_MAX || name.as_str().starts_with(MODEL_KEY))
        {
            forwarded.insert(name, value.clone());
        }
    }
    forwarded
}

#[cfg(test)]
mod tests {
    use protocol::{LANE_CROSS_KEY, LANE_KEY};

    use super::*;

    fn headers(entries: &[(&'static str, &str)]) -> HeaderMap {
        let entry = |(name, value): &(&'static str, &str)| {
            let value = HeaderValue::try_from(*value).unwrap();
            (HeaderName::from_static(name), value)
        };
        entries.iter().map(entry).collect()
    }

    #[test]
    fn no_caller_sets_metadata_of_this_program_or_passes_a_credential_on() {
        let forwarded = forwarded_headers(headers(&[
            (LANE_KEY, "7"),
            (LANE_CROSS_KEY, "true"),
            ("x-andon-cache", "hit"),
            ("authorization", "Bearer secret"),
            ("x-own", "kept"),
            (MODEL_KEY, "minilm"),
        ]));
        let expected = headers(&[("x-own", "kept"), (MODEL_KEY, "minilm")]);
        assert_eq!(forwarded, expected);
    }

    #[test]
    fn long_metadata_is_left_out_but_for_what_is_known() {
        let long = "v".repeat(METADATA_BYTES_MAX);
        let known = [(MODEL_KEY, "minilm"), ("te", "trailers")];
        let mut long = headers(&[known[0], ("x-long", &long), known[1]]);
        long.append("x-more", HeaderValue::from_static("too"));
        assert_eq!(forwarded_headers(long), headers(&known));
        // Many short entries count too.
        let mut many = headers(&known);
        for number in 0..1000_u32 {
            many.append("x-n", number.into());
        }
        assert_eq!(forwarded_headers(many), headers(&known));
        let few = [known[0], ("x-a", "1"), ("x-a", "2")];
        let mut sent = headers(&few[..2]);
        sent.append("x-a", HeaderValue::from_static("2"));
        assert_eq!(forwarded_headers(sent.clone()), sent);
    }
}
