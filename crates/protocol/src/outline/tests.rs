use proptest::prelude::*;

use super::*;
use crate::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use crate::inference::{
    InferParameter, InferTensorContents, LogSettingsRequest, ModelInferRequest,
};
use crate::tei::v1 as tei;

const INFER: Method = Method::ModelInfer;

fn input(shape: &[i64]) -> InferInputTensor {
    InferInputTensor {
        name: "pixels".into(),
        datatype: "BOOL".into(),
        shape: shape.to_vec(),
        ..Default::default()
    }
}

fn infer(inputs: Vec<InferInputTensor>) -> ModelInferRequest {
    ModelInferRequest {
        model_name: "digits".into(),
        inputs,
        raw_input_contents: vec![vec![0; 600].into()],
        ..Default::default()
    }
}

fn parameters(count: usize) -> HashMap<String, InferParameter> {
    let parameter = |number: usize| (number.to_string(), InferParameter::default());
    (0..count).map(parameter).collect()
}

fn rows(message: &impl prost::Message) -> u64 {
    INFER.outline(&message.encode_to_vec()).unwrap().rows
}

/// The field that is at fault.
fn refused(method: Method, bytes: &[u8]) -> String {
    let error = method.outline(bytes).unwrap_err();
    assert_eq!(error.kind(), crate::Kind::Invalid);
    error.field().unwrap().to_string()
}

#[test]
fn every_method_has_the_layout_of_its_request() {
    for method in Method::ALL {
        assert!(LAYOUTS.of_method.contains_key(&method), "{method:?}");
    }
}

#[test]
fn rows_are_those_of_the_message() {
    assert_eq!(rows(&infer(vec![input(&[300, 2]), input(&[7])])), 300);
    for one in [vec![], vec![input(&[])], vec![input(&[0, 2])]] {
        assert_eq!(rows(&infer(one)), 1);
    }
    let texts = |count: usize| tei::RerankRequest {
        query: "q".into(),
        texts: vec![String::new(); count],
        ..Default::default()
    };
    for (count, rows) in [(0, 1), (1, 1), (300, 300)] {
        let outline = Method::Rerank.outline(&texts(count).encode_to_vec());
        assert_eq!(outline.unwrap().rows, rows);
    }
    for (method, rows) in [
        (Method::Embed, 1),
        (Method::PredictPair, 1),
        (Method::Tokenize, 0),
        (Method::ModelMetadata, 0),
        (Method::TeiInfo, 0),
    ] {
        assert_eq!(method.outline(&[]).unwrap().rows, rows, "{method:?}");
    }
}

#[test]
fn rows_that_cannot_be_are_refused() {
    for size in [-1, i64::MIN, i64::MAX, 100_000] {
        let bytes = infer(vec![input(&[size])]).encode_to_vec();
        assert_eq!(refused(INFER, &bytes), "inputs[0].shape", "{size}");
    }
}

/// A group, or a field that is longer than its message, hid the rows behind it.
#[test]
fn what_is_no_protobuf_is_refused_wherever_it_is() {
    let whole = infer(vec![input(&[300, 2])]).encode_to_vec();
    let group = [0x7b, 0x7c];
    let too_long = [(15 << 3) | 2, 0xff, 0xff, 0xff, 0x7f];
    for wrong in [&group[..], &[0x7c], &[0x7b], &too_long, &[0], &[0xff; 12]] {
        let before = [wrong, &whole].concat();
        // The wrong field at the end of an input that has been appended.
        let mut appended = infer(vec![]).encode_to_vec();
        let content = [&[3 << 3, 9], wrong].concat();
        appended.extend([(5 << 3) | 2, content.len() as u8]);
        appended.extend(content);
        for bytes in [&before[..], &[&whole[..], wrong].concat(), &appended] {
            assert_eq!(refused(INFER, bytes), "message", "{wrong:?}");
        }
        assert_eq!(refused(Method::Rerank, wrong), "message");
        assert_eq!(refused(Method::Embed, wrong), "message");
        assert_eq!(refused(Method::ModelReady, wrong), "message");
    }
    // A known field of another type: a decoder refuses it too.
    for wrong in [&[5 << 3, 1][..], &[1 << 3, 1], &[(7 << 3) | 5, 0, 0, 0, 0]] {
        assert_eq!(refused(INFER, wrong), "message");
        assert!(ModelInferRequest::decode(wrong).is_err());
    }
}

