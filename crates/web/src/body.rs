//! Reads the body of a request within limits, and its JSON with errors that name
//! the field.

use std::fmt;
use std::marker::PhantomData;

use axum::RequestExt;
use axum::body::Body;
use axum::extract::{FromRequest, Request};
use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http_body_util::BodyExt;
use platform::body::discard;
use platform::grpc::{ByteBudget, BytesHeld, MessageLimits};
use platform::inflate::{Compressed, InflateError, inflate};
use platform::pool::Cancelled;
use protocol::words::cut;
use protocol::{Error, Kind};
use serde::de::{self, DeserializeOwned, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::error::Category;

use super::compression::of_body;
use super::context::{RequestContext, hold};
use super::error::{ApiError, request_aborted};
use super::texts::TEXTS_MAX;
use super::waiting::{self, while_waiting};
use gateway::stack::Stack;

/// JSON that is parsed as a whole.
const JSON_BYTES_MAX: usize = 16 << 20;
/// The most memory that an entry of a list takes besides its text, while the list
/// grows: a token id is the shortest, and long lists of others are refused.
const ENTRY_BYTES: usize = 12;
/// Shorter chunks are joined, since each has an overhead of some bytes.
const SMALL_BYTES: usize = 4 << 10;
/// The length of joined chunks.
const JOINED_BYTES: usize = 64 << 10;

/// A body in the chunks that it came in; small ones are joined.
#[derive(Debug, Default)]
pub struct Received {
    /// The chunks.
    pub chunks: Vec<Bytes>,
    /// The sum of their lengths.
    pub length: usize,
    /// The bytes of the body count as in flight until this is dropped.
    pub held: Option<BytesHeld>,
}

impl Received {
    fn push(&mut self, chunk: Bytes, small: &mut BytesMut) {
        self.length += chunk.len();
        if chunk.len() >= SMALL_BYTES {
            self.push_joined(small);
            self.chunks.push(chunk);
            return;
        }
        small.extend_from_slice(&chunk);
        if small.len() >= JOINED_BYTES {
            self.push_joined(small);
        }
    }

    /// Ends a chunk of joined ones.
    fn push_joined(&mut self, small: &mut BytesMut) {
        if !small.is_empty() {
            self.chunks.push(small.split().freeze());
        }
    }

    /// The body in one chunk: a copy, counted before it is made, if it came in
    /// several.
    pub fn joined(mut self, budget: &ByteBudget) -> Result<Bytes, Error> {
        self.join(budget)?;
        Ok(self.chunks.pop().unwrap_or_default())
    }

    fn join(&mut self, budget: &ByteBudget) -> Result<(), Error> {
        if self.chunks.len() > 1 {
            let held = hold(budget, self.length)?;
            let whole = self.chunks.concat();
            self.chunks = vec![whole.into()];
            self.held = Some(held);
        }
        Ok(())
    }
}

/// The limits of a JSON body.
pub fn json_limits(limits: &MessageLimits) -> MessageLimits {
    at_most(limits, JSON_BYTES_MAX)
}

/// The same limits with a lower maximum of bytes.
pub fn at_most(limits: &MessageLimits, bytes_max: usize) -> MessageLimits {
    let mut limits = limits.clone();
    limits.message_bytes_max = limits.message_bytes_max.min(bytes_max);
    limits
}

/// Reads a body to its end, at the least speed of a message. Bytes are counted as
/// they arrive, and before they are decompressed: a large `content-length` alone
/// reserves nothing.
pub async fn read(request: Request, limits: &MessageLimits) -> Result<Received, Error> {
    let (head, mut body) = request.into_parts();
    let received = read_parts(&head.headers, &mut body, limits).await;
    if received.is_err() {
        discard(body).await;
    }
    received
}

async fn read_parts(
    headers: &HeaderMap,
    body: &mut Body,
    limits: &MessageLimits,
) -> Result<Received, Error> {
    let compression = of_body(headers)?;
    let received = gather(headers, body, limits).await?;
    let Some(compression) = compression else {
        return Ok(received);
    };
    let compressed = Compressed {
        chunks: received.chunks,
        held: received.held,
        compression,
        prefix_bytes: 0,
    };
    let inflated = inflate(compressed, limits).await;
    let inflated = inflated.map_err(|error| match error {
        InflateError::Invalid(_) => Error::invalid("body", "cannot be decompressed"),
        InflateError::TooLarge(length) => Error::too_large(length, limits.message_bytes_max),
        InflateError::Refused(status) => Error::from_status(&status),
    })?;
    Ok(Received {
        length: inflated.bytes.len(),
        chunks: vec![inflated.bytes.into()],
        held: Some(inflated.held),
    })
}

async fn gather(
    headers: &HeaderMap,
    body: &mut Body,
    limits: &MessageLimits,
) -> Result<Received, Error> {
    let bytes_max = limits.message_bytes_max;
    let announced = headers.get(CONTENT_LENGTH);
    let announced = announced.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if let Some(length) = announced.filter(|length| *length > bytes_max) {
        return Err(Error::too_large(length, bytes_max));
    }
    let (mut received, mut small) = (Received::default(), BytesMut::new());
    let mut progress = limits.pace.begin();
    loop {
        let frame = progress.within(body.frame()).await.map_err(|_| {
            limits.too_slow();
            let message = "the request body was not received in time";
            Error::new(Kind::DeadlinePassed, message)
        })?;
        let Some(frame) = frame else {
            received.push_joined(&mut small);
            return Ok(received);
        };
        let Ok(chunk) = frame.map_err(|_| request_aborted())?.into_data() else {
            continue;
        };
        progress.moved(chunk.len());
        let length = received.length + chunk.len();
        if length > bytes_max {
            return Err(Error::too_large(length, bytes_max));
        }
        let more = hold(&limits.budget, chunk.len())?;
        match &mut received.held {
            Some(held) => held.merge(more),
            none => *none = Some(more),
        }
        received.push(chunk, &mut small);
    }
}

/// An error for a content type that no client of this protocol uses. Their
/// libraries label the JSON as JSON, as bytes or as text.
pub fn check_content_type(headers: &HeaderMap) -> Result<(), Error> {
    let kind = headers.get(CONTENT_TYPE).map(|kind| kind.as_bytes());
    let accepted = |kind: &[u8]| {
        let named = kind.split(|byte| *byte == b';').next().unwrap_or_default();
        [&b"application/octet-stream"[..], b"text/plain"]
            .iter()
            .any(|other| named.trim_ascii().eq_ignore_ascii_case(other))
    };
    if kind.is_some_and(accepted) {
        return Ok(());
    }
    must_be_json(headers)
}

/// An error if the request has a content type other than JSON.
pub fn must_be_json(headers: &HeaderMap) -> Result<(), Error> {
    let Some(kind) = headers.get(CONTENT_TYPE) else {
        return Ok(());
    };
    let kind = kind.to_str().unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    let json = kind.eq_ignore_ascii_case("application/json")
        || kind.to_ascii_lowercase().ends_with("+json");
    if json {
        return Ok(());
    }
    Err(Error::invalid("content-type", "must be application/json"))
}

/// Parses JSON. An error names the path of the field if a value is wrong, else
/// the line and the column.
pub fn json<'de, T: Deserialize<'de>>(bytes: &'de [u8]) -> Result<T, Error> {
    // Paths are tracked only if there is an error to report.
    serde_json::from_slice(bytes).or_else(|_| {
        let mut reader = serde_json::Deserializer::from_slice(bytes);
        let value = serde_path_to_error::deserialize(&mut reader)
            .map_err(|error| json_error(&error.path().to_string(), error.inner()))?;
        reader.end().map_err(|error| json_error("", &error))?;
        Ok(value)
    })
}

/// The same for values that keep nothing of the text.
pub fn owned<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    json(bytes)
}

