//! `infer` of REST v2: tensors in JSON and in the binary extension, on their
//! way to the message that both doors share, and back.
//!
//! A binary tensor is copied once on its way in, from the pieces that the
//! connection read into the message, and not at all on its way out.

pub mod request;
mod response;
mod scan;

use axum::extract::{Request, State};
use axum::response::Response;
use http::HeaderMap;
use platform::grpc::Message;
use protocol::inference::ModelInferResponse;
use protocol::{Error, Kind, Method};

use super::body;
use super::gate::{Visit, guarded};
use super::openapi::ModelPath;
use super::openapi::rest::InferAnswer;
use super::problem::Refused;
use super::rest::{Model, must_be_known};
use crate::stack::Stack;

/// Gives the length of the JSON before the binary tensors.
pub const HEADER_LENGTH: &str = "inference-header-content-length";
const INFER: Method = Method::ModelInfer;

/// Infer
///
/// Tensors in, tensors out. The data of a tensor is a list in JSON, flat or
/// nested, or it comes behind the JSON as bytes: then the body is
/// application/octet-stream, the header Inference-Header-Content-Length gives
/// the length of the JSON, and the tensor's parameter binary_data_size the
/// number of its bytes. Outputs come as bytes where binary_data or
/// binary_data_output asks for it.
#[utoipa::path(
    post, path = "/v2/models/{model}/infer", tag = "Inference", operation_id = "infer",
    params(ModelPath),
    request_body(content(
        (request::Asked = "application/json"),
        (String = "application/octet-stream"),
    )),
    responses((status = 200, description = "The outputs", content(
        (InferAnswer = "application/json"), (String = "application/octet-stream"),
    )))
)]
pub async fn infer(
    State(stack): State<Stack>,
    visit: Visit,
    model: Model,
    request: Request,
) -> Result<Response, Refused> {
    let limits = &stack.0.limits;
    let known = must_be_known(request.headers());
    let json_bytes = header_length(request.headers());
    let mut received = body::read(request, limits).await?;
    known?;
    let length = received.length;
    let held = received.held.take();
    let read = request::read(received, json_bytes?, &model)?;
    let framed = read.framed();
    if framed.len() > limits.message_bytes_max {
        return Err(Error::too_large(framed.len(), limits.message_bytes_max).into());
    }
    // Text may be shorter than the tensor that it stands for.
    let more = limits.budget.take(framed.len().saturating_sub(length))?;
    let held = match (held, more) {
        (Some(mut held), Some(more)) => {
            held.merge(more);
            Some(held)
        }
        (held, more) => held.or(more),
    };
    let message = Message::from_framed(framed).with_held(held);
    let plan = visit
        .route(&model.wanted())
        .map_err(|error| error.renamed(in_json))?;
    let answered = visit
        .ask::<ModelInferResponse>(INFER, message, &plan)
        .await
        .map_err(|error| error.renamed(in_json))?;
    let mut response = response::write(answered.message, &read.forms)?;
    response.headers_mut().extend(answered.headers);
    Ok(guarded(response, answered.held))
}

fn header_length(headers: &HeaderMap) -> Result<Option<usize>, Error> {
    let Some(value) = headers.get(HEADER_LENGTH) else {
        return Ok(None);
    };
    let text = value.to_str().ok();
    let digits = text.filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    let length = digits.and_then(|digits| digits.parse().ok());
    length
        .map(Some)
        .ok_or_else(|| Error::invalid(HEADER_LENGTH, "must be the length of the JSON in bytes"))
}

/// The fields of tensors as this door has them: whether a tensor came as text
/// or as bytes, it is its input's data.
fn in_json(field: &str, description: &str) -> Option<(String, String)> {
    let data = |index: &str| format!("inputs[{index}].data");
    let field = match field {
        "raw_input_contents" => "inputs".to_owned(),
        field => {
            let raw = field
                .strip_prefix("raw_input_contents[")
                .and_then(|rest| rest.strip_suffix(']'));
            let typed = field
                .strip_prefix("inputs[")
                .and_then(|rest| rest.strip_suffix("].contents"));
            data(raw.or(typed)?)
        }
    };
    Some((field, description.to_owned()))
}

/// A tensor that has no form in JSON.
fn not_json(name: &str, why: &str) -> Error {
    let message = format!("output '{name}' {why}: ask for it with the parameter 'binary_data'");
    Error::new(Kind::Unsupported, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_of_tensors_are_this_doors() {
        let renamed = |field: &str| {
            let error = Error::invalid(field, "is wrong").renamed(in_json);
            assert_eq!(
                error.to_string(),
                format!("{}: is wrong", error.violation().unwrap().field)
            );
            error.violation().unwrap().field.clone()
        };
        assert_eq!(renamed("raw_input_contents[3]"), "inputs[3].data");
        assert_eq!(renamed("inputs[0].contents"), "inputs[0].data");
        assert_eq!(renamed("raw_input_contents"), "inputs");
        assert_eq!(renamed("inputs[0].shape"), "inputs[0].shape");
        assert_eq!(renamed("parameters[contents]"), "parameters[contents]");
    }

    #[test]
    fn the_length_of_the_json_is_a_number() {
        let with = |value: &str| {
            let value = http::HeaderValue::try_from(value).unwrap();
            header_length(&HeaderMap::from_iter([(
                http::HeaderName::from_static(HEADER_LENGTH),
                value,
            )]))
        };
        assert_eq!(with("12"), Ok(Some(12)));
        for wrong in ["", "-1", "+1", "x", "99999999999999999999999"] {
            assert_eq!(
                with(wrong).unwrap_err().violation().unwrap().field,
                HEADER_LENGTH
            );
        }
    }
}
