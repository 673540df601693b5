//! What clients write beside a tensor about its contents: how many bytes they
//! have (KServe's and Triton's), and which codec made them (MLServer's). A hint
//! that needs nothing done is ignored when it is true, base64 is decoded, and
//! what contradicts the contents or cannot be done is refused by name.

use std::collections::HashMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tensor::{Datatype, Tensor, TensorError, bytes_elements};

use crate::inference::{InferParameter, infer_parameter::ParameterChoice};
use crate::{Error, FieldPath};

const BINARY_SIZE: &str = "binary_data_size";
const CONTENT_TYPE: &str = "content_type";

/// A codec of MLServer by the name that it writes as `content_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Codec {
    /// `np`, an array, and `pd`, a column of a table: the contents are as the
    /// datatype says.
    Plain,
    /// `str`: the elements are texts.
    Text,
    /// `base64`: the elements are bytes in base64.
    Base64,
}

impl Codec {
    /// Every codec that is supported, by its names.
    const ALL: [(&'static str, Self); 4] = [
        ("np", Self::Plain),
        ("pd", Self::Plain),
        ("str", Self::Text),
        ("base64", Self::Base64),
    ];

    /// The codec of a parameter at `field`, if it is one of these.
    fn checked(value: InferParameter, field: FieldPath, supported: &[Self]) -> Result<Self, Error> {
        let name = match value.parameter_choice {
            Some(ParameterChoice::StringParam(name)) => name,
            _ => return Err(Error::invalid(field, "must be a string")),
        };
        let mut names = Vec::with_capacity(Self::ALL.len());
        for (known, codec) in Self::ALL {
            if supported.contains(&codec) {
                if known == name {
                    return Ok(codec);
                }
                names.push(known);
            }
        }
        let names = names.join(", ");
        let reason = format!("is not a codec that is supported here: use one of {names}");
        Err(Error::invalid(field, reason))
    }

    /// An error unless the codec writes tensors of this datatype.
    fn check_datatype(self, datatype: Datatype, field: FieldPath) -> Result<(), Error> {
        if self == Self::Plain || datatype == Datatype::Bytes {
            return Ok(());
        }
        let reason = format!("is a codec for BYTES, but the datatype is {datatype}");
        Err(Error::invalid(field, reason))
    }
}

/// The hints of one input.
#[derive(Debug)]
pub(crate) struct InputHints {
    index: usize,
    bytes: Option<i64>,
    codec: Option<Codec>,
}

impl InputHints {
    /// Reads the parameters of an input: others than hints are refused.
    pub fn read(index: usize, parameters: HashMap<String, InferParameter>) -> Result<Self, Error> {
        let mut hints = Self {
            index,
            bytes: None,
            codec: None,
        };
        for (key, value) in parameters {
            let field = hints.field(&key);
            match (key.as_str(), value.parameter_choice) {
                (BINARY_SIZE, Some(ParameterChoice::Int64Param(bytes))) => {
                    hints.bytes = Some(bytes);
                }
                (BINARY_SIZE, _) => return Err(Error::invalid(field, "must be a number of bytes")),
                (CONTENT_TYPE, parameter_choice) => {
                    let value = InferParameter { parameter_choice };
                    let supported = [Codec::Plain, Codec::Text, Codec::Base64];
                    hints.codec = Some(Codec::checked(value, field, &supported)?);
                }
                (key, _) if key.starts_with("shared_memory") => {
                    let reason = "is not supported: there is no shared memory, send the contents";
                    return Err(Error::invalid(field, reason));
                }
                _ => return Err(Error::invalid(field, "is not a known parameter")),
            }
        }
        Ok(hints)
    }

    fn field(&self, key: &str) -> FieldPath {
        FieldPath::input(self.index).field("parameters").key(key)
    }

    /// The tensor that the contents stand for, which agree with the hints.
    pub fn apply(&self, tensor: Tensor) -> Result<Tensor, Error> {
        let actual = tensor.raw().len();
        if let Some(bytes) = self.bytes
            && usize::try_from(bytes) != Ok(actual)
        {
            let reason = format!("is {bytes}, but the contents have {actual} bytes");
            return Err(Error::invalid(self.field(BINARY_SIZE), reason));
        }
        let Some(codec) = self.codec else {
            return Ok(tensor);
        };
        codec.check_datatype(tensor.datatype(), self.field(CONTENT_TYPE))?;
        match codec {
            Codec::Plain | Codec::Text => Ok(tensor),
            Codec::Base64 => self.decoded(&tensor),
        }
    }

