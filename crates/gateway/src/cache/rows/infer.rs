//! `ModelInfer`: each index of the first dimension of all inputs is a row.

use std::collections::HashMap;

use bytes::{BufMut, Bytes, BytesMut};
use http::HeaderMap;
use platform::grpc::{Message, frame};
use prost::Message as _;
use protocol::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use protocol::inference::model_infer_response::InferOutputTensor;
use protocol::inference::{InferParameter, ModelInferRequest, ModelInferResponse};
use protocol::tei::v1::Metadata;
use protocol::{InferRequest, TOKENS_KEY, Value, renamed};
use tensor::{Datatype, Shape, Tensor, bytes_elements};

use super::super::key::{KeyContext, KeyWriter, RowKey};
use super::super::memory::CachedRow;
use super::{ComputedUsage, ROWS_MAX, RowRequest, SplitResponse};

/// Parameters of requests that depend on requests before them.
const STATEFUL: [&str; 3] = ["sequence_id", "sequence_start", "sequence_end"];

/// A request of the Open Inference Protocol.
#[derive(Debug)]
pub struct InferRows {
    model_name: String,
    model_version: String,
    request: InferRequest,
    /// Unchanged, for the requests for some of the rows.
    parameters: HashMap<String, InferParameter>,
    outputs: Vec<InferRequestedOutputTensor>,
    /// The byte ranges of the rows of each input.
    ranges: Vec<RowRanges>,
    keys: Vec<RowKey>,
}

/// The byte ranges of the rows of a tensor.
#[derive(Debug)]
enum RowRanges {
    /// All rows have this many bytes.
    Equal(usize),
    /// The offsets at which rows begin, and the end of the last.
    Offsets(Vec<usize>),
}

impl RowRanges {
    /// None unless the tensor has `rows` rows.
    fn of(tensor: &Tensor, rows: usize) -> Option<Self> {
        if rows == 0 || tensor.shape().sizes().first() != Some(&rows) {
            return None;
        }
        if tensor.datatype() != Datatype::Bytes {
            return Some(Self::Equal(tensor.raw().len() / rows));
        }
        let elements = tensor.shape().elements() / rows;
        let mut ends = Vec::with_capacity(rows + 1);
        let (mut end, mut count) = (0, 0);
        if elements == 0 {
            return Some(Self::Equal(0));
        }
        ends.push(0);
        for element in bytes_elements(tensor.raw()) {
            end += 4 + element.ok()?.len();
            count += 1;
            if count % elements == 0 {
                ends.push(end);
            }
        }
        (ends.len() == rows + 1).then_some(Self::Offsets(ends))
    }

    fn row<'r>(&self, raw: &'r [u8], row: usize) -> &'r [u8] {
        let range = match self {
            Self::Equal(bytes) => row * bytes..(row + 1) * bytes,
            Self::Offsets(ends) => match (ends.get(row), ends.get(row + 1)) {
                (Some(&begin), Some(&end)) => begin..end,
                _ => 0..0,
            },
        };
        raw.get(range).unwrap_or_default()
    }
}

impl InferRows {
    /// Reads a message; None when it is malformed or cannot be cached.
    pub fn read(message: Bytes, source: &KeyContext<'_>) -> Option<Box<dyn RowRequest>> {
        let infer = Self::checked(message, source)?;
        Some(Box::new(infer))
    }

    fn checked(message: Bytes, source: &KeyContext<'_>) -> Option<Self> {
        let bytes = message;
        let mut message = ModelInferRequest::decode(bytes.clone()).ok()?;
        let known = message.encoded_len() == bytes.len();
        if !known && !is_renamed(&bytes, &message.model_name) {
            return None;
        }
        if STATEFUL
            .iter()
            .any(|key| message.parameters.contains_key(*key))
        {
            return None;
        }
        let (parameters, outputs) = (message.parameters.clone(), message.outputs.clone());
        let model_name = message.model_name.clone();
        let model_version = std::mem::take(&mut message.model_version);
        let mut request = InferRequest::checked(message).ok()?;
        let rows = *request.inputs.first()?.tensor.shape().sizes().first()?;
        if rows > ROWS_MAX {
            return None;
        }
        let ranges = request
            .inputs
            .iter()
            .map(|input| RowRanges::of(&input.tensor, rows));
        let ranges = ranges.collect::<Option<Vec<_>>>()?;
        request.outputs.sort_unstable();
        let keys = keys(&request, &ranges, rows, source);
        Some(Self {
            model_name,
            model_version,
            request,
            parameters,
            outputs,
            ranges,
            keys,
        })
    }
}

/// Whether all fields of a message are known here, except that the name of
/// another model is appended. An unknown field may change the response.
fn is_renamed(bytes: &[u8], name: &str) -> bool {
    let added = renamed(&[], name);
    bytes.strip_suffix(&added[..]).is_some_and(|whole| {
        ModelInferRequest::decode(whole).is_ok_and(|message| message.encoded_len() == whole.len())
    })
}

