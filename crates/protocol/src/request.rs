//! Inference requests, checked once as far as the protocol alone can tell. What
//! a model needs beyond that is checked by who serves the model.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use tensor::{Datatype, Shape, Tensor, TensorError, TypedContents, encode_typed};

use crate::inference::{
    DataType, InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse,
    RepositoryModelLoadRequest, RepositoryModelUnloadRequest, infer_parameter::ParameterChoice,
    model_infer_request::InferInputTensor, model_infer_response::InferOutputTensor,
};
use crate::{Error, ModelName, ModelVersion};

/// The value of a parameter.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the names say everything")]
pub enum Value {
    Bool(bool),
    Integer(i64),
    Text(String),
    Number(f64),
}

/// A model's own parameters by name.
pub type Parameters = BTreeMap<String, Value>;

/// A named tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Input {
    /// The input's name.
    pub name: String,
    /// Its contents.
    pub tensor: Tensor,
}

/// An inference request whose names, parameters and tensors agree with
/// themselves.
#[derive(Debug, Clone, PartialEq)]
pub struct InferRequest {
    /// The model.
    pub model: ModelName,
    /// The version; none for the newest that is ready.
    pub version: Option<ModelVersion>,
    /// The caller's id for the request.
    pub id: String,
    /// 1 is served first; 0, the default, after every other.
    pub priority: u64,
    /// How long the caller lets the request wait, besides its deadline.
    pub timeout: Option<Duration>,
    /// The model's own parameters.
    pub parameters: Parameters,
    /// The input tensors in the order of the request.
    pub inputs: Vec<Input>,
    /// The wanted outputs by name; none means all.
    pub outputs: Vec<String>,
}

impl InferRequest {
    /// Checks a message as it came.
    pub fn checked(message: ModelInferRequest) -> Result<Self, Error> {
        let model = ModelName::checked(&message.model_name, "model_name")?;
        let version = ModelVersion::optional(&message.model_version, "model_version")?;
        let mut request = Self {
            model,
            version,
            id: message.id,
            priority: 0,
            timeout: None,
            parameters: Parameters::new(),
            inputs: Vec::with_capacity(message.inputs.len()),
            outputs: Vec::with_capacity(message.outputs.len()),
        };
        for (key, value) in message.parameters {
            request.take_parameter(key, value)?;
        }
        request.take_inputs(message.inputs, message.raw_input_contents)?;
        for (index, output) in message.outputs.into_iter().enumerate() {
            for key in output.parameters.keys() {
                if key != "binary_data" {
                    return Err(Error::invalid(
                        format!("outputs[{index}].parameters[{key}]"),
                        "unknown parameter",
                    ));
                }
            }
            if request.outputs.contains(&output.name) {
                return Err(Error::invalid(
                    format!("outputs[{index}].name"),
                    "the output is asked for twice",
                ));
            }
            request.outputs.push(output.name);
        }
        Ok(request)
    }

    /// Sorts a parameter into the protocol's own and the model's.
    fn take_parameter(&mut self, key: String, value: InferParameter) -> Result<(), Error> {
        let field = format!("parameters[{key}]");
        let value = checked_value(value, &field)?;
        match (key.as_str(), &value) {
            ("priority", Value::Integer(priority)) => {
                self.priority = u64::try_from(*priority)
                    .map_err(|_| Error::invalid(field, "a priority cannot be negative"))?;
            }
            ("timeout", Value::Integer(timeout_us)) => {
                let timeout_us = u64::try_from(*timeout_us)
                    .map_err(|_| Error::invalid(field, "a timeout cannot be negative"))?;
                // Zero is the protocol's way to say none.
                self.timeout = (timeout_us > 0).then(|| Duration::from_micros(timeout_us));
            }
            // No model here keeps state between requests, so a sequence's
            // requests are answered like any others.
            ("sequence_id", Value::Integer(_) | Value::Text(_))
            | ("sequence_start" | "sequence_end", Value::Bool(_))
            | ("triton_enable_empty_final_response" | "binary_data_output", Value::Bool(_)) => {}
            ("priority" | "timeout", _) => {
                return Err(Error::invalid(field, "must be an integer"));
            }
            ("sequence_id", _) => {
                return Err(Error::invalid(field, "must be an integer or a text"));
            }
            (
                "sequence_start"
                | "sequence_end"
                | "triton_enable_empty_final_response"
                | "binary_data_output",
                _,
            ) => return Err(Error::invalid(field, "must be a boolean")),
            (reserved, _) if reserved.starts_with("triton_") || reserved == "headers" => {
                return Err(Error::invalid(field, "the name is reserved"));
            }
            _ => {
                self.parameters.insert(key, value);
            }
        }
        Ok(())
    }

    fn take_inputs(
        &mut self,
        inputs: Vec<InferInputTensor>,
        raw_contents: Vec<Bytes>,
    ) -> Result<(), Error> {
        let raw = !raw_contents.is_empty();
        let typed = inputs.iter().position(|input| input.contents.is_some());
        if let (true, Some(index)) = (raw, typed) {
            return Err(Error::invalid(
                format!("inputs[{index}].contents"),
                "typed contents and raw_input_contents cannot stand in one request",
            ));
        }
        if raw && raw_contents.len() != inputs.len() {
            return Err(Error::invalid(
                "raw_input_contents",
                format!(
                    "{} entries for {} inputs: each input needs one",
                    raw_contents.len(),
                    inputs.len()
                ),
            ));
        }
        let mut raw_contents = raw_contents.into_iter();
        for (index, input) in inputs.into_iter().enumerate() {
            if self.inputs.iter().any(|other| other.name == input.name) {
                return Err(Error::invalid(
                    format!("inputs[{index}].name"),
                    "the input is given twice",
                ));
            }
            let (name, tensor) = checked_input(index, input, raw_contents.next())?;
            self.inputs.push(Input { name, tensor });
        }
        Ok(())
    }
}

