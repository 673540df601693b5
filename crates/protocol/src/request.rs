//! Inference requests: checked once as far as the protocol alone determines, and
//! then against what a model takes.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use bytes::Bytes;
use tensor::{Datatype, Shape, Tensor, TensorError, TypedContents, encode_typed};

use crate::hints::{self, InputHints};
use crate::inference::{
    InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse,
    ModelStreamInferResponse, infer_parameter::ParameterChoice,
    model_infer_request::InferInputTensor, model_infer_response::InferOutputTensor,
};
use crate::{Error, FieldPath, ModelName, ModelVersion};

/// The value of a parameter.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the names say everything")]
pub enum Value {
    Bool(bool),
    Integer(i64),
    Text(String),
    Number(f64),
}

impl Value {
    /// The boolean of a model's own parameter.
    pub fn boolean(&self, name: &str) -> Result<bool, Error> {
        match self {
            Self::Bool(value) => Ok(*value),
            _ => Err(Error::invalid(
                FieldPath::parameter(name),
                "must be a boolean",
            )),
        }
    }

    /// The integer of a model's own parameter.
    pub fn integer(&self, name: &str) -> Result<i64, Error> {
        match self {
            Self::Integer(value) => Ok(*value),
            _ => Err(Error::invalid(
                FieldPath::parameter(name),
                "must be an integer",
            )),
        }
    }

    /// The text of a model's own parameter.
    pub fn text(&self, name: &str) -> Result<&str, Error> {
        match self {
            Self::Text(value) => Ok(value),
            _ => Err(Error::invalid(
                FieldPath::parameter(name),
                "must be a string",
            )),
        }
    }
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
    /// How long the request may wait, besides its deadline.
    pub timeout: Option<Duration>,
    /// The model's own parameters.
    pub parameters: Parameters,
    /// The input tensors in the order of the request.
    pub inputs: Vec<Input>,
    /// The requested outputs by name; none means all.
    pub outputs: Vec<String>,
    /// Those of the requested outputs that are requested as texts.
    pub text_outputs: Vec<String>,
}

