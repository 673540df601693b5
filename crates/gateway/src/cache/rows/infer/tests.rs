use proptest::prelude::*;
use protocol::inference::InferTensorContents;
use protocol::inference::infer_parameter::ParameterChoice;
use tensor::encode_bytes_elements;

use super::*;

const SOURCE: KeyContext<'_> = KeyContext {
    scope: "team",
    model: "model",
    version: 1,
    digest: "abc",
};

fn input(name: &str, datatype: &str, shape: &[i64]) -> InferInputTensor {
    InferInputTensor {
        name: name.to_owned(),
        datatype: datatype.to_owned(),
        shape: shape.to_vec(),
        ..Default::default()
    }
}

fn parameter(choice: ParameterChoice) -> InferParameter {
    InferParameter {
        parameter_choice: Some(choice),
    }
}

/// Two rows of a text and two numbers each.
fn request() -> ModelInferRequest {
    let text = encode_bytes_elements(&["one", "two"]).unwrap();
    ModelInferRequest {
        model_name: "model".to_owned(),
        id: "id".to_owned(),
        parameters: [(
            "normalize".to_owned(),
            parameter(ParameterChoice::BoolParam(true)),
        )]
        .into(),
        inputs: vec![
            input("text", "BYTES", &[2]),
            input("numbers", "UINT16", &[2, 2]),
        ],
        raw_input_contents: vec![text.into(), vec![1, 0, 2, 0, 3, 0, 4, 0].into()],
        ..Default::default()
    }
}

fn read(request: &ModelInferRequest) -> Option<InferRows> {
    InferRows::checked(request.encode_to_vec().into(), &SOURCE)
}

fn changed(change: impl Fn(&mut ModelInferRequest)) -> ModelInferRequest {
    let mut request = request();
    change(&mut request);
    request
}

#[test]
fn what_changes_a_response_changes_the_key() {
    let mut keys = read(&request()).unwrap().keys;
    assert_ne!(keys[0], keys[1]);
    let text = |texts: &[&str]| Bytes::from(encode_bytes_elements(texts).unwrap());
    let others = [
        changed(|r| r.inputs[0].name = "texts".to_owned()),
        changed(|r| r.inputs[1].datatype = "INT16".to_owned()),
        changed(|r| r.inputs[1].shape = vec![2, 2, 1]),
        changed(|r| r.inputs[1].shape = vec![2, 1, 2]),
        changed(|r| r.inputs[0].shape = vec![2, 1]),
        changed(|r| r.raw_input_contents[0] = text(&["onE", "twO"])),
        changed(|r| r.raw_input_contents[1] = vec![9; 8].into()),
        changed(|r| r.parameters.clear()),
        changed(|r| {
            let choice = ParameterChoice::BoolParam(false);
            r.parameters
                .insert("normalize".to_owned(), parameter(choice));
        }),
        changed(|r| {
            let choice = ParameterChoice::Int64Param(1);
            r.parameters
                .insert("normalize".to_owned(), parameter(choice));
        }),
        changed(|r| {
            let choice = ParameterChoice::BoolParam(true);
            r.parameters
                .insert("truncate".to_owned(), parameter(choice));
        }),
        changed(|r| {
            let choice = ParameterChoice::StringParam("query".to_owned());
            r.parameters
                .insert("prompt_name".to_owned(), parameter(choice));
        }),
        changed(|r| {
            let choice = ParameterChoice::StringParam("query".to_owned());
            r.parameters.insert("prompt".to_owned(), parameter(choice));
        }),
        changed(|r| {
            r.outputs = vec![InferRequestedOutputTensor {
                name: "embedding".to_owned(),
                ..Default::default()
            }];
        }),
    ];
    for other in &others {
        for key in read(other).unwrap().keys {
            assert!(!keys.contains(&key), "{other:?}");
            keys.push(key);
        }
    }
}

