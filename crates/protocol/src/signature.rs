//! The inputs and outputs of a model: the one check of a request against them, and
//! the messages that describe them.

use std::collections::HashMap;
use std::sync::LazyLock;

use tensor::{Datatype, Shape, TensorError, TensorSpec};

use crate::hints;
use crate::inference::{
    DataType, ModelConfig, ModelInferRequest, ModelInput, ModelMetadataResponse, ModelOutput,
    ModelParameter, ModelVersionPolicy,
    model_metadata_response::TensorMetadata,
    model_version_policy::{PolicyChoice, Specific},
};
use crate::{Error, FieldPath, InferRequest, Input};

/// The input of token ids, which a model of texts takes in place of the texts:
/// the ids of all lists, one list after the other.
pub const IDS_INPUT: &str = "input_ids";
/// The input with the number of ids of each list. It counts the rows.
pub const LENGTHS_INPUT: &str = "input_lengths";

/// Inputs, outputs and parameters that a request may have above what the model
/// has: a mistake is told by the field that is wrong, and nothing is done for a
/// flood.
const EXCESS_MAX: usize = 16;
/// Parameters of the protocol and of any model together.
const PARAMETERS_MAX: usize = 16;

static ID_INPUTS: LazyLock<[TensorSpec; 2]> = LazyLock::new(|| {
    [LENGTHS_INPUT, IDS_INPUT].map(|name| TensorSpec::new(name, Datatype::Int64, &[-1]))
});

/// Whether a model offers the input beside its own ones, so that a request need
/// not have it.
pub fn is_optional_input(name: &str) -> bool {
    [LENGTHS_INPUT, IDS_INPUT].contains(&name)
}

/// The inputs and outputs of a model and the rows that one request may have.
#[derive(Debug, Clone, Copy)]
pub struct Signature<'m> {
    /// The inputs; each is required.
    pub inputs: &'m [TensorSpec],
    /// Whether lists of token ids may come in place of the inputs:
    /// [`IDS_INPUT`] and [`LENGTHS_INPUT`].
    pub takes_ids: bool,
    /// The outputs.
    pub outputs: &'m [TensorSpec],
    /// The most rows of one request.
    pub rows_max: usize,
}

