use proptest::prelude::*;
use serde_json::json;

use super::*;

fn model() -> PathModel {
    PathModel {
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

fn parse(
    received: Received,
    json_bytes: Option<usize>,
    model: &PathModel,
) -> Result<ParsedRequest, Error> {
    let limits = MessageLimits::new(64 << 20, 256 << 20);
    let reading = Reading {
        limits: &limits,
        cancelled: &Cancelled::never(),
    };
    super::parse(received, json_bytes, model, reading)
}

/// The message that a worker reads.
fn message(parsed: &ParsedRequest) -> ModelInferRequest {
    let framed = parsed.framed();
    let length = u32::from_be_bytes([framed[1], framed[2], framed[3], framed[4]]);
    assert_eq!(length as usize, framed.len() - 5);
    ModelInferRequest::decode(framed.slice(5..)).unwrap()
}

fn parse_json(body: &serde_json::Value) -> Result<ParsedRequest, Error> {
    parse(received(body.to_string().as_bytes(), 7), None, &model())
}

fn field(body: &serde_json::Value) -> String {
    let error = parse_json(body).unwrap_err();
    error.field().unwrap().to_string()
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
    let from_text = parse_json(&text).unwrap();
    for chunk_bytes in [1, 5, 1000] {
        let body = [head.as_bytes(), &raw].concat();
        let from_bytes = parse(received(&body, chunk_bytes), Some(head.len()), &model()).unwrap();
        assert_eq!(message(&from_bytes), message(&from_text));
        assert!(from_bytes.formats.outputs["o"]);
    }
    let message = message(&from_text);
    assert_eq!(message.model_name, "digits");
    assert_eq!(message.model_version, "1");
    assert_eq!(message.raw_input_contents, [raw]);
    let ratio = message.parameters["ratio"].parameter_choice.clone();
    assert_eq!(ratio, Some(ParameterChoice::DoubleParam(0.5)));
}

#[test]
fn binary_tensors_are_not_copied_before_the_message() {
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
    let parsed = parse(received, Some(head.len()), &model()).unwrap();
    assert_eq!(parsed.raw[0][0].as_ptr(), body[head.len()..].as_ptr());
    assert_eq!(message(&parsed).raw_input_contents, ["abc", "de"]);
}

#[test]
fn invalid_fields_are_named() {
    let input = |part: serde_json::Value| {
        let mut input = json!({"name": "p", "datatype": "FP32", "shape": [2], "data": [1, 2]});
        for (key, value) in part.as_object().unwrap() {
            let input = input.as_object_mut().unwrap();
            if value.is_null() {
                input.remove(key);
            } else {
                input.insert(key.clone(), value.clone());
            }
        }
        json!({"inputs": [input]})
    };
    for (body, expected) in [
        (json!({}), "inputs"),
        (json!({"inputs": 5}), "inputs"),
        (json!({"inputs": [], "extra": 1}), "extra"),
        (json!({"inputs": [], "model_name": "minilm"}), "model_name"),
        (json!({"inputs": [], "model_name": 1}), "model_name"),
        (json!({"inputs": [], "id": 1}), "id"),
        (json!({"inputs": null}), "inputs"),
        (json!({"inputs": [], "outputs": [null]}), "outputs[0]"),
        (json!({"inputs": [], "parameters": []}), "parameters"),
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
        assert_eq!(field(&body), expected, "{body}");
    }
}

#[test]
fn null_is_absent_and_the_models_name_may_stand_beside_the_inputs() {
    let input = json!({"name": "p", "datatype": "FP32", "shape": [2], "data": [1, 2]});
    let output = json!({"name": "o"});
    let plain = parse_json(&json!({"inputs": [input], "outputs": [output]})).unwrap();
    let (mut nulls, mut requested) = (input.clone(), output);
    nulls["parameters"] = json!({"binary_data_size": null, "content_type": null});
    requested["parameters"] = json!(null);
    let body = json!({
        "id": null, "model_name": "digits", "parameters": {"truncate": null},
        "inputs": [nulls], "outputs": [requested],
    });
    assert_eq!(message(&parse_json(&body).unwrap()), message(&plain));
    let body = json!({"model_name": null, "parameters": null, "inputs": [input], "outputs": null});
    assert!(message(&parse_json(&body).unwrap()).outputs.is_empty());
    // Data that is null is behind the JSON, if its size says so.
    let head = json!({"inputs": [{
        "name": "p", "datatype": "UINT8", "shape": [2], "data": null,
        "parameters": {"binary_data_size": 2},
    }]});
    let head = head.to_string();
    let body = [head.as_bytes(), b"ab"].concat();
    let parsed = parse(received(&body, 7), Some(head.len()), &model()).unwrap();
    assert_eq!(message(&parsed).raw_input_contents, ["ab"]);
    // The last of a name that is given twice counts, and null is none.
    let twice = r#"{"inputs": [], "parameters": {"a": 1, "b": 2, "a": null}}"#;
    let parsed = parse(received(twice.as_bytes(), 9), None, &model()).unwrap();
    assert_eq!(message(&parsed).parameters.len(), 1);
}

#[test]
fn a_wrong_element_has_its_line_and_column() {
    let body = "{\"inputs\": [{\"name\": \"p\", \"datatype\": \"INT8\",\n \"shape\": [2],\n \"data\": [1,\n  300]}]}";
    let error = parse(received(body.as_bytes(), 1000), None, &model()).unwrap_err();
    assert_eq!(error.violation().unwrap().field, "inputs[0].data[1]");
    assert!(error.to_string().contains("line 4, column 3"), "{error}");
    let error = parse(
        received(body.replace("300", "NaN").as_bytes(), 1000),
        None,
        &model(),
    )
    .unwrap_err();
    assert_eq!(error.violation().unwrap().field, "inputs[0].data");
    assert!(error.to_string().contains("line 4, column 3"), "{error}");
}

#[test]
fn counts_are_bounded_while_they_are_read() {
    let input = |shape: &str, parameters: &str| {
        format!(
            r#"{{"name": "p", "datatype": "INT8", "shape": {shape}, "parameters": {parameters}, "data": []}}"#
        )
    };
    let map = |from: usize, count: usize| {
        let entries = (from..from + count).map(|number| format!("\"p{number}\": 1"));
        format!("{{{}}}", entries.collect::<Vec<_>>().join(","))
    };
    let list = |entry: &str, count: usize| vec![entry; count].join(",");
    let one = input("[0]", "{}");
    let most = format!(r#"{{"inputs": [{}]}}"#, list(&one, PARTS_MAX));
    let of = |body: &str| parse(received(body.as_bytes(), 1 << 20), None, &model());
    assert_eq!(of(&most).unwrap().head.inputs.len(), PARTS_MAX);
    let dimensions = format!("[{}]", list("0", DIMENSIONS_MAX + 1));
    let half = map(0, PARTS_MAX / 2);
    for (body, field) in [
        (
            format!(r#"{{"inputs": [{}]}}"#, list(&one, PARTS_MAX + 1)),
            "inputs",
        ),
        (
            format!(
                r#"{{"inputs": [], "outputs": [{}]}}"#,
                list(r#"{"name": "o"}"#, PARTS_MAX + 1)
            ),
            "outputs",
        ),
        (
            format!(r#"{{"inputs": [{}]}}"#, input(&dimensions, "{}")),
            "inputs[0].shape",
        ),
        (
            format!(
                r#"{{"inputs": [], "parameters": {}}}"#,
                map(0, PARTS_MAX + 1)
            ),
            "parameters",
        ),
        (
            format!(
                r#"{{"inputs": [{one}, {}], "parameters": {half}}}"#,
                input("[0]", &map(0, PARTS_MAX / 2 + 1))
            ),
            "inputs[1].parameters",
        ),
    ] {
        let error = of(&body).unwrap_err();
        assert_eq!(error.violation().unwrap().field, field);
        assert!(error.to_string().contains("4096") || field.ends_with("shape"));
    }
}

#[test]
fn what_numbers_become_is_reserved_before_it_is_made() {
    let count = 100_000;
    let data = vec!["0"; count].join(",");
    let body = format!(
        r#"{{"inputs": [{{"name": "p", "datatype": "FP64", "shape": [{count}], "data": [{data}]}}]}}"#
    );
    let read = |limits: &MessageLimits| {
        let reading = Reading {
            limits,
            cancelled: &Cancelled::never(),
        };
        let received = received(body.as_bytes(), 1 << 20);
        super::parse(received, None, &model(), reading)?.into_message(limits)
    };
    let limits = MessageLimits::new(1 << 20, 4 << 20);
    let (message, _) = read(&limits).unwrap();
    assert_eq!(limits.budget.used(), message.framed().len());
    // The tensor's bytes and the message are there at the same time.
    let full = read(&MessageLimits::new(1 << 20, 15 * count)).unwrap_err();
    assert_eq!(full.kind(), protocol::Kind::Overloaded);
    let long = read(&MessageLimits::new(7 * count, 4 << 20)).unwrap_err();
    assert_eq!(long.kind(), protocol::Kind::TooLarge);
    drop(message);
    assert_eq!(limits.budget.used(), 0);
}

#[test]
fn wrong_lengths_are_refused() {
    let head = r#"{"inputs": []}"#;
    let over = parse(received(head.as_bytes(), 100), Some(100), &model()).unwrap_err();
    assert_eq!(over.violation().unwrap().field, HEADER_LENGTH);
    let body = format!("{head}rest");
    let left = parse(received(body.as_bytes(), 100), Some(head.len()), &model()).unwrap_err();
    assert_eq!(left.violation().unwrap().field, "inputs");
}

proptest! {
    #[test]
    fn no_bytes_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
        json_bytes in proptest::option::of(0_usize..400),
        chunk_bytes in 1_usize..50,
    ) {
        let _ = parse(received(&bytes, chunk_bytes), json_bytes, &model());
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
        if let Ok(parsed) = parse(received(body.as_bytes(), 11), None, &model()) {
            message(&parsed);
        }
    }

    #[test]
    fn floats_keep_their_bits(values in proptest::collection::vec(any::<f32>(), 1..50)) {
        let values: Vec<f32> = values.into_iter().filter(|v| v.is_finite()).collect();
        let body = json!({"inputs": [
            {"name": "p", "datatype": "FP32", "shape": [values.len()], "data": values}
        ]});
        let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        prop_assert_eq!(&message(&parse_json(&body).unwrap()).raw_input_contents[0], &raw);
    }
}