#[test]
fn what_changes_no_response_changes_no_key() {
    let keys = read(&request()).unwrap().keys;
    let int64 = |value| parameter(ParameterChoice::Int64Param(value));
    let others = [
        changed(|r| r.id = "another".to_owned()),
        changed(|r| r.model_version = "1".to_owned()),
        changed(|r| {
            r.inputs.swap(0, 1);
            r.raw_input_contents.swap(0, 1);
        }),
        changed(|r| {
            r.parameters.insert("priority".to_owned(), int64(1));
            r.parameters.insert("timeout".to_owned(), int64(1000));
        }),
        changed(|r| {
            r.raw_input_contents.clear();
            r.inputs[0].contents = Some(InferTensorContents {
                bytes_contents: vec!["one".into(), "two".into()],
                ..Default::default()
            });
            r.inputs[1].contents = Some(InferTensorContents {
                uint_contents: vec![1, 2, 3, 4],
                ..Default::default()
            });
        }),
        // The hints of MLServer's client, and the base64 of the same texts.
        changed(|r| {
            let text = |name: &str| parameter(ParameterChoice::StringParam(name.to_owned()));
            let base64 = encode_bytes_elements(&["b25l", "dHdv"]).unwrap();
            r.raw_input_contents[0] = base64.into();
            r.parameters.insert("content_type".to_owned(), text("pd"));
            for (input, codec) in r.inputs.iter_mut().zip(["base64", "np"]) {
                let hint = ("content_type".to_owned(), text(codec));
                input.parameters = [hint].into();
                input.contents = Some(InferTensorContents::default());
            }
        }),
    ];
    for other in &others {
        assert_eq!(read(other).unwrap().keys, keys, "{other:?}");
    }
}

#[test]
fn an_unusual_request_goes_to_a_worker_unchanged() {
    let int64 = |value| parameter(ParameterChoice::Int64Param(value));
    let odd = [
        changed(|r| r.inputs.clear()),
        changed(|r| r.raw_input_contents.clear()),
        changed(|r| r.inputs[1].datatype = "UINT17".to_owned()),
        changed(|r| r.inputs[1].shape = vec![4]),
        changed(|r| r.inputs[1].shape = vec![]),
        changed(|r| r.inputs[1].shape = vec![-2, 2]),
        changed(|r| r.raw_input_contents[1] = vec![0; 7].into()),
        changed(|r| r.inputs[1].name = "text".to_owned()),
        changed(|r| {
            r.parameters.insert("sequence_id".to_owned(), int64(1));
        }),
        changed(|r| {
            r.parameters.insert("priority".to_owned(), int64(-1));
        }),
        changed(|r| {
            r.inputs[0]
                .parameters
                .insert("shared_memory_region".to_owned(), int64(1));
        }),
        changed(|r| {
            r.inputs = vec![input("numbers", "UINT16", &[0, 2])];
            r.raw_input_contents = vec![Bytes::new()];
        }),
    ];
    for request in &odd {
        assert!(read(request).is_none(), "{request:?}");
    }
    assert!(InferRows::checked(Bytes::from_static(b"\xff"), &SOURCE).is_none());
}

/// A model that responds with the texts of a row joined, and twice with the sum
/// of its numbers.
fn response(request: &ModelInferRequest) -> ModelInferResponse {
    let rows = request.inputs[0].shape[0] as usize;
    let texts = bytes_elements(&request.raw_input_contents[0]);
    let texts: Vec<&[u8]> = texts.map(Result::unwrap).collect();
    let per_row = texts.len() / rows;
    let joined: Vec<Vec<u8>> = texts.chunks(per_row).map(<[&[u8]]>::concat).collect();
    let numbers = &request.raw_input_contents[1];
    let sums = numbers.chunks(numbers.len() / rows).flat_map(|row| {
        let sum: u64 = row.iter().map(|&byte| u64::from(byte)).sum();
        [sum.to_le_bytes(), sum.to_le_bytes()].concat()
    });
    let output = |name: &str, datatype: &str, shape: Vec<i64>| InferOutputTensor {
        name: name.to_owned(),
        datatype: datatype.to_owned(),
        shape,
        ..Default::default()
    };
    let rows = rows as i64;
    ModelInferResponse {
        model_name: request.model_name.clone(),
        model_version: "1".to_owned(),
        id: request.id.clone(),
        outputs: vec![
            output("joined", "BYTES", vec![rows]),
            output("sums", "UINT64", vec![rows, 2, 1]),
        ],
        raw_output_contents: vec![
            encode_bytes_elements(&joined).unwrap().into(),
            Bytes::from(sums.collect::<Vec<u8>>()),
        ],
        ..Default::default()
    }
}

fn split(
    rows: &dyn RowRequest,
    response: &ModelInferResponse,
    count: usize,
) -> Option<SplitResponse> {
    rows.split(response.encode_to_vec().into(), &HeaderMap::new(), count)
}

fn joined(rows: &dyn RowRequest, found: &[CachedRow]) -> Option<ModelInferResponse> {
    let framed = rows.join(found, &ComputedUsage::default(), &mut HeaderMap::new())?;
    ModelInferResponse::decode(framed.slice(5..)).ok()
}

