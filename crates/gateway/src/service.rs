//! What a call is, and the request that the layers below pass on: read once,
//! checked once, its tensor bytes never decoded.

mod fleet;
mod stream;

pub use fleet::fleet;
pub use stream::{each_message, rerank_stream};

use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue};
use platform::grpc::{Call, Message, MessageLimits, frame_bytes};
use protocol::{Error, MODEL_KEY, VERSION_KEY, peek, peek_count, peek_rows, renamed};
use tokio::time::Instant;
use tonic::Status;

use crate::auth::Caller;
use crate::limit::Counted;
use crate::stack::Access;

/// Where a call says which model it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// In the message's first fields.
    Message,
    /// In the metadata; without it, the only model of one of these tasks.
    Metadata(&'static [&'static str]),
}

/// What the gateway does with a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// One message that a worker answers.
    Forward(Door),
    /// A stream of messages, each of which a worker answers.
    Stream(Door),
    /// A stream that is gathered into one message.
    Gathered,
    /// Answered by the gateway from what it knows of all workers.
    Fleet(&'static str),
    /// What the server can do, for tools that ask.
    Reflection,
    /// Health, and what is not known.
    Common,
}

impl Method {
    /// Whether a probe may depend on it: then it is answered under overload
    /// too, or a busy gateway would be taken for a dead one.
    pub fn is_probe(self) -> bool {
        matches!(
            self,
            Self::Common | Self::Reflection | Self::Fleet("ServerLive" | "ServerReady")
        )
    }

    /// Whose it is to call. A probe has no key, and what is not known says so
    /// to everybody.
    pub fn access(self) -> Access {
        match self {
            Self::Reflection => Access::Reflection,
            _ if self.is_probe() => Access::Open,
            _ if self.is_administrative() => Access::Administrator,
            _ => Access::Caller,
        }
    }

    /// Whether only administrators may call it.
    fn is_administrative(self) -> bool {
        matches!(
            self,
            Self::Fleet(
                "RepositoryModelLoad" | "RepositoryModelUnload" | "TraceSetting" | "LogSettings"
            )
        )
    }
}

const EMBEDDING: &[&str] = &["embedding"];
const CLASSIFICATION: &[&str] = &["classification"];
const RERANK: &[&str] = &["rerank"];
const TEXT: &[&str] = &["embedding", "classification", "rerank"];