impl InferRequest {
    /// Checks a message as it came.
    pub fn checked(mut message: ModelInferRequest) -> Result<Self, Error> {
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
            text_outputs: Vec::new(),
        };
        let texts = hints::take_texts(&mut message.parameters)?;
        for (key, value) in message.parameters {
            request.take_parameter(key, value)?;
        }
        request.take_inputs(message.inputs, message.raw_input_contents)?;
        if texts {
            hints::check_texts(request.inputs.iter().map(|input| &input.tensor))?;
        }
        if let Some(index) = repeated(message.outputs.iter().map(|output| &output.name)) {
            let field = FieldPath::output(index).field("name");
            return Err(Error::invalid(field, "is requested twice"));
        }
        for (index, output) in message.outputs.into_iter().enumerate() {
            if hints::output_is_text(index, output.parameters)? {
                request.text_outputs.push(output.name.clone());
            }
            request.outputs.push(output.name);
        }
        Ok(request)
    }

    /// The error of a parameter that the model does not have.
    pub fn unknown_parameter(&self, name: &str) -> Error {
        let reason = format!("is not a parameter of model '{}'", self.model);
        Error::invalid(FieldPath::parameter(name), reason)
    }

    /// Sorts a parameter into the protocol's own and the model's.
    fn take_parameter(&mut self, key: String, value: InferParameter) -> Result<(), Error> {
        let invalid =
            |description: &str| Err(Error::invalid(FieldPath::parameter(&key), description));
        let value = match checked_value(value) {
            Ok(value) => value,
            Err(description) => return invalid(description),
        };
        match (key.as_str(), &value) {
            ("priority", Value::Integer(priority)) => {
                let Ok(priority) = u64::try_from(*priority) else {
                    return invalid("must not be negative");
                };
                self.priority = priority;
            }
            ("timeout", Value::Integer(timeout_us)) => {
                let Ok(timeout_us) = u64::try_from(*timeout_us) else {
                    return invalid("must not be negative");
                };
                // Zero means no timeout in the protocol.
                self.timeout = (timeout_us > 0).then(|| Duration::from_micros(timeout_us));
            }
            // No model here keeps state between requests, so the requests of a
            // sequence are handled like any others.
            ("sequence_id", Value::Integer(_) | Value::Text(_))
            | ("sequence_start" | "sequence_end", Value::Bool(_))
            | ("triton_enable_empty_final_response" | "binary_data_output", Value::Bool(_)) => {}
            ("priority" | "timeout", _) => {
                return invalid("must be an integer");
            }
            ("sequence_id", _) => {
                return invalid("must be an integer or a string");
            }
            (
                "sequence_start"
                | "sequence_end"
                | "triton_enable_empty_final_response"
                | "binary_data_output",
                _,
            ) => return invalid("must be a boolean"),
            (reserved, _) if reserved.starts_with("triton_") || reserved == "headers" => {
                return invalid("is a reserved name");
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
        // MLServer's client sends contents beside raw ones, and empties them.
        let has_contents = |input: &InferInputTensor| {
            let contents = input.contents.as_ref();
            contents.is_some_and(|contents| *contents != InferTensorContents::default())
        };
        let typed = inputs.iter().position(has_contents);
        if let (true, Some(index)) = (raw, typed) {
            return Err(Error::invalid(
                FieldPath::input(index).field("contents"),
                "must not be set in a request with raw_input_contents",
            ));
        }
        if raw && raw_contents.len() != inputs.len() {
            return Err(Error::invalid(
                "raw_input_contents",
                format!(
                    "has {} entries for {} inputs: each input needs one",
                    raw_contents.len(),
                    inputs.len()
                ),
            ));
        }
        if let Some(index) = repeated(inputs.iter().map(|input| &input.name)) {
            let field = FieldPath::input(index).field("name");
            return Err(Error::invalid(field, "is the name of an earlier input"));
        }
        let mut raw_contents = raw_contents.into_iter();
        for (index, input) in inputs.into_iter().enumerate() {
            let (name, tensor) = checked_input(index, input, raw_contents.next())?;
            self.inputs.push(Input { name, tensor });
        }
        Ok(())
    }
}

/// The index of the first name that an earlier one equals. In linear time: a
/// message may have very many names.
fn repeated<'n>(names: impl ExactSizeIterator<Item = &'n String>) -> Option<usize> {
    if names.len() < 2 {
        return None;
    }
    let mut seen = HashSet::with_capacity(names.len());
    names
        .enumerate()
        .find_map(|(index, name)| (!seen.insert(name)).then_some(index))
}

/// The value of a parameter, or the reason why it is invalid.
fn checked_value(value: InferParameter) -> Result<Value, &'static str> {
    Ok(match value.parameter_choice {
        Some(ParameterChoice::BoolParam(value)) => Value::Bool(value),
        Some(ParameterChoice::Int64Param(value)) => Value::Integer(value),
        Some(ParameterChoice::StringParam(value)) => Value::Text(value),
        Some(ParameterChoice::DoubleParam(value)) => Value::Number(value),
        Some(ParameterChoice::Uint64Param(value)) => {
            Value::Integer(i64::try_from(value).map_err(|_| "must fit a signed 64-bit integer")?)
        }
        None => return Err("has no value"),
    })
}

