//! `ModelInfer`: each place of the first dimension of all inputs is a row.

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

use super::super::key::{Key, KeyWriter, Source};
use super::super::memory::Row;
use super::{Paid, ROWS_MAX, Rows, Split};

/// Parameters of requests that belong to others before and after them.
const STATEFUL: [&str; 3] = ["sequence_id", "sequence_start", "sequence_end"];

/// A request of the Open Inference Protocol.
#[derive(Debug)]
pub struct Infer {
    model_name: String,
    model_version: String,
    request: InferRequest,
    /// As they came, for the requests of parts.
    parameters: HashMap<String, InferParameter>,
    outputs: Vec<InferRequestedOutputTensor>,
    /// Where the rows of each input are.
    cuts: Vec<Cut>,
    keys: Vec<Key>,
}

/// Where the rows of a tensor begin and end.
#[derive(Debug)]
enum Cut {
    /// All have so many bytes.
    Even(usize),
    /// One ends where the next begins.
    At(Vec<usize>),
}

impl Cut {
    /// None unless the tensor has that many rows.
    fn of(tensor: &Tensor, rows: usize) -> Option<Self> {
        if rows == 0 || tensor.shape().sizes().first() != Some(&rows) {
            return None;
        }
        if tensor.datatype() != Datatype::Bytes {
            return Some(Self::Even(tensor.raw().len() / rows));
        }
        let elements = tensor.shape().elements() / rows;
        let mut ends = Vec::with_capacity(rows + 1);
        let (mut end, mut count) = (0, 0);
        if elements == 0 {
            return Some(Self::Even(0));
        }
        ends.push(0);
        for element in bytes_elements(tensor.raw()) {
            end += 4 + element.ok()?.len();
            count += 1;
            if count % elements == 0 {
                ends.push(end);
            }
        }
        (ends.len() == rows + 1).then_some(Self::At(ends))
    }

    fn row<'r>(&self, raw: &'r [u8], row: usize) -> &'r [u8] {
        let range = match self {
            Self::Even(bytes) => row * bytes..(row + 1) * bytes,
            Self::At(ends) => match (ends.get(row), ends.get(row + 1)) {
                (Some(&begin), Some(&end)) => begin..end,
                _ => 0..0,
            },
        };
        raw.get(range).unwrap_or_default()
    }
}

impl Infer {
    /// Reads a message; none when anything of it is odd.
    pub fn read(message: Bytes, source: &Source<'_>) -> Option<Box<dyn Rows>> {
        let infer = Self::checked(message, source)?;
        Some(Box::new(infer))
    }

    fn checked(message: Bytes, source: &Source<'_>) -> Option<Self> {
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
        let cuts = request
            .inputs
            .iter()
            .map(|input| Cut::of(&input.tensor, rows));
        let cuts = cuts.collect::<Option<Vec<_>>>()?;
        request.outputs.sort_unstable();
        let keys = keys(&request, &cuts, rows, source);
        Some(Self {
            model_name,
            model_version,
            request,
            parameters,
            outputs,
            cuts,
            keys,
        })
    }
}

/// Whether all of a message's fields are known here but for the name of another
/// model, which is added at its end. What is unknown may change the answer.
fn is_renamed(bytes: &[u8], name: &str) -> bool {
    let added = renamed(&[], name);
    bytes.strip_suffix(&added[..]).is_some_and(|whole| {
        ModelInferRequest::decode(whole).is_ok_and(|message| message.encoded_len() == whole.len())
    })
}

/// What each row stands for. Inputs, outputs and parameters are named, so that
/// their order does not count; `priority` and `timeout` change no answer.
fn keys(request: &InferRequest, cuts: &[Cut], rows: usize, source: &Source<'_>) -> Vec<Key> {
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
    let mut inputs: Vec<_> = request.inputs.iter().zip(cuts).collect();
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
    let place = writer.fold();
    let row = |row: usize| {
        writer.back(place);
        for (input, cut) in &inputs {
            writer.part(cut.row(input.tensor.raw(), row));
        }
        writer.key()
    };
    (0..rows).map(row).collect()
}

impl Rows for Infer {
    fn keys(&self) -> &[Key] {
        &self.keys
    }

    fn part(&self, places: &[usize]) -> Message {
        let mut inputs = Vec::with_capacity(self.cuts.len());
        let mut raw_input_contents = Vec::with_capacity(self.cuts.len());
        for (input, cut) in self.request.inputs.iter().zip(&self.cuts) {
            let raw = input.tensor.raw();
            let rows: Vec<&[u8]> = places.iter().map(|&place| cut.row(raw, place)).collect();
            raw_input_contents.push(Bytes::from(rows.concat()));
            let mut shape = input.tensor.shape().to_wire();
            if let Some(rows) = shape.first_mut() {
                *rows = i64::try_from(places.len()).unwrap_or(i64::MAX);
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

    /// The head is the answer without its contents and its first dimension,
    /// the content each output's length and bytes.
    fn split(&self, answer: Bytes, _headers: &HeaderMap, count: usize) -> Option<Split> {
        let mut answer = ModelInferResponse::decode(answer).ok()?;
        let raw = std::mem::take(&mut answer.raw_output_contents);
        let plain = answer.parameters.is_empty()
            && answer
                .outputs
                .iter()
                .all(|output| output.parameters.is_empty() && output.contents.is_none());
        if !plain || answer.outputs.is_empty() || raw.len() != answer.outputs.len() {
            return None;
        }
        let mut outputs = Vec::with_capacity(raw.len());
        for (output, raw) in answer.outputs.iter_mut().zip(raw) {
            let datatype: Datatype = output.datatype.parse().ok()?;
            let shape = Shape::checked(&output.shape).ok()?;
            let tensor = Tensor::from_raw(datatype, shape, raw).ok()?;
            let cut = Cut::of(&tensor, count)?;
            output.shape.remove(0);
            outputs.push((tensor, cut));
        }
        answer.id.clear();
        let head = Bytes::from(answer.encode_to_vec());
        let mut rows = Vec::with_capacity(count);
        for place in 0..count {
            let mut content = BytesMut::new();
            for (tensor, cut) in &outputs {
                let row = cut.row(tensor.raw(), place);
                content.put_u32(u32::try_from(row.len()).ok()?);
                content.put_slice(row);
            }
            rows.push(Row {
                head: head.clone(),
                // A copy of its own length, which keeps nothing else alive.
                content: Bytes::copy_from_slice(&content),
            });
        }
        Some(Split {
            rows,
            took: Metadata::default(),
        })
    }

    fn join(&self, rows: &[Row], paid: &Paid, headers: &mut HeaderMap) -> Option<Bytes> {
        let head = &rows.first()?.head;
        if rows.iter().any(|row| row.head != *head) {
            return None;
        }
        let mut answer = ModelInferResponse::decode(head.clone()).ok()?;
        answer.id.clone_from(&self.request.id);
        for output in &mut answer.outputs {
            output.shape.insert(0, i64::try_from(rows.len()).ok()?);
        }
        answer.raw_output_contents = contents(rows, &answer.outputs)?;
        headers.insert(TOKENS_KEY, paid.tokens.into());
        Some(frame(&answer))
    }
}

/// The contents of each output, from the rows in order.
fn contents(rows: &[Row], outputs: &[InferOutputTensor]) -> Option<Vec<Bytes>> {
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
