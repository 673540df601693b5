//! Requests as rows that are known or computed each on its own. What cannot be
//! read as such goes to a worker as it came, so that the worker's own error
//! comes back.

mod infer;
mod rerank;
mod text;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use platform::grpc::Message;
use protocol::tei::v1 as tei;
use protocol::{COMPUTE_TYPE_KEY, Method, insert_compute_metadata};

use super::key::{Key, Source};
use super::memory::Row;
use crate::request::Request;

/// Rows of one request: more are seldom asked for twice.
const ROWS_MAX: usize = 4096;
/// Bytes of one request: hashing them keeps a thread for some milliseconds.
const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// A request whose rows are known or computed each on its own.
pub trait Rows: Send + Sync {
    /// What stands for each row.
    fn keys(&self) -> &[Key];

    /// The request for some of the rows.
    fn part(&self, places: &[usize]) -> Message;

    /// The rows of an answer to so many, and what they took; none when the
    /// answer is not what such a request has.
    fn split(&self, answer: Bytes, headers: &HeaderMap, count: usize) -> Option<Split>;

    /// The answer of some rows, one for each of the request, framed; adds to
    /// its metadata. None when the rows do not belong together.
    fn join(&self, rows: &[Row], paid: &Paid, headers: &mut HeaderMap) -> Option<Bytes>;
}

/// An answer in rows.
#[derive(Debug)]
pub struct Split {
    /// One for each row that was asked for.
    pub rows: Vec<Row>,
    /// What the call says it took.
    pub took: tei::Metadata,
}

/// What the computed part of an answer took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Paid {
    /// Tokens.
    pub tokens: u64,
    /// What an outside provider takes for it.
    pub cost: f64,
    /// What text calls say of it.
    pub took: tei::Metadata,
}

/// A request in rows; none when it is no such request.
pub fn of(request: &Request, source: &Source<'_>) -> Option<Box<dyn Rows>> {
    let framed = request.message.framed();
    if framed.len() < 5 || framed.len() > MESSAGE_BYTES_MAX {
        return None;
    }
    let message = framed.slice(5..);
    let method = request.method;
    match method {
        Method::ModelInfer => infer::Infer::read(message, source),
        Method::Rerank => rerank::Rerank::read(message, source),
        Method::Embed => {
            text::Text::<tei::EmbedRequest, tei::EmbedResponse>::read(message, method, source)
        }
        Method::EmbedAll => {
            text::Text::<tei::EmbedAllRequest, tei::EmbedAllResponse>::read(message, method, source)
        }
        Method::Predict => {
            text::Text::<tei::PredictRequest, tei::PredictResponse>::read(message, method, source)
        }
        Method::PredictPair => text::Text::<tei::PredictPairRequest, tei::PredictResponse>::read(
            message, method, source,
        ),
        Method::Tokenize => {
            text::Text::<tei::EncodeRequest, tei::EncodeResponse>::read(message, method, source)
        }
        Method::Decode => {
            text::Text::<tei::DecodeRequest, tei::DecodeResponse>::read(message, method, source)
        }
        _ => None,
    }
}

/// The metadata of a text call's answer: `kind` is the kind of device that
/// computed it once; the tokens are those of this call.
fn text_headers(kind: &[u8], characters: u32, paid: &Paid, headers: &mut HeaderMap) {
    let took = tei::Metadata {
        compute_chars: characters,
        ..paid.took
    };
    let kind = HeaderValue::from_bytes(kind).ok();
    insert_compute_metadata(headers, kind, paid.tokens, &took);
}

/// The kind of device that an answer names.
fn compute_type(headers: &HeaderMap) -> &[u8] {
    let kind = headers.get(COMPUTE_TYPE_KEY).map(HeaderValue::as_bytes);
    kind.unwrap_or_default()
}