/// The cache key of each row. Inputs, outputs and parameters are sorted by name,
/// so that their order does not matter; `priority` and `timeout` change no
/// response and are not in it.
fn keys(
    request: &InferRequest,
    ranges: &[RowRanges],
    rows: usize,
    source: &KeyContext<'_>,
) -> Vec<RowKey> {
    let mut writer = KeyWriter::new("infer", source);
    writer.number(request.outputs.len() as u64);
    for name in &request.outputs {
        writer.part(name.as_bytes());
    }
    writer.number(request.parameters.len() as u64);
    for (name, value) in &request.parameters {
        writer.part(name.as_bytes());
        match value {
            Value::Bool(value) => writer.number(1).number((*value).into()),
            Value::Integer(value) => writer.number(2).number(value.cast_unsigned()),
            Value::Text(value) => writer.number(3).part(value.as_bytes()),
            Value::Number(value) => writer.number(4).number(value.to_bits()),
        };
    }
    let mut inputs: Vec<_> = request.inputs.iter().zip(ranges).collect();
    inputs.sort_unstable_by(|(a, _), (b, _)| a.name.cmp(&b.name));
    writer.number(inputs.len() as u64);
    for (input, _) in &inputs {
        writer.part(input.name.as_bytes());
        writer.part(input.tensor.datatype().name().as_bytes());
        let sizes = input.tensor.shape().sizes();
        writer.number(sizes.len() as u64);
        for size in sizes.iter().skip(1) {
            writer.number(*size as u64);
        }
    }
    let common = writer.fold();
    let row = |row: usize| {
        writer.rewind(common);
        for (input, range) in &inputs {
            writer.part(range.row(input.tensor.raw(), row));
        }
        writer.key()
    };
    (0..rows).map(row).collect()
}

impl RowRequest for InferRows {
    fn keys(&self) -> &[RowKey] {
        &self.keys
    }

    fn part(&self, indices: &[usize]) -> Message {
        let mut inputs = Vec::with_capacity(self.ranges.len());
        let mut raw_input_contents = Vec::with_capacity(self.ranges.len());
        for (input, range) in self.request.inputs.iter().zip(&self.ranges) {
            let raw = input.tensor.raw();
            let rows: Vec<&[u8]> = indices.iter().map(|&index| range.row(raw, index)).collect();
            raw_input_contents.push(Bytes::from(rows.concat()));
            let mut shape = input.tensor.shape().to_wire();
            if let Some(rows) = shape.first_mut() {
                *rows = i64::try_from(indices.len()).unwrap_or(i64::MAX);
            }
            inputs.push(InferInputTensor {
                name: input.name.clone(),
                datatype: input.tensor.datatype().name().to_owned(),
                shape,
                ..Default::default()
            });
        }
        Message::encode(&ModelInferRequest {
            model_name: self.model_name.clone(),
            model_version: self.model_version.clone(),
            id: self.request.id.clone(),
            parameters: self.parameters.clone(),
            inputs,
            outputs: self.outputs.clone(),
            raw_input_contents,
        })
    }

    /// The head of a row is the response without its contents and its first
    /// dimension, its content the length and bytes of each output.
    fn split(&self, response: Bytes, _headers: &HeaderMap, count: usize) -> Option<SplitResponse> {
        let mut response = ModelInferResponse::decode(response).ok()?;
        let raw = std::mem::take(&mut response.raw_output_contents);
        let plain = response.parameters.is_empty()
            && response
                .outputs
                .iter()
                .all(|output| output.parameters.is_empty() && output.contents.is_none());
        if !plain || response.outputs.is_empty() || raw.len() != response.outputs.len() {
            return None;
        }
        let mut outputs = Vec::with_capacity(raw.len());
        for (output, raw) in response.outputs.iter_mut().zip(raw) {
            let datatype: Datatype = output.datatype.parse().ok()?;
            let shape = Shape::checked(&output.shape).ok()?;
            let tensor = Tensor::from_raw(datatype, shape, raw).ok()?;
            let range = RowRanges::of(&tensor, count)?;
            output.shape.remove(0);
            outputs.push((tensor, range));
        }
        response.id.clear();
        let head = Bytes::from(response.encode_to_vec());
        let mut rows = Vec::with_capacity(count);
        for index in 0..count {
            let mut content = BytesMut::new();
            for (tensor, range) in &outputs {
                let row = range.row(tensor.raw(), index);
                content.put_u32(u32::try_from(row.len()).ok()?);
                content.put_slice(row);
            }
            rows.push(CachedRow {
                head: head.clone(),
                // A copy of the exact length, which holds no other memory.
                content: Bytes::copy_from_slice(&content),
            });
        }
        Some(SplitResponse {
            rows,
            timing: Metadata::default(),
        })
    }

    fn join(
        &self,
        rows: &[CachedRow],
        usage: &ComputedUsage,
        headers: &mut HeaderMap,
    ) -> Option<Bytes> {
        let head = &rows.first()?.head;
        if rows.iter().any(|row| row.head != *head) {
            return None;
        }
        let mut response = ModelInferResponse::decode(head.clone()).ok()?;
        response.id.clone_from(&self.request.id);
        for output in &mut response.outputs {
            output.shape.insert(0, i64::try_from(rows.len()).ok()?);
        }
        response.raw_output_contents = contents(rows, &response.outputs)?;
        headers.insert(TOKENS_KEY, usage.tokens.into());
        Some(frame(&response))
    }
}

/// The contents of each output, from the rows in order.
fn contents(rows: &[CachedRow], outputs: &[InferOutputTensor]) -> Option<Vec<Bytes>> {
    let mut rests: Vec<Bytes> = rows.iter().map(|row| row.content.clone()).collect();
    let mut contents = Vec::with_capacity(outputs.len());
    for _ in outputs {
        let mut joined = BytesMut::new();
        for rest in &mut rests {
            let (length, after) = rest.split_first_chunk::<4>()?;
            let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
            joined.put_slice(after.get(..length)?);
            *rest = rest.slice(4 + length..);
        }
        contents.push(joined.freeze());
    }
    rests.iter().all(Bytes::is_empty).then_some(contents)
}

#[cfg(test)]
mod tests;
