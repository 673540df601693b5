//! Token ids as the input of a model: the ids of all lists in one call, beside the
//! length of each list.

use std::sync::Arc;

use bytes::Bytes;
use platform::grpc::Message;
use protocol::inference::infer_parameter::ParameterChoice;
use protocol::inference::model_infer_request::InferInputTensor;
use protocol::inference::{
    InferParameter, ModelInferRequest, ModelMetadataRequest, ModelMetadataResponse,
};

use protocol::{Error, FieldPath, IDS_INPUT, Kind, LENGTHS_INPUT, Method, Segment};

use super::super::context::{CallResponse, RequestContext};
use super::super::model_cache::ModelCache;
use super::super::texts::{InputFields, call_model};
use gateway::Plan;

/// Whether models take token ids.
pub type IdTakers = ModelCache<bool>;

/// Bytes of an id, or of a length, in the message.
const ID_BYTES: usize = 8;

/// An error unless the model of a plan offers the inputs of ids.
pub async fn must_be_taken(
    takers: &IdTakers,
    context: &RequestContext,
    plan: &Plan,
    fields: InputFields,
) -> Result<(), Error> {
    let table = Arc::downgrade(&context.stack.routing_table());
    let taken = match takers.get(&table, plan.name()) {
        Some(taken) => *taken,
        None => {
            let (name, taken) = offered(context, plan).await?;
            // Of a chain another model may respond next time.
            if name == plan.name() {
                takers.insert(table, name, Arc::new(taken));
            }
            taken
        }
    };
    if taken {
        return Ok(());
    }
    let reason = "must be texts: this model takes no token ids";
    let field = if fields.single {
        fields.at(0)
    } else {
        "input".to_owned()
    };
    Err(Error::invalid(field, reason))
}

/// The model that describes itself, and whether it offers the inputs of ids.
async fn offered(context: &RequestContext, plan: &Plan) -> Result<(String, bool), Error> {
    let message = Message::encode(&ModelMetadataRequest {
        name: plan.name().to_owned(),
        ..Default::default()
    });
    let described: Result<CallResponse<ModelMetadataResponse>, Error> =
        call_model(context, Method::ModelMetadata, plan, message).await;
    match described {
        Ok(described) => Ok(take_ids(described.message)),
        Err(error) if error.kind() == Kind::Unsupported => Ok((plan.name().to_owned(), false)),
        Err(error) => Err(error),
    }
}

fn take_ids(metadata: ModelMetadataResponse) -> (String, bool) {
    let offers = |name| {
        let mut inputs = metadata.inputs.iter();
        inputs.any(|input| input.name == name && input.datatype == "INT64")
    };
    let both = offers(IDS_INPUT) && offers(LENGTHS_INPUT);
    (metadata.name, both)
}