/// Deserializes a list of texts, or of objects with a text.
pub fn texts<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    deserializer.deserialize_seq(Bounded::new("texts", TEXTS_MAX))
}

/// Deserializes a list of at most `MAX` entries, which are counted as they are
/// read.
pub fn list<'de, const MAX: usize, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    deserializer.deserialize_seq(Bounded::new("entries", MAX))
}

/// The same for a list that may be absent: null is absent too.
pub fn optional_list<'de, const MAX: usize, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<Vec<T>>, D::Error> {
    let list = Option::<List<T, MAX>>::deserialize(deserializer)?;
    Ok(list.map(|list| list.0))
}

/// A list of at most `MAX` entries.
struct List<T, const MAX: usize>(Vec<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for List<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        list::<MAX, _, _>(deserializer).map(Self)
    }
}

/// Reads a list of so many entries at most.
pub struct Bounded<T> {
    what: &'static str,
    count_max: usize,
    entries: PhantomData<T>,
}

impl<T> Bounded<T> {
    /// At most `count_max` of what they are called.
    pub fn new(what: &'static str, count_max: usize) -> Self {
        Self {
            what,
            count_max,
            entries: PhantomData,
        }
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Bounded<T> {
    type Value = Vec<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a sequence")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let Self {
            what, count_max, ..
        } = self;
        let mut entries = Vec::new();
        while entries.len() < count_max {
            waiting::check::<A::Error>(entries.len())?;
            match list.next_element()? {
                Some(entry) => entries.push(entry),
                None => return Ok(entries),
            }
        }
        reject_rest(&mut list, count_max, |count| {
            format!("has {count} {what}, but the maximum is {count_max}")
        })?;
        Ok(entries)
    }
}

