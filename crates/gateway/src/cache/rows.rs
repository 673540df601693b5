//! Requests split into rows, each of which is cached or computed on its own. A
//! request that cannot be split goes to a worker unchanged, so that the caller
//! gets the worker's own error.

mod infer;
mod rerank;
mod text;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use platform::grpc::Message;
use protocol::tei::v1 as tei;
use protocol::{COMPUTE_TYPE_KEY, Method, insert_compute_metadata};

use super::key::{KeyContext, RowKey};
use super::memory::CachedRow;
use crate::request::Request;

/// Rows of a request that is cached: larger requests are seldom repeated.
const ROWS_MAX: usize = 4096;
/// Fields of a request that is cached: each is a value to decode and to hash.
const FIELDS_MAX: u64 = 1 << 16;
/// Bytes of a request that is cached: to hash them takes some milliseconds.
const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// A request whose rows are cached or computed each on its own.
pub trait RowRequest: Send + Sync {
    /// The cache key of each row.
    fn keys(&self) -> &[RowKey];

    /// The request for the rows at some indices.
    fn part(&self, indices: &[usize]) -> Message;

    /// Splits the response to a request of `count` rows. None when the response
    /// has another form.
    fn split(&self, response: Bytes, headers: &HeaderMap, count: usize) -> Option<SplitResponse>;

    /// Joins rows, one for each row of the request, to a framed response, and adds
    /// its metadata to `headers`. None when the rows do not belong together.
    fn join(
        &self,
        rows: &[CachedRow],
        usage: &ComputedUsage,
        headers: &mut HeaderMap,
    ) -> Option<Bytes>;
}

/// A response split into rows.
#[derive(Debug)]
pub struct SplitResponse {
    /// One for each row of the request.
    pub rows: Vec<CachedRow>,
    /// The timing that the response reports.
    pub timing: tei::Metadata,
}

/// The usage of the rows that were computed, not cached.
#[derive(Debug, Clone, Copy, Default)]
pub struct ComputedUsage {
    /// Computed tokens.
    pub tokens: u64,
    /// The price of an outside provider, in the currency of the price table.
    pub cost: f64,
    /// The timing that text calls report.
    pub timing: tei::Metadata,
}

/// Splits a request into rows. None when it cannot be split: it is not cached.
pub fn split_request(request: &Request, source: &KeyContext<'_>) -> Option<Box<dyn RowRequest>> {
    let framed = request.message.framed();
    if framed.len() < 5 || framed.len() > MESSAGE_BYTES_MAX {
        return None;
    }
    let outline = request.outline();
    if outline.rows > ROWS_MAX as u64 || outline.fields > FIELDS_MAX {
        return None;
    }
    let message = framed.slice(5..);
    let method = request.method;
    match method {
        Method::ModelInfer => infer::InferRows::read(message, source),
        Method::Rerank => rerank::RerankRows::read(message, source),
        Method::Embed => {
            text::TextRow::<tei::EmbedRequest, tei::EmbedResponse>::read(message, method, source)
        }
        Method::EmbedAll => text::TextRow::<tei::EmbedAllRequest, tei::EmbedAllResponse>::read(
            message, method, source,
        ),
        Method::Predict => text::TextRow::<tei::PredictRequest, tei::PredictResponse>::read(
            message, method, source,
        ),
        Method::PredictPair => {
            text::TextRow::<tei::PredictPairRequest, tei::PredictResponse>::read(
                message, method, source,
            )
        }
        Method::Tokenize => {
            text::TextRow::<tei::EncodeRequest, tei::EncodeResponse>::read(message, method, source)
        }
        Method::Decode => {
            text::TextRow::<tei::DecodeRequest, tei::DecodeResponse>::read(message, method, source)
        }
        _ => None,
    }
}

/// Adds the metadata of a response to a text call: `kind` is the kind of device
/// that computed it once; the tokens are those of this call.
fn text_headers(kind: &[u8], characters: u32, usage: &ComputedUsage, headers: &mut HeaderMap) {
    let timing = tei::Metadata {
        compute_chars: characters,
        ..usage.timing
    };
    let kind = HeaderValue::from_bytes(kind).ok();
    insert_compute_metadata(headers, kind, usage.tokens, &timing);
}

/// The kind of device that a response names.
fn compute_type(headers: &HeaderMap) -> &[u8] {
    let kind = headers.get(COMPUTE_TYPE_KEY).map(HeaderValue::as_bytes);
    kind.unwrap_or_default()
}