impl Signature<'_> {
    /// Checks how many inputs, outputs, parameters and dimensions a message has,
    /// before anything is made of it.
    pub fn check_counts(&self, message: &ModelInferRequest) -> Result<(), Error> {
        let inputs = self.inputs.len().max(ID_INPUTS.len());
        for (field, count, most) in [
            ("inputs", message.inputs.len(), inputs),
            (
                "raw_input_contents",
                message.raw_input_contents.len(),
                inputs,
            ),
            ("outputs", message.outputs.len(), self.outputs.len()),
            ("parameters", message.parameters.len(), PARAMETERS_MAX),
        ] {
            if count > most + EXCESS_MAX {
                let reason = format!("has {count} entries, but the model takes {most}");
                return Err(Error::invalid(field, reason));
            }
        }
        for (index, input) in message.inputs.iter().enumerate() {
            let rank = input.shape.len();
            if rank > Shape::RANK_MAX {
                let reason = format!(
                    "has {rank} dimensions, over the limit of {}",
                    Shape::RANK_MAX
                );
                return Err(Error::invalid(
                    FieldPath::input(index).field("shape"),
                    reason,
                ));
            }
        }
        Ok(())
    }

    /// The inputs that a request has to have: its own choice of two.
    fn expected(&self, request: &InferRequest) -> &[TensorSpec] {
        let has_ids = |input: &Input| is_optional_input(&input.name);
        if self.takes_ids && request.inputs.iter().any(has_ids) {
            &*ID_INPUTS
        } else {
            self.inputs
        }
    }

    /// Checks the requested outputs, and the names, datatypes and shapes of the
    /// inputs. Returns the rows of the request: the leading dimension, which
    /// all inputs share and which is at least 1.
    pub fn check(&self, request: &InferRequest) -> Result<usize, Error> {
        for (index, name) in request.outputs.iter().enumerate() {
            let Some(spec) = self.outputs.iter().find(|spec| spec.name == *name) else {
                return Err(Error::invalid(
                    FieldPath::output(index).field("name"),
                    format!("must be one of: {}", names(self.outputs)),
                ));
            };
            if request.text_outputs.contains(name) {
                hints::check_text_output(index, spec.datatype)?;
            }
        }
        let inputs = self.expected(request);
        for spec in inputs {
            if !request.inputs.iter().any(|input| input.name == spec.name) {
                let reason = format!("must have an input '{}'", spec.name);
                return Err(Error::invalid("inputs", reason));
            }
        }
        let mut rows = None;
        for (index, input) in request.inputs.iter().enumerate() {
            let Some(count) = self.check_input(inputs, index, input)? else {
                continue;
            };
            let expected = *rows.get_or_insert(count);
            if count != expected {
                let reason = format!("has {count} rows, but an earlier input has {expected}");
                let field = FieldPath::input(index).field("shape");
                return Err(Error::invalid_input(&input.name, field, reason));
            }
        }
        rows.ok_or_else(|| Error::invalid("inputs", "must not be empty"))
    }

    /// The rows of one input, which agrees with the model; none of
    /// [`IDS_INPUT`], whose elements belong to rows by the lengths.
    fn check_input(
        &self,
        inputs: &[TensorSpec],
        index: usize,
        input: &Input,
    ) -> Result<Option<usize>, Error> {
        let Some(spec) = inputs.iter().find(|spec| spec.name == input.name) else {
            return Err(Error::invalid(
                FieldPath::input(index).field("name"),
                format!("must be one of: {}", names(inputs)),
            ));
        };
        let invalid = |part: &str, reason: String| {
            let field = FieldPath::input(index).field(part);
            Err(Error::invalid_input(&spec.name, field, reason))
        };
        let (datatype, shape) = (input.tensor.datatype(), input.tensor.shape());
        if datatype != spec.datatype {
            let reason = format!("is {datatype}, but must be {}", spec.datatype);
            return invalid("datatype", reason);
        }
        if !spec.fits(shape.sizes()) {
            return invalid("shape", format!("is {shape}, but must be {:?}", spec.shape));
        }
        if std::ptr::eq(inputs, &*ID_INPUTS) && spec.name == IDS_INPUT {
            return Ok(None);
        }
        let rows = shape.sizes().first().copied().unwrap_or_default();
        if rows == 0 {
            return invalid("shape", "has no rows".to_owned());
        }
        let rows_max = self.rows_max;
        if rows > rows_max {
            let reason = format!("has {rows} rows, over the limit of {rows_max} for a request");
            return invalid("shape", reason);
        }
        Ok(Some(rows))
    }

    /// The inputs that a request may have in place of the others.
    fn optional_inputs(&self) -> &[TensorSpec] {
        if self.takes_ids { &*ID_INPUTS } else { &[] }
    }

    /// The model's metadata; `platform` names what runs it.
    pub fn to_metadata(
        &self,
        name: &str,
        versions: Vec<String>,
        platform: String,
    ) -> ModelMetadataResponse {
        let tensor = |spec: &TensorSpec| TensorMetadata {
            name: spec.name.clone(),
            datatype: spec.datatype.name().to_owned(),
            shape: spec.shape.clone(),
        };
        ModelMetadataResponse {
            name: name.to_owned(),
            versions,
            platform,
            inputs: self
                .inputs
                .iter()
                .chain(self.optional_inputs())
                .map(tensor)
                .collect(),
            outputs: self.outputs.iter().map(tensor).collect(),
        }
    }

    /// The part of Triton's configuration that every model has; `parameters`
    /// are what has no field of its own there.
    pub fn to_config(
        &self,
        name: &str,
        version: u64,
        platform: String,
        parameters: impl IntoIterator<Item = (&'static str, String)>,
    ) -> ModelConfig {
        let versions = vec![i64::try_from(version).unwrap_or(i64::MAX)];
        let input = |spec: &TensorSpec, optional| ModelInput {
            name: spec.name.clone(),
            data_type: data_type(spec.datatype).into(),
            dims: dims(spec),
            optional,
        };
        // With the other choice none of the inputs is required by itself.
        let own = self.inputs.iter().map(|spec| input(spec, self.takes_ids));
        let others = self.optional_inputs().iter().map(|spec| input(spec, true));
        let output = |spec: &TensorSpec| ModelOutput {
            name: spec.name.clone(),
            data_type: data_type(spec.datatype).into(),
            dims: dims(spec),
        };
        let parameters: HashMap<_, _> = parameters
            .into_iter()
            .map(|(name, string_value)| (name.to_owned(), ModelParameter { string_value }))
            .collect();
        ModelConfig {
            name: name.to_owned(),
            platform,
            backend: "andon".to_owned(),
            version_policy: Some(ModelVersionPolicy {
                policy_choice: Some(PolicyChoice::Specific(Specific { versions })),
            }),
            max_batch_size: i32::try_from(self.rows_max).unwrap_or(i32::MAX),
            input: own.chain(others).collect(),
            output: self.outputs.iter().map(output).collect(),
            parameters,
            ..Default::default()
        }
    }
}