/// An error, with the total count, if a list has elements after the first `read`.
pub fn reject_rest<'de, A: SeqAccess<'de>>(
    list: &mut A,
    read: usize,
    reason: impl FnOnce(usize) -> String,
) -> Result<(), A::Error> {
    let mut count = read;
    while list.next_element::<IgnoredAny>()?.is_some() {
        count += 1;
        waiting::check::<A::Error>(count)?;
    }
    if count > read {
        return Err(de::Error::custom(reason(count)));
    }
    Ok(())
}

/// The error for wrong JSON, without any value of the caller's.
fn json_error(path: &str, error: &serde_json::Error) -> Error {
    let position = format!("line {}, column {}", error.line(), error.column());
    let field = match path {
        "" | "." | "?" => "body".to_owned(),
        path => cut(path).into_owned(),
    };
    let text = error.to_string();
    let text = text
        .rsplit_once(" at line ")
        .map_or(&*text, |(text, _)| text);
    if error.classify() != Category::Data {
        let field = match error.classify() {
            Category::Eof => "body".to_owned(),
            _ => field,
        };
        return Error::invalid(field, format!("invalid JSON at {position}: {text}"));
    }
    let below = |name: &str| match field.as_str() {
        "body" => name.to_owned(),
        field => format!("{field}.{name}"),
    };
    let quoted = || text.split('`').nth(1).unwrap_or_default();
    if text.starts_with("missing field") {
        return Error::invalid(below(quoted()), format!("is required (at {position})"));
    }
    if text.starts_with("duplicate field") {
        let field = if path.ends_with(quoted()) {
            field
        } else {
            below(quoted())
        };
        return Error::invalid(field, format!("is given twice (at {position})"));
    }
    // The known names come last: the caller's own name before them may have any
    // text.
    let known = text.rsplit_once("`, expected ").map(|(_, known)| known);
    if text.starts_with("unknown field") {
        let known = known.map_or_else(String::new, |known| format!(": expected {known}"));
        return Error::invalid(field, format!("is an unknown field (at {position}){known}"));
    }
    if text.starts_with("unknown variant") {
        let known = known.unwrap_or("another");
        return Error::invalid(field, format!("must be {known} (at {position})"));
    }
    let description = match super::json_words::must_be(text) {
        Some(reason) => format!("{reason} (at {position})"),
        None => format!("is invalid (at {position}): {text}"),
    };
    Error::invalid(field, description)
}

/// A JSON body. An extractor.
#[derive(Debug)]
pub struct Json<T> {
    /// The parsed value.
    pub value: T,
    /// Never read: the body's bytes and those of its values count as in flight
    /// until it is dropped.
    _held: Option<BytesHeld>,
}

impl<T: DeserializeOwned + Send + 'static> FromRequest<Stack> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(mut request: Request, _: &Stack) -> Result<Self, ApiError> {
        let context: RequestContext = request.extract_parts().await?;
        Ok(Self::read(&context, request, owned).await?)
    }
}

impl<T: Send + 'static> Json<T> {
    /// Reads a body, and parses it: on a thread for work if it is large.
    pub async fn read(
        context: &RequestContext,
        request: Request,
        parse: impl FnOnce(&[u8]) -> Result<T, Error> + Send + 'static,
    ) -> Result<Self, Error> {
        let content_type = must_be_json(request.headers());
        let received = read(request, &json_limits(&context.limits)).await?;
        content_type?;
        Self::parse(context, received, parse).await
    }

    /// Parses a body: on a thread for work if it is large, as long as its caller
    /// waits.
    pub async fn parse(
        context: &RequestContext,
        mut received: Received,
        parse: impl FnOnce(&[u8]) -> Result<T, Error> + Send + 'static,
    ) -> Result<Self, Error> {
        let (length, budget) = (received.length, context.limits.budget.clone());
        let work = move |cancelled: &Cancelled| {
            received.join(&budget)?;
            let bytes = received.chunks.pop().unwrap_or_default();
            let values = hold(&budget, values_bytes(&bytes))?;
            let value = while_waiting(cancelled, || parse(&bytes))?;
            let held = match received.held.take() {
                Some(mut held) => {
                    held.merge(values);
                    held
                }
                None => values,
            };
            Ok(Self {
                value,
                _held: Some(held),
            })
        };
        context.work(length, work).await
    }
}