/// Every call that the gateway knows.
const METHODS: [(&str, Method); 37] = [
    (
        "/inference.GRPCInferenceService/ModelInfer",
        Method::Forward(Door::Message),
    ),
    (
        "/inference.GRPCInferenceService/ModelStreamInfer",
        Method::Stream(Door::Message),
    ),
    (
        "/inference.GRPCInferenceService/ModelMetadata",
        Method::Forward(Door::Message),
    ),
    (
        "/inference.GRPCInferenceService/ModelConfig",
        Method::Forward(Door::Message),
    ),
    (
        "/inference.GRPCInferenceService/ModelReady",
        Method::Fleet("ModelReady"),
    ),
    (
        "/inference.GRPCInferenceService/ServerLive",
        Method::Fleet("ServerLive"),
    ),
    (
        "/inference.GRPCInferenceService/ServerReady",
        Method::Fleet("ServerReady"),
    ),
    (
        "/inference.GRPCInferenceService/ServerMetadata",
        Method::Fleet("ServerMetadata"),
    ),
    (
        "/inference.GRPCInferenceService/ModelStatistics",
        Method::Fleet("ModelStatistics"),
    ),
    (
        "/inference.GRPCInferenceService/RepositoryIndex",
        Method::Fleet("RepositoryIndex"),
    ),
    (
        "/inference.GRPCInferenceService/RepositoryModelLoad",
        Method::Fleet("RepositoryModelLoad"),
    ),
    (
        "/inference.GRPCInferenceService/RepositoryModelUnload",
        Method::Fleet("RepositoryModelUnload"),
    ),
    (
        "/inference.GRPCInferenceService/TraceSetting",
        Method::Fleet("TraceSetting"),
    ),
    (
        "/inference.GRPCInferenceService/LogSettings",
        Method::Fleet("LogSettings"),
    ),
    (
        "/inference.GRPCInferenceService/SystemSharedMemoryStatus",
        Method::Fleet("SharedMemory"),
    ),
    (
        "/inference.GRPCInferenceService/SystemSharedMemoryRegister",
        Method::Fleet("SharedMemory"),
    ),
    (
        "/inference.GRPCInferenceService/SystemSharedMemoryUnregister",
        Method::Fleet("SharedMemory"),
    ),
    (
        "/inference.GRPCInferenceService/CudaSharedMemoryStatus",
        Method::Fleet("SharedMemory"),
    ),
    (
        "/inference.GRPCInferenceService/CudaSharedMemoryRegister",
        Method::Fleet("SharedMemory"),
    ),
    (
        "/inference.GRPCInferenceService/CudaSharedMemoryUnregister",
        Method::Fleet("SharedMemory"),
    ),
    ("/tei.v1.Info/Info", Method::Forward(Door::Metadata(TEXT))),
    (
        "/tei.v1.Embed/Embed",
        Method::Forward(Door::Metadata(EMBEDDING)),
    ),
    (
        "/tei.v1.Embed/EmbedStream",
        Method::Stream(Door::Metadata(EMBEDDING)),
    ),
    (
        "/tei.v1.Embed/EmbedAll",
        Method::Forward(Door::Metadata(EMBEDDING)),
    ),
    (
        "/tei.v1.Embed/EmbedAllStream",
        Method::Stream(Door::Metadata(EMBEDDING)),
    ),
    ("/tei.v1.Embed/EmbedSparse", Method::Fleet("Sparse")),
    ("/tei.v1.Embed/EmbedSparseStream", Method::Fleet("Sparse")),
    (
        "/tei.v1.Predict/Predict",
        Method::Forward(Door::Metadata(CLASSIFICATION)),
    ),
    (
        "/tei.v1.Predict/PredictStream",
        Method::Stream(Door::Metadata(CLASSIFICATION)),
    ),
    (
        "/tei.v1.Predict/PredictPair",
        Method::Forward(Door::Metadata(CLASSIFICATION)),
    ),
    (
        "/tei.v1.Predict/PredictPairStream",
        Method::Stream(Door::Metadata(CLASSIFICATION)),
    ),
    (
        "/tei.v1.Rerank/Rerank",
        Method::Forward(Door::Metadata(RERANK)),
    ),
    ("/tei.v1.Rerank/RerankStream", Method::Gathered),
    (
        "/tei.v1.Tokenize/Tokenize",
        Method::Forward(Door::Metadata(TEXT)),
    ),
    (
        "/tei.v1.Tokenize/TokenizeStream",
        Method::Stream(Door::Metadata(TEXT)),
    ),
    (
        "/tei.v1.Tokenize/Decode",
        Method::Forward(Door::Metadata(TEXT)),
    ),
    (
        "/tei.v1.Tokenize/DecodeStream",
        Method::Stream(Door::Metadata(TEXT)),
    ),
];

/// The name that a path has in metrics, and what the gateway does with it. An
/// unknown path has no name of its own: callers must not make new ones.
pub fn method(path: &str) -> (&'static str, Method) {
    if let Some((known, method)) = METHODS.iter().find(|(known, _)| *known == path) {
        let name = known.rsplit_once('/').map_or(*known, |(_, name)| name);
        return (name, *method);
    }
    match path.starts_with("/grpc.reflection.") {
        true => ("other", Method::Reflection),
        false => ("other", Method::Common),
    }
}

/// The model that a request is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// It is named.
    Named {
        /// The model's name, not checked yet.
        name: String,
        /// The version; empty for the newest.
        version: String,
        /// The field or metadata key that holds the name.
        field: &'static str,
    },
    /// The only model that does one of these tasks.
    Doing(&'static [&'static str]),
}

/// A call's message and what must travel with it.
#[derive(Debug)]
pub struct Request {
    /// The call's path.
    pub path: PathAndQuery,
    /// The metadata that is passed on.
    pub headers: HeaderMap,
    /// The message; its bytes count as in flight as long as it is held.
    pub message: Message,
    /// When the caller stops waiting.
    pub deadline: Instant,
    /// The model.
    pub wanted: Wanted,
    /// Who asks.
    pub caller: Caller,
    /// What it counts as.
    pub counted: Counted,
}

impl Request {
    /// A request of the gateway's own.
    pub fn own(path: &'static str, message: &impl prost::Message, deadline: Instant) -> Self {
        Self {
            path: PathAndQuery::from_static(path),
            headers: own_headers(),
            message: Message::own(message),
            deadline,
            wanted: Wanted::Doing(&[]),
            caller: Caller::gateway(),
            counted: Counted::Request,
        }
    }

