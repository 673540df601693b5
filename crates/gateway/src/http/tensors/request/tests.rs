use proptest::prelude::*;
use serde_json::json;

use super::*;

fn model() -> Model {
    Model {
        name: "digits".to_owned(),
        version: "1".to_owned(),
    }
}

fn received(body: &[u8], chunk_bytes: usize) -> Received {
    Received {
        chunks: body
            .chunks(chunk_bytes)
            .map(Bytes::copy_from_slice)
            .collect(),
        length: body.len(),
        held: None,
    }
}

/// What the worker sees.
fn message(read: &Read) -> ModelInferRequest {
    let framed = read.framed();
    let length = u32::from_be_bytes([framed[1], framed[2], framed[3], framed[4]]);
    assert_eq!(length as usize, framed.len() - 5);
    ModelInferRequest::decode(framed.slice(5..)).unwrap()
}

fn read_json(body: &serde_json::Value) -> Result<Read, Error> {
    read(received(body.to_string().as_bytes(), 7), None, &model())
}

fn field(body: &serde_json::Value) -> String {
    let error = read_json(body).unwrap_err();
    error.violation().unwrap().field.clone()
}

#[test]
fn text_and_bytes_become_the_same_message() {
    let values = [1.5_f32, -2.25, 0.1];
    let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let text = json!({
        "id": "a",
        "parameters": {"truncate": true, "priority": 2, "ratio": 0.5, "mode": "x"},
        "inputs": [{"name": "p", "datatype": "FP32", "shape": [1, 3], "data": [values]}],
        "outputs": [{"name": "o"}],
    });
    let head = json!({
        "id": "a",
        "parameters": {"truncate": true, "priority": 2, "ratio": 0.5, "mode": "x"},
        "inputs": [{"name": "p", "datatype": "FP32", "shape": [1, 3],
            "parameters": {"binary_data_size": raw.len()}}],
        "outputs": [{"name": "o", "parameters": {"binary_data": true}}],
    })
    .to_string();
    let from_text = read_json(&text).unwrap();
    for chunk_bytes in [1, 5, 1000] {
        let body = [head.as_bytes(), &raw].concat();
        let from_bytes = read(received(&body, chunk_bytes), Some(head.len()), &model()).unwrap();
        assert_eq!(message(&from_bytes), message(&from_text));
        assert!(from_bytes.forms.outputs["o"]);
    }
    let message = message(&from_text);
    assert_eq!(message.model_name, "digits");
    assert_eq!(message.model_version, "1");
    assert_eq!(message.raw_input_contents, [raw]);
    let ratio = message.parameters["ratio"].parameter_choice.clone();
    assert_eq!(ratio, Some(ParameterChoice::DoubleParam(0.5)));
}

#[test]
fn binary_tensors_are_never_copied_before_the_message() {
    let head = json!({"inputs": [
        {"name": "a", "datatype": "UINT8", "shape": [3], "parameters": {"binary_data_size": 3}},
        {"name": "b", "datatype": "UINT8", "shape": [2], "parameters": {"binary_data_size": 2}},
    ]})
    .to_string();
    let body = Bytes::from([head.as_bytes(), b"abcde"].concat());
    let received = Received {
        length: body.len(),
        chunks: vec![body.clone()],
        held: None,
    };
    let read = read(received, Some(head.len()), &model()).unwrap();
    assert_eq!(read.raw[0][0].as_ptr(), body[head.len()..].as_ptr());
    assert_eq!(message(&read).raw_input_contents, ["abc", "de"]);
}

