//! Vectors of texts, in the terms of the Open Inference Protocol.

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use protocol::inference::infer_parameter::ParameterChoice;
use protocol::inference::model_infer_request::InferInputTensor;
use protocol::inference::{InferParameter, ModelInferRequest, ModelInferResponse};
use protocol::{Error, Kind, Method, tei::v1 as tei};

use super::super::ask::{self, CALLS_AT_ONCE, element};
use super::super::gate::Visit;
use crate::route::Plan;

const DECODE: Method = Method::Decode;

/// The texts of tokens. Only the model's own tokenizer knows them, so that
/// models of outside services take none.
pub async fn decoded(
    visit: &Visit,
    plan: &Plan,
    lists: Vec<Vec<u32>>,
    single: bool,
) -> Result<Vec<String>, Error> {
    let calls =
        lists
            .into_iter()
            .enumerate()
            .map(|(index, ids)| async move {
                let message = tei::DecodeRequest {
                    ids,
                    skip_special_tokens: true,
                };
                let told = ask::call::<tei::DecodeResponse>(visit, DECODE, plan, &message);
                let field = match single {
                    true => "input".to_owned(),
                    false => format!("input[{index}]"),
                };
                match told.await {
                    Ok(told) if told.message.text.is_empty() => {
                        Err(Error::invalid(field, "has no tokens of a text"))
                    }
                    Ok(told) => Ok(told.message.text),
                    Err(error) if error.kind() == Kind::Unsupported => {
                        let reason = "this model takes texts only, since its tokenizer is not here";
                        Err(Error::invalid(field, reason))
                    }
                    Err(error) => Err(error
                        .renamed(|at, reason| (at == "ids").then(|| (field, reason.to_owned())))),
                }
            });
    stream::iter(calls)
        .buffered(CALLS_AT_ONCE)
        .try_collect()
        .await
}

/// The request of the Open Inference Protocol for vectors of texts.
pub fn infer_request(
    model: &str,
    texts: &[String],
    dimensions: Option<u32>,
    truncate: Option<bool>,
) -> Result<ModelInferRequest, Error> {
    let raw = tensor::encode_bytes_elements(texts)
        .map_err(|error| Error::invalid("input", error.to_string()))?;
    let mut parameters = vec![("normalize", ParameterChoice::BoolParam(true))];
    if let Some(dimensions) = dimensions {
        parameters.push(("dimensions", ParameterChoice::Int64Param(dimensions.into())));
    }
    if truncate == Some(true) {
        parameters.push(("truncate", ParameterChoice::BoolParam(true)));
    }
    let parameter = |(name, choice): (&str, ParameterChoice)| {
        let parameter_choice = Some(choice);
        (name.to_owned(), InferParameter { parameter_choice })
    };
    Ok(ModelInferRequest {
        model_name: model.to_owned(),
        parameters: parameters.into_iter().map(parameter).collect(),
        inputs: vec![InferInputTensor {
            name: "text".to_owned(),
            datatype: "BYTES".to_owned(),
            shape: vec![i64::try_from(texts.len()).unwrap_or(i64::MAX)],
            ..Default::default()
        }],
        raw_input_contents: vec![raw.into()],
        ..Default::default()
    })
}

/// A field of the Open Inference Protocol, in the terms of this surface.
pub fn in_terms_of_texts(field: &str, reason: &str, single: bool) -> (String, String) {
    let named = field.strip_prefix("parameters[");
    if let Some(name) = named.and_then(|field| field.strip_suffix(']')) {
        return (name.to_owned(), reason.to_owned());
    }
    if !field.starts_with("inputs") && !field.starts_with("raw_input_contents") {
        return (field.to_owned(), reason.to_owned());
    }
    match element(reason) {
        Some((index, reason)) if !single => (format!("input[{index}]"), reason),
        Some((_, reason)) => ("input".to_owned(), reason),
        None => ("input".to_owned(), reason.to_owned()),
    }
}

/// The bytes of each vector.
pub fn rows(answer: &ModelInferResponse, count: usize) -> Result<Vec<Bytes>, Error> {
    let output = answer.outputs.first();
    let raw = answer.raw_output_contents.first();
    let (Some(output), Some(raw)) = (output, raw) else {
        return Err(no_vectors());
    };
    let width = match output.shape.as_slice() {
        [rows, width] if usize::try_from(*rows).ok() == Some(count) => usize::try_from(*width).ok(),
        _ => None,
    };
    let bytes = width.and_then(|width| width.checked_mul(4));
    let whole = bytes.and_then(|bytes| bytes.checked_mul(count)) == Some(raw.len());
    match bytes {
        Some(bytes) if whole && bytes > 0 && output.datatype == "FP32" => {
            let row = |index: usize| raw.slice(index * bytes..(index + 1) * bytes);
            Ok((0..count).map(row).collect())
        }
        _ => Err(no_vectors()),
    }
}

fn no_vectors() -> Error {
    let reason = "the model's answer is not one vector of FP32 for each text";
    Error::new(Kind::Unsupported, reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::inference::model_infer_response::InferOutputTensor;

    fn answer(shape: &[i64], values: &[f32]) -> ModelInferResponse {
        let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        ModelInferResponse {
            outputs: vec![InferOutputTensor {
                name: "embedding".into(),
                datatype: "FP32".into(),
                shape: shape.to_vec(),
                ..Default::default()
            }],
            raw_output_contents: vec![raw.into()],
            ..Default::default()
        }
    }

    #[test]
    fn what_is_no_vector_is_refused() {
        for (shape, count) in [(&[2_i64, 3][..], 3), (&[2, 2], 2), (&[6], 6), (&[-1, 3], 2)] {
            let answer = answer(shape, &[0.0; 6]);
            assert_eq!(rows(&answer, count).unwrap_err().kind(), Kind::Unsupported);
        }
    }

    #[test]
    fn fields_are_those_of_the_request() {
        let words = |field, reason| in_terms_of_texts(field, reason, false);
        assert_eq!(words("parameters[dimensions]", "x").0, "dimensions");
        assert_eq!(
            words("raw_input_contents[0]", "element 2: too long"),
            ("input[2]".to_owned(), "too long".to_owned())
        );
        assert_eq!(
            in_terms_of_texts("inputs[0].contents", "element 0: too long", true).0,
            "input"
        );
        assert_eq!(words("model", "x").0, "model");
    }
}