    /// The elements as their base64 says, in one buffer however many they are:
    /// nothing has counted them yet.
    fn decoded(&self, tensor: &Tensor) -> Result<Tensor, Error> {
        let contents = FieldPath::input(self.index).field("contents");
        let failed = |error: TensorError| Error::invalid(&contents, error.to_string());
        // Bytes are fewer than the characters of their base64.
        let mut raw = Vec::with_capacity(tensor.raw().len());
        for (element, text) in bytes_elements(tensor.raw()).enumerate() {
            let begins = raw.len() + 4;
            raw.extend_from_slice(&[0; 4]);
            let decoded = STANDARD.decode_vec(text.map_err(failed)?, &mut raw);
            decoded.map_err(|_| {
                let field = contents.clone().index(element);
                Error::invalid(field, "is not valid base64")
            })?;
            let length = u32::try_from(raw.len() - begins);
            let length = length.map_err(|_| failed(TensorError::ShapeOverflow))?;
            raw[begins - 4..begins].copy_from_slice(&length.to_le_bytes());
        }
        Tensor::from_raw(Datatype::Bytes, tensor.shape().clone(), raw.into()).map_err(failed)
    }
}

/// Takes the codec of a whole request out of its parameters. Returns whether all
/// its inputs are said to be texts.
pub(crate) fn take_texts(parameters: &mut HashMap<String, InferParameter>) -> Result<bool, Error> {
    let Some(value) = parameters.remove(CONTENT_TYPE) else {
        return Ok(false);
    };
    let field = FieldPath::parameter(CONTENT_TYPE);
    let codec = Codec::checked(value, field, &[Codec::Plain, Codec::Text])?;
    Ok(codec == Codec::Text)
}

/// An error if a request of texts has an input of another datatype.
pub(crate) fn check_texts<'t>(mut tensors: impl Iterator<Item = &'t Tensor>) -> Result<(), Error> {
    tensors.try_for_each(|tensor| {
        let field = FieldPath::parameter(CONTENT_TYPE);
        Codec::Text.check_datatype(tensor.datatype(), field)
    })
}

/// Reads the parameters of a requested output: others than hints are refused.
/// Returns whether it is requested as texts.
pub(crate) fn output_is_text(
    index: usize,
    parameters: HashMap<String, InferParameter>,
) -> Result<bool, Error> {
    let mut text = false;
    for (key, value) in parameters {
        match key.as_str() {
            // How an output travels in HTTP; over gRPC all are raw.
            "binary_data" => {}
            CONTENT_TYPE => {
                let supported = [Codec::Plain, Codec::Text];
                text = Codec::checked(value, output_codec(index), &supported)? == Codec::Text;
            }
            _ => {
                let field = FieldPath::output(index).field("parameters").key(&key);
                return Err(Error::invalid(field, "is not a known parameter"));
            }
        }
    }
    Ok(text)
}

/// An error if an output that is requested as texts has another datatype.
pub(crate) fn check_text_output(index: usize, datatype: Datatype) -> Result<(), Error> {
    Codec::Text.check_datatype(datatype, output_codec(index))
}