/// The most memory that the values of a text take besides their own text.
fn values_bytes(json: &[u8]) -> usize {
    let entries = json.iter().filter(|byte| **byte == b',').count();
    ENTRY_BYTES * entries
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http::HeaderValue;
    use http::header::CONTENT_ENCODING;
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        #[allow(dead_code, reason = "only read")]
        inputs: Vec<Inner>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code, reason = "only read")]
    struct Inner {
        shape: Vec<i64>,
        name: String,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Form {
        Float,
        Base64,
    }

    #[test]
    fn an_unknown_word_is_not_repeated() {
        for wrong in ["secret", "secret`, expected `x", "secret: x, expected"] {
            let error = json::<Form>(json_text(wrong).as_bytes()).unwrap_err();
            let message = error.to_string();
            assert!(
                message.contains("must be `float` or `base64` (at line 1"),
                "{message}"
            );
            assert!(!message.contains("secret"), "{message}");
        }
        let named = r#"{"inputs": [], "secret`, expected `x": 1}"#;
        let reason = json::<Outer>(named.as_bytes()).unwrap_err();
        let reason = &reason.violation().unwrap().description;
        assert!(!reason.contains("secret"), "{reason}");
        assert!(reason.ends_with(": expected `inputs`"), "{reason}");
    }

    fn json_text(text: &str) -> String {
        serde_json::to_string(text).unwrap()
    }

    fn refused(text: &str) -> (String, String) {
        let error = json::<Outer>(text.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid);
        (error.field().unwrap().to_string(), error.to_string())
    }

    #[test]
    fn a_wrong_value_is_named_by_its_path() {
        let (field, message) = refused(r#"{"inputs": [{"name": "a", "shape": [1, "secret"]}]}"#);
        assert_eq!(field, "inputs[0].shape[1]");
        assert!(
            message.contains("must be an integer, not a string (at line 1"),
            "{message}"
        );
        assert!(!message.contains("secret"), "{message}");
        let (field, message) = refused(r#"{"inputs": [{"name": "a"}]}"#);
        assert_eq!(field, "inputs[0].shape", "{message}");
        let (field, message) = refused(r#"{"inputs": [{"nam": "a"}]}"#);
        assert_eq!(field, "inputs[0].nam", "{message}");
        assert!(
            message.contains("`shape`") && message.contains("`name`"),
            "{message}"
        );
        let (field, message) = refused(r#"{"inputs": [], "inputs": []}"#);
        assert_eq!(field, "inputs", "{message}");
        assert!(message.contains("twice"), "{message}");
        assert_eq!(refused(r"{}").0, "inputs");
        assert_eq!(refused(r"[]").0, "body");
    }

    #[test]
    fn invalid_json_is_named_by_line_and_column() {
        let (field, message) = refused("{\"inputs\":\n  [}");
        assert_eq!(field, "inputs[0]");
        assert!(message.contains("line 2, column 4"), "{message}");
        let (field, message) = refused("{\"inputs\": []} {}");
        assert_eq!(field, "body");
        assert!(message.contains("column 16"), "{message}");
        assert_eq!(refused("").0, "body");
        assert_eq!(refused("{\"inputs\": [").0, "body");
        let deep = format!("{{\"inputs\": {}", "[".repeat(1000));
        refused(&deep);
    }

    #[test]
    fn other_content_types_are_refused() {
        let with = |kind: &'static str| {
            let kind = HeaderValue::from_static(kind);
            must_be_json(&HeaderMap::from_iter([(CONTENT_TYPE, kind)]))
        };
        assert!(must_be_json(&HeaderMap::new()).is_ok());
        assert!(with("application/json; charset=utf-8").is_ok());
        assert!(with("application/problem+json").is_ok());
        let error = with("text/plain").unwrap_err();
        assert_eq!(error.violation().unwrap().field, "content-type");
    }

    #[tokio::test]
    async fn a_body_stops_at_the_limit_and_gives_its_bytes_back() {
        let limits = MessageLimits::new(10, 15);
        let request = |text: &'static str| Request::new(Body::from(text));
        let first = read(request("0123456789"), &limits).await.unwrap();
        assert_eq!((first.length, limits.budget.used()), (10, 10));
        let error = read(request("01234567890"), &limits).await.unwrap_err();
        assert_eq!(error.kind(), Kind::TooLarge);
        let error = read(request("0123456"), &limits).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Overloaded);
        drop(first);
        assert_eq!(limits.budget.used(), 0);
    }

    #[tokio::test]
    async fn small_chunks_are_joined() {
        let limits = MessageLimits::new(1 << 20, 1 << 20);
        let large = Bytes::from(vec![b'x'; SMALL_BYTES]);
        let small = || std::iter::repeat_n(Bytes::from_static(b"ab"), 50_000);
        let chunks: Vec<Bytes> = small().chain([large]).chain(small()).collect();
        let whole = chunks.concat();
        let chunks = chunks.into_iter().map(Ok::<_, std::convert::Infallible>);
        let body = Body::from_stream(futures::stream::iter(chunks));
        let received = read(Request::new(body), &limits).await.unwrap();
        assert!(received.chunks.len() <= 5, "{}", received.chunks.len());
        assert_eq!(received.length, whole.len());
        assert_eq!(received.joined(&limits.budget).unwrap(), whole);
    }

    #[tokio::test]
    async fn a_body_moves_at_the_least_speed() {
        let mut limits = MessageLimits::new(1 << 20, 2 << 20);
        limits.pace.grace = Duration::from_millis(100);
        // A tenth of the least speed, and never a pause for long.
        let drops = futures::stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            let drop = Bytes::from_static(&[b'a'; 16]);
            Some((Ok::<_, std::convert::Infallible>(drop), ()))
        });
        let reading = read(Request::new(Body::from_stream(drops)), &limits);
        let read = tokio::time::timeout(Duration::from_secs(20), reading).await;
        let error = read.unwrap().unwrap_err();
        assert_eq!(error.kind(), Kind::DeadlinePassed);
        assert_eq!(limits.budget.used(), 0);
    }

    #[tokio::test]
    async fn what_is_decompressed_is_counted_and_bounded() {
        let limits = MessageLimits::new(1 << 20, 2 << 20);
        let (body, _) = platform::deflate::gzip(vec![vec![b' '; 1 << 20].into()], &limits)
            .await
            .unwrap();
        let packed = |encoding: &'static str| {
            let mut request = Request::new(Body::from(body.clone()));
            let encoding = HeaderValue::from_static(encoding);
            request.headers_mut().insert(CONTENT_ENCODING, encoding);
            request
        };
        let received = read(packed("gzip"), &limits).await.unwrap();
        assert_eq!(received.length, 1 << 20);
        assert!(limits.budget.used() >= 1 << 20);
        let full = read(packed("gzip"), &limits).await.unwrap_err();
        assert_eq!(full.kind(), Kind::Overloaded);
        drop(received);
        let (short, whole) = (MessageLimits::new(1000, 2 << 20), limits);
        let long = read(packed("gzip"), &short).await.unwrap_err();
        assert_eq!(long.kind(), Kind::TooLarge);
        for (encoding, field) in [("deflate", "body"), ("br", "content-encoding")] {
            let error = read(packed(encoding), &whole).await.unwrap_err();
            assert_eq!(error.violation().unwrap().field, field);
        }
        assert_eq!((short.budget.used(), whole.budget.used()), (0, 0));
    }

    #[test]
    fn long_lists_are_counted_and_not_stored() {
        #[derive(Debug, Deserialize)]
        struct Listed {
            #[serde(deserialize_with = "texts")]
            texts: Vec<String>,
        }
        let read = |count: usize| {
            let list = vec!["a"; count];
            let text = serde_json::json!({ "texts": list }).to_string();
            json::<Listed>(text.as_bytes()).map(|read| read.texts.len())
        };
        assert_eq!(read(0), Ok(0));
        assert_eq!(read(TEXTS_MAX), Ok(TEXTS_MAX));
        let error = read(TEXTS_MAX + 7).unwrap_err();
        assert_eq!(error.violation().unwrap().field, "texts");
        let expected = "has 2055 texts, but the maximum is 2048";
        assert!(error.to_string().contains(expected), "{error}");
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = json::<Outer>(&bytes);
        }
    }
}