/// One input's tensor, from its raw entry when there is one.
fn checked_input(
    index: usize,
    input: InferInputTensor,
    raw: Option<Bytes>,
) -> Result<(String, Tensor), Error> {
    let at = |part: &str| FieldPath::input(index).field(part);
    let hints = InputHints::read(index, input.parameters)?;
    let datatype: Datatype = input
        .datatype
        .parse()
        .map_err(|error: TensorError| Error::invalid(at("datatype"), error.to_string()))?;
    let shape = Shape::checked(&input.shape)
        .map_err(|error| Error::invalid(at("shape"), error.to_string()))?;
    let (tensor, contents) = match raw {
        Some(raw) => (
            Tensor::from_raw(datatype, shape, raw),
            FieldPath::from("raw_input_contents").index(index),
        ),
        None => {
            let contents = to_typed(input.contents.unwrap_or_default());
            let tensor = encode_typed(datatype, &shape, &contents)
                .and_then(|raw| Tensor::from_raw(datatype, shape, raw.into()));
            (tensor, at("contents"))
        }
    };
    let tensor = tensor.map_err(|error| match error {
        TensorError::ShapeOverflow => Error::invalid(at("shape"), error.to_string()),
        TensorError::Element { element, problem } => {
            Error::invalid(at("contents").index(element), problem.to_string())
        }
        _ => Error::invalid(contents, error.to_string()),
    })?;
    Ok((input.name, hints.apply(tensor)?))
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

/// The response to a request: its outputs, raw.
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

/// The response of a stream to a request that failed: the stream stays open,
/// and the id says which request it was.
pub fn stream_failure(id: String, message: &str) -> ModelStreamInferResponse {
    ModelStreamInferResponse {
        error_message: message.to_owned(),
        infer_response: Some(ModelInferResponse {
            id,
            ..Default::default()
        }),
    }
}

/// The check of a parameter or field `dimensions`: how many leading dimensions
/// of an embedding of `width` are returned. The error is a predicate of it.
pub fn checked_dimensions(count: i64, width: usize) -> Result<usize, String> {
    usize::try_from(count)
        .ok()
        .filter(|count| (1..=width).contains(count))
        .ok_or_else(|| format!("must be from 1 to {width}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::model_infer_request::InferRequestedOutputTensor;

    /// The least processor time of a check, of several tries.
    fn least(message: &ModelInferRequest) -> Duration {
        let time = || {
            let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
            let nanoseconds = stat.split(' ').next().unwrap().parse().unwrap();
            Duration::from_nanos(nanoseconds)
        };
        let tries = (0..3).map(|_| {
            let message = message.clone();
            let before = time();
            let checked = InferRequest::checked(message);
            let took = time() - before;
            assert!(checked.is_ok(), "{checked:?}");
            took
        });
        tries.min().unwrap()
    }

    fn named(count: usize) -> [ModelInferRequest; 3] {
        let names = || (0..count).map(|number| format!("a name of some length {number}"));
        let base = || ModelInferRequest {
            model_name: "m".into(),
            ..Default::default()
        };
        let output = |name| InferRequestedOutputTensor {
            name,
            ..Default::default()
        };
        let input = |name| InferInputTensor {
            name,
            datatype: "FP32".into(),
            shape: vec![0],
            ..Default::default()
        };
        let parameter = |name| {
            let parameter_choice = Some(ParameterChoice::BoolParam(true));
            (name, InferParameter { parameter_choice })
        };
        [
            ModelInferRequest {
                outputs: names().map(output).collect(),
                ..base()
            },
            ModelInferRequest {
                inputs: names().map(input).collect(),
                ..base()
            },
            ModelInferRequest {
                parameters: names().map(parameter).collect(),
                ..base()
            },
        ]
    }

    #[test]
    fn twice_as_many_names_take_twice_the_time() {
        for (one, two) in named(40_000).iter().zip(&named(80_000)) {
            let (one, two) = (least(one), least(two));
            // Times of a few ticks say nothing.
            let bound = one.mul_f64(2.5) + Duration::from_millis(20);
            assert!(two <= bound, "{one:?}, then {two:?}");
        }
    }

    #[test]
    fn a_name_is_there_once() {
        for message in named(3) {
            let mut twice = message;
            twice.inputs.extend(twice.inputs.last().cloned());
            twice.outputs.extend(twice.outputs.last().cloned());
            let expected = match (twice.inputs.len(), twice.outputs.len()) {
                (4, _) => "inputs[3].name",
                (_, 4) => "outputs[3].name",
                _ => continue,
            };
            let error = InferRequest::checked(twice).unwrap_err();
            assert_eq!(error.field().unwrap().as_str(), expected);
        }
    }
}