fn checked_value(value: InferParameter, field: &str) -> Result<Value, Error> {
    Ok(match value.parameter_choice {
        Some(ParameterChoice::BoolParam(value)) => Value::Bool(value),
        Some(ParameterChoice::Int64Param(value)) => Value::Integer(value),
        Some(ParameterChoice::StringParam(value)) => Value::Text(value),
        Some(ParameterChoice::DoubleParam(value)) => Value::Number(value),
        Some(ParameterChoice::Uint64Param(value)) => Value::Integer(
            i64::try_from(value).map_err(|_| Error::invalid(field, "the number is too large"))?,
        ),
        None => return Err(Error::invalid(field, "has no value")),
    })
}

/// One input's tensor, from its raw entry when there is one.
fn checked_input(
    index: usize,
    input: InferInputTensor,
    raw: Option<Bytes>,
) -> Result<(String, Tensor), Error> {
    let at = |part: &str| format!("inputs[{index}].{part}");
    if let Some(key) = input.parameters.keys().next() {
        let reason = if key.starts_with("shared_memory") {
            "shared memory is not supported: send the contents"
        } else {
            "unknown parameter"
        };
        return Err(Error::invalid(at(&format!("parameters[{key}]")), reason));
    }
    let datatype: Datatype = input
        .datatype
        .parse()
        .map_err(|error: TensorError| Error::invalid(at("datatype"), error.to_string()))?;
    let shape = Shape::checked(&input.shape)
        .map_err(|error| Error::invalid(at("shape"), error.to_string()))?;
    let tensor = match raw {
        Some(raw) => Tensor::from_raw(datatype, shape, raw).map_err(|error| {
            let field = match error {
                TensorError::ShapeOverflow => at("shape"),
                _ => format!("raw_input_contents[{index}]"),
            };
            Error::invalid(field, error.to_string())
        })?,
        None => {
            let contents = to_typed(input.contents.unwrap_or_default());
            encode_typed(datatype, &shape, &contents)
                .and_then(|raw| Tensor::from_raw(datatype, shape, raw.into()))
                .map_err(|error| Error::invalid(at("contents"), error.to_string()))?
        }
    };
    Ok((input.name, tensor))
}

fn to_typed(contents: InferTensorContents) -> TypedContents {
    TypedContents {
        bool_contents: contents.bool_contents,
        int_contents: contents.int_contents,
        int64_contents: contents.int64_contents,
        uint_contents: contents.uint_contents,
        uint64_contents: contents.uint64_contents,
        fp32_contents: contents.fp32_contents,
        fp64_contents: contents.fp64_contents,
        bytes_contents: contents.bytes_contents,
    }
}

/// The answer to a request: its outputs, raw.
pub fn to_response(
    model: &ModelName,
    version: ModelVersion,
    id: String,
    outputs: Vec<(String, Tensor)>,
) -> ModelInferResponse {
    let (outputs, raw_output_contents) = outputs
        .into_iter()
        .map(|(name, tensor)| {
            let output = InferOutputTensor {
                name,
                datatype: tensor.datatype().name().to_owned(),
                shape: tensor.shape().to_wire(),
                ..Default::default()
            };
            (output, tensor.into_raw())
        })
        .unzip();
    ModelInferResponse {
        model_name: model.to_string(),
        model_version: version.to_string(),
        id,
        parameters: Default::default(),
        outputs,
        raw_output_contents,
    }
}

/// The model that a load names, in Triton's dialect or KServe's.
pub fn load_target(request: &RepositoryModelLoadRequest) -> Result<ModelName, Error> {
    if let Some(key) = request.parameters.keys().next() {
        return Err(Error::invalid(
            format!("parameters[{key}]"),
            "a model is configured by its folder: no parameter is taken",
        ));
    }
    target(&request.repository_name, &request.model_name)
}

/// The model that an unload names, in Triton's dialect or KServe's.
pub fn unload_target(request: &RepositoryModelUnloadRequest) -> Result<ModelName, Error> {
    let unknown = request
        .parameters
        .keys()
        .find(|key| *key != "unload_dependents");
    if let Some(key) = unknown {
        return Err(Error::invalid(
            format!("parameters[{key}]"),
            "unknown parameter",
        ));
    }
    target(&request.repository_name, &request.model_name)
}

/// KServe's first field is the model's name where Triton's is the repository's.
fn target(repository_name: &str, model_name: &str) -> Result<ModelName, Error> {
    match (repository_name, model_name) {
        (kserve, "") => ModelName::checked(kserve, "model_name"),
        ("", triton) => ModelName::checked(triton, "model_name"),
        _ => Err(Error::invalid(
            "repository_name",
            "a server has one repository: leave it empty",
        )),
    }
}

/// A datatype in Triton's configuration.
pub fn data_type(datatype: Datatype) -> DataType {
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