/// The request of a model that takes ids.
pub fn infer_request(
    model: &str,
    lists: &[Vec<u32>],
    parameters: impl IntoIterator<Item = (&'static str, ParameterChoice)>,
) -> ModelInferRequest {
    let lengths = lists.iter().map(|list| list.len() as u64);
    let ids = lists.iter().flatten().map(|id| u64::from(*id));
    let count = lists.iter().map(Vec::len).sum();
    let tensors = [
        tensor(LENGTHS_INPUT, lists.len(), lengths),
        tensor(IDS_INPUT, count, ids),
    ];
    let (inputs, raw_input_contents) = tensors.into_iter().unzip();
    let parameter = |(name, choice): (&str, ParameterChoice)| {
        let parameter_choice = Some(choice);
        (name.to_owned(), InferParameter { parameter_choice })
    };
    ModelInferRequest {
        model_name: model.to_owned(),
        parameters: parameters.into_iter().map(parameter).collect(),
        inputs,
        raw_input_contents,
        ..Default::default()
    }
}

fn tensor(
    name: &str,
    count: usize,
    values: impl Iterator<Item = u64>,
) -> (InferInputTensor, Bytes) {
    let mut raw = Vec::with_capacity(count * ID_BYTES);
    values.for_each(|value| raw.extend_from_slice(&value.to_le_bytes()));
    let described = InferInputTensor {
        name: name.to_owned(),
        datatype: "INT64".to_owned(),
        shape: vec![i64::try_from(count).unwrap_or(i64::MAX)],
        ..Default::default()
    };
    (described, raw.into())
}

/// The fields of the ids of a call.
#[derive(Debug)]
pub struct IdFields {
    single: bool,
    /// Where each list ends among the ids of all.
    ends: Vec<usize>,
}

impl IdFields {
    /// Those of a request, whose only list may be its input itself.
    pub fn of(lists: &[Vec<u32>], single: bool) -> Self {
        let mut end = 0;
        let ends = lists.iter().map(|list| {
            end += list.len();
            end
        });
        Self {
            single,
            ends: ends.collect(),
        }
    }

    /// About the bytes of the call's message.
    pub fn message_bytes(&self) -> usize {
        let ids = self.ends.last().copied().unwrap_or_default();
        (ids + self.ends.len()) * ID_BYTES
    }

    /// An error of the call with the fields of the request.
    pub fn of_infer(&self, error: Error) -> Error {
        error.map_field(|field| self.map(field))
    }

    fn map(&self, field: &FieldPath) -> Option<FieldPath> {
        match field.segments().as_slice() {
            [Segment::Name("parameters"), Segment::Key(name)] => Some((*name).into()),
            [
                Segment::Name("inputs"),
                Segment::Index(input),
                Segment::Name("contents"),
                Segment::Index(element),
            ] => Some(match input {
                0 => self.list(*element).into(),
                _ => self.id(*element).into(),
            }),
            [Segment::Name("inputs" | "raw_input_contents"), ..] => Some("input".into()),
            _ => None,
        }
    }

    fn list(&self, index: usize) -> String {
        if self.single {
            "input".to_owned()
        } else {
            format!("input[{index}]")
        }
    }

    /// The field of an id, by its index among the ids of all lists.
    fn id(&self, index: usize) -> String {
        let list = self.ends.partition_point(|end| *end <= index);
        let before = list.checked_sub(1).and_then(|before| self.ends.get(before));
        let within = index - before.copied().unwrap_or_default();
        format!("{}[{within}]", self.list(list))
    }
}

#[cfg(test)]
mod tests {
    use protocol::inference::model_metadata_response::TensorMetadata;

    use super::*;

    #[test]
    fn all_lists_are_two_tensors_of_one_call() {
        let lists = [vec![7, 8], vec![u32::MAX]];
        let request = infer_request("m", &lists, []);
        let names: Vec<_> = request
            .inputs
            .iter()
            .map(|input| input.name.as_str())
            .collect();
        assert_eq!(names, [LENGTHS_INPUT, IDS_INPUT]);
        assert_eq!(
            (request.inputs[0].shape[0], request.inputs[1].shape[0]),
            (2, 3)
        );
        let longs = |values: &[u64]| -> Vec<u8> {
            values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect()
        };
        assert_eq!(request.raw_input_contents[0], longs(&[2, 1]));
        assert_eq!(
            request.raw_input_contents[1],
            longs(&[7, 8, u32::MAX.into()])
        );
        assert_eq!(IdFields::of(&lists, false).message_bytes(), 5 * ID_BYTES);
    }

    #[test]
    fn an_id_is_named_by_its_list_and_its_place() {
        let several = IdFields::of(&[vec![1, 2], vec![3], vec![4, 5]], false);
        let one = IdFields::of(&[vec![1, 2]], true);
        for (fields, field, expected) in [
            (&several, "inputs[1].contents[0]", "input[0][0]"),
            (&several, "inputs[1].contents[1]", "input[0][1]"),
            (&several, "inputs[1].contents[2]", "input[1][0]"),
            (&several, "inputs[1].contents[4]", "input[2][1]"),
            (&several, "inputs[0].contents[2]", "input[2]"),
            (&several, "inputs[0].shape", "input"),
            (&several, "parameters[dimensions]", "dimensions"),
            (&one, "inputs[1].contents[1]", "input[1]"),
            (&one, "inputs[0].contents[0]", "input"),
        ] {
            let mapped = fields.map(&field.into()).unwrap();
            assert_eq!(mapped.as_str(), expected, "{field}");
        }
    }

    #[test]
    fn a_model_takes_ids_if_its_metadata_says_so() {
        let metadata = |names: &[&str]| ModelMetadataResponse {
            name: "m".to_owned(),
            inputs: names
                .iter()
                .map(|name| TensorMetadata {
                    name: (*name).to_owned(),
                    datatype: "INT64".to_owned(),
                    shape: vec![-1],
                })
                .collect(),
            ..Default::default()
        };
        assert!(take_ids(metadata(&["text", LENGTHS_INPUT, IDS_INPUT])).1);
        for other in [&[][..], &["text"], &[IDS_INPUT], &[IDS_INPUT, "mask"]] {
            assert!(!take_ids(metadata(other)).1, "{other:?}");
        }
    }
}