fn output_codec(index: usize) -> FieldPath {
    FieldPath::output(index)
        .field("parameters")
        .key(CONTENT_TYPE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::InferRequest;
    use crate::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
    use crate::inference::{InferTensorContents, ModelInferRequest};

    fn parameters(of: &[(&str, ParameterChoice)]) -> HashMap<String, InferParameter> {
        let entry = |(key, choice): &(&str, ParameterChoice)| {
            let parameter_choice = Some(choice.clone());
            ((*key).to_owned(), InferParameter { parameter_choice })
        };
        of.iter().map(entry).collect()
    }

    fn text(value: &str) -> ParameterChoice {
        ParameterChoice::StringParam(value.to_owned())
    }

    fn codec(name: &str) -> HashMap<String, InferParameter> {
        parameters(&[(CONTENT_TYPE, text(name))])
    }

    /// A request of one input with typed contents.
    fn typed(
        datatype: &str,
        contents: InferTensorContents,
        parameters: HashMap<String, InferParameter>,
    ) -> ModelInferRequest {
        ModelInferRequest {
            model_name: "m".into(),
            inputs: vec![InferInputTensor {
                name: "x".into(),
                datatype: datatype.into(),
                shape: vec![2],
                parameters,
                contents: Some(contents),
            }],
            ..Default::default()
        }
    }

    fn bytes(parameters: HashMap<String, InferParameter>) -> ModelInferRequest {
        let bytes_contents = vec!["TGFudGVybg==".into(), "".into()];
        let contents = InferTensorContents {
            bytes_contents,
            ..Default::default()
        };
        typed("BYTES", contents, parameters)
    }

    fn floats(parameters: HashMap<String, InferParameter>) -> ModelInferRequest {
        let contents = InferTensorContents {
            fp32_contents: vec![1.0, 2.0],
            ..Default::default()
        };
        typed("FP32", contents, parameters)
    }

    /// The same request with its contents raw.
    fn raw(mut message: ModelInferRequest) -> ModelInferRequest {
        let plain = ModelInferRequest {
            inputs: vec![InferInputTensor {
                parameters: HashMap::new(),
                ..message.inputs[0].clone()
            }],
            ..message.clone()
        };
        let plain = InferRequest::checked(plain).unwrap();
        message.raw_input_contents = vec![plain.inputs[0].tensor.raw().clone()];
        message.inputs[0].contents = None;
        message
    }

    fn elements(message: ModelInferRequest) -> Vec<Vec<u8>> {
        let request = InferRequest::checked(message).unwrap();
        let elements = request.inputs[0].tensor.to_elements().unwrap();
        elements.into_iter().map(<[u8]>::to_vec).collect()
    }

    fn refused(message: ModelInferRequest) -> (String, String) {
        let error = InferRequest::checked(message).unwrap_err();
        (error.field().unwrap().to_string(), error.to_string())
    }

    #[test]
    fn true_hints_change_nothing() {
        let size = |bytes| parameters(&[(BINARY_SIZE, ParameterChoice::Int64Param(bytes))]);
        let expected = InferRequest::checked(floats(HashMap::new())).unwrap();
        for hints in [size(8), codec("np"), codec("pd")] {
            for message in [floats(hints.clone()), raw(floats(hints.clone()))] {
                assert_eq!(InferRequest::checked(message), Ok(expected.clone()));
            }
        }
        let texts = elements(bytes(HashMap::new()));
        for hints in [size(20), codec("np"), codec("pd"), codec("str")] {
            assert_eq!(elements(bytes(hints.clone())), texts);
            assert_eq!(elements(raw(bytes(hints.clone()))), texts);
        }
    }

    #[test]
    fn base64_is_decoded() {
        for message in [bytes(codec("base64")), raw(bytes(codec("base64")))] {
            assert_eq!(elements(message), [b"Lantern".to_vec(), Vec::new()]);
        }
        // The size is that of the bytes that came.
        let size = ParameterChoice::Int64Param(20);
        let both = parameters(&[(CONTENT_TYPE, text("base64")), (BINARY_SIZE, size)]);
        assert_eq!(elements(raw(bytes(both)))[0], b"Lantern");
        let mut wrong = bytes(codec("base64"));
        let contents = wrong.inputs[0].contents.as_mut().unwrap();
        contents.bytes_contents[1] = "a lantern".into();
        let (field, _) = refused(wrong);
        assert_eq!(field, "inputs[0].contents[1]");
    }

    #[test]
    fn what_contradicts_the_contents_is_refused() {
        let size = |value| parameters(&[(BINARY_SIZE, value)]);
        let size_field = "inputs[0].parameters[binary_data_size]";
        for value in [
            ParameterChoice::Int64Param(7),
            ParameterChoice::Int64Param(-8),
            ParameterChoice::BoolParam(true),
        ] {
            assert_eq!(refused(floats(size(value.clone()))).0, size_field);
            assert_eq!(refused(raw(floats(size(value)))).0, size_field);
        }
        let codec_field = "inputs[0].parameters[content_type]";
        for name in ["str", "base64"] {
            assert_eq!(refused(floats(codec(name))).0, codec_field);
        }
        let mut texts = floats(HashMap::new());
        texts.parameters = codec("str");
        assert_eq!(refused(texts).0, "parameters[content_type]");
    }

    #[test]
    fn codecs_that_are_not_supported_are_refused_and_not_repeated() {
        let inner = |name| refused(bytes(codec(name)));
        let (field, message) = inner("pd_json");
        assert_eq!(field, "inputs[0].parameters[content_type]");
        assert!(
            message.ends_with("use one of np, pd, str, base64"),
            "{message}"
        );
        assert!(!message.contains("pd_json"), "{message}");
        assert_eq!(inner("datetime").0, field);
        let mut whole = bytes(HashMap::new());
        for (name, refuses) in [
            ("np", false),
            ("pd", false),
            ("str", false),
            ("base64", true),
        ] {
            whole.parameters = codec(name);
            let checked = InferRequest::checked(whole.clone());
            assert_eq!(checked.is_err(), refuses, "{name}");
            // It is the protocol's parameter, and no model's.
            assert!(checked.is_err() || checked.unwrap().parameters.is_empty());
        }
        let other = parameters(&[("quantize", ParameterChoice::BoolParam(true))]);
        let (field, _) = refused(bytes(other));
        assert_eq!(field, "inputs[0].parameters[quantize]");
    }

    #[test]
    fn outputs_are_requested_by_codec() {
        let requested = |name: &str| {
            let mut message = floats(HashMap::new());
            message.outputs = vec![InferRequestedOutputTensor {
                name: "y".into(),
                parameters: codec(name),
            }];
            InferRequest::checked(message)
        };
        assert!(requested("np").unwrap().text_outputs.is_empty());
        assert_eq!(requested("str").unwrap().text_outputs, ["y"]);
        let error = requested("base64").unwrap_err();
        let field = error.field().unwrap();
        assert_eq!(field, "outputs[0].parameters[content_type]");
    }

    #[test]
    fn empty_contents_stand_beside_raw_ones() {
        let mut message = raw(floats(HashMap::new()));
        message.inputs[0].contents = Some(InferTensorContents::default());
        assert!(InferRequest::checked(message.clone()).is_ok());
        let contents = message.inputs[0].contents.as_mut().unwrap();
        contents.fp32_contents = vec![1.0, 2.0];
        assert_eq!(refused(message).0, "inputs[0].contents");
    }
}