#[test]
fn what_is_wrong_is_named() {
    let input = |part: serde_json::Value| {
        let mut input = json!({"name": "p", "datatype": "FP32", "shape": [2], "data": [1, 2]});
        for (key, value) in part.as_object().unwrap() {
            match value.is_null() {
                true => input.as_object_mut().unwrap().remove(key),
                false => input
                    .as_object_mut()
                    .unwrap()
                    .insert(key.clone(), value.clone()),
            };
        }
        json!({"inputs": [input]})
    };
    for (body, wanted) in [
        (json!({}), "inputs"),
        (json!({"inputs": 5}), "inputs"),
        (json!({"inputs": [], "extra": 1}), "extra"),
        (input(json!({"extra": 1})), "inputs[0].extra"),
        (input(json!({"name": null})), "inputs[0].name"),
        (input(json!({"shape": [1, "2"]})), "inputs[0].shape[1]"),
        (input(json!({"shape": [-2]})), "inputs[0].shape"),
        (input(json!({"datatype": "FLOAT"})), "inputs[0].datatype"),
        (input(json!({"data": [1, "NaN"]})), "inputs[0].data[1]"),
        (input(json!({"data": [1]})), "inputs[0].data"),
        (input(json!({"data": null})), "inputs[0].data"),
        (
            input(json!({"parameters": {"binary_data_size": 4}})),
            "inputs[0].data",
        ),
        (
            input(json!({"data": null, "parameters": {"binary_data_size": 4}})),
            "inputs[0].parameters[binary_data_size]",
        ),
        (
            input(json!({"parameters": {"x": [[1]]}})),
            "inputs[0].parameters[x]",
        ),
        (
            json!({"inputs": [], "parameters": {"binary_data_output": 1}}),
            "parameters[binary_data_output]",
        ),
        (
            json!({"inputs": [], "outputs": [{"name": "o", "parameters": {"binary_data": 1}}]}),
            "outputs[0].parameters[binary_data]",
        ),
    ] {
        assert_eq!(field(&body), wanted, "{body}");
    }
}

#[test]
fn a_wrong_element_has_its_place_in_the_body() {
    let body = "{\"inputs\": [{\"name\": \"p\", \"datatype\": \"INT8\",\n \"shape\": [2],\n \"data\": [1,\n  300]}]}";
    let error = read(received(body.as_bytes(), 1000), None, &model()).unwrap_err();
    assert_eq!(error.violation().unwrap().field, "inputs[0].data[1]");
    assert!(error.to_string().contains("line 4, column 3"), "{error}");
    let error = read(
        received(body.replace("300", "NaN").as_bytes(), 1000),
        None,
        &model(),
    )
    .unwrap_err();
    assert_eq!(error.violation().unwrap().field, "inputs[0].data");
    assert!(error.to_string().contains("line 4, column 3"), "{error}");
}

#[test]
fn lengths_that_lie_are_refused() {
    let head = r#"{"inputs": []}"#;
    let over = read(received(head.as_bytes(), 100), Some(100), &model()).unwrap_err();
    assert_eq!(over.violation().unwrap().field, HEADER_LENGTH);
    let body = format!("{head}rest");
    let left = read(received(body.as_bytes(), 100), Some(head.len()), &model()).unwrap_err();
    assert_eq!(left.violation().unwrap().field, "inputs");
}

proptest! {
    #[test]
    fn no_bytes_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
        json_bytes in proptest::option::of(0_usize..400),
        chunk_bytes in 1_usize..50,
    ) {
        let _ = read(received(&bytes, chunk_bytes), json_bytes, &model());
    }

    #[test]
    fn no_json_panics(
        data in "[\\[\\]{}\",0-9a-z.+\\\\ -]{0,40}",
        datatype in proptest::sample::select(&Datatype::ALL[..]),
        shape in proptest::collection::vec(-1_i64..5, 0..4),
        size in proptest::option::of(any::<i64>()),
    ) {
        let parameters = size.map_or(json!({}), |size| json!({"binary_data_size": size}));
        let body = format!(
            "{{\"inputs\": [{{\"name\": \"p\", \"datatype\": \"{datatype}\", \"shape\": {shape:?}, \"parameters\": {parameters}, \"data\": {data}}}]}}"
        );
        if let Ok(read) = read(received(body.as_bytes(), 11), None, &model()) {
            message(&read);
        }
    }

    #[test]
    fn floats_keep_their_bits(values in proptest::collection::vec(any::<f32>(), 1..50)) {
        let values: Vec<f32> = values.into_iter().filter(|v| v.is_finite()).collect();
        let body = json!({"inputs": [
            {"name": "p", "datatype": "FP32", "shape": [values.len()], "data": values}
        ]});
        let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        prop_assert_eq!(&message(&read_json(&body).unwrap()).raw_input_contents[0], &raw);
    }
}