#[test]
fn unknown_fields_are_skipped() {
    let mut bytes = vec![(90 << 3) & 0x7f | 0x80, 5, 1];
    bytes.extend([(15 << 3) | 2, 3, 0x7b, 0x7b, 0x7b]);
    bytes.extend([(14 << 3) | 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    bytes.extend(infer(vec![input(&[300, 2])]).encode_to_vec());
    assert_eq!(INFER.outline(&bytes).unwrap().rows, 300);
}

#[test]
fn a_shape_may_come_in_pieces() {
    let with = |pieces: &[&[u8]]| {
        let content = pieces.concat();
        let mut message = vec![(5 << 3) | 2, content.len() as u8];
        message.extend(content);
        message.extend([(7 << 3) | 2, 127]);
        message.extend([0; 127]);
        message
    };
    let (packed, empty) = ([(3 << 3) | 2, 2, 100, 2], [(3 << 3) | 2, 0]);
    for pieces in [&[&packed[..]][..], &[&empty, &packed], &[&[3 << 3, 100]]] {
        assert_eq!(INFER.outline(&with(pieces)).unwrap().rows, 100);
    }
    let sixteen: Vec<&[u8]> = vec![&packed; 8];
    assert!(INFER.outline(&with(&sixteen)).is_ok());
    let more: Vec<&[u8]> = vec![&packed; 9];
    assert_eq!(refused(INFER, &with(&more)), "inputs[0].shape");
}

#[test]
fn parts_are_bounded_wherever_they_are() {
    let most = PARTS_MAX;
    let mut request = infer(vec![input(&[1]); most]);
    request.outputs = vec![InferRequestedOutputTensor::default(); most];
    request.parameters = parameters(most);
    assert_eq!(rows(&request), 1);
    let mut inputs = request.clone();
    inputs.inputs.push(input(&[1]));
    let mut outputs = request.clone();
    outputs.outputs.push(InferRequestedOutputTensor::default());
    let mut of_input = request.clone();
    of_input.inputs[most - 1].parameters = parameters(1);
    let mut of_output = request.clone();
    of_output.outputs[0].parameters = parameters(1);
    let mut own = request.clone();
    own.parameters = parameters(most + 1);
    let mut shape = request;
    shape.inputs[most - 1].shape = vec![1; 17];
    for (request, field) in [
        (inputs, "inputs"),
        (outputs, "outputs"),
        (of_input, "parameters"),
        (of_output, "parameters"),
        (own, "parameters"),
        (shape, "inputs[4095].shape"),
    ] {
        assert_eq!(refused(INFER, &request.encode_to_vec()), field);
    }
    // An entry twice is one of the map, and costs what two cost.
    let twice = [(4 << 3) | 2, 0].repeat(most + 1);
    assert_eq!(refused(INFER, &twice), "parameters");
    let settings = [(1 << 3) | 2, 0].repeat(most + 1);
    assert!(LogSettingsRequest::decode(&settings[..]).is_ok());
    assert_eq!(refused(Method::LogSettings, &settings), "parameters");
}

#[test]
fn fields_are_bounded_in_all() {
    let contents = |count: u64| {
        let mut one = input(&[1]);
        one.contents = Some(InferTensorContents {
            bytes_contents: vec![Vec::new().into(); count as usize],
            ..Default::default()
        });
        infer(vec![one]).encode_to_vec()
    };
    let few = INFER.outline(&contents(1000)).unwrap().fields;
    assert_eq!(INFER.outline(&contents(3000)).unwrap().fields, few + 2000);
    assert_eq!(refused(INFER, &contents(FIELDS_MAX)), "message");
    let unknown = [15 << 3, 0].repeat(FIELDS_MAX as usize + 1);
    assert_eq!(refused(Method::Embed, &unknown), "message");
}

/// A list of each type of contents, and the bytes of an element in a tensor.
fn typed_contents(count: usize) -> Vec<(usize, InferTensorContents)> {
    macro_rules! contents {
        ($($field:ident: $value:expr, $bytes:literal;)*) => {
            vec![$((
                $bytes,
                InferTensorContents {
                    $field: vec![$value; count],
                    ..Default::default()
                },
            )),*]
        };
    }
    contents! {
        bool_contents: true, 1;
        int_contents: -1, 4;
        uint_contents: 300, 4;
        int64_contents: 7, 8;
        uint64_contents: u64::MAX, 8;
        fp32_contents: 1.0, 4;
        fp64_contents: 1.0, 8;
        bytes_contents: bytes::Bytes::new(), 4;
    }
}

#[test]
fn what_a_message_becomes_is_known_before_it_is_decoded() {
    const COUNT: usize = 10_000;
    // The vector that a decoder grows, and the tensor that is made of it.
    let lists = |c: &InferTensorContents| {
        c.bool_contents.capacity()
            + 4 * (c.int_contents.capacity() + c.uint_contents.capacity())
            + 8 * (c.int64_contents.capacity() + c.uint64_contents.capacity())
            + 4 * c.fp32_contents.capacity()
            + 8 * c.fp64_contents.capacity()
            + size_of::<bytes::Bytes>() * c.bytes_contents.capacity()
    };
    for (bytes, contents) in typed_contents(COUNT) {
        let mut one = input(&[COUNT as i64]);
        one.contents = Some(contents);
        let mut request = infer(vec![one]);
        request.raw_input_contents.clear();
        let encoded = request.encode_to_vec();
        let counted = INFER.outline(&encoded).unwrap().decoded_bytes;
        let decoded = ModelInferRequest::decode(&encoded[..]).unwrap();
        let lists = lists(decoded.inputs[0].contents.as_ref().unwrap());
        let made = (lists + bytes * COUNT) as u64;
        // A decoder may have known how many there are.
        assert!(counted >= made, "{counted} for {made}");
        assert!(counted <= 2 * made + 2000, "{counted} for {made}");
    }
    // Numbers that do not come packed, and raw contents, which are copied once.
    let one = [(6 << 3) | 5, 0, 0, 0, 0].repeat(COUNT);
    let length = one.len() as u64;
    let unpacked = INFER.outline(&nested(&[5, 5], &one)).unwrap();
    assert_eq!(unpacked.decoded_bytes, 65_536 + 40_000 + 512, "{length}");
    let raw = INFER.outline(&nested(&[7], &one)).unwrap();
    assert_eq!(raw.decoded_bytes, 32 + length + 4);
}

/// A message within fields of these numbers.
fn nested(tags: &[u8], content: &[u8]) -> Vec<u8> {
    tags.iter().rev().fold(content.to_vec(), |inner, tag| {
        let mut outer = vec![(tag << 3) | 2];
        prost::encoding::encode_varint(inner.len() as u64, &mut outer);
        outer.extend(inner);
        outer
    })
}

/// The least time of several runs: others take the processor now and then.
fn time_of(method: Method, bytes: &[u8]) -> std::time::Duration {
    let runs = (0..15).map(|_| {
        let begun = std::time::Instant::now();
        let _ = std::hint::black_box(method.outline(bytes));
        begun.elapsed()
    });
    runs.min().unwrap()
}

#[test]
fn a_message_twice_as_long_takes_twice_as_long() {
    type Make<'m> = &'m dyn Fn(usize) -> Vec<u8>;
    let outputs = |count| [(6 << 3) | 2, 0_u8].repeat(count);
    let parameters = |count| [(5 << 3) | 2, 2, (4 << 3) | 2, 0_u8].repeat(count);
    let texts = |count| [(2 << 3) | 2, 0_u8].repeat(count);
    let unknown = |count| [15 << 3, 0_u8].repeat(count);
    let ids = |count| [1 << 3, 1_u8].repeat(count);
    for (method, make, count) in [
        (INFER, &outputs as Make<'_>, PARTS_MAX / 2),
        (INFER, &parameters as Make<'_>, PARTS_MAX / 2),
        (INFER, &unknown as Make<'_>, 200_000),
        (Method::Rerank, &texts as Make<'_>, 200_000),
        (Method::Decode, &ids as Make<'_>, 200_000),
    ] {
        let (one, two) = (make(count), make(2 * count));
        let ratio = || time_of(method, &two).as_secs_f64() / time_of(method, &one).as_secs_f64();
        let least = (0..5).map(|_| ratio()).fold(f64::INFINITY, f64::min);
        assert!(least <= 2.5, "{method:?}: {least}");
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        for method in Method::ALL {
            let Ok(outline) = method.outline(&bytes) else { continue };
            prop_assert!(outline.rows <= (bytes.len() as u64).max(1));
            prop_assert!(outline.fields <= bytes.len() as u64);
        }
    }

    /// What a decoder takes is counted as it takes it.
    #[test]
    fn agrees_with_a_decoder(
        shapes in proptest::collection::vec(proptest::collection::vec(0_i64..100, 0..17), 0..5),
        outputs in 0_usize..5,
        texts in proptest::collection::vec(".{0,9}", 0..9),
    ) {
        let mut request = infer(shapes.iter().map(|shape| input(shape)).collect());
        request.outputs = vec![InferRequestedOutputTensor::default(); outputs];
        let first = shapes.first().and_then(|shape| shape.first()).copied().unwrap_or(1);
        prop_assert_eq!(rows(&request), (first as u64).max(1));
        let count = (texts.len() as u64).max(1);
        let rerank = tei::RerankRequest { query: "q".into(), texts, ..Default::default() };
        let outline = Method::Rerank.outline(&rerank.encode_to_vec()).unwrap();
        prop_assert_eq!(outline.rows, count);
    }
}
