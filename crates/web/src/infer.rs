//! `infer` of REST v2: converts tensors in JSON and in the binary extension to
//! the message of a gRPC call, and its response back.
//!
//! A binary tensor of a request is copied once, from the chunks that the
//! connection read into the message; one of a response is not copied at all.

mod json_data;
mod parameters;
pub mod request;
mod response;

use axum::extract::Request;
use axum::response::Response;
use http::HeaderMap;
use platform::pool::Cancelled;
use protocol::inference::ModelInferResponse;
use protocol::{Error, FieldPath, Kind, Method, Segment};

use super::body;
use super::context::RequestContext;
use super::error::ApiError;
use super::model_path::{ModelPath, PathModel};
use super::schemas::InferResponse;
use request::Reading;

/// The header with the length of the JSON before the binary tensors.
pub const HEADER_LENGTH: &str = "inference-header-content-length";

/// Bytes that are copied in the time in which one of JSON is parsed.
const COPIED_PER_PARSED: usize = 16;

/// Model inference
///
/// The data of a tensor is a list in the JSON, flat or nested, or bytes behind
/// the JSON. With bytes the body is application/octet-stream, the header
/// Inference-Header-Content-Length has the length of the JSON, and the parameter
/// binary_data_size of the tensor the number of its bytes. Outputs are bytes
/// behind the JSON if binary_data or binary_data_output says so.
#[utoipa::path(
    post, path = "/v2/models/{model}/infer", tag = "Inference", operation_id = "infer",
    params(ModelPath),
    request_body(content(
        (request::InferRequest = "application/json"),
        (String = "application/octet-stream"),
    )),
    responses((status = 200, description = "The outputs", content(
        (InferResponse = "application/json"), (String = "application/octet-stream"),
    )))
)]
pub async fn infer(
    context: RequestContext,
    model: PathModel,
    request: Request,
) -> Result<Response, ApiError> {
    let content_type = body::check_content_type(request.headers());
    let json_bytes = header_length(request.headers());
    let received = body::read(request, &context.limits).await?;
    content_type?;
    let json_bytes = json_bytes?;
    let (limits, path) = (context.limits.clone(), model.clone());
    // Bytes behind the JSON are only copied.
    let work_bytes = match json_bytes {
        Some(json) => json.saturating_add(received.length / COPIED_PER_PARSED),
        None => received.length,
    };
    let read = move |cancelled: &Cancelled| {
        let reading = Reading {
            limits: &limits,
            cancelled,
        };
        request::parse(received, json_bytes, &path, reading)?.into_message(&limits)
    };
    let (message, formats) = context.work(work_bytes, read).await?;
    let plan = context
        .route(&model.selector())
        .map_err(|error| error.map_field(as_json_field))?;
    let response = context
        .call::<ModelInferResponse>(Method::ModelInfer, message, &plan)
        .await
        .map_err(|error| error.map_field(as_json_field))?;
    Ok(response::write(&context, response, formats).await?)
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

/// The field of the JSON for one of the gRPC message: the contents of a tensor
/// are the data of its input, whether they came in the JSON or behind it.
fn as_json_field(field: &FieldPath) -> Option<FieldPath> {
    let data = |index: &usize| FieldPath::input(*index).field("data");
    match field.segments().as_slice() {
        [Segment::Name("raw_input_contents")] => Some("inputs".into()),
        [Segment::Name("raw_input_contents"), Segment::Index(index)] => Some(data(index)),
        [
            Segment::Name("inputs"),
            Segment::Index(index),
            Segment::Name("contents"),
            rest @ ..,
        ] => Some(rest.iter().copied().fold(data(index), FieldPath::then)),
        _ => None,
    }
}

/// An output that JSON cannot represent.
fn not_json(name: &str, why: &str) -> Error {
    let message = format!("output '{name}' {why}: request it with the parameter 'binary_data'");
    Error::new(Kind::Unsupported, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_tensors_are_those_of_the_json() {
        let renamed = |field: &str| {
            let error = Error::invalid(field, "is wrong").map_field(as_json_field);
            let field = error.field().unwrap().to_string();
            assert_eq!(error.to_string(), format!("{field}: is wrong"));
            field
        };
        assert_eq!(renamed("raw_input_contents[3]"), "inputs[3].data");
        assert_eq!(renamed("inputs[0].contents"), "inputs[0].data");
        assert_eq!(renamed("inputs[0].contents[7]"), "inputs[0].data[7]");
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
