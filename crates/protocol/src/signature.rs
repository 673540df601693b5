//! The inputs and outputs of a model: the one check of a request against them, and
//! the messages that describe them.

use std::collections::HashMap;

use tensor::{Datatype, TensorSpec};

use crate::inference::{
    DataType, ModelConfig, ModelInput, ModelMetadataResponse, ModelOutput, ModelParameter,
    ModelVersionPolicy,
    model_metadata_response::TensorMetadata,
    model_version_policy::{PolicyChoice, Specific},
};
use crate::{Error, FieldPath, InferRequest, Input};

/// The inputs and outputs of a model and the rows that one request may have.
#[derive(Debug, Clone, Copy)]
pub struct Signature<'m> {
    /// The inputs; each is required.
    pub inputs: &'m [TensorSpec],
    /// The outputs.
    pub outputs: &'m [TensorSpec],
    /// The most rows of one request.
    pub rows_max: usize,
}

impl Signature<'_> {
    /// Checks the requested outputs, and the names, datatypes and shapes of the
    /// inputs. Returns the rows of the request: the leading dimension, which
    /// all inputs share and which is at least 1.
    pub fn check(&self, request: &InferRequest) -> Result<usize, Error> {
        for (index, name) in request.outputs.iter().enumerate() {
            if !self.outputs.iter().any(|spec| spec.name == *name) {
                return Err(Error::invalid(
                    FieldPath::output(index).field("name"),
                    format!("must be one of: {}", names(self.outputs)),
                ));
            }
        }
        for spec in self.inputs {
            if !request.inputs.iter().any(|input| input.name == spec.name) {
                let reason = format!("must have an input '{}'", spec.name);
                return Err(Error::invalid("inputs", reason));
            }
        }
        let mut rows = None;
        for (index, input) in request.inputs.iter().enumerate() {
            let count = self.check_input(index, input)?;
            let expected = *rows.get_or_insert(count);
            if count != expected {
                let reason = format!("has {count} rows, but an earlier input has {expected}");
                let field = FieldPath::input(index).field("shape");
                return Err(Error::invalid_input(&input.name, field, reason));
            }
        }
        rows.ok_or_else(|| Error::invalid("inputs", "must not be empty"))
    }

    /// The rows of one input, which agrees with the model.
    fn check_input(&self, index: usize, input: &Input) -> Result<usize, Error> {
        let Some(spec) = self.inputs.iter().find(|spec| spec.name == input.name) else {
            return Err(Error::invalid(
                FieldPath::input(index).field("name"),
                format!("must be one of: {}", names(self.inputs)),
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
        let rows = shape.sizes().first().copied().unwrap_or_default();
        if rows == 0 {
            return invalid("shape", "has no rows".to_owned());
        }
        let rows_max = self.rows_max;
        if rows > rows_max {
            let reason = format!("has {rows} rows, over the limit of {rows_max} for a request");
            return invalid("shape", reason);
        }
        Ok(rows)
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
            inputs: self.inputs.iter().map(tensor).collect(),
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
        let input = |spec: &TensorSpec| ModelInput {
            name: spec.name.clone(),
            data_type: data_type(spec.datatype).into(),
            dims: dims(spec),
            optional: false,
        };
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
            input: self.inputs.iter().map(input).collect(),
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

/// A shape as Triton's configuration has it: without the batch dimension.
fn dims(spec: &TensorSpec) -> Vec<i64> {
    match spec.shape.get(1..) {
        Some([]) | None => vec![1],
        Some(dims) => dims.to_vec(),
    }
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
            outputs: &outputs,
            rows_max: 4,
        };
        let good = request(&[("pixels", "FP32", &[3, 2], vec![0; 24])]);
        assert_eq!(signature.check(&good), Ok(3));
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

    #[test]
    fn the_messages_of_a_model_agree() {
        let inputs = [TensorSpec::new("text", Datatype::Bytes, &[-1])];
        let outputs = [TensorSpec::new("embedding", Datatype::Fp32, &[-1, 384])];
        let signature = Signature {
            inputs: &inputs,
            outputs: &outputs,
            rows_max: 32,
        };
        let metadata = signature.to_metadata("m", vec!["1".into()], "andon_bert".into());
        assert_eq!(metadata.outputs[0].shape, [-1, 384]);
        let config = signature.to_config("m", 1, "andon_bert".into(), [("task", "x".into())]);
        assert_eq!(config.max_batch_size, 32);
        assert_eq!(
            (
                config.input[0].dims.as_slice(),
                config.output[0].dims.as_slice()
            ),
            (&[1][..], &[384][..])
        );
        assert_eq!(config.parameters["task"].string_value, "x");
    }
}