#[test]
fn a_response_of_another_form_is_not_split() {
    let (request, rows) = (request(), read(&request()).unwrap());
    let right = response(&request);
    let found = split(&rows, &right, 2).unwrap().rows;
    assert_eq!(joined(&rows, &found), Some(right.clone()));
    assert!(split(&rows, &right, 1).is_none());
    let wrong = |change: &dyn Fn(&mut ModelInferResponse)| {
        let mut response = right.clone();
        change(&mut response);
        split(&rows, &response, 2).is_none()
    };
    assert!(wrong(&|response| response.outputs.clear()));
    assert!(wrong(&|response| response.outputs[1].shape = vec![4]));
    assert!(wrong(&|response| response.outputs[1].shape = vec![]));
    assert!(wrong(
        &|response| response.outputs[0].datatype = "TEXT".to_owned()
    ));
    assert!(wrong(&|response| drop(response.raw_output_contents.pop())));
    let own = parameter(ParameterChoice::BoolParam(true));
    assert!(wrong(&|response| {
        response.parameters.insert("own".to_owned(), own.clone());
    }));
    // Rows of two versions make no response.
    let mut other = right.clone();
    other.model_version = "2".to_owned();
    let other = split(&rows, &other, 2).unwrap().rows;
    assert!(joined(&rows, &[found[0].clone(), other[1].clone()]).is_none());
    assert!(joined(&rows, &[]).is_none());
    let cut = CachedRow {
        content: found[0].content.slice(1..),
        ..found[0].clone()
    };
    assert!(joined(&rows, &[cut, found[1].clone()]).is_none());
}

fn requests() -> impl Strategy<Value = ModelInferRequest> {
    let row = (
        proptest::collection::vec("[a-b]{0,4}", 3),
        proptest::collection::vec(any::<u8>(), 4),
    );
    proptest::collection::vec(row, 1..20).prop_map(|rows| {
        let count = rows.len() as i64;
        let texts: Vec<String> = rows.iter().flat_map(|(texts, _)| texts.clone()).collect();
        let numbers: Vec<u8> = rows.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
        changed(|request| {
            request.inputs[0].shape = vec![count, 3];
            request.inputs[1].shape = vec![count, 2];
            request.raw_input_contents = vec![
                encode_bytes_elements(&texts).unwrap().into(),
                Bytes::from(numbers.clone()),
            ];
        })
    })
}

proptest! {
    #[test]
    fn parts_join_to_the_whole(request in requests(), sides in any::<u32>()) {
        let rows = read(&request).unwrap();
        let count = rows.keys().len();
        let mut found = vec![None; count];
        for side in [0, 1] {
            let indices: Vec<usize> =
                (0..count).filter(|index| sides >> index & 1 == side).collect();
            if indices.is_empty() {
                continue;
            }
            let part = ModelInferRequest::decode(rows.part(&indices).bytes()).unwrap();
            // The keys of a part are those of its rows.
            let keys: Vec<RowKey> = indices.iter().map(|&index| rows.keys()[index]).collect();
            prop_assert_eq!(&read(&part).unwrap().keys, &keys);
            let split = split(&rows, &response(&part), indices.len()).unwrap();
            for (index, row) in indices.into_iter().zip(split.rows) {
                found[index] = Some(row);
            }
        }
        let found: Vec<CachedRow> = found.into_iter().map(Option::unwrap).collect();
        prop_assert_eq!(joined(&rows, &found), Some(response(&request)));
    }

    #[test]
    fn equal_keys_are_equal_rows(request in requests()) {
        let rows = read(&request).unwrap();
        let row = |index: usize| {
            let inputs = rows.request.inputs.iter().zip(&rows.ranges);
            let rows = inputs.map(|(input, cut)| cut.row(input.tensor.raw(), index).to_vec());
            rows.collect::<Vec<_>>()
        };
        for (a, key) in rows.keys().iter().enumerate() {
            for (b, other) in rows.keys().iter().enumerate() {
                prop_assert_eq!(key == other, row(a) == row(b));
            }
        }
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let rows = read(&request()).unwrap();
        let bytes = Bytes::from(bytes);
        let _ = InferRows::checked(bytes.clone(), &SOURCE);
        let _ = rows.split(bytes.clone(), &HeaderMap::new(), 2);
        let row = CachedRow { head: bytes.clone(), content: bytes };
        let _ = joined(&rows, &[row.clone(), row]);
    }
}