    /// The rows that are asked for.
    pub fn items(&self) -> u64 {
        let bytes = self.message.framed().get(5..).unwrap_or_default();
        match self.path.path() {
            "/inference.GRPCInferenceService/ModelInfer" => peek_rows(bytes),
            "/tei.v1.Rerank/Rerank" => peek_count(bytes, 2),
            // What computes nothing on a device has no rows.
            path if path.starts_with("/inference.") => 0,
            path if path.starts_with("/tei.v1.Info/") => 0,
            path if path.starts_with("/tei.v1.Tokenize/") => 0,
            _ => 1,
        }
    }

    /// The same request with another message.
    #[must_use]
    pub fn with_message(&self, message: Message) -> Self {
        Self {
            path: self.path.clone(),
            headers: self.headers.clone(),
            message,
            deadline: self.deadline,
            wanted: self.wanted.clone(),
            caller: self.caller.clone(),
            counted: self.counted,
        }
    }

    /// The same request for another model, by its name alone.
    #[must_use]
    pub fn renamed(&self, name: &str) -> Self {
        let bytes = self.message.framed().get(5..).unwrap_or_default();
        let inside = self.path.path().starts_with("/inference.");
        let message = match inside {
            true => Message::of_framed(frame_bytes(&renamed(bytes, name))),
            false => Message::of_framed(self.message.framed().clone()),
        };
        let mut request = self.with_message(message);
        request.headers.remove(VERSION_KEY);
        if let Ok(value) = HeaderValue::try_from(name)
            && !inside
        {
            request.headers.insert(MODEL_KEY, value);
        }
        request
    }
}

/// The metadata of a call of the gateway's own.
pub fn own_headers() -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(4);
    headers.insert(
        http::header::CONTENT_TYPE,
        HeaderValue::from_static("application/grpc"),
    );
    headers.insert(http::header::TE, HeaderValue::from_static("trailers"));
    headers
}

/// Reads the only message of a call and finds out which model it is for.
pub async fn read(
    call: Call,
    door: Door,
    limits: &MessageLimits,
    caller: Caller,
) -> Result<Request, Status> {
    let deadline = call.deadline;
    let path = call.path_and_query();
    let (head, messages) = call.into_parts(limits);
    let headers = forwarded(head.headers);
    let message = messages.only().await?;
    let wanted = wanted(door, &message, &headers)?;
    Ok(Request {
        path,
        headers,
        message,
        deadline,
        wanted,
        caller,
        counted: Counted::Request,
    })
}

/// What says who calls.
const CREDENTIALS: [&str; 3] = ["authorization", "x-api-key", "api-key"];

/// What belongs to the caller's connection, or is nobody else's to know.
const NOT_FORWARDED: [&str; 7] = [
    "grpc-encoding",
    "grpc-accept-encoding",
    "content-length",
    "authorization",
    "x-api-key",
    "api-key",
    "cookie",
];

/// The caller's metadata without what belongs to its own connection. The
/// trace goes on as the caller's, or as the span of this call.
fn forwarded(mut headers: HeaderMap) -> HeaderMap {
    for name in NOT_FORWARDED {
        headers.remove(name);
    }
    let span = tracing::Span::current();
    if !span.is_none() {
        let from = HeaderMap::new();
        platform::telemetry::forward_trace(&span, &from, &mut headers);
    }
    headers
}

fn wanted(door: Door, message: &Message, headers: &HeaderMap) -> Result<Wanted, Error> {
    match door {
        Door::Message => {
            let bytes = message.framed().get(5..).unwrap_or_default();
            let peeked = peek(bytes)?;
            Ok(Wanted::Named {
                name: peeked.name.to_owned(),
                version: peeked.version.to_owned(),
                field: "model_name",
            })
        }
        Door::Metadata(tasks) => {
            let text = |key: &'static str| {
                headers.get(key).map(|value| {
                    value
                        .to_str()
                        .map(str::to_owned)
                        .map_err(|_| Error::invalid(key, "must be ASCII text"))
                })
            };
            Ok(match text(MODEL_KEY).transpose()? {
                Some(name) => Wanted::Named {
                    name,
                    version: text(VERSION_KEY).transpose()?.unwrap_or_default(),
                    field: MODEL_KEY,
                },
                None if headers.contains_key(VERSION_KEY) => {
                    return Err(Error::invalid(VERSION_KEY, "name the model too"));
                }
                None => Wanted::Doing(tasks),
            })
        }
    }
}