impl InferRequest {
    /// The path of an input's contents, by the input's name.
    pub fn contents_field(&self, name: &str) -> FieldPath {
        let position = self.inputs.iter().position(|input| input.name == name);
        FieldPath::input(position.unwrap_or_default()).field("contents")
    }

    /// Lists of token ids, each of at least one id and at most `ids_max`; none
    /// for a request of texts. The request agrees with the model's signature.
    pub fn id_lists(&self, ids_max: usize) -> Result<Option<Vec<Vec<u32>>>, Error> {
        let values = |name: &str| {
            let input = self.inputs.iter().find(|input| input.name == name)?;
            let failed = |error: TensorError| {
                Error::invalid_input(name, self.contents_field(name), error.to_string())
            };
            Some(input.tensor.to_i64().map_err(failed))
        };
        let (Some(lengths), Some(ids)) = (values(LENGTHS_INPUT), values(IDS_INPUT)) else {
            return Ok(None);
        };
        let (lengths, ids) = (lengths?, ids?);
        let mut rest = ids.as_slice();
        let mut lists = Vec::with_capacity(lengths.len());
        for (row, length) in lengths.into_iter().enumerate() {
            let list = usize::try_from(length)
                .ok()
                .filter(|length| (1..=ids_max).contains(length))
                .ok_or_else(|| format!("is {length}, but must be from 1 to {ids_max}"))
                .and_then(|length| {
                    let parts = rest.split_at_checked(length);
                    parts.ok_or_else(|| format!("'{IDS_INPUT}' has no {length} further ids"))
                });
            let (list, after) = list.map_err(|reason| {
                let field = self.contents_field(LENGTHS_INPUT).index(row);
                Error::invalid_input(LENGTHS_INPUT, field, reason)
            })?;
            let first = ids.len() - rest.len();
            lists.push(self.checked_ids(list, first)?);
            rest = after;
        }
        if !rest.is_empty() {
            let reason = format!("has {} ids more than the lengths say", rest.len());
            let field = self.contents_field(IDS_INPUT);
            return Err(Error::invalid_input(IDS_INPUT, field, reason));
        }
        Ok(Some(lists))
    }

    /// One list of ids, which begins at element `first` of [`IDS_INPUT`].
    fn checked_ids(&self, list: &[i64], first: usize) -> Result<Vec<u32>, Error> {
        let ids = list
            .iter()
            .enumerate()
            .map(|(index, id)| u32::try_from(*id).map_err(|_| self.unknown_id(first + index, id)));
        ids.collect()
    }

    /// The error of a token id that the model does not have, by its index among
    /// the ids of all lists.
    pub fn unknown_id(&self, index: usize, id: impl std::fmt::Display) -> Error {
        let field = self.contents_field(IDS_INPUT).index(index);
        let reason = format!("is {id}, which is not in the model's vocabulary");
        Error::invalid_input(IDS_INPUT, field, reason)
    }

    /// The texts of an input of BYTES, each of at most `bytes_max` bytes.
    pub fn texts(&self, name: &str, bytes_max: usize) -> Result<Vec<String>, Error> {
        let Some(input) = self.inputs.iter().find(|input| input.name == name) else {
            let reason = format!("must have an input '{name}'");
            return Err(Error::invalid("inputs", reason));
        };
        let elements = input.tensor.to_elements().map_err(|error| {
            Error::invalid_input(name, self.contents_field(name), error.to_string())
        })?;
        let texts = elements.into_iter().enumerate().map(|(index, bytes)| {
            checked_text(bytes, bytes_max).map_err(|reason| {
                Error::invalid_input(name, self.contents_field(name).index(index), reason)
            })
        });
        texts.collect()
    }
}

/// One text, or the reason why it is invalid. Tokenizers truncate after
/// tokenizing: the limit comes first.
fn checked_text(bytes: &[u8], bytes_max: usize) -> Result<String, String> {
    check_text_bytes(bytes.len(), bytes_max)?;
    std::str::from_utf8(bytes)
        .map(str::to_owned)
        .map_err(|_| "is not UTF-8".to_owned())
}

/// The check of a text's length; the error is a predicate of the text.
pub fn check_text_bytes(bytes: usize, bytes_max: usize) -> Result<(), String> {
    if bytes > bytes_max {
        return Err(format!("has {bytes} bytes, over the limit of {bytes_max}"));
    }
    Ok(())
}

fn names(specs: &[TensorSpec]) -> String {
    let names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    names.join(", ")
}

/// A shape as Triton's configuration has it: without the batch dimension, which
/// stands before it in the metadata.
fn dims(spec: &TensorSpec) -> Vec<i64> {
    spec.shape.get(1..).unwrap_or_default().to_vec()
}

/// A datatype in Triton's configuration.
fn data_type(datatype: Datatype) -> DataType {
    match datatype {
        Datatype::Bool => DataType::TypeBool,
        Datatype::Uint8 => DataType::TypeUint8,
        Datatype::Uint16 => DataType::TypeUint16,
        Datatype::Uint32 => DataType::TypeUint32,
        Datatype::Uint64 => DataType::TypeUint64,
        Datatype::Int8 => DataType::TypeInt8,
        Datatype::Int16 => DataType::TypeInt16,
        Datatype::Int32 => DataType::TypeInt32,
        Datatype::Int64 => DataType::TypeInt64,
        Datatype::Fp16 => DataType::TypeFp16,
        Datatype::Bf16 => DataType::TypeBf16,
        Datatype::Fp32 => DataType::TypeFp32,
        Datatype::Fp64 => DataType::TypeFp64,
        Datatype::Bytes => DataType::TypeString,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::{ModelInferRequest, model_infer_request::InferInputTensor};

    /// A request of raw inputs: name, datatype, shape and bytes of each.
    fn request(inputs: &[(&str, &str, &[i64], Vec<u8>)]) -> InferRequest {
        let message = ModelInferRequest {
            model_name: "m".into(),
            inputs: inputs
                .iter()
                .map(|(name, datatype, shape, _)| InferInputTensor {
                    name: (*name).into(),
                    datatype: (*datatype).into(),
                    shape: shape.to_vec(),
                    ..Default::default()
                })
                .collect(),
            raw_input_contents: inputs.iter().map(|input| input.3.clone().into()).collect(),
            ..Default::default()
        };
        InferRequest::checked(message).unwrap()
    }

    fn texts(texts: &[&str]) -> Vec<u8> {
        tensor::encode_bytes_elements(texts).unwrap()
    }

    #[test]
    fn a_request_agrees_with_the_model() {
        let inputs = [TensorSpec::new("pixels", Datatype::Fp32, &[-1, 2])];
        let outputs = [TensorSpec::new("scores", Datatype::Fp32, &[-1, 10])];
        let signature = Signature {
            inputs: &inputs,
            takes_ids: false,
            outputs: &outputs,
            rows_max: 4,
        };
        let good = request(&[("pixels", "FP32", &[3, 2], vec![0; 24])]);
        assert_eq!(signature.check(&good), Ok(3));
        let mut texts = good.clone();
        texts.outputs = vec!["scores".into()];
        texts.text_outputs = vec!["scores".into()];
        let error = signature.check(&texts).unwrap_err();
        assert_eq!(
            error.field().unwrap(),
            "outputs[0].parameters[content_type]"
        );
        for (inputs, field, message) in [
            (
                ("pixels", "FP32", &[6][..], vec![0; 24]),
                "inputs[0].shape",
                "inputs[0] 'pixels': shape is [6], but must be [-1, 2]",
            ),
            (
                ("pixels", "FP32", &[2, 3], vec![0; 24]),
                "inputs[0].shape",
                "inputs[0] 'pixels': shape is [2, 3], but must be [-1, 2]",
            ),
            (
                ("pixels", "INT32", &[3, 2], vec![0; 24]),
                "inputs[0].datatype",
                "inputs[0] 'pixels': datatype is INT32, but must be FP32",
            ),
            (
                ("pixels", "FP32", &[0, 2], vec![]),
                "inputs[0].shape",
                "inputs[0] 'pixels': shape has no rows",
            ),
            (
                ("pixels", "FP32", &[5, 2], vec![0; 40]),
                "inputs[0].shape",
                "inputs[0] 'pixels': shape has 5 rows, over the limit of 4 for a request",
            ),
            (
                ("image", "FP32", &[3, 2], vec![0; 24]),
                "inputs",
                "inputs: must have an input 'pixels'",
            ),
        ] {
            let error = signature.check(&request(&[inputs])).unwrap_err();
            assert_eq!(error.field().unwrap(), field);
            assert_eq!(error.to_string(), message);
        }
        let extra = request(&[
            ("pixels", "FP32", &[1, 2], vec![0; 8]),
            ("more", "FP32", &[1, 2], vec![0; 8]),
        ]);
        let error = signature.check(&extra).unwrap_err();
        assert_eq!(error.to_string(), "inputs[1].name: must be one of: pixels");
        let mut outputs = good;
        outputs.outputs = vec!["scores".into(), "label".into()];
        let error = signature.check(&outputs).unwrap_err();
        assert_eq!(error.to_string(), "outputs[1].name: must be one of: scores");
    }

    #[test]
    fn all_inputs_have_as_many_rows() {
        let text = |name| TensorSpec::new(name, Datatype::Bytes, &[-1]);
        let inputs = [text("query"), text("text")];
        let signature = Signature {
            inputs: &inputs,
            takes_ids: false,
            outputs: &[],
            rows_max: 8,
        };
        let pairs = request(&[
            ("text", "BYTES", &[2], texts(&["a", "b"])),
            ("query", "BYTES", &[1], texts(&["q"])),
        ]);
        let error = signature.check(&pairs).unwrap_err();
        assert_eq!(
            error.to_string(),
            "inputs[1] 'query': shape has 1 rows, but an earlier input has 2"
        );
        let none = Signature {
            inputs: &[],
            ..signature
        };
        let error = none.check(&request(&[])).unwrap_err();
        assert_eq!(error.to_string(), "inputs: must not be empty");
    }

    #[test]
    fn texts_are_utf8_and_within_the_limit() {
        let good = request(&[("text", "BYTES", &[2], texts(&["a", "bc"]))]);
        assert_eq!(good.texts("text", 2).unwrap(), ["a", "bc"]);
        let error = good.texts("text", 1).unwrap_err();
        assert_eq!(
            error.to_string(),
            "inputs[0] 'text': contents[1] has 2 bytes, over the limit of 1"
        );
        assert_eq!(error.element(), Some(1));
        let raw = tensor::encode_bytes_elements(&[&b"a"[..], b"\xff"]).unwrap();
        let error = request(&[("text", "BYTES", &[2], raw)]).texts("text", 9);
        let error = error.unwrap_err();
        assert_eq!(
            error.to_string(),
            "inputs[0] 'text': contents[1] is not UTF-8"
        );
        assert!(good.texts("query", 9).is_err());
    }

    fn longs(values: &[i64]) -> Vec<u8> {
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    }

    #[test]
    fn lists_of_ids_come_in_place_of_texts() {
        let inputs = [TensorSpec::new("text", Datatype::Bytes, &[-1])];
        let signature = Signature {
            inputs: &inputs,
            takes_ids: true,
            outputs: &[],
            rows_max: 3,
        };
        let lists = |lengths: &[i64], ids: &[i64]| {
            request(&[
                (
                    "input_lengths",
                    "INT64",
                    &[lengths.len() as i64],
                    longs(lengths),
                ),
                ("input_ids", "INT64", &[ids.len() as i64], longs(ids)),
            ])
        };
        let good = lists(&[2, 1], &[7, 8, 9]);
        assert_eq!(signature.check(&good), Ok(2));
        assert_eq!(good.id_lists(2), Ok(Some(vec![vec![7, 8], vec![9]])));
        for (lengths, ids, field) in [
            (&[2, 2][..], &[7, 8, 9][..], "inputs[0].contents[1]"),
            (&[2, 0], &[7, 8], "inputs[0].contents[1]"),
            (&[3], &[7, 8, 9], "inputs[0].contents[0]"),
            (&[-1], &[7], "inputs[0].contents[0]"),
            (&[i64::MAX, 1], &[7], "inputs[0].contents[0]"),
            (&[1], &[7, 8], "inputs[1].contents"),
            (&[1, 2], &[7, 8, -1], "inputs[1].contents[2]"),
            (&[1], &[1 << 32], "inputs[1].contents[0]"),
        ] {
            let error = lists(lengths, ids).id_lists(2).unwrap_err();
            assert_eq!(error.field().unwrap(), field, "{error}");
        }
        let error = signature.check(&lists(&[1; 4], &[1; 4])).unwrap_err();
        assert_eq!(error.field().unwrap(), "inputs[0].shape");
        let both = request(&[
            ("input_lengths", "INT64", &[1], longs(&[1])),
            ("input_ids", "INT64", &[1], longs(&[1])),
            ("text", "BYTES", &[1], texts(&["a"])),
        ]);
        let error = signature.check(&both).unwrap_err();
        assert_eq!(error.field().unwrap(), "inputs[2].name");
        let alone = request(&[("input_ids", "INT64", &[1], longs(&[1]))]);
        let error = signature.check(&alone).unwrap_err();
        assert_eq!(
            error.to_string(),
            "inputs: must have an input 'input_lengths'"
        );
        let column = request(&[("text", "BYTES", &[2, 1], texts(&["a", "b"]))]);
        assert_eq!(signature.check(&column), Ok(2));
        let texts = request(&[("text", "BYTES", &[1], texts(&["a"]))]);
        assert_eq!(
            (signature.check(&texts), texts.id_lists(2)),
            (Ok(1), Ok(None))
        );
        let none = Signature {
            takes_ids: false,
            ..signature
        };
        let error = none.check(&good).unwrap_err();
        assert_eq!(error.to_string(), "inputs: must have an input 'text'");
    }

    #[test]
    fn ids_are_told_as_optional_inputs() {
        let inputs = [TensorSpec::new("text", Datatype::Bytes, &[-1])];
        let signature = Signature {
            inputs: &inputs,
            takes_ids: true,
            outputs: &[],
            rows_max: 3,
        };
        let metadata = signature.to_metadata("m", Vec::new(), String::new());
        let names: Vec<_> = metadata
            .inputs
            .iter()
            .map(|input| input.name.as_str())
            .collect();
        assert_eq!(names, ["text", "input_lengths", "input_ids"]);
        assert!(
            metadata.inputs[1..]
                .iter()
                .all(|input| is_optional_input(&input.name))
        );
        let config = signature.to_config("m", 1, String::new(), []);
        assert!(config.input.iter().all(|input| input.optional));
    }

    #[test]
    fn counts_are_bounded_by_the_model_before_anything_is_made() {
        let inputs = [TensorSpec::new("text", Datatype::Bytes, &[-1])];
        let signature = Signature {
            inputs: &inputs,
            takes_ids: true,
            outputs: &inputs,
            rows_max: 3,
        };
        let most = ModelInferRequest {
            inputs: vec![InferInputTensor::default(); 18],
            outputs: vec![Default::default(); 17],
            ..Default::default()
        };
        assert_eq!(signature.check_counts(&most), Ok(()));
        let changed = |change: &dyn Fn(&mut ModelInferRequest)| {
            let mut message = most.clone();
            change(&mut message);
            let error = signature.check_counts(&message).unwrap_err();
            error.field().unwrap().to_string()
        };
        let parameters = || (0..33).map(|number| (number.to_string(), Default::default()));
        assert_eq!(changed(&|m| m.inputs.push(Default::default())), "inputs");
        assert_eq!(changed(&|m| m.outputs.push(Default::default())), "outputs");
        assert_eq!(
            changed(&|m| m.parameters.extend(parameters())),
            "parameters"
        );
        let raw = |m: &mut ModelInferRequest| m.raw_input_contents = vec![Default::default(); 19];
        assert_eq!(changed(&raw), "raw_input_contents");
        let shape = |m: &mut ModelInferRequest| m.inputs[3].shape = vec![1; 17];
        assert_eq!(changed(&shape), "inputs[3].shape");
    }

    #[test]
    fn the_messages_of_a_model_agree() {
        let inputs = [TensorSpec::new("text", Datatype::Bytes, &[-1])];
        let outputs = [TensorSpec::new("embedding", Datatype::Fp32, &[-1, 384])];
        let signature = Signature {
            inputs: &inputs,
            takes_ids: false,
            outputs: &outputs,
            rows_max: 32,
        };
        let metadata = signature.to_metadata("m", vec!["1".into()], "andon_bert".into());
        assert_eq!(metadata.outputs[0].shape, [-1, 384]);
        let config = signature.to_config("m", 1, "andon_bert".into(), [("task", "x".into())]);
        assert_eq!(config.max_batch_size, 32);
        for (tensor, dims) in [
            (&metadata.inputs[0], config.input[0].dims.as_slice()),
            (&metadata.outputs[0], config.output[0].dims.as_slice()),
        ] {
            assert_eq!(tensor.shape, [&[-1][..], dims].concat());
        }
        assert_eq!(config.parameters["task"].string_value, "x");
    }
}
